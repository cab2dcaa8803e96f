"""Leaving a run in good order when asked to.

Schedulers send SIGTERM some seconds before they kill a process, and people press Ctrl-C. Either
signal is noted, and acted upon between two steps, when a checkpoint can be written. A second one
acts at once.
"""

import signal
import threading
from types import FrameType
from typing import Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Signals:
    """Notes SIGTERM and Ctrl-C inside a ``with`` block.

    At the end of the block, or when `leave` is called, the process exits with the usual code: 143
    after SIGTERM, `KeyboardInterrupt` (130) after Ctrl-C. Python handles signals in the main thread
    only; in another thread nothing is noted.

    Examples:
        >>> with Signals() as signals:
        ...     signals.noted
        0
    """

    def __init__(self) -> None:
        self.noted = 0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                # An ignored signal stays ignored (a job in the background ignores Ctrl-C), and a
                # handler that was not set from Python could not be put back.
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, error_type: type[BaseException] | None, *rest: object) -> None:
        self._restore()
        if error_type is None:
            self.leave()

    def leave(self, noted: int = 0) -> None:
        """Exit as a signal demands: `noted`, which another process has noted, or else our own."""
        self.noted = noted or self.noted
        if self.noted == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
        if self.noted == signal.SIGINT:
            raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002  # signal's signature
        if self.noted:
            self._restore()
            self.noted = number
            self.leave()
        self.noted = number

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous = {}
