"""Memory that is read where it lies until its owner changes it, and from then on in a copy.

Whoever reads what a :class:`.types.Chunk` has does so within :func:`reading`, and for no longer than that takes: the
owner waits meanwhile.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from bisect import bisect_right
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torchferry.engine.memory import address_of

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Sequence

    from torchferry.engine.types import Buffer

__all__ = ["Loans", "is_lent", "joined", "lend", "reading", "when_back"]


class Loans:
    """Pieces of memory that are lent until their owner recalls them.

    Args:
        memories: Address and size of each; none overlaps another.

    Attributes:
        recalled: Whether the owner has recalled them: their memory is not read any more.
    """

    def __init__(self, memories: Sequence[tuple[int, int]]) -> None:
        self.recalled = False
        self._memories = sorted(memories)
        self._sent: list[tuple[int, int]] = []  # first and last address, exclusive, of the pieces that came back
        self._copies: list[tuple[int, int, memoryview]] = []  # the same of each range that was copied, and its copy
        self._error: BaseException | None = None
        self._readers = 0
        self._recalling = False
        self._changed = threading.Condition()

    def came_back(self, piece: memoryview) -> None:
        """Notes that a piece is not needed any more. Safe in a finalizer."""
        start = address_of(piece)
        self._sent.append((start, start + len(piece)))

    def recall(self, copy: Callable[[Sequence[tuple[int, int]]], Sequence[memoryview]]) -> None:
        """Copies what is still needed, and has it read there from now on. Blocks until nobody reads the memory itself.

        The first call does it; others wait for that.

        Args:
            copy: Makes copies of ranges, each given by its first and last address, exclusive. Nobody reads meanwhile.
                Where it raises, all who read later get that error.
        """
        with self._changed:
            while self._recalling:
                self._changed.wait()
            if self.recalled:
                return
            self._recalling = True
            try:
                while self._readers:
                    self._changed.wait()
            except BaseException as error:
                self._end_recall(error)
                raise
        try:
            ranges = list(self._needed())
            self._copies = [(*found, made) for found, made in zip(ranges, copy(ranges), strict=True)]
        except BaseException as error:
            with self._changed:
                self._end_recall(error)
            raise
        with self._changed:
            self._end_recall(None)

    def enter(self, address: int, size: int) -> memoryview:
        """Where to read ``size`` bytes of the memory at ``address``, until :meth:`leave`."""
        with self._changed:
            while self._recalling:
                self._changed.wait()
            if self._error is not None:
                raise self._error
            if not self.recalled:
                self._readers += 1
                return _view(address, size)
        found = bisect_right(self._copies, address, key=lambda entry: entry[0]) - 1
        start, stop, made = self._copies[found]
        if found < 0 or address + size > stop:
            raise RuntimeError("Memory that was given back is read again.")
        return made[address - start : address - start + size]

    def leave(self, memory: memoryview, address: int) -> None:
        """Ends what :meth:`enter` began."""
        if address_of(memory) == address:  # not in a copy
            self._leave()

    @contextmanager
    def held(self) -> Generator[bool]:
        """Keeps the owner from recalling while in here. Yields False where it has recalled already."""
        with self._changed:
            while self._recalling:
                self._changed.wait()
            if self._error is not None:
                raise self._error
            are_lent = not self.recalled
            self._readers += are_lent
        try:
            yield are_lent
        finally:
            if are_lent:
                self._leave()

    def end(self) -> None:
        """Called when nobody reads the memory any more: there is nothing to recall."""
        with self._changed:
            while self._recalling:
                self._changed.wait()
            self.recalled = True
            self._copies = []

    def _leave(self) -> None:
        with self._changed:
            self._readers -= 1
            if not self._readers:
                self._changed.notify_all()

    def _end_recall(self, error: BaseException | None) -> None:
        if error is not None and not isinstance(error, Exception):
            error = InterruptedError("The copy of what was not sent yet was interrupted.")
        self._error = error
        self._recalling = False
        self.recalled = True
        self._changed.notify_all()

    def _needed(self) -> Generator[tuple[int, int]]:
        """The ranges of memory that were not lent yet, or did not come back."""
        sent = sorted(self._sent)
        number = 0
        for address, size in self._memories:
            at, end = address, address + size
            while number < len(sent) and sent[number][0] < end:
                start, stop = sent[number]
                if start > at:
                    yield at, start
                at = max(at, stop)
                number += 1
            if at < end:
                yield at, end


def lend(data: memoryview, owner: object, loans: Loans | None = None) -> memoryview:
    """The same bytes as a view that keeps their memory alive, as ``data`` does not.

    Args:
        data: Some bytes.
        owner: Keeps their memory alive.
        loans: Where the owner may recall them.
    """
    lent = (ctypes.c_char * len(data)).from_address(address_of(data))
    # Every view of `lent` keeps it, and it keeps these.
    lent.owner = owner  # type: ignore[attr-defined]
    lent.loans = loans  # type: ignore[attr-defined]
    return memoryview(lent).cast("B").toreadonly()


def when_back(view: memoryview, func: Callable[[], object]) -> None:
    """Calls ``func()`` when a lent view and all its slices are gone, in whichever thread lets go of the last."""
    weakref.finalize(view.obj, func).atexit = False


def is_lent(data: Buffer) -> bool:
    """Whether the owner of the memory may recall it."""
    return _loans_of(data) is not None


@contextmanager
def reading(data: Buffer) -> Generator[memoryview]:
    """Where to read ``data``: it does not change while in here."""
    loans = _loans_of(data)
    if loans is None:
        yield memoryview(data)
        return
    address = address_of(data)
    memory = loans.enter(address, len(data))
    try:
        yield memory
    finally:
        loans.leave(memory, address)


def joined(buffers: Iterable[Buffer]) -> bytes:
    """A copy of some buffers, one after the other."""
    pieces = []
    for buffer in buffers:
        with reading(buffer) as memory:
            pieces.append(bytes(memory))
    return b"".join(pieces)


def _loans_of(data: Buffer) -> Any:
    return getattr(data.obj, "loans", None) if isinstance(data, memoryview) else None


def _view(address: int, size: int) -> memoryview:
    return memoryview((ctypes.c_char * size).from_address(address)).cast("B").toreadonly()
