"""Proves that a checkpoint is still what it was when it was loaded, so that it need not be uploaded again.

The proof is in the archive's own CRC32s: the object is saved once more, into nothing, and its records (names, sizes,
CRC32s, in their order) are compared with those in the store. The first of them is the pickle, which holds all
structure and every value that is no tensor. torch computes the CRC32s at some 3 GB/s.
"""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING, Any

import torch

from torchferry.archive import LOCAL_HEADER_SIZE, find_directory, parse_directory
from torchferry.errors import TorchferryError
from torchferry.loading import inspect_async
from torchferry.storage.cancellation import in_thread

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fsspec import AbstractFileSystem

    from torchferry.archive import Record

__all__ = ["is_unchanged"]


async def is_unchanged(content: dict[str, Any], uri: str, filesystem: AbstractFileSystem) -> bool:
    """Whether ``content``, saved, would be what is stored at ``uri``.

    Reads at most 2 MiB of the object. A checkpoint whose structure or plain values changed is found out before any
    tensor is looked at.

    Args:
        content: What would be saved.
        uri: Where it was loaded from.
        filesystem: Reaches the store.
    """
    try:
        manifest = await inspect_async(uri, filesystem=filesystem)
    except TorchferryError:
        return False  # gone, replaced by something else, or out of reach: nothing can be proved
    return await in_thread(_saves_as, content, manifest.records)


def _saves_as(content: dict[str, Any], records: Sequence[Record]) -> bool:
    expected = _identities(records)
    # torch.serialization.set_crc32_options(False), there or here: nothing can be proved.
    if any(crc32 is None for _, _, crc32 in expected) or not torch.serialization.get_crc32_options():
        return False
    sink = _Sink(records)
    try:
        torch.save(content, sink)  # type: ignore[arg-type]  # it needs write and flush, and says that it needs IO[bytes]
    except Exception:
        if sink.changed:  # which ended it early; torch makes other errors of that one
            return False
        raise
    return _identities(sink.records()) == expected


def _identities(records: Sequence[Record]) -> list[tuple[str, int, int | None]]:
    return [(record.name, record.size, record.crc32) for record in records]


class _Sink:
    """A file that keeps no more than its beginning and its end.

    Attributes:
        changed: The first record is not the expected one; ``write`` has raised, for the rest does not matter.
    """

    def __init__(self, expected: Sequence[Record]) -> None:
        self.changed = False
        self._first = expected[0]
        self._head = bytearray()
        self._head_checked = False
        # The central directory, which is what counts of the end: a header and a path a record, and the end records.
        self._tail_size = sum(128 + len(record.name) for record in expected) + (1 << 16)
        self._tail = bytearray()
        self._size = 0

    def write(self, data: memoryview) -> int:
        """Takes a part of the archive."""
        self._size += len(data)
        self._tail += data[-self._tail_size :]
        if len(self._tail) > 2 * self._tail_size:
            del self._tail[: -self._tail_size]
        if not self._head_checked:
            self._head += data
            self._check_head()
        return len(data)

    def flush(self) -> None:
        """Nothing to do, but torch asks."""

    def records(self) -> Sequence[Record]:
        """The records of what was written."""
        name = "what would be saved"
        directory = find_directory(self._tail, self._size, name)
        if directory is None:
            raise AssertionError("torch.save has written no archive.")
        start = len(self._tail) - self._size + directory.start
        return parse_directory(self._tail[start : start + directory.size], directory, name).records

    def _check_head(self) -> None:
        """Compares the first record as soon as it is complete: it comes right after its local header."""
        if len(self._head) < LOCAL_HEADER_SIZE:
            return
        path_size, extra_size = struct.unpack_from("<HH", self._head, LOCAL_HEADER_SIZE - 4)
        start = LOCAL_HEADER_SIZE + path_size + extra_size
        end = start + self._first.size
        if len(self._head) >= end:
            self._head_checked = True
            self.changed = zlib.crc32(self._head[start:end]) != self._first.crc32
            self._head.clear()
        if self.changed:
            raise InterruptedError("The checkpoint has changed.")
