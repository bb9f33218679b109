"""What becomes of the items that a rank reads: which ranges, into which memory, checked by what. No I/O."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata
from torch.distributed.checkpoint.planner import ReadItem

from torchferry.distributed.archives import Guess, Item, StoredTensor, contiguous_strides
from torchferry.distributed.checks import PartChecksums, ReadPart, WantedPart
from torchferry.distributed.metadata import chunk_of
from torchferry.distributed.slices import Direct, Piece, cut
from torchferry.engine.memory import BLOCK_SIZE, copy_bytes
from torchferry.engine.transfer import current
from torchferry.engine.types import ObjectStat
from torchferry.errors import CheckpointCorruptError, CheckpointFormatError, TorchferryError
from torchferry.formats.archive import Record
from torchferry.formats.checked import load_bytes
from torchferry.printable import printable

__all__ = ["Plan", "Wanted", "Where", "where_stored"]


@dataclass(frozen=True, slots=True)
class Wanted:
    """One item to read.

    Attributes:
        request: DCP's.
        number: Of the file.
        info: Where it is in the file.
        target: The tensor to fill; None for bytes.
    """

    request: ReadItem
    number: int
    info: Any
    target: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Where:
    """Where a piece of a tensor is in a file.

    Attributes:
        dtype: Of its elements.
        start: Of its first element, in bytes.
        strides: Of its elements.
        record: Offset, size and CRC32 of what was stored together; None for a CRC32 that is not known.
    """

    dtype: torch.dtype
    start: int
    strides: Sequence[int]
    record: tuple[int, int, int | None]


def where_stored(
    info: Any, dtype: torch.dtype, chunk: ChunkStorageMetadata, stored: StoredTensor | None
) -> Where | None:
    """Where an item's tensor is; None where torch has to load it.

    Raises:
        CheckpointCorruptError: the metadata contradicts itself.
    """
    if getattr(info, "data_offset", None) is not None:
        nbytes = chunk.sizes.numel() * dtype.itemsize
        if not 0 <= info.data_offset <= info.data_offset + nbytes <= info.length:
            raise CheckpointCorruptError(f"The metadata of {info.relative_path} contradicts itself.")
        start = info.offset + info.data_offset
        return Where(dtype, start, contiguous_strides(chunk.sizes), (start, nbytes, info.crc32))
    if stored is None or stored.shape != tuple(chunk.sizes):
        return None
    record = (info.offset + stored.record_offset, stored.record_size, stored.crc32)
    return Where(stored.dtype, info.offset + stored.first, stored.strides, record)


class Plan:
    """What is read, and what becomes of it.

    Attributes:
        parts: What to read of which file.
        checksums: Of each file.
        nbytes: Of the parts.
    """

    def __init__(
        self,
        metadata: Metadata,
        wanted: Sequence[Wanted],
        stored: Mapping[tuple[int, int], StoredTensor],
        guesses: Mapping[tuple[int, int], Guess],
        contents: dict[int, bytearray],
        stats: Sequence[ObjectStat],
        verify: bool,
    ) -> None:
        self._metadata = metadata
        self._stored = stored
        self._guesses = guesses
        self._guessed: dict[tuple[int, int], tuple[Wanted, Guess]] = {}  # by file, and where the storage begins
        self._contents = contents
        self._stats = stats
        self._verify = verify
        self._records: list[list[Record]] = [[] for _ in stats]
        self._runs: list[dict[tuple[int, int], WantedPart]] = [{} for _ in stats]
        self._whole: dict[tuple[int, int], Item] = {}  # items in memory, by file and offset
        self._filled: dict[tuple[int, int], torch.Tensor] = {}  # targets of whole items
        self._later: list[Callable[[], object]] = []
        self.parts: list[tuple[int, Direct | Piece]] = []
        self._wholes = Counter((want.number, want.info.offset) for want in wanted)
        for index, want in enumerate(wanted):
            self._add(index, want)
        self.nbytes = sum(
            part.stop - part.start if isinstance(part, Piece) else len(part.memory) for _, part in self.parts
        )
        self.checksums: list[PartChecksums | None] = [
            PartChecksums(records, runs, stat.url) if (records or runs) and verify else None
            for records, runs, stat in zip(self._records, self._runs, stats, strict=True)
        ]

    @property
    def read_parts(self) -> list[ReadPart]:
        """The parts of items that other ranks read the rest of."""
        return [part for place, part in self._read() if place not in self._guessed]

    def disproved(self) -> list[Wanted]:
        """To be called when everything is there: the items that are not where they were guessed to be.

        What was read for them is something else, or damaged.
        """
        crc32s = {place: part.crc32 for place, part in self._read()}
        wrong: list[Wanted] = []
        for place, (want, guess) in self._guessed.items():
            url = self._stats[want.number].url
            found = guess.confirmed(url)
            if found is None:
                wrong.append(want)
            elif None not in {found.crc32, crc32s.get(place)} and found.crc32 != crc32s[place]:
                current().warn(
                    f"{url}: {printable(want.request.storage_index.fqn)} does not match its CRC32. Reading it again."
                )
                wrong.append(want)
        return wrong

    def finish(self) -> None:
        """Does what can be done only when everything is right."""
        for call in self._later:
            call()

    def _add(self, index: int, want: Wanted) -> None:
        info = want.info
        if want.target is None:
            self._later.append(partial(self._hand_over, index, self._read_whole(want)))
            return
        request, target = want.request, want.target
        if target.shape != request.lengths:
            raise CheckpointFormatError(
                f"{printable(request.storage_index.fqn)} has the shape {tuple(request.lengths)} in the checkpoint, and "
                f"{tuple(target.shape)} where it is to be loaded."
            )
        if not target.numel():
            return
        dtype, chunk = chunk_of(self._metadata, request.storage_index)
        place = (want.number, info.offset)
        guess = self._guesses.get(place)
        where = where_stored(info, dtype, chunk, self._stored.get(place) if guess is None else guess.stored)
        if where is None:
            self._later.append(partial(self._load, want, self._read_whole(want)))
            return
        if request.lengths == chunk.sizes:
            first = self._first_target(place, target, where.dtype)
            if first is None:
                return
            target = first
            start, size, crc32 = where.record
            if crc32 is not None and size == target.numel() * where.dtype.itemsize:
                name = f"{request.storage_index.fqn} at {tuple(chunk.offsets)}"
                self._records[want.number].append(Record(name, start, size, crc32))
        offsets = zip(request.storage_offsets, where.strides, strict=True)
        start = where.start + sum(at * stride for at, stride in offsets) * where.dtype.itemsize
        parts = list(cut(target, start, where.strides, where.dtype))
        self.parts += [(want.number, part) for part in parts]
        if guess is not None:
            self._add_guess(want, guess)
            return
        _, size, crc32 = where.record
        nbytes = target.numel() * where.dtype.itemsize
        is_run = (
            sum(part.stop - part.start if isinstance(part, Piece) else len(part.memory) for part in parts) == nbytes
        )
        if (
            request.lengths != chunk.sizes
            and is_run
            and len(parts) == _spanned(parts, start, nbytes)
            and crc32 is not None
        ):
            name = f"{request.storage_index.fqn} at {tuple(chunk.offsets)}"
            item = info.relative_path, info.offset
            self._runs[want.number][start, nbytes] = WantedPart(name, item, (where.record[0], size, crc32))

    def _first_target(self, place: tuple[int, int], target: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        """What an item is read into, so that each of its targets gets all bits of it; None where it is read already."""
        is_new = place not in self._filled
        if is_new:
            is_exact = self._wholes[place] == 1 or target.dtype == dtype
            self._filled[place] = target if is_exact else torch.empty(target.shape, dtype=dtype)
        first = self._filled[place]
        if first is not target:
            self._later.append(partial(target.copy_, first))
        return first if is_new else None

    def _add_guess(self, want: Wanted, guess: Guess) -> None:
        """Plans to read what tells whether a guess is right, and to compute the CRC32 of the storage."""
        first, size = want.info.offset + guess.stored.record_offset, guess.stored.record_size
        self._guessed[want.number, first] = want, guess
        item = want.info.relative_path, want.info.offset
        self._runs[want.number][first, size] = WantedPart(want.request.storage_index.fqn, item, (first, size, 0))
        for start, memory in ((want.info.offset, guess.head), (first + size, guess.tail)):
            sink = partial(copy_bytes, memoryview(memory))
            self.parts.append((want.number, Piece(start, start + len(memory), sink)))

    def _read(self) -> Iterator[tuple[tuple[int, int], ReadPart]]:
        """The parts whose CRC32s were computed, by file and offset."""
        for number, checksum in enumerate(self.checksums):
            for part in checksum.read if checksum is not None else ():
                yield (number, part.start), part

    def _read_whole(self, want: Wanted) -> Item:
        """Plans to read an item into memory; torch takes it from there."""
        info = want.info
        place = (want.number, info.offset)
        if place not in self._whole:
            content = bytearray(info.length)
            self._whole[place] = Item(content, self._stats[want.number].url)
            memory = memoryview(content)
            if info.length <= BLOCK_SIZE:
                part: Direct | Piece = Piece(info.offset, info.offset + info.length, partial(copy_bytes, memory))
            else:
                part = Direct(info.offset, memory)
            self.parts.append((want.number, part))
            crc32 = getattr(info, "crc32", None) if getattr(info, "data_offset", None) is None else None
            if crc32 is None and self._verify:
                self._later.append(self._whole[place].check)
            elif crc32 is not None:
                self._records[want.number].append(
                    Record(want.request.storage_index.fqn, info.offset, info.length, crc32)
                )
        return self._whole[place]

    def _hand_over(self, index: int, item: Item) -> None:
        self._contents[index] = item.content

    def _load(self, want: Wanted, item: Item) -> None:
        """Fills a target from an item that is in memory: the tensor in it, or what torch makes of it."""
        assert want.target is not None  # noqa: S101 - it is a tensor's
        url = self._stats[want.number].url
        try:
            tensor = item.tensor()
            if tensor is None:
                tensor = load_bytes(item.content, url, map_location="cpu")
        except TorchferryError:
            raise
        except Exception as error:
            raise CheckpointCorruptError(
                f"{url}: {printable(want.request.storage_index.fqn)} cannot be loaded: {error}"
            ) from error
        for dim, (offset, length) in enumerate(zip(want.request.storage_offsets, want.request.lengths, strict=True)):
            tensor = tensor.narrow(dim, offset, length)
        want.target.copy_(tensor)


def _spanned(parts: Sequence[Direct | Piece], start: int, nbytes: int) -> int:
    """How many of the parts lie, one after the other, in a run of bytes."""
    at = start
    for number, part in enumerate(parts):
        if part.start != at:
            return number
        at = part.stop if isinstance(part, Piece) else at + len(part.memory)
    return len(parts) if at == start + nbytes else 0
