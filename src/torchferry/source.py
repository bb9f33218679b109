"""One version of one stored checkpoint, read in ranges."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import TYPE_CHECKING

from anyio import CapacityLimiter
from anyio.lowlevel import RunVar

from torchferry._collector import collector_paused
from torchferry._sync import run_on
from torchferry._tasks import task_group
from torchferry.archive import LOCAL_HEADER_SIZE, SNIFF_SIZE, ZIP_FORMAT, find_directory, parse_directory, sniff
from torchferry.errors import CheckpointCorruptError, CheckpointFormatError, StorageError
from torchferry.storage.base import MIB, Backend
from torchferry.storage.cancellation import in_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torchferry.archive import Archive
    from torchferry.storage.base import Chunk, ObjectStat

__all__ = ["Source"]

_WHOLE = 1 * MIB  # an object up to this size is read at once
_PROBE = (64 << 10, 1 * MIB)  # least and most bytes of the first look at either end
_PROBE_SHARE = 96  # each is this part of the object: looking costs 2% of it at most
_END_SIZE = 66 << 10  # the end records, with the longest comment
_UNDER_WAY = 96 * MIB  # bytes of all ranges under way; clients hold up to twice as many
_LIMITER: RunVar[CapacityLimiter] = RunVar("torchferry.source._LIMITER")
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

        async def keep(first: int, last: int) -> None:
            insort(self._kept, (first, await self.fetch(first, last)), key=_offset)

        async with task_group() as group:
            for first, last in self.plan([(start, stop)]):
                group.start_soon(keep, first, last)
        pieces = ((at, memoryview(buffer)) for at, buffer in self._kept)
        return b"".join(piece[max(start - at, 0) : max(stop - at, 0)] for at, piece in pieces)

    def plan(self, extents: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """The ranges to stream for these extents, what is kept already left out: neighbours merged, long ones cut."""
        step = min(self._backend.range_size, _UNDER_WAY // self._backend.range_concurrency)
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
    ) -> None:
        """Reads ranges, many at once, and calls ``sink(start, buffer)`` with each, in a worker thread.

        Then it calls ``progress`` with the number of bytes, on the event loop.
        At most ``range_concurrency`` buffers exist at a time, including those that ``sink`` works on; and of all
        streams on this event loop together, at most as many as one backend of the default may have.
        """
        queue = iter(ranges)
        limiter = _limiter()

        async def work() -> None:
            for start, stop in queue:
                async with limiter:
                    await in_thread(sink, start, await self.fetch(start, stop))
                progress(stop - start)

        async with task_group() as group:
            for _ in range(min(self._backend.range_concurrency, len(ranges))):
                group.start_soon(work)

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

    def _missing(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        for at, buffer in self._kept:
            if start < min(at, stop):
                yield start, min(at, stop)
            start = max(start, at + len(buffer))
        if start < stop:
            yield start, stop


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
