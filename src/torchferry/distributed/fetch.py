"""Reads ranges of several objects as if they were one: planned together, at one pace."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeAlias

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
_BESIDE = 16 << 10  # bytes beside what goes straight into memory that are read with it, in one range: at most these
_BETWEEN = 1 * MIB  # between two objects, so that no range is of both


_Group: TypeAlias = "list[tuple[int, int, Piece]]"  # first and last offset of each


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

    async def read_into(self, path: str, start: int, buffers: Sequence[memoryview], stat: ObjectStat) -> None:
        """Reads a range of one object into pieces of memory."""
        del path, stat
        number = self.find(start)
        file, version = self.files[number]
        await self._backend.read_into(file, start - self.starts[number], buffers, version)


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
    runs = _runs(direct, groups, files.range_size)
    memories = (run.memory() for run in runs)
    beside = {start: part.group for run in runs for start, part in run.parts if isinstance(part, _Beside)}
    sink = _Sink(files, checksums)

    def memory(_start: int, _stop: int) -> list[memoryview]:
        return next(memories)  # asked for in the order of the ranges

    async with task_group() as tasks:
        if runs:
            ranges = [(run.start, run.stop) for run in runs]
            tasks.start_soon(partial(reader.stream, ranges, partial(sink.take, beside), memory=memory))
        if groups:
            ranges = [(start, _stop_of(group)) for start, group in groups.items()]
            tasks.start_soon(reader.stream, ranges, partial(sink.take, groups))
    if again := list(_damaged(wanted, checksums)):
        await fetch(files, again, checksums, url, finish=finish)
        return
    for checksum in checksums if finish else ():
        if checksum is not None:
            checksum.finish()


@dataclass(frozen=True, slots=True)
class _Sink:
    """Takes what is read, and has it checked.

    Attributes:
        files: What it is read from.
        checksums: Of each object.
    """

    files: Files
    checksums: Sequence[Checksums | None]

    def take(self, groups: Mapping[int, _Group], start: int, buffer: Buffer) -> None:
        """Takes what is read for a group of pieces, by its start; or else went straight into memory."""
        if start not in groups:
            self._check(start, buffer)
            return
        view = memoryview(buffer)
        for first, last, piece in groups[start]:
            data = view[first - start : last - start]
            self._check(first, data)
            piece.sink(data)

    def _check(self, start: int, buffer: Buffer) -> None:
        number = self.files.find(start)
        checksum = self.checksums[number]
        if checksum is not None:
            checksum.add(start - self.files.starts[number], buffer)


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


def _groups(pieces: Sequence[tuple[int, int, Piece]], longest: int) -> dict[int, _Group]:
    """Pieces that are read in one range, by its start."""
    groups: dict[int, _Group] = {}
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


def _stop_of(group: _Group) -> int:
    return max(last for _, last, _ in group)


@dataclass(frozen=True, slots=True)
class _Beside:
    """Bytes that are read with what goes straight into memory.

    Attributes:
        nbytes: How many.
        group: What is wanted of them.
    """

    nbytes: int
    group: _Group

    def __len__(self) -> int:
        return self.nbytes


@dataclass(slots=True)
class _Run:
    """One range that goes into several pieces of memory.

    Attributes:
        start: Where it begins.
        stop: Where it ends.
        parts: Where each begins, and its memory, if it has some.
        beside: Bytes of those that have none.
    """

    start: int
    stop: int
    parts: list[tuple[int, memoryview | _Beside]] = field(default_factory=list)
    beside: int = 0

    def add(self, start: int, part: memoryview | _Beside, longest: int) -> bool:
        """Adds a part; not where it is too far away, or the range would be too long."""
        gap, stop = start - self.stop, start + len(part)
        beside = gap + (len(part) if isinstance(part, _Beside) else 0)
        if self.parts and (gap < 0 or self.beside + beside > _BESIDE or stop - self.start > longest + _BESIDE):
            return False
        if gap:
            self.parts.append((self.stop, _Beside(gap, [])))
        self.parts.append((start, part))
        self.beside += beside
        self.stop = stop
        return True

    def memory(self) -> list[memoryview]:
        """The memory of each part."""
        return [memoryview(bytearray(len(part))) if isinstance(part, _Beside) else part for _, part in self.parts]


def _runs(direct: Sequence[tuple[int, int, memoryview]], groups: dict[int, _Group], longest: int) -> list[_Run]:
    """The ranges that go straight into memory, each with what is beside it, where that is little.

    Args:
        direct: What goes straight into memory.
        groups: Pieces that are read in one range; those that are read along are taken out.
        longest: Bytes of a range; with what is beside, it may be a little longer.
    """
    straight: list[tuple[int, memoryview | _Beside]] = [(start, memory) for start, _, memory in direct]
    little = [(start, _Beside(_stop_of(group) - start, group)) for start, group in groups.items()]
    parts = sorted([*straight, *(entry for entry in little if len(entry[1]) <= _BESIDE)], key=_start)
    if any(start + len(part) > after for (start, part), (after, _) in pairwise(parts)):
        parts = straight  # something is wanted twice
    runs: list[_Run] = []
    for start, part in parts:
        if not (runs and runs[-1].add(start, part, longest)):
            runs.append(_Run(start, start))
            runs[-1].add(start, part, longest)
    runs = [run for run in runs if any(not isinstance(part, _Beside) for _, part in run.parts)]
    for start, part in (entry for run in runs for entry in run.parts):
        if isinstance(part, _Beside) and part.group:
            del groups[start]
    return runs


def _start(part: tuple[Any, ...]) -> int:
    start: int = part[0]
    return start
