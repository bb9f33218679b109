"""The memory budget: bytes that may be held at once, counted across threads and event loops."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

__all__ = ["PROCESS_BUDGET", "ByteBudget"]


class ByteBudget:
    """A number of bytes that threads take and give back.

    Takers wait in line, so a large claim is not overtaken for ever by small ones. A claim larger than the
    whole budget waits until it can have all of it.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._free = total
        self._line: deque[object] = deque()
        # Re-entrant, as threading.Condition is by default: giving back happens in finalizers, and those run anywhere.
        self._changed = threading.Condition()

    def take(self, size: int, *, abandoned: Callable[[], bool]) -> int:
        """Waits until ``size`` bytes are free, takes them, and returns how many that were.

        Blocks the calling thread. Raises ``InterruptedError`` once ``abandoned()`` is true; call :meth:`wake`
        after making it so.
        """
        size = min(size, self._total)
        place = object()
        with self._changed:
            self._line.append(place)
            try:
                while self._line[0] is not place or self._free < size:
                    if abandoned():
                        raise InterruptedError
                    self._changed.wait()
                self._free -= size
            finally:
                self._line.remove(place)
                self._changed.notify_all()
        return size

    def give(self, size: int) -> None:
        """Gives ``size`` bytes back. Safe in a finalizer."""
        with self._changed:
            self._free += size
            self._changed.notify_all()

    def wake(self) -> None:
        """Makes every waiting thread look again whether it is abandoned."""
        with self._changed:
            self._changed.notify_all()


PROCESS_BUDGET = ByteBudget(48 << 20)
"""What all saves and copies of this process may hold together beyond the tensors themselves: 48 MiB."""
