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

__all__ = ["PartChecksums", "ReadPart", "WantedPart", "damage_of", "find_damaged"]


@dataclass(frozen=True, slots=True)
class WantedPart:
    """A run of bytes of what was stored together.

    Attributes:
        name: Of the item, for messages.
        item: Relative path of the shard, and the item's offset in it.
        whole: Offset, size and CRC32 of what was stored together.
    """

    name: str
    item: tuple[str, int]
    whole: tuple[int, int, int]


class ReadPart(NamedTuple):
    """A run of bytes that a rank has read; travels to the rank that puts them together.

    Attributes:
        url: Of the shard.
        name: Of the item.
        item: Relative path of the shard, and the item's offset in it.
        whole: Offset, size and CRC32 of what was stored together.
        start: Of the run, in the shard.
        size: In bytes.
        crc32: Of the run.
    """

    url: str
    name: str
    item: tuple[str, int]
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
            self.read.append(ReadPart(self._url, part.name, part.item, part.whole, record.offset, record.size, crc32))


def find_damaged(parts: Iterable[ReadPart]) -> list[ReadPart]:
    """Puts the parts of all ranks together, and checks each item of which they are all.

    Returns:
        Of each item that does not match its CRC32, a part. An item of which nobody has read some bytes is not checked.
    """
    by_item: dict[tuple[str, int], list[ReadPart]] = {}
    for part in parts:
        by_item.setdefault(part.item, []).append(part)
    return [of_item[0] for of_item in by_item.values() if _is_damaged(of_item)]


def _is_damaged(parts: Sequence[ReadPart]) -> bool:
    runs: dict[tuple[int, int], ReadPart] = {}
    for part in parts:
        twin = runs.setdefault((part.start, part.size), part)  # of another rank that has read the same
        if (twin.crc32, parts[0].whole) != (part.crc32, part.whole):
            return True
    offset, size, crc32 = parts[0].whole
    total, at = 0, offset
    for (start, length), part in sorted(runs.items()):
        if start != at:
            return False
        total = isal_zlib.crc32_combine(total, part.crc32, length)
        at += length
    return at == offset + size and total != crc32


def damage_of(part: ReadPart) -> CheckpointCorruptError:
    """The error that says that the item of a part is damaged."""
    offset, size, crc32 = part.whole
    return CheckpointCorruptError(
        f"{part.url} is damaged: {printable(part.name)} ({size} bytes at {offset}), which ranks have read in parts, "
        f"does not have the CRC32 {crc32:08x} that it was saved with. Another copy may be whole; verify=False loads "
        "this one as it is."
    )
