"""One version of one stored checkpoint, read in ranges."""

from __future__ import annotations

from bisect import bisect_left, insort
from time import monotonic
from typing import TYPE_CHECKING

import anyio
from anyio import CapacityLimiter
from anyio.lowlevel import RunVar

from torchferry.engine.collector import collector_paused
from torchferry.engine.loops import run_on
from torchferry.engine.tasks import task_group
from torchferry.formats.archive import LOCAL_HEADER_SIZE, SNIFF_SIZE, ZIP_FORMAT, find_directory, parse_directory, sniff
from torchferry.errors import CheckpointCorruptError, CheckpointFormatError, StorageError
from torchferry.storage.base import MIB, Backend
from torchferry.engine.cancellation import in_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torchferry.formats.archive import Archive
    from torchferry.storage.base import Chunk, ObjectStat

__all__ = ["Source"]

_WHOLE = 1 * MIB  # an object up to this size is read at once
_PROBE = (64 << 10, 1 * MIB)  # least and most bytes of the first look at either end
_PROBE_SHARE = 96  # each is this part of the object: looking costs 2% of it at most
_END_SIZE = 66 << 10  # the end records, with the longest comment
_UNDER_WAY = 96 * MIB  # bytes of all ranges under way; clients hold up to twice as many
_LIMITER: RunVar[CapacityLimiter] = RunVar("torchferry.engine.reader._LIMITER")
_AT_FIRST = 4  # ranges under way
_GAIN = 1.2  # how many times the bytes a second make an increase worth it
_GAP = 64 << 10  # needed ranges that are this near are read in one: a request costs more


class Source:
    """One version of one object, read through a backend; keeps what :meth:`read` has read.

    Attributes:
        stat: The version.
        url: For messages.
    """

    def __init__(self, backend: Backend, path: str, stat: ObjectStat) -> None:
        self.stat = stat
        self.url = stat.url
        self._backend = backend
        self._path = path
        self._kept: list[tuple[int, Chunk]] = []  # offset and bytes, in order, disjoint

    @classmethod
    async def open(cls, backend: Backend, path: str) -> Source:
        """Looks an object up and reads its head and its tail, side by side.

        A checkpoint of torch has its pickle at the head and its directory at the tail.

        Raises:
            CheckpointFormatError: the object is empty.
        """
        source = cls(backend, path, await run_on(backend.loop, backend.stat, path))
        size = source.stat.size
        if not size:
            raise CheckpointFormatError(f"{source.url} is empty: not a checkpoint.")
        probe = size if size <= _WHOLE else min(max(size // _PROBE_SHARE, _PROBE[0]), _PROBE[1])
        async with task_group() as group:
            group.start_soon(source.read, 0, probe)
            if probe < size:
                group.start_soon(source.read, size - probe, size)
        return source

    @property
    def kept(self) -> list[tuple[int, Chunk]]:
        """What :meth:`read` has read: offsets and bytes, in order, disjoint."""
        return list(self._kept)

    async def read(self, start: int, stop: int) -> bytes:
        """Reads the bytes ``start`` to ``stop``, and keeps them: for what is small, and needed again.

        Only what is not kept already is asked of the backend.
        """
        limiter = _limiter()

        async def keep(first: int, last: int) -> None:
            async with limiter:
                insort(self._kept, (first, await self.fetch(first, last)), key=_offset)

        async with task_group() as group:
            for first, last in self.plan([(start, stop)]):
                group.start_soon(keep, first, last)
        pieces = ((at, memoryview(buffer)) for at, buffer in self._kept)
        return b"".join(piece[max(start - at, 0) : max(stop - at, 0)] for at, piece in pieces)

    def plan(self, extents: Iterable[tuple[int, int]], *, into_memory: bool = False) -> list[tuple[int, int]]:
        """The ranges to stream for these extents, what is kept already left out: neighbours merged, long ones cut.

        They are shorter where :meth:`stream` has to hold them, because nobody gives it memory for them.
        """
        step = self._backend.range_size
        if not into_memory:
            step = min(step, _UNDER_WAY // self._backend.range_concurrency)
        return [
            (at, min(at + step, last))
            for start, stop in _merge(extents, _GAP, self.stat.size)
            for first, last in self._missing(start, stop)
            for at in range(first, last, step)
        ]

    async def stream(
        self,
        ranges: Sequence[tuple[int, int]],
        sink: Callable[[int, Chunk], object],
        progress: Callable[[int], object] = lambda _: None,
        *,
        memory: Callable[[int, int], memoryview] | None = None,
    ) -> None:
        """Reads ranges, many at once, and calls ``sink(start, buffer)`` with each, in a worker thread.

        They are read into ``memory(start, stop)``, where there is such memory. At first a few are under way, and more
        and more as long as that moves more bytes a second: up to ``range_concurrency``, including those that ``sink``
        works on, and up to the default of that for all streams on this event loop together.
        Then it calls ``progress`` with the number of bytes, on the event loop.
        """
        limiter = _limiter()
        pace = _Pace(self._backend.range_concurrency)
        slots = anyio.Semaphore(pace.limit)

        async def read(start: int, stop: int) -> None:
            async with limiter:
                if memory is None:
                    await in_thread(sink, start, await self.fetch(start, stop))
                else:
                    await self._fetch_into(start, buffer := memory(start, stop))
                    group.start_soon(in_thread, sink, start, buffer)  # meanwhile the next one can come
            progress(stop - start)
            for _ in range(1 + pace.note(stop - start)):
                slots.release()

        async with task_group() as group:
            for start, stop in ranges:
                await slots.acquire()
                group.start_soon(read, start, stop)

    async def read_archive(self) -> Archive | None:
        """Reads the archive's central directory; None if the object is no zip archive.

        Raises:
            CheckpointCorruptError: the object is damaged: truncated, or its directory contradicts itself.
            CheckpointFormatError: it is a zip archive but no checkpoint.
        """
        size = self.stat.size
        if sniff(await self.read(0, min(size, SNIFF_SIZE))) != ZIP_FORMAT:
            return None
        directory = find_directory(await self.read(max(size - _END_SIZE, 0), size), size, self.url)
        if directory is None:
            raise CheckpointCorruptError(f"{self.url} is truncated: it starts as a zip archive does, but has no end.")
        buffer = await self.read(directory.start, directory.start + directory.size)
        archive = await in_thread(collector_paused()(parse_directory), buffer, directory, self.url)
        if archive.unproven:
            archive = await self._settle(archive)
        return archive

    async def _settle(self, archive: Archive) -> Archive:
        """Reads the local headers that the offsets of some records depend on."""
        offsets = archive.unproven_headers
        headers: dict[int, bytes] = {}

        def collect(start: int, buffer: Chunk) -> None:
            view = memoryview(buffer)
            for at in offsets[bisect_left(offsets, start) : bisect_left(offsets, start + len(view))]:
                headers[at] = bytes(view[at - start : at - start + LOCAL_HEADER_SIZE])

        extents = [(at, at + LOCAL_HEADER_SIZE) for at in offsets]
        await self.stream(_merge(extents, _GAP, self._backend.range_size), collect)
        return await in_thread(archive.settle, headers)

    async def fetch(self, start: int, stop: int) -> Chunk:
        """Reads the bytes ``start`` to ``stop`` without keeping them."""
        buffer = await run_on(self._backend.loop, self._backend.read, self._path, start, stop, self.stat)
        if len(buffer) != stop - start:
            raise StorageError(f"{self.url}: the store sent {len(buffer)} bytes for the range {start} to {stop}.")
        return buffer

    async def _fetch_into(self, start: int, buffer: memoryview) -> None:
        await run_on(self._backend.loop, self._backend.read_into, self._path, start, buffer, self.stat)

    def _missing(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        for at, buffer in self._kept:
            if start < min(at, stop):
                yield start, min(at, stop)
            start = max(start, at + len(buffer))
        if start < stop:
            yield start, stop


class _Pace:
    """How many ranges to read at once: twice as many, whenever the last increase has paid.

    A few fill a fast link, where more would only get into each other's way; a store that is far away, or slow on each
    connection, as S3 is (some 90 MB/s), takes many.

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
        _LIMITER.set(CapacityLimiter(Backend.range_concurrency))
        return _LIMITER.get()


def _offset(piece: tuple[int, Chunk]) -> int:
    return piece[0]


def _merge(extents: Iterable[tuple[int, int]], gap: int, longest: int) -> list[tuple[int, int]]:
    """Joins extents between which there are at most ``gap`` bytes, up to ``longest`` bytes."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(extents):
        if merged and start - merged[-1][1] <= gap and stop - merged[-1][0] <= longest:
            merged[-1] = merged[-1][0], max(merged[-1][1], stop)
        else:
            merged.append((start, stop))
    return merged
