"""Lays out the memory for a part of an archive as an archive of its own, which torch then loads.

It holds a pickle of that part and the storages that it needs. So what is loaded takes no more memory than it needs, and
torch sees nothing of the rest.
"""

from __future__ import annotations

import struct
import sys
import zlib
from bisect import bisect_right
from typing import TYPE_CHECKING

from torchferry.engine.reader import merge
from torchferry.formats.archive import (
    CENTRAL_HEADER,
    CENTRAL_SIGNATURE,
    END,
    END64,
    END64_LOCATOR,
    END64_LOCATOR_SIGNATURE,
    END64_SIGNATURE,
    END_SIGNATURE,
    LOCAL_HEADER,
    LOCAL_SIGNATURE,
)
from torchferry.formats.layout import Layout, Run

if TYPE_CHECKING:
    from collections.abc import Collection

    from torchferry.formats.archive import Archive

__all__ = ["subset"]

_PAGE = 4096  # records lie in pages as they do in the object: so the alignment of their data is the object's
_UINT16_MAX, _UINT32_MAX = 0xFFFF, 0xFFFFFFFF
_ZIP64_EXTRA = 1
_VERSION = b"3\n"  # of torch's format, as torch has written it since 1.6
_FITS_ANY = 1 << 62


def subset(archive: Archive, pickled: bytes, names: Collection[str], *, empty: bool = False) -> Layout:
    """The layout of an archive with another pickle, and only some of the storages.

    Records lie in it at the distances that they have in the object, where these are small, so that they are read in one
    range.

    Args:
        archive: The object's.
        pickled: The pickle.
        names: Of the records of the storages.
        empty: Whether to leave the bytes of the storages out, for tensors of the meta device.
    """
    part = _Subset(archive)
    part.add(b"data.pkl", pickled)
    part.add(b"version", _VERSION)
    wanted = sorted(index for name in names if (index := archive.records.find(name)) is not None)
    if empty:
        part.add(b"byteorder", sys.byteorder.encode())
        for index in wanted:
            part.add_empty(index)
    else:
        if (index := archive.records.find("byteorder")) is not None:
            wanted = sorted({*wanted, index})
        part.add_records(wanted)
    return part.finished()


class _Subset:
    def __init__(self, archive: Archive) -> None:
        self._records = archive.records
        self._at = 0
        self._runs: list[Run] = []
        self._written: list[tuple[int, bytes]] = []
        self._directory = bytearray()
        self._count = 0

    def add(self, name: bytes, data: bytes) -> None:
        """Adds a record with new data."""
        path = self._records.top + name
        crc32 = zlib.crc32(data)
        header = LOCAL_HEADER.pack(
            LOCAL_SIGNATURE, 20, 0, 0, 0, 0, crc32, len(data), len(data), len(path), 0
        )  # fmt: skip
        self._list(path, 0, crc32, len(data), self._at)
        self._written.append((self._at, header + path + data))
        self._at += len(header) + len(path) + len(data)

    def add_empty(self, index: int) -> None:
        """Adds a record of the object without its data."""
        header = self._records.local_header(index)
        self._list(self._records.path(index), self._records.flags(index), 0, 0, self._at)
        self._written.append((self._at, header))
        self._at += len(header)

    def add_records(self, indices: list[int]) -> None:
        """Adds records of the object, given in its order."""
        records = self._records
        data = [(records[index].offset, records[index].end) for index in indices]
        runs = merge(data, _FITS_ANY)
        starts = [start for start, _ in runs]
        shifts: dict[int, int] = {}  # by run: how much further back it lies in the object
        for index, (offset, _) in zip(indices, data, strict=True):
            header = records.local_header_offset(index)
            number = bisect_right(starts, offset) - 1
            start, stop = runs[number]
            if number not in shifts:
                first = -(-self._at // _PAGE) * _PAGE + header % _PAGE
                shifts[number] = header - first
                self._runs.append(Run(start, stop, start - shifts[number]))
                self._at = stop - shifts[number]
            at = header - shifts[number]
            record = records[index]
            self._list(records.path(index), records.flags(index), record.crc32 or 0, record.size, at)
            self._written.append((at, records.local_header(index)))

    def finished(self) -> Layout:
        """The layout of what was added."""
        start, length = self._at, len(self._directory)
        end = bytes(self._directory) + END64.pack(
            END64_SIGNATURE, END64.size - 12, 45, 45, 0, 0, self._count, self._count, length, start
        )
        end += END64_LOCATOR.pack(END64_LOCATOR_SIGNATURE, 0, start + length, 1)
        count = min(self._count, _UINT16_MAX)
        end += END.pack(END_SIGNATURE, 0, 0, count, count, min(length, _UINT32_MAX), min(start, _UINT32_MAX), 0)
        written = [*self._written, (start, end)]
        return Layout(start + len(end), self._runs, lambda: iter(written))

    def _list(self, path: bytes, flags: int, crc32: int, size: int, at: int) -> None:
        """Lists a record in the directory."""
        large = [number for number in (size, size, at) if number >= _UINT32_MAX]
        extra = struct.pack(f"<HH{len(large)}Q", _ZIP64_EXTRA, 8 * len(large), *large) if large else b""
        shown = min(size, _UINT32_MAX)
        self._directory += CENTRAL_HEADER.pack(
            CENTRAL_SIGNATURE, 45, 20, flags, 0, 0, 0, crc32, shown, shown, len(path), len(extra), 0, 0, 0, 0,
            min(at, _UINT32_MAX),
        ) + path + extra  # fmt: skip
        self._count += 1
