"""The leaf types: what every other module may import."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

__all__ = ["MIB", "Buffer", "Chunk", "ObjectStat"]

MIB = 1 << 20

Buffer: TypeAlias = "bytes | bytearray | memoryview"
"""A contiguous buffer of bytes. Whoever holds it keeps its memory alive; nobody writes to it."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some bytes of an object, on their way to a store.

    Attributes:
        data: The bytes.
        crc32: Their CRC32, where it is known already; None where it is not.
    """

    data: Buffer
    crc32: int | None = None

    def __len__(self) -> int:
        return len(self.data)


@dataclass(frozen=True, slots=True)
class ObjectStat:
    """One version of one object.

    Attributes:
        url: The object's full URL.
        size: Its length in bytes.
        etag: Names this version: an ETag (S3, Azure), a generation (GCS), or what the filesystem has in
            its place. None where a store has nothing of the kind: its reads cannot be pinned.
        metadata: User metadata stored with the object. ``write`` returns what it was given, or what a backend made of
            that for a store that is particular about names; ``stat`` what the store holds.
    """

    url: str
    size: int
    etag: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict, compare=False)
