"""What share of words is masked when: one rate, or a schedule that follows the run.

A schedule is a function of the share of the run that is done, not of what was drawn before, so that
a resumed run, several processes and workers that collate ahead all have the same rate at a step.
"""

import inspect
import multiprocessing
import os
from collections.abc import Callable, Mapping
from multiprocessing.context import get_spawning_popen
from multiprocessing.sharedctypes import RawValue
from typing import Any, TypeAlias

import numpy as np

# A rate, or the rate by the share of the run that is done: in steps, or of any form.
RateSchedule: TypeAlias = float | Mapping[float, float] | Callable[[float], float]


def is_share(value: Any) -> bool:
    """Tell whether a value is a number in [0, 1].

    Examples:
        >>> is_share(0.2), is_share("0.2")
        (True, False)
    """
    return isinstance(value, (int, float, np.floating)) and bool(0 <= value <= 1)


def rate_at(schedule: RateSchedule, progress: float) -> float:
    """Return the rate when a share `progress` of the run is done.

    Raises:
        ValueError: If it is not in [0, 1], or `progress` is not.

    Examples:
        >>> rate_at({0.0: 0.3, 0.8: 0.15}, 0.9), rate_at(lambda done: 0.3 - 0.15 * done, 1.0)
        (0.15, 0.15)
    """
    if not is_share(progress):
        raise ValueError(f"progress is {progress!r}; it must be a share of the run, in [0, 1]")
    rate: Any = schedule
    if isinstance(schedule, Mapping):
        rate = schedule.get(max((share for share in schedule if share <= progress), default=-1))
    elif callable(schedule):
        rate = schedule(progress)
    if not is_share(rate):
        when = "" if rate is schedule else f" when a share {progress} of the run is done"
        raise ValueError(f"wwm_probability is {rate!r}{when}; it must be a probability in [0, 1]")
    return rate  # type: ignore[no-any-return]  # is_share has seen it


def sample_rates(schedule: RateSchedule) -> list[float]:
    """Return the rates of a run at 1,001 places, which tell schedules apart and show wrong ones.

    Raises:
        ValueError: If one is not in [0, 1], or a step is not at a share of the run.

    Examples:
        >>> sample_rates({0.0: 0.3, 0.8: 0.15})[799:801]
        [0.3, 0.15]
    """
    steps = [*schedule] if isinstance(schedule, Mapping) else []
    for share in steps:
        if not is_share(share):
            raise ValueError(f"wwm_probability has a step at {share!r}; it must be in [0, 1]")
    return [rate_at(schedule, share) for share in (*(i / 1000 for i in range(1001)), *steps)]


def check_rates(schedule: RateSchedule, collate: Callable[..., Any]) -> None:
    """Check the rates of a run, and that a collator's `collate` can be told where the run is.

    A subclass may override `collate` as it was before there were schedules. It is told nothing
    where the rate is a number, and refused where it is not.

    Raises:
        ValueError: As `sample_rates`.
        TypeError: If the rate follows the run, and `collate` does not take ``progress``.

    Examples:
        >>> check_rates(0.2, lambda features, *, key: {})
        >>> check_rates({0.0: 0.3}, lambda features, *, key, progress=1.0: {})
    """
    sample_rates(schedule)
    if not is_share(schedule):
        try:
            inspect.signature(collate).bind([], key=0, progress=0.0)
        except TypeError as error:
            raise TypeError(
                f"wwm_probability is {schedule!r}, which follows the run, but "
                f"{collate.__qualname__} takes no 'progress'; give it a keyword `progress: float = "
                "1.0` that it hands to super().collate, or give one rate"
            ) from error


# ---- was masking/clock: How far a run is, in memory that DataLoader workers share with the process that trains.


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
