"""The CRC32 of each record of an archive: filled in as torch.save writes it, checked as it is read.

torch computes CRC32s at 3 to 6 GB/s, and of a whole storage before it writes any of it. isal does at 9 to 33 GB/s (the
latter with AVX-512), a piece at a time.
"""

from __future__ import annotations

import struct
import threading
from array import array
from bisect import bisect_right
from typing import TYPE_CHECKING

from isal import isal_zlib

from torchferry.engine.transfer import current
from torchferry.errors import CheckpointCorruptError
from torchferry.formats.archive import (
    CENTRAL_HEADER,
    CENTRAL_SIGNATURE,
    DESCRIPTOR_SIGNATURE,
    FLAG_DESCRIPTOR,
    LOCAL_HEADER,
    LOCAL_HEADER_SIZE,
    LOCAL_SIGNATURE,
    Records,
)
from torchferry.printable import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torchferry.engine.types import Buffer
    from torchferry.formats.archive import Record

__all__ = ["Checksums", "Crc32Filler", "UnknownLayoutError"]

_CRC32 = struct.Struct("<I")
_CRC32_IN_DESCRIPTOR = 4  # bytes before it
_CRC32_IN_CENTRAL_HEADER = 16
_SERIALIZATION_ID = b"/.data/serialization_id"
_UINT64_MAX = (1 << 64) - 1
_MOST_DAMAGED = 8  # records that are read again: more were damaged in the store, not on the way


class Crc32Filler:
    """Fills in the CRC32s that ``torch.save`` leaves out under ``set_crc32_options(False)``, as its writes pass.

    What torch writes for a record is its header, its name, the extra field in one write or two and, unless it is
    empty, its bytes and a descriptor, each with one write; after all records, the directory with one, and the end
    (``mz_zip_writer_add_mem_ex_v2`` in miniz). The CRC32s are in the descriptors and the directory, and a hash of them
    in the record ``.data/serialization_id``: torch takes what it hashes from every write that begins as a descriptor
    does, be it one or a record's bytes (``ostream_write_func`` in ``caffe2/serialize/inline_container.cc``).

    Attributes:
        fill: What is to be stored for the next of torch's writes: the same number of bytes. It raises an
            :class:`UnknownLayoutError` for what torch does not write, as far as is known: only zeros are overwritten.
            Each time another method, for what comes next.
    """

    def __init__(self) -> None:
        self.fill: Callable[[Buffer], Buffer] = self._on_header
        self._is_empty = False  # what its header says of the record
        self._extra_size = 0  # bytes of the extra field still to come
        self._is_serialization_id = False
        self._crc32 = 0  # of the bytes of the record so far
        self._crc32s: list[int] = []  # of the records
        self._hash = 0  # of the CRC32s

    def add(self, data: Buffer, crc32: int) -> None:
        """Takes some of a record's bytes, which are stored as they are; instead of :meth:`fill`, as often as needed.

        Args:
            data: The bytes.
            crc32: Their CRC32.
        """
        if self.fill == self._on_bytes:
            if data[:4] == DESCRIPTOR_SIGNATURE:
                self._hash_descriptor(data)
        elif self.fill != self._on_descriptor:
            raise _unknown_layout("a record's bytes")
        self._crc32 = isal_zlib.crc32_combine(self._crc32, crc32, len(data))
        self.fill = self._on_descriptor

    def _on_header(self, data: Buffer) -> Buffer:
        if len(data) != LOCAL_HEADER_SIZE:
            return self._on_directory(data)
        signature, _, flags, method, _, _, _, _, _, _, self._extra_size = LOCAL_HEADER.unpack(data)
        if signature != LOCAL_SIGNATURE or method:
            raise _unknown_layout("a record's header")
        self._is_empty = not flags & FLAG_DESCRIPTOR
        self._crc32 = 0
        self.fill = self._on_name
        return data

    def _on_name(self, data: Buffer) -> Buffer:
        self._is_serialization_id = data[-len(_SERIALIZATION_ID) :] == _SERIALIZATION_ID
        self.fill = self._on_extra
        return data

    def _on_extra(self, data: Buffer) -> Buffer:
        self._extra_size -= len(data)
        if self._extra_size <= 0:
            if self._is_empty:
                self._finish_record()
            else:
                self.fill = self._on_bytes
        return data

    def _on_bytes(self, data: Buffer) -> Buffer:
        if self._is_serialization_id:
            hash_of_names = bytes(data[:20])
            data = hash_of_names + b"%020d" % self._hash
        self.add(data, isal_zlib.crc32(data))
        return data

    def _on_descriptor(self, data: Buffer) -> Buffer:
        filled = bytearray(data)
        if filled[:4] != DESCRIPTOR_SIGNATURE or any(filled[_CRC32_IN_DESCRIPTOR : _CRC32_IN_DESCRIPTOR + _CRC32.size]):
            raise _unknown_layout("a record's descriptor")
        _CRC32.pack_into(filled, _CRC32_IN_DESCRIPTOR, self._crc32)
        self._hash_descriptor(filled)
        self._finish_record()
        return filled

    def _hash_descriptor(self, data: Buffer) -> None:
        if len(data) < _CRC32_IN_DESCRIPTOR + _CRC32.size:
            return  # torch looks at no shorter write either
        (crc32,) = _CRC32.unpack_from(data, _CRC32_IN_DESCRIPTOR)
        self._hash ^= (crc32 + 0x9E3779B9 + (self._hash << 6) + (self._hash >> 2)) & _UINT64_MAX  # c10::hash_combine

    def _finish_record(self) -> None:
        self._crc32s.append(self._crc32)
        self.fill = self._on_header

    def _on_directory(self, data: Buffer) -> Buffer:
        filled = bytearray(data)
        at = 0
        for crc32 in self._crc32s:
            signature, *_, unset, _, _, name, extra, comment, _, _, _, _ = CENTRAL_HEADER.unpack_from(filled, at)
            if signature != CENTRAL_SIGNATURE or unset:
                raise _unknown_layout("the directory")
            _CRC32.pack_into(filled, at + _CRC32_IN_CENTRAL_HEADER, crc32)
            at += CENTRAL_HEADER.size + name + extra + comment
        if at != len(filled):
            raise _unknown_layout("the directory")
        self.fill = self._on_end
        return filled

    def _on_end(self, data: Buffer) -> Buffer:
        return data


class UnknownLayoutError(RuntimeError):
    """``torch.save`` writes what no known version of it does."""


def _unknown_layout(what: str) -> UnknownLayoutError:
    return UnknownLayoutError(
        f"This torch.save writes {what} otherwise than any that torchferry knows: please report it. "
        "Nothing was stored. From now on, torch computes the CRC32s in this process: save again."
    )


def _described(record: Record) -> str:
    return f"record {printable(record.name)} ({record.size} bytes at {record.offset})"


def _crc32_of_zeros(size: int) -> int:
    """The CRC32 of so many zero bytes: that of each power of two is combined from two halves."""
    total, part, length = 0, isal_zlib.crc32(b"\0"), 1
    while size:
        if size & 1:
            total = isal_zlib.crc32_combine(total, part, length)
        part, length, size = isal_zlib.crc32_combine(part, part, length), 2 * length, size >> 1
    return total


def _checked(records: Sequence[Record]) -> tuple[array[int], array[int]]:
    order = sorted(range(len(records)), key=lambda index: records[index].offset)
    checked = array("q", (index for index in order if records[index].crc32 is not None and records[index].size))
    return checked, array("q", (records[index].end for index in checked))


class Checksums:
    """The CRC32s of some records of one object, checked as their bytes arrive.

    Add every byte once, in pieces of any size and any order, from any thread. Records without a CRC32 are left out.

    Args:
        records: May be a million: their numbers are kept in columns, 20 bytes a record.
        url: For messages.
        twice: Whether records that do not match are not an error at first: :meth:`take_damaged` has them, to be read
            and added again.
    """

    def __init__(self, records: Sequence[Record], url: str, *, twice: bool = False) -> None:
        self._url = url
        self._records = records
        # Indices of those with a CRC32, in the order of the file, and where they end.
        self._checked, self._ends = records.checked() if isinstance(records, Records) else _checked(records)
        self._pieces: dict[int, list[tuple[int, int, int]]] = {}  # by record: (offset, length, CRC32) of its pieces
        self._added: dict[int, int] = {}  # by record: bytes of its pieces
        self._unchecked = len(self._checked)
        self._damaged: list[Record] = []
        self._may_be_damaged = _MOST_DAMAGED if twice else 0
        self._lock = threading.Lock()

    def add(self, start: int, buffer: Buffer) -> int:
        """Takes the bytes that the object has at ``start``, and checks each record that they complete.

        Computes; call it in a worker thread for more than some MiB.

        Returns:
            The CRC32 of the buffer.

        Raises:
            CheckpointCorruptError: a record does not match its CRC32, for the second time where it may be read twice.
        """
        view = memoryview(buffer).cast("B")
        stop = start + len(view)
        whole = total = 0
        done = start
        for number in range(bisect_right(self._ends, start), len(self._checked)):
            record = self._records[self._checked[number]]
            if record.offset >= stop:
                break
            first, last = max(record.offset, start), min(record.end, stop)
            crc32 = isal_zlib.crc32(view[first - start : last - start])
            total = isal_zlib.crc32(view[done - start : first - start], total)  # between the records
            total = isal_zlib.crc32_combine(total, crc32, last - first)
            done = last
            if last - first == record.size:
                self._check(record, crc32)
                whole += 1
            else:
                self._add_piece(number, first, last - first, crc32)
        with self._lock:
            self._unchecked -= whole
        return isal_zlib.crc32(view[done - start :], total)

    @property
    def found_damage(self) -> bool:
        """Whether :meth:`take_damaged` has any."""
        return bool(self._damaged)

    def again(self) -> Checksums:
        """Those of the same records, with nothing added: what does not match is an error at once."""
        return Checksums(self._records, self._url)

    def take_damaged(self) -> list[Record]:
        """To be called when all is added, once: the records that do not match, to be read and added again."""
        with self._lock:
            damaged, self._damaged = self._damaged, []
            self._may_be_damaged = 0
            self._unchecked += len(damaged)
        for record in damaged:
            current().warn(f"{self._url}: {_described(record)} does not match its CRC32. Reading it again.")
        return damaged

    def finish(self) -> None:
        """To be called when all is added.

        Raises:
            CheckpointCorruptError: a record did not arrive in full.
        """
        if self._unchecked:
            raise CheckpointCorruptError(f"{self._url}: {self._unchecked} records could not be checked.")

    def _add_piece(self, number: int, offset: int, length: int, crc32: int) -> None:
        record = self._records[self._checked[number]]
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
        # torch.serialization.skip_data() has the CRC32 0 written for a record, and zeros for its bytes.
        was_skipped = not record.crc32 and crc32 == _crc32_of_zeros(record.size)
        if crc32 != record.crc32 and not was_skipped:
            with self._lock:
                if len(self._damaged) < self._may_be_damaged:
                    self._damaged.append(record)
                    return
            raise CheckpointCorruptError(
                f"{self._url} is damaged: {_described(record)} has the CRC32 {crc32:08x}, not {record.crc32:08x} as "
                "when it was saved. Another copy may be whole; verify=False loads this one as it is."
            )
