"""Reads ranges of several objects as if they were one: planned together, at one pace."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from torchferry.distributed.slices import Direct, Piece
from torchferry.engine.memory import BLOCK_SIZE
from torchferry.engine.reader import RangeReader
from torchferry.engine.tasks import task_group
from torchferry.engine.types import MIB, Buffer, ObjectStat
from torchferry.formats.checksum import Checksums

if TYPE_CHECKING:
    import asyncio

    from torchferry.storage.base import Backend

__all__ = ["Files", "fetch"]

_GAP = 64 << 10  # pieces that are this near are read in one
_BETWEEN = 1 * MIB  # between two objects, so that no range is of both


class Files:
    """Versions of objects of one store, end to end: what :class:`RangeReader` reads.

    Args:
        backend: Of the store.
        files: Path and version of each.

    Attributes:
        files: Path and version of each.
        starts: Where each begins.
        size: Of all.
    """

    def __init__(self, backend: Backend, files: Sequence[tuple[str, ObjectStat]]) -> None:
        self.starts: list[int] = []
        self.size = 0
        for _, stat in files:
            self.starts.append(self.size)
            self.size += stat.size + _BETWEEN
        self._backend = backend
        self.files = files

    @property
    def range_size(self) -> int:
        """The store's."""
        return self._backend.range_size

    @property
    def range_concurrency(self) -> int:
        """The store's."""
        return self._backend.range_concurrency

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The store's."""
        return self._backend.loop

    def find(self, start: int) -> int:
        """The number of the object that a byte is of."""
        return bisect_right(self.starts, start) - 1

    async def read(self, path: str, start: int, stop: int, stat: ObjectStat) -> Buffer:
        """Reads a range of one object."""
        del path, stat
        number = self.find(start)
        file, version = self.files[number]
        base = self.starts[number]
        return await self._backend.read(file, start - base, stop - base, version)

    async def read_into(self, path: str, start: int, buffer: memoryview, stat: ObjectStat) -> None:
        """Reads a range of one object into memory."""
        del path, stat
        number = self.find(start)
        file, version = self.files[number]
        await self._backend.read_into(file, start - self.starts[number], buffer, version)


async def fetch(
    files: Files,
    wanted: Iterable[tuple[int, Direct | Piece]],
    checksums: Sequence[Checksums | None],
    url: str,
    *,
    finish: bool = True,
) -> None:
    """Reads everything that is wanted; a record that does not match its CRC32 again, where it may be read twice.

    Args:
        files: Where it is.
        wanted: The number of the object, and what is wanted of it. No byte twice where it is checked.
        checksums: Of each object: told of what is wanted, and of nothing between.
        url: For messages.
        finish: Whether all that is checked is among what is wanted.
    """
    reader = RangeReader(files, "", ObjectStat(url, files.size))
    wanted = list(wanted)
    direct, pieces = _sorted_out(files, wanted)
    groups = _groups(pieces, min(BLOCK_SIZE, files.range_size))
    memories = iter(direct)

    def check(start: int, buffer: Buffer) -> None:
        number = files.find(start)
        checksum = checksums[number]
        if checksum is not None:
            checksum.add(start - files.starts[number], buffer)

    def spread(start: int, buffer: Buffer) -> None:
        view = memoryview(buffer)
        for first, last, piece in groups[start]:
            data = view[first - start : last - start]
            check(first, data)
            piece.sink(data)

    async with task_group() as tasks:
        if direct:
            ranges = [(start, stop) for start, stop, _ in direct]
            tasks.start_soon(_stream_into, reader, ranges, check, memories)
        if groups:
            spans = [(start, max(last for _, last, _ in group)) for start, group in groups.items()]
            tasks.start_soon(reader.stream, spans, spread)
    if again := list(_damaged(wanted, checksums)):
        await fetch(files, again, checksums, url, finish=finish)
        return
    for checksum in checksums if finish else ():
        if checksum is not None:
            checksum.finish()


def _damaged(
    wanted: Sequence[tuple[int, Direct | Piece]], checksums: Sequence[Checksums | None]
) -> Iterator[tuple[int, Direct | Piece]]:
    """What is wanted of the records that do not match their CRC32, and may be read again."""
    records = [checksum.take_damaged() if checksum is not None else [] for checksum in checksums]
    for number, part in wanted if any(records) else ():
        stop = part.stop if isinstance(part, Piece) else part.start + len(part.memory)
        if any(part.start < record.end and record.offset < stop for record in records[number]):
            yield number, part


def _sorted_out(
    files: Files, wanted: Iterable[tuple[int, Direct | Piece]]
) -> tuple[list[tuple[int, int, memoryview]], list[tuple[int, int, Piece]]]:
    """Ranges for memory and pieces, each in order, by where they are in all files."""
    direct: list[tuple[int, int, memoryview]] = []
    pieces: list[tuple[int, int, Piece]] = []
    for number, part in wanted:
        base = files.starts[number]
        if isinstance(part, Piece):
            pieces.append((base + part.start, base + part.stop, part))
            continue
        for at in range(0, len(part.memory), files.range_size):
            memory = part.memory[at : at + files.range_size]
            start = base + part.start + at
            direct.append((start, start + len(memory), memory))
    return sorted(direct, key=_start), sorted(pieces, key=_start)


async def _stream_into(reader: RangeReader, ranges: Sequence[tuple[int, int]], sink: object, memories: object) -> None:
    def memory(_start: int, _stop: int) -> memoryview:
        found: memoryview = next(memories)[2]  # type: ignore[call-overload]  # asked for in the order of the ranges
        return found

    await reader.stream(ranges, sink, memory=memory)  # type: ignore[arg-type]


def _groups(pieces: Sequence[tuple[int, int, Piece]], longest: int) -> dict[int, list[tuple[int, int, Piece]]]:
    """Pieces that are read in one range, by its start."""
    groups: dict[int, list[tuple[int, int, Piece]]] = {}
    start = stop = -1
    for piece in pieces:
        first, last, _ = piece
        if start < 0 or first - stop > _GAP or max(stop, last) - start > longest:
            start = first
            groups[start] = []
            stop = last
        groups[start].append(piece)
        stop = max(stop, last)
    return groups


def _start(part: tuple[int, int, object]) -> int:
    return part[0]
