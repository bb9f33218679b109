"""Checks the CRC32 of each record of an archive, from pieces that arrive in any order."""

from __future__ import annotations

import threading
from bisect import bisect_right
from typing import TYPE_CHECKING

from isal import isal_zlib

from torchferry.errors import CheckpointCorruptError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torchferry.archive import Record
    from torchferry.storage.base import Chunk

__all__ = ["Checksums"]


class Checksums:
    """The CRC32s of some records of one object, checked as their bytes arrive.

    Every byte is to be added once, in pieces of any size and any order, from any thread. Records that carry no CRC32
    are left out.
    """

    def __init__(self, records: Iterable[Record], url: str) -> None:
        self._url = url
        self._records = sorted((r for r in records if r.crc32 is not None and r.size), key=lambda record: record.offset)
        self._ends = [record.end for record in self._records]
        self._pieces: dict[int, list[tuple[int, int, int]]] = {}  # by record: (offset, length, CRC32) of its pieces
        self._added: dict[int, int] = {}  # by record: bytes of its pieces
        self._unchecked = len(self._records)
        self._lock = threading.Lock()

    def add(self, start: int, buffer: Chunk) -> None:
        """Takes the bytes that the object has at ``start``, and checks each record that they complete.

        Computes; call it in a worker thread for more than some MiB.

        Raises:
            CheckpointCorruptError: a record does not match its CRC32.
        """
        view = memoryview(buffer).cast("B")
        stop = start + len(view)
        whole = 0
        for number in range(bisect_right(self._ends, start), len(self._records)):
            record = self._records[number]
            if record.offset >= stop:
                break
            first, last = max(record.offset, start), min(record.end, stop)
            crc32 = isal_zlib.crc32(view[first - start : last - start])
            if last - first == record.size:
                self._check(record, crc32)
                whole += 1
            else:
                self._add_piece(number, first, last - first, crc32)
        with self._lock:
            self._unchecked -= whole

    def finish(self) -> None:
        """To be called when all is added.

        Raises:
            CheckpointCorruptError: a record did not arrive in full.
        """
        if self._unchecked:
            raise CheckpointCorruptError(f"{self._url}: {self._unchecked} records could not be checked.")

    def _add_piece(self, number: int, offset: int, length: int, crc32: int) -> None:
        record = self._records[number]
        with self._lock:
            pieces = self._pieces.setdefault(number, [])
            pieces.append((offset, length, crc32))
            self._added[number] = self._added.get(number, 0) + length
            if self._added[number] < record.size:
                return
            del self._pieces[number], self._added[number]
            self._unchecked -= 1
        total = 0
        for _, piece_length, piece_crc32 in sorted(pieces):
            total = isal_zlib.crc32_combine(total, piece_crc32, piece_length)
        self._check(record, total)

    def _check(self, record: Record, crc32: int) -> None:
        if crc32 != record.crc32:
            raise CheckpointCorruptError(
                f"{self._url} is damaged: record {record.name} ({record.size} bytes at {record.offset}) has the CRC32 "
                f"{crc32:08x}, not {record.crc32:08x} as when it was saved. Another copy may be whole; "
                "verify=False loads this one as it is."
            )
