"""Signals that end a run, turned into an exception that cleaning up can wait for."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """A signal asked the run to end. Not an Exception, so that nothing handles it by accident."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number
        """Which one."""


class Interrupts:
    """Raises `Interrupted` in the main thread, once: the second Ctrl-C must not cut short the cleaning up.

    Cleaning up is bounded; whoever can't wait still has SIGKILL.
    """

    def __init__(self) -> None:
        self._shields = 0
        self._pending: int | None = None
        self._raised = False

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within it, SIGINT, SIGTERM and SIGHUP raise `Interrupted`. Main thread only."""
        # nohup means it: a run that was told to outlive its terminal does.
        numbers = [one for one in SIGNALS if one != signal.SIGHUP or signal.getsignal(one) != signal.SIG_IGN]
        previous = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextmanager
    def shielded(self) -> Iterator[None]:
        """Within it nothing is raised; a signal that came meanwhile is raised at its end."""
        self._shields += 1
        try:
            yield
        finally:
            self._shields -= 1
        self._raise_pending()

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._pending = number
        self._raise_pending()

    def _raise_pending(self) -> None:
        if self._pending is not None and not self._shields and not self._raised:
            self._raised = True
            raise Interrupted(self._pending)
