"""The one ledger of host memory: what saves, copies and verifications hold beside the tensors, in blocks.

The limit is 256 MiB for the process, or what the environment variable ``TORCHFERRY_MEMORY`` says in MiB. Saves of CPU
tensors share 3/16 of it (48 MiB). Saves from a device, copies, verifications, and what loads hold beside their buffer
share the rest.

Snapshots are as large as what they are of, and have a ledger of their own: one at a time, or as many as fit into the
MiB that the environment variable ``TORCHFERRY_SNAPSHOTS`` says.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from torchferry.engine.cancellation import wait_in_thread
from torchferry.engine.transfer import current
from torchferry.engine.types import MIB

if TYPE_CHECKING:
    from torchferry.engine.types import Buffer

__all__ = [
    "BLOCK_SIZE",
    "CPU_SAVES",
    "EVERYTHING_ELSE",
    "SNAPSHOTS",
    "Claim",
    "Ledger",
    "address_of",
    "copy_bytes",
]

BLOCK_SIZE = 4 * MIB
"""Bytes in a block, of which a claim is made."""

_SMALL_BLOCK = 64 << 10  # what a claim below it takes: many tiny saves fit at once
_DEFAULT_LIMIT = 256  # MiB
_HEADROOM = 8  # claims grow while less than 7/8 of the ledger is held: the rest lets new ones begin


class Ledger:
    """A number of bytes that claims share.

    A claim begins when what it must have is free: smaller ones may begin before larger ones that wait. It grows, a
    block at a time, while memory is free, and gives blocks back one at a time.

    Args:
        limit: In bytes. A claim that must have more gets it when nobody else holds any.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.reset()

    def reset(self) -> None:
        """Forgets all claims: after a fork, only the forking thread exists in the child."""
        self.held = 0
        # Re-entrant, as threading.Condition is by default: blocks come back in finalizers, which run anywhere.
        self.changed = threading.Condition()
        self._spare: deque[mmap.mmap] = deque()  # blocks kept warm while there are claims: filling new memory is slow
        self._claims = 0

    def claim(
        self,
        need: int,
        *,
        piece: int = 0,
        beside: int = 0,
        waits: bool = True,
        abandoned: Callable[[], bool] = lambda: False,
    ) -> Claim:
        """Waits until ``need + beside`` bytes are free, and reserves them, all at once. Blocks the thread.

        Who holds a claim and waits for another may wait for ever: several of them can hold all there is.

        Args:
            need: What is enough to make progress, and no more than the object can need.
            piece: The most bytes that are needed in one block, 4 MiB at most; 0 where any blocks will do.
            beside: Bytes that are needed otherwise than in blocks, as a client's own buffers are.
            waits: False where who asks holds a claim that it gives back later: then the limit is exceeded.
            abandoned: Asked before each wait; after a change, call :meth:`wake`.

        Raises:
            InterruptedError: ``abandoned()`` was true.
        """
        with self.changed:
            while (claim := self._try_claim(need, piece, beside, waits)) is None:
                if abandoned():
                    raise InterruptedError
                self.changed.wait()
        return claim

    def _try_claim(self, need: int, piece: int, beside: int, waits: bool) -> Claim | None:
        """A claim, if what it must have is free. Called with the lock held."""
        block = BLOCK_SIZE if need > BLOCK_SIZE // 2 or piece > _SMALL_BLOCK else _SMALL_BLOCK
        need = max(1, -(-need // block)) * block + beside
        if waits and self.held and self.held + need > self.limit:
            return None
        self.held += need
        self._claims += 1
        return Claim(self, need, block, beside)

    async def claim_async(self, need: int, *, piece: int = 0, beside: int = 0, waits: bool = True) -> Claim:
        """:meth:`claim` on an event loop, which goes on meanwhile. A cancel ends the wait."""
        with self.changed:
            claim = self._try_claim(need, piece, beside, waits)
        if claim is not None:
            return claim
        abandoned = False
        granted: list[Claim] = []

        def wait() -> None:
            granted.append(self.claim(need, piece=piece, beside=beside, waits=waits, abandoned=lambda: abandoned))

        def abandon() -> None:
            nonlocal abandoned
            abandoned = True
            self.wake()

        try:
            await wait_in_thread(wait, interrupt=abandon)
        except BaseException:
            for claim in granted:
                claim.close()
            raise
        return granted[0]

    def may_grow(self, nbytes: int) -> bool:
        """Takes ``nbytes`` more for a claim, if they are free. Called with the lock held."""
        if self.held + nbytes > self.limit - self.limit // _HEADROOM:
            return False
        self.held += nbytes
        return True

    def give(self, nbytes: int) -> None:
        """Gives bytes back. Safe in a finalizer."""
        with self.changed:
            self.held = max(0, self.held - nbytes)  # after a fork, blocks of the parent come back, too
            self.changed.notify_all()

    def wake(self) -> None:
        """Makes every waiting thread look again whether it is abandoned."""
        with self.changed:
            self.changed.notify_all()

    def open_block(self, size: int) -> mmap.mmap:
        """Memory for a block. Raises OSError where the machine has none."""
        if size == BLOCK_SIZE:
            with suppress(IndexError):
                return self._spare.pop()
        return mmap.mmap(-1, size)

    def keep_block(self, block: mmap.mmap) -> None:
        """Keeps a block for the next who opens one, while there are claims."""
        if self._claims and len(block) == BLOCK_SIZE and (len(self._spare) + 1) * BLOCK_SIZE <= self.limit:
            self._spare.append(block)

    def end_claim(self) -> None:
        """Frees the spare blocks with the last claim."""
        with self.changed:
            self._claims -= 1
            if not self._claims:
                self._spare.clear()


class Claim:
    """The memory of one transfer: blocks that come back when nobody holds a view of them any more.

    Made by :meth:`Ledger.claim`.

    Attributes:
        block_size: Bytes in each of its blocks.
    """

    def __init__(self, ledger: Ledger, need: int, block_size: int, beside: int) -> None:
        self.block_size = block_size
        self._ledger = ledger
        self._reserved = need  # bytes that are this claim's until it ends
        self._used = beside  # and bytes of blocks that are out
        self._held = need  # bytes of the ledger: what is reserved, and what it grew by
        self._abandoned = False
        self._closed = False
        self._transfer = current()
        self._transfer.holds(need)

    def take(self) -> memoryview:
        """A block, to be filled and passed on in slices; waits while none is free. Blocks the thread.

        It comes back when this view and all its slices are gone, in whichever thread lets go of the last.

        Raises:
            InterruptedError: the claim was abandoned.
            OSError: the machine has no memory.
        """
        with self._ledger.changed:
            while not self._try_use():
                if self._abandoned:
                    raise InterruptedError
                self._ledger.changed.wait()
        return self._lend()

    async def take_async(self) -> memoryview:
        """:meth:`take` on an event loop, which goes on meanwhile. A cancel ends the wait."""
        with self._ledger.changed:
            is_free = self._try_use()
        return self._lend() if is_free else await wait_in_thread(self.take, interrupt=self.abandon)

    def abandon(self) -> None:
        """Makes :meth:`take` raise, also in a thread that waits in it."""
        self._abandoned = True
        self._ledger.wake()

    def close(self) -> None:
        """Gives everything back. What an error's traceback still holds of it is freed with that."""
        with self._ledger.changed:
            if self._closed:
                return
            self._closed = self._abandoned = True
            self._shrink_to(0)
        self._ledger.end_claim()

    def _lend(self) -> memoryview:
        """A block, whose bytes :meth:`_try_use` has counted."""
        try:
            block = self._ledger.open_block(self.block_size)
        except BaseException:
            self._unuse()
            raise
        loan = (ctypes.c_char * self.block_size).from_buffer(block)  # all views of it keep it, and it can be watched
        weakref.finalize(loan, self._came_back, block).atexit = False
        return memoryview(loan).cast("B")

    def _try_use(self) -> bool:
        if self._abandoned:
            return False
        if self._used + self.block_size > self._held:
            if not self._ledger.may_grow(self.block_size):
                return False
            self._held += self.block_size
            self._transfer.holds(self.block_size)
        self._used += self.block_size
        return True

    def _unuse(self) -> None:
        with self._ledger.changed:
            self._used -= self.block_size
            if not self._closed:
                self._shrink_to(max(self._used, self._reserved))

    def _shrink_to(self, nbytes: int) -> None:
        surplus = self._held - nbytes
        self._held = nbytes
        self._transfer.holds(-surplus)
        self._ledger.give(surplus)  # also wakes who waits for a block of this claim

    def _came_back(self, block: mmap.mmap) -> None:
        self._ledger.keep_block(block)
        self._unuse()


def _number_of_mib(variable: str, default: int) -> int:
    """What an environment variable says in MiB, in bytes."""
    text = os.environ.get(variable, "").strip()
    if text and not (text.isascii() and text.isdigit()):
        warnings.warn(
            f"{variable} is a whole number of MiB, such as {default or 4096}, without a unit; given: {text!r}. "
            "It is ignored.",
            stacklevel=2,
        )
        text = ""
    return (int(text) if text else default) * MIB


def _limit() -> int:
    """The limit for the process, in bytes."""
    return max(32 * MIB, _number_of_mib("TORCHFERRY_MEMORY", _DEFAULT_LIMIT))


CPU_SAVES = Ledger(_limit() * 3 // 16)
"""For saves of CPU tensors: they copy only what is small."""

EVERYTHING_ELSE = Ledger(_limit() - CPU_SAVES.limit)
"""For saves from a device, copies and verifications, and what loads hold beside their buffer."""

SNAPSHOTS = Ledger(_number_of_mib("TORCHFERRY_SNAPSHOTS", 0))
"""For snapshots: one at a time, whatever its size, where the user chose no limit."""

if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=CPU_SAVES.reset)
    os.register_at_fork(after_in_child=SNAPSHOTS.reset)
    os.register_at_fork(after_in_child=EVERYTHING_ELSE.reset)


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


def address_of(data: Buffer) -> int:
    """Where in memory ``data`` begins; ctypes' own ``from_buffer`` refuses read-only views, which torch's are."""
    buffer = _PyBuffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(data), ctypes.byref(buffer), 0)
    try:
        return buffer.buf or 0
    finally:
        ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))


def copy_bytes(target: Buffer, source: Buffer) -> None:
    """Copies ``source`` to where ``target``, which is as long, begins; other threads run meanwhile.

    They would not, if it was assigned to a slice of ``target``.
    """
    if len(target) != len(source):
        raise ValueError(f"{len(source)} bytes do not fill {len(target)}.")
    ctypes.memmove(address_of(target), address_of(source), len(source))
