"""How far a run is, in memory that DataLoader workers share with the process that trains.

Persistent workers are started once and hold a copy of the collator from then. So epoch and progress
lie where they see them change.
"""

import multiprocessing
import os
from multiprocessing.context import get_spawning_popen
from multiprocessing.sharedctypes import RawValue
from typing import Any


class Clock:
    """The epoch of a run, and the share of the run that is done.

    A copy has its own; a process that is started with one shares it, until it sets one itself.
    """

    def __init__(self, epoch: int = 0, progress: float = 0.0) -> None:
        self._epoch, self._progress = RawValue("q", epoch), RawValue("d", progress)
        self._unseen = RawValue("q")  # a process whose workers do not see its clock
        self._owner = os.getpid()
        # In this process, in place of the shared one: a worker is ahead of the training.
        self.progress_here: float | None = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        if get_spawning_popen() is None:
            return Clock, (self._epoch.value, self._progress.value)
        return super().__reduce_ex__(protocol)

    @property
    def epoch(self) -> int:
        """The epoch."""
        self._note_reader()
        return int(self._epoch.value)

    @property
    def progress(self) -> float:
        """The share of the run that is done, in [0, 1]."""
        self._note_reader()
        return float(self._progress.value) if self.progress_here is None else self.progress_here

    def set(self, *, epoch: int | None = None, progress: float | None = None) -> None:
        """Set one of them, for this process and its workers.

        Raises:
            RuntimeError: If this process was handed the clock by another, and has DataLoader
                workers from before its first call.
        """
        if self._owner != os.getpid():
            if self._unseen.value == os.getpid():
                told = f"epoch {epoch}" if progress is None else f"progress {progress}"
                raise RuntimeError(
                    f"{told} would not reach the DataLoader workers of this process, which "
                    "started before its first set_epoch; call set_epoch(0) before they start"
                )
            # A training process of several that were handed one collator: each counts for itself.
            self._epoch = RawValue("q", self._epoch.value)
            self._progress = RawValue("d", self._progress.value)
            self._owner = os.getpid()
        if epoch is not None:
            self._epoch.value = epoch
        if progress is not None:
            self._progress.value = progress

    def _note_reader(self) -> None:
        parent = multiprocessing.parent_process()
        if parent is not None and self._owner not in (os.getpid(), parent.pid):
            self._unseen.value = parent.pid
