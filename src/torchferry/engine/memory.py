"""Memory for bytes on their way: how much may be held at once, and the blocks it is held in."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchferry.storage.base import Chunk

__all__ = ["BLOCK_SIZE", "EXTRA_BUDGET", "PROCESS_BUDGET", "Blocks", "ByteBudget", "address_of", "copy_bytes"]

BLOCK_SIZE = 4 << 20
"""Bytes in a block."""


class ByteBudget:
    """A number of bytes that threads take and give back.

    Takers wait in line, so a large claim is not overtaken for ever by small ones. A claim larger than the
    whole budget waits until it can have all of it.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self.reset()

    def reset(self) -> None:
        """Makes all of it free: for a forked child, in which nobody is left who holds any."""
        self._free = self._total
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

    def try_take(self, size: int) -> bool:
        """Takes ``size`` bytes if they are free and nobody waits for any."""
        with self._changed:
            if self._line or self._free < size:
                return False
            self._free -= size
            return True

    @property
    def is_wanted(self) -> bool:
        """Whether anybody waits."""
        return bool(self._line)

    def give(self, size: int) -> None:
        """Gives ``size`` bytes back. Safe in a finalizer."""
        with self._changed:
            self._free += size
            self._changed.notify_all()

    def grow(self, size: int) -> None:
        """Makes the budget ``size`` bytes larger."""
        with self._changed:
            self._total += size
            self._free += size
            self._changed.notify_all()

    def wake(self) -> None:
        """Makes every waiting thread look again whether it is abandoned."""
        with self._changed:
            self._changed.notify_all()


PROCESS_BUDGET = ByteBudget(48 << 20)
"""What all saves and copies of this process may hold together beyond the tensors themselves: 48 MiB."""

EXTRA_BUDGET = ByteBudget(208 << 20)
"""What saves from a device and copies may hold together in addition, as far as it is free: 208 MiB.

A store like S3 takes 90 MB/s over one connection: 16 parts of 16 MiB at once are 1.4 GB/s.
"""

if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=PROCESS_BUDGET.reset)
    os.register_at_fork(after_in_child=EXTRA_BUDGET.reset)


class Blocks:
    """Blocks of memory that come back when nobody holds a view of them any more.

    Reused, because filling memory for the first time is eight times slower than filling it again. There are none
    before :meth:`allow`.
    """

    def __init__(self) -> None:
        self._budget = ByteBudget(0)
        self._spare: deque[mmap.mmap] = deque()
        self._lock = threading.RLock()  # blocks come back in finalizers, and those run anywhere
        self._borrows = False
        self._borrowed = 0  # bytes
        self._abandoned = False
        self._cleared = False

    def allow(self, total: int, *, borrows: bool) -> None:
        """Lets there be so many blocks that they have at least ``total`` bytes together.

        Args:
            total: In bytes.
            borrows: Whether there may be more while all those are out, as far as ``EXTRA_BUDGET`` has room for them.
        """
        self._borrows = borrows
        self._budget.grow(-(-total // BLOCK_SIZE) * BLOCK_SIZE)

    def take(self) -> memoryview:
        """A block, to be filled and passed on in slices; waits for one if all are out and none can be borrowed.

        It comes back when this view and all its slices are gone, in whichever thread lets go of the last.
        """
        if not self._budget.try_take(BLOCK_SIZE) and not self._borrow():
            self._budget.take(BLOCK_SIZE, abandoned=lambda: self._abandoned)
        try:
            block = self._spare.pop()
        except IndexError:
            block = mmap.mmap(-1, BLOCK_SIZE)  # takes memory only as far as it is filled
        loan = (ctypes.c_char * BLOCK_SIZE).from_buffer(block)  # all views of it keep it, and it can be watched
        weakref.finalize(loan, self._came_back, block).atexit = False
        return memoryview(loan).cast("B")

    def abandon(self) -> None:
        """Makes :meth:`take` raise ``InterruptedError``, also in a thread that waits in it."""
        self._abandoned = True
        self._budget.wake()

    def clear(self) -> None:
        """Frees the blocks: the spare ones now, the others when they come back."""
        with self._lock:
            self._cleared = True
            self._spare.clear()
            borrowed, self._borrowed = self._borrowed, 0
        EXTRA_BUDGET.give(borrowed)

    def _borrow(self) -> bool:
        if not self._borrows or not EXTRA_BUDGET.try_take(BLOCK_SIZE):
            return False
        with self._lock:
            if not self._cleared:
                self._borrowed += BLOCK_SIZE
                return True
        EXTRA_BUDGET.give(BLOCK_SIZE)
        return False

    def _came_back(self, block: mmap.mmap) -> None:
        with self._lock:
            goes_back = self._borrowed > 0 and not self._budget.is_wanted
            if goes_back:
                self._borrowed -= BLOCK_SIZE
            elif not self._cleared:
                self._spare.append(block)
        (EXTRA_BUDGET if goes_back else self._budget).give(BLOCK_SIZE)


class _PyBuffer(ctypes.Structure):
    """``Py_buffer``; its layout is part of CPython's stable ABI since 3.11."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


def address_of(data: Chunk) -> int:
    """Where in memory ``data`` begins; ctypes' own ``from_buffer`` refuses read-only views, which torch's are."""
    buffer = _PyBuffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(data), ctypes.byref(buffer), 0)
    try:
        return buffer.buf or 0
    finally:
        ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))


def copy_bytes(target: Chunk, source: Chunk) -> None:
    """Copies ``source`` to where ``target``, which is as long, begins; other threads run meanwhile.

    They would not, if it was assigned to a slice of ``target``.
    """
    if len(target) != len(source):
        raise ValueError(f"{len(source)} bytes do not fill {len(target)}.")
    ctypes.memmove(address_of(target), address_of(source), len(source))
