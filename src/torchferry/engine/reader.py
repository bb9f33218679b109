"""Reads ranges of one version of one object: many at once, paced, into memory that it is given."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Protocol

import anyio
from anyio import CapacityLimiter
from anyio.lowlevel import RunVar

from torchferry.engine.cancellation import in_thread
from torchferry.engine.loops import run_on
from torchferry.engine.memory import BLOCK_SIZE, EVERYTHING_ELSE, Claim
from torchferry.engine.tasks import task_group
from torchferry.engine.types import Buffer, ObjectStat

if TYPE_CHECKING:
    import asyncio

__all__ = ["RangeReader", "Readable", "merge"]

_UNDER_WAY = 24  # ranges of all readers on an event loop
_LIMITER: RunVar[CapacityLimiter] = RunVar("torchferry.engine.reader._LIMITER")
_AT_FIRST = 4  # ranges under way when a stream begins
_GAIN = 1.2  # the number of ranges doubles as long as that moves this many times the bytes a second
_GAP = 64 << 10  # needed ranges that are this near are read in one: a request costs more


class Readable(Protocol):
    """What can be read in ranges: a storage backend."""

    @property
    def range_size(self) -> int:
        """Bytes that one read should ask for."""

    @property
    def range_concurrency(self) -> int:
        """Reads that should be under way at once."""

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The event loop that the methods must run on; None for any."""

    async def read(self, path: str, start: int, stop: int, stat: ObjectStat) -> Buffer:
        """Reads a range of one version."""

    async def read_into(self, path: str, start: int, buffers: Sequence[memoryview], stat: ObjectStat) -> None:
        """Reads a range of one version into pieces of memory, one after the other."""


class RangeReader:
    """One version of one object; keeps what :meth:`read` has read.

    Attributes:
        stat: The version.
        url: For messages.
    """

    def __init__(self, backend: Readable, path: str, stat: ObjectStat) -> None:
        self.stat = stat
        self.url = stat.url
        self._backend = backend
        self._path = path
        self._kept: list[tuple[int, Buffer]] = []  # offset and bytes, in order, disjoint

    @property
    def kept(self) -> list[tuple[int, Buffer]]:
        """What :meth:`read` has read: offsets and bytes, in order, disjoint."""
        return list(self._kept)

    async def read(self, start: int, stop: int) -> bytes:
        """Reads the bytes ``start`` to ``stop``, and keeps them: for what is small, and needed again.

        Only what is not kept already is asked of the backend.
        """
        limiter = _limiter()

        async def keep(first: int, last: int) -> None:
            async with limiter:
                buffer = await run_on(self._backend.loop, self._backend.read, self._path, first, last, self.stat)
                insort(self._kept, (first, buffer), key=_offset)

        async with task_group() as group:
            for first, last in self.plan([(start, stop)], self._backend.range_size):
                group.start_soon(keep, first, last)
        pieces = ((at, memoryview(buffer)) for at, buffer in self._kept)
        return b"".join(piece[max(start - at, 0) : max(stop - at, 0)] for at, piece in pieces)

    @property
    def is_remote(self) -> bool:
        """Whether bytes come over a network, on which bits may flip: of all that is read on an event loop."""
        return self._backend.loop is not None

    def forget(self) -> None:
        """Keeps nothing of what :meth:`read` has read: the next time, it is asked of the backend."""
        self._kept.clear()

    async def renew(self) -> None:
        """Reads again what is kept."""
        kept = self.kept
        self.forget()
        async with task_group() as group:
            for start, buffer in kept:
                group.start_soon(self.read, start, start + len(buffer))

    def plan(self, extents: Iterable[tuple[int, int]], longest: int | None = None) -> list[tuple[int, int]]:
        """The ranges to read for these extents, without what is kept: neighbours merged, long ones cut.

        Args:
            extents: First and last (exclusive) offsets of what is needed.
            longest: Bytes of a range at most; by default a block of the ledger's.
        """
        step = min(longest or BLOCK_SIZE, self._backend.range_size)
        return [
            (at, min(at + step, last))
            for start, stop in merge(extents, self.stat.size)
            for first, last in self._missing(start, stop)
            for at in range(first, last, step)
        ]

    def plan_into_memory(self, extents: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """The ranges to read into memory that is there: as long as the backend likes best."""
        return self.plan(extents, self._backend.range_size)

    async def read_into(self, start: int, *buffers: memoryview) -> None:
        """Fills ``buffers``, one after the other, with the bytes from ``start``."""
        await run_on(self._backend.loop, self._backend.read_into, self._path, start, buffers, self.stat)

    async def stream(
        self,
        ranges: Sequence[tuple[int, int]],
        sink: Callable[[int, Buffer], object],
        *,
        memory: Callable[[int, int], Sequence[memoryview]] | None = None,
    ) -> None:
        """Reads ranges, many at once, and calls ``sink(start, buffer)`` with each, in a worker thread.

        Starts with 4 ranges under way; doubles while that moves 20 % more bytes a second; at most
        ``range_concurrency`` of the backend, and at most 24 for all streams on this event loop.

        Args:
            ranges: What to read, each at most as long as :meth:`plan` makes them.
            sink: Given each range when it is there. Without ``memory`` it must not keep the buffer.
            memory: The memory for a range, by its start and stop, in one piece or several: ``sink`` is called with each
                of them. Without, blocks of the memory ledger are used.
        """
        if memory is not None:
            await self._stream(ranges, sink, memory, None)
        elif ranges:
            longest = max(stop - start for start, stop in ranges)
            claim = await EVERYTHING_ELSE.claim_async(longest, piece=longest)
            try:
                await self._stream(ranges, sink, None, claim)
            finally:
                claim.close()

    async def _stream(
        self,
        ranges: Sequence[tuple[int, int]],
        sink: Callable[[int, Buffer], object],
        memory: Callable[[int, int], Sequence[memoryview]] | None,
        claim: Claim | None,
    ) -> None:
        limiter = _limiter()
        pace = _Pace(self._backend.range_concurrency)
        slots = anyio.Semaphore(pace.limit)

        def take(start: int, *buffers: memoryview) -> None:
            for buffer in buffers:
                sink(start, buffer)
                start += len(buffer)

        async def read(start: int, *buffers: memoryview) -> None:
            nbytes = sum(map(len, buffers))
            async with limiter:
                await self.read_into(start, *buffers)
                group.start_soon(in_thread, take, start, *buffers)  # meanwhile the next one can come
            for _ in range(1 + pace.note(nbytes)):
                slots.release()

        async with task_group() as group:
            for start, stop in ranges:
                await slots.acquire()
                if memory is not None:
                    group.start_soon(read, start, *memory(start, stop))
                elif claim is not None:  # nothing but the task holds the block, so that it comes back
                    group.start_soon(read, start, (await claim.take_async())[: stop - start])

    def _missing(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        for at, buffer in self._kept:
            if start < min(at, stop):
                yield start, min(at, stop)
            start = max(start, at + len(buffer))
        if start < stop:
            yield start, stop


class _Pace:
    """How many ranges to read at once: 4 at first, doubled while that moves 20 % more bytes a second.

    4 fill a fast link, where more would slow each other down. A store that is far away, or slow on each connection, as
    S3 is (90 MB/s), takes 24.

    Attributes:
        limit: How many.
    """

    def __init__(self, most: int) -> None:
        self.limit = min(_AT_FIRST, most)
        self._most = most
        self._wanted = 0.0  # bytes a second
        self._start_round()

    def note(self, nbytes: int) -> int:
        """Tells of a range that has arrived; returns by how much the limit is higher now."""
        self._count += 1
        self._nbytes += nbytes
        if self._count < self.limit:
            return 0
        before = self.limit
        rate = self._nbytes / max(monotonic() - self._since, 1e-6)
        if rate >= self._wanted:
            self._wanted = _GAIN * rate
            self.limit = min(2 * self.limit, self._most)
        self._start_round()
        return self.limit - before

    def _start_round(self) -> None:
        self._since = monotonic()
        self._count = self._nbytes = 0


def _limiter() -> CapacityLimiter:
    try:
        return _LIMITER.get()
    except LookupError:
        _LIMITER.set(CapacityLimiter(_UNDER_WAY))
        return _LIMITER.get()


def _offset(piece: tuple[int, Buffer]) -> int:
    return piece[0]


def merge(extents: Iterable[tuple[int, int]], longest: int) -> list[tuple[int, int]]:
    """Joins extents between which there are at most 64 KiB, up to ``longest`` bytes."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(extents):
        if merged and start - merged[-1][1] <= _GAP and stop - merged[-1][0] <= longest:
            merged[-1] = merged[-1][0], max(merged[-1][1], stop)
        else:
            merged.append((start, stop))
    return merged
