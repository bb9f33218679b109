"""CRC32s of items that no rank reads as a whole: each rank's part has one, and together they are the item's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from isal import isal_zlib

from torchferry.errors import CheckpointCorruptError
from torchferry.formats.archive import Record
from torchferry.formats.checksum import Checksums
from torchferry.printable import printable

__all__ = ["PartChecksums", "ReadPart", "WantedPart", "check_parts"]


@dataclass(frozen=True, slots=True)
class WantedPart:
    """A run of bytes of what was stored together.

    Attributes:
        name: Of the item, for messages.
        whole: Offset, size and CRC32 of what was stored together.
    """

    name: str
    whole: tuple[int, int, int]


class ReadPart(NamedTuple):
    """A run of bytes that a rank has read; travels to the rank that puts them together.

    Attributes:
        url: Of the shard.
        name: Of the item.
        whole: Offset, size and CRC32 of what was stored together.
        start: Of the run, in the shard.
        size: In bytes.
        crc32: Of the run.
    """

    url: str
    name: str
    whole: tuple[int, int, int]
    start: int
    size: int
    crc32: int


class PartChecksums(Checksums):
    """Checks records, and computes the CRC32s of parts of others.

    Args:
        records: What is read whole.
        parts: What else is read, by offset and size; disjoint, and apart from the records.
        url: For messages.

    Attributes:
        read: The parts that are there.
    """

    def __init__(self, records: Sequence[Record], parts: Mapping[tuple[int, int], WantedPart], url: str) -> None:
        super().__init__([*records, *(Record(part.name, *at, 0) for at, part in parts.items())], url, twice=True)
        self.read: list[ReadPart] = []
        self._parts = parts

    def _check(self, record: Record, crc32: int) -> None:
        part = self._parts.get((record.offset, record.size))
        if part is None:
            super()._check(record, crc32)
        else:
            self.read.append(ReadPart(self._url, part.name, part.whole, record.offset, record.size, crc32))


def check_parts(parts: Iterable[ReadPart]) -> int:
    """Puts the parts of all ranks together, and checks each item of which they are all.

    Returns:
        How many items could not be checked, because nobody has read some of their bytes.

    Raises:
        CheckpointCorruptError: one does not match its CRC32.
    """
    by_item: dict[tuple[str, tuple[int, int, int]], dict[tuple[int, int], ReadPart]] = {}
    for part in parts:
        others = by_item.setdefault((part.url, part.whole), {})
        twin = others.setdefault((part.start, part.size), part)  # of another rank that has read the same
        if twin.crc32 != part.crc32:
            raise _damaged(part)
    unchecked = 0
    for (_, (offset, size, crc32)), runs in by_item.items():
        total, at = 0, offset
        for (start, length), part in sorted(runs.items()):
            if start != at:
                break
            total = isal_zlib.crc32_combine(total, part.crc32, length)
            at += length
        if at != offset + size:
            unchecked += 1
        elif total != crc32:
            raise _damaged(next(iter(runs.values())))
    return unchecked


def _damaged(part: ReadPart) -> CheckpointCorruptError:
    offset, size, crc32 = part.whole
    return CheckpointCorruptError(
        f"{part.url} is damaged: {printable(part.name)} ({size} bytes at {offset}), which ranks have read in parts, "
        f"does not have the CRC32 {crc32:08x} that it was saved with. Another copy may be whole; verify=False loads "
        "this one as it is."
    )
