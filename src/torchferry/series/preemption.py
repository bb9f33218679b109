"""SIGTERM, as schedulers send it some time before they kill a process."""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import FrameType

__all__ = ["Preemption"]


class Preemption:
    """Notes that SIGTERM has come, and does nothing else: who asks for it ends the process in time.

    A handler that was there before is called, too. One that is closed, or was made in the process that this one was
    forked from, acts as the handler before it would.

    Attributes:
        reached: Whether it has come.

    Raises:
        ValueError: this is not the main thread.
    """

    def __init__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise ValueError(
                "handle_preemption=True sets a handler of SIGTERM, which only the main thread may: make the manager "
                "there; or without it, and call save(force=True) when the signal comes."
            )
        self.reached = False
        self._closed = False
        self._process = os.getpid()
        self._previous: Any = signal.signal(signal.SIGTERM, self._handle)

    def close(self) -> None:
        """Puts the handler back that was there before, unless another one was set meanwhile, which may pass on to this.

        In another thread than the main one, the handler stays, and acts as the one before.
        """
        self._closed = True
        if threading.current_thread() is threading.main_thread():
            handler = signal.getsignal(signal.SIGTERM)
            if _owner_of(handler) is not None:
                signal.signal(signal.SIGTERM, _first_in_use(handler))

    @property
    def _is_over(self) -> bool:
        return self._closed or os.getpid() != self._process

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._is_over:
            self.reached = True  # a signal handler may do no more: it can come anywhere, and locks may be held
        previous = _first_in_use(self._previous)
        if callable(previous):
            previous(number, frame)
        elif self._is_over and previous == signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def _owner_of(handler: Any) -> Preemption | None:
    owner = getattr(handler, "__self__", None)
    return owner if isinstance(owner, Preemption) else None


def _first_in_use(handler: Any) -> Any:
    """The first of these handlers, each of which was set in place of the next, that is not over."""
    while (owner := _owner_of(handler)) is not None and owner._is_over:  # noqa: SLF001 - of this class
        handler = owner._previous  # noqa: SLF001 - the same
    return signal.SIG_DFL if handler is None else handler  # None: it was not set from Python
