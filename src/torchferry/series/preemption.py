"""SIGTERM, as schedulers send it some time before they kill a process."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import FrameType

__all__ = ["Preemption"]


class Preemption:
    """Notes that SIGTERM has come, and does nothing else: who asks for it ends the process in time.

    A handler that was there before is called, too. To be made in the main thread, as Python wants it.

    Attributes:
        reached: Whether it has come.
    """

    def __init__(self) -> None:
        self.reached = False
        self._previous: Any = signal.signal(signal.SIGTERM, self._handle)

    def close(self) -> None:
        """Puts the handler back that was there before, unless somebody has set another one meanwhile."""
        if signal.getsignal(signal.SIGTERM) == self._handle:
            signal.signal(signal.SIGTERM, signal.SIG_DFL if self._previous is None else self._previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.reached = True  # a signal handler may do no more: it can come anywhere, and locks may be held
        if callable(self._previous):
            self._previous(number, frame)
