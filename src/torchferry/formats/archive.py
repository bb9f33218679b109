"""What the zip archive that ``torch.save`` writes looks like: its records, their offsets and their CRC32s. No I/O.

An archive is read from its end: the end record says where the central directory is, and the central directory
where each record is. What it does not say is where a record's data starts: between the record's local header and
its data lies padding of unknown length. torch reads 30 bytes of every local header to learn it. Here two ways to
derive it from the directory alone are compared (:meth:`Records._find_offsets`). Only where they differ for any
record, all local headers are read.

A directory may have a million records. What is known of them is held in columns, 60 bytes a record; a
:class:`Record` is made when it is asked for.

Sources: PKWARE's APPNOTE.TXT 6.3.10 for zip; ``caffe2/serialize/inline_container.cc`` (``getPadding``) and
``third_party/miniz-3.0.2/miniz.c`` (``mz_zip_writer_add_mem_ex_v2``) in PyTorch for what torch makes of it.
"""

from __future__ import annotations

import struct
import zlib
from array import array
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from itertools import chain, islice, pairwise
from typing import TYPE_CHECKING, overload

from torchferry.errors import CheckpointCorruptError, CheckpointFormatError
from torchferry.formats.layout import Layout, whole
from torchferry.printable import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "CENTRAL_HEADER",
    "CENTRAL_SIGNATURE",
    "DESCRIPTOR_SIGNATURE",
    "END",
    "END64",
    "END64_LOCATOR",
    "END64_LOCATOR_SIGNATURE",
    "END64_SIGNATURE",
    "END_SIGNATURE",
    "FLAG_DESCRIPTOR",
    "INDEX_FORMAT",
    "LEGACY_FORMAT",
    "LOCAL_HEADER",
    "LOCAL_HEADER_SIZE",
    "LOCAL_SIGNATURE",
    "SAFETENSORS_FORMAT",
    "SNIFF_SIZE",
    "ZIP_FORMAT",
    "Archive",
    "Directory",
    "Record",
    "Records",
    "find_directory",
    "parse_directory",
    "read_archive",
    "sniff",
]

INDEX_FORMAT = "an index of safetensors files"
SAFETENSORS_FORMAT = "a safetensors file"
LEGACY_FORMAT = "a checkpoint in torch's legacy format (before 1.6)"
ZIP_FORMAT = "a zip archive"
SNIFF_SIZE = 512

_UINT16_MAX = 0xFFFF
_UINT32_MAX = 0xFFFFFFFF
_ALIGNMENT = 64  # of the data of every record, unless torch's config.save.storage_alignment says otherwise
_MAX_ALIGNMENT = 1 << 15  # the padding's length has 16 bits
_DIRECTORY_SIZE = (4 << 20, 1.5)  # bytes that a directory may have, and for each byte of the records before it
_SHOWN_RECORDS = 20  # in a repr
_MAX_DIRECTORY = (1 << 31) - 1  # positions in it are held in 32 bits

LOCAL_HEADER = struct.Struct("<4sHHHHHIIIHH")
LOCAL_HEADER_SIZE = LOCAL_HEADER.size
_LOCAL_LENGTHS = struct.Struct("<4s22xHH")
CENTRAL_HEADER = struct.Struct("<4sHHHHHHIIIHHHHHII")
_CENTRAL_FIELDS = struct.Struct("<4s4xHH4xiIIHHH4xII")  # those that are used
END = struct.Struct("<4sHHHHIIH")
END64_LOCATOR = struct.Struct("<4sIQI")
END64 = struct.Struct("<4sQHHIIQQQQ")

LOCAL_SIGNATURE = b"PK\x03\x04"
DESCRIPTOR_SIGNATURE = b"PK\x07\x08"
CENTRAL_SIGNATURE = b"PK\x01\x02"
END_SIGNATURE = b"PK\x05\x06"
END64_LOCATOR_SIGNATURE = b"PK\x06\x07"
END64_SIGNATURE = b"PK\x06\x06"

_FLAG_ENCRYPTED = 1
FLAG_DESCRIPTOR = 1 << 3
_DIRECTORY_ATTRIBUTE = 1 << 4
_ZIP64_EXTRA = 1

_SIGNATURES = (
    (LOCAL_SIGNATURE, ZIP_FORMAT),
    (END_SIGNATURE, "an empty zip archive"),
    (b"\x1f\x8b", "a gzip file"),
    (b"\x28\xb5\x2f\xfd", "a zstd file"),
    (b"BZh", "a bzip2 file"),
    (b"\xfd7zXZ\x00", "an xz file"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (b"GGUF", "a GGUF file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"PAR1", "a Parquet file"),
)
# torch.serialization.MAGIC_NUMBER, pickled with protocol 2 or later, 0 or 1
_LEGACY_MAGIC = (b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19", b"L119547037146038801333356L")
_HTML = (b"<!doctype", b"<html", b"<?xml", b"<head", b"<error")


@dataclass(frozen=True, slots=True)
class Record:
    """One record of an archive.

    Attributes:
        name: Its name without the archive's top folder, such as "data.pkl" or "data/0".
        offset: Where its data starts in the object, in bytes.
        size: Bytes of data, as they are stored.
        crc32: Of the data; None where the file carries none: it was saved under
            ``torch.serialization.set_crc32_options(False)``, or the record is compressed (source code in TorchScript).
    """

    name: str
    offset: int
    size: int
    crc32: int | None

    @property
    def end(self) -> int:
        """Where its data ends."""
        return self.offset + self.size


@dataclass(frozen=True, slots=True)
class Directory:
    """Where an archive's central directory is: offset and size in bytes, and the number of records in it."""

    start: int
    size: int
    count: int


class Records(Sequence[Record]):
    """The records of an archive, in the order of the file: a sequence that makes each when it is asked for.

    Attributes:
        are_checked: Whether they carry CRC32s. If not, torch writes 0 for each.
        top: The folder of all records, with its slash, as it is in the file.
    """

    def __init__(self, directory: bytes) -> None:
        self.are_checked = False
        self._directory = directory
        self.top = b""  # folder of all records, with its slash
        self._headers, self._stored, self._sizes = array("q"), array("q"), array("q")
        self._offsets = array("q")
        self._paths, self._crc32s = array("i"), array("i")  # where in the directory; CRC32s, as signed numbers
        self._lengths, self._flags, self._methods = array("H"), array("H"), array("H")  # the lengths of the paths
        self._table = array("i")  # a hash table of the paths: one more than the index of each, 0 where there is none

    def __len__(self) -> int:
        return len(self._headers)

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...

    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        crc32 = self._crc32s[index] & _UINT32_MAX if self.are_checked and not self._methods[index] else None
        return Record(self.name(index), self._offsets[index], self._stored[index], crc32)

    def __iter__(self) -> Iterator[Record]:
        skip, are_checked = len(self.top), self.are_checked
        columns = zip(self._offsets, self._stored, self._crc32s, self._methods, strict=True)
        for index, (offset, stored, crc32, method) in enumerate(columns):
            known = crc32 & _UINT32_MAX if are_checked and not method else None
            yield Record(self.path(index)[skip:].decode(), offset, stored, known)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Records):
            return NotImplemented
        return len(self) == len(other) and all(mine == others for mine, others in zip(self, other, strict=True))

    def __hash__(self) -> int:
        return hash((len(self), self._directory))

    def __repr__(self) -> str:
        return repr(self[:]) if len(self) <= _SHOWN_RECORDS else f"<{len(self)} records>"

    def name(self, index: int) -> str:
        """The name of a record, without the top folder."""
        return self.path(index)[len(self.top) :].decode()

    def get(self, name: str) -> Record | None:
        """The record of that name, if there is one."""
        index = self.find(name)
        return None if index is None else self[index]

    def find(self, name: str) -> int | None:
        """The index of the record of that name, if there is one."""
        path = self.top + name.encode(errors="surrogatepass")
        found = self._table[self._slot(path)] - 1
        return None if found < 0 else found

    def local_header_offset(self, index: int) -> int:
        """Where the local header of a record starts."""
        return self._headers[index]

    def local_header(self, index: int) -> bytes:
        """A local header for a record, made from what is known."""
        path = self.path(index)
        extra = self._offsets[index] - self._headers[index] - LOCAL_HEADER_SIZE - len(path)
        header = LOCAL_HEADER.pack(
            LOCAL_SIGNATURE,
            20,
            self._flags[index] & ~FLAG_DESCRIPTOR,
            self._methods[index],
            0,
            0,
            self._crc32s[index] & _UINT32_MAX,
            min(self._stored[index], _UINT32_MAX),
            min(self._sizes[index], _UINT32_MAX),
            len(path),
            extra,
        )
        padding = struct.pack("<2sH", b"FB", extra - 4) if extra >= 4 else b""  # noqa: PLR2004 - the length of that
        return header + path + padding

    def checked(self) -> tuple[array[int], array[int]]:
        """The indices of the records that have bytes and a CRC32, and where each of them ends."""
        if not self.are_checked:
            return array("q"), array("q")
        indices, ends = array("q"), array("q")
        for index, (offset, stored, method) in enumerate(zip(self._offsets, self._stored, self._methods, strict=True)):
            if stored and not method:
                indices.append(index)
                ends.append(offset + stored)
        return indices, ends

    def flags(self, index: int) -> int:
        """The flags of a record that its local header and the directory share."""
        return self._flags[index] & ~FLAG_DESCRIPTOR

    def settled(self, headers: bytes | bytearray, end: int, url: str) -> Records:
        """The same records, with the offsets that their local headers give.

        Args:
            headers: The first 30 bytes of each, one after another.
            end: Where the last record ends.
            url: For messages.

        Raises:
            CheckpointCorruptError: a header is none, or leaves its record no room.
        """
        offsets = array("q")
        ends = chain(islice(self._headers, 1, None), (end,))
        found = _LOCAL_LENGTHS.iter_unpack(headers)
        columns = zip(found, self._headers, self._lengths, self._stored, ends, strict=True)
        for (signature, length, extra), header, known, stored, stop in columns:
            offset = header + LOCAL_HEADER_SIZE + length + extra
            if signature != LOCAL_SIGNATURE or length != known or offset + stored > stop:
                name = printable(self.name(len(offsets)))
                raise CheckpointCorruptError(f"{url}: the local header of record {name} is damaged.")
            offsets.append(offset)
        records = copy(self)
        vars(records)["_offsets"] = offsets
        return records

    def path(self, index: int) -> bytes:
        """The name of a record with the top folder, as it is in the file."""
        at = self._paths[index]
        return self._directory[at : at + self._lengths[index]]

    @classmethod
    def parse(cls, buffer: bytes, directory: Directory, url: str) -> tuple[Records, Sequence[int]]:
        """The records of a directory, and where the local headers of those are whose offset it does not prove.

        Raises:
            ValueError: it contradicts itself.
            CheckpointFormatError: it is the directory of a zip archive that is no checkpoint.
        """
        records = cls(buffer)
        are_outside = records._read(directory.count)
        if not records:
            raise CheckpointFormatError(f"{url} is an empty zip archive, not a checkpoint.")
        records._sort()
        if not records.top or records.find("data.pkl") is None:
            some = ", ".join(repr(records.path(i).decode(errors="replace")) for i in range(min(len(records), 4)))
            raise CheckpointFormatError(f"{url} is a zip archive but not a checkpoint: it has no data.pkl, but {some}.")
        if are_outside:
            raise ValueError(f"it has records outside the top folder {records.top.decode(errors='replace')!r}")
        records._check(url)
        return records, records._find_offsets(directory.start)

    def _read(self, count: int) -> bool:
        """Reads the fields of so many records; returns whether some are outside the top folder.

        Takes some microseconds a record: it does nothing here that can be done for all at once.
        """
        buffer, unpack, at = self._directory, _CENTRAL_FIELDS.unpack_from, 0
        columns = (
            self._paths, self._lengths, self._flags, self._methods, self._crc32s,
            self._stored, self._sizes, self._headers,
        )  # fmt: skip
        add_path, add_length, add_flags, add_method, add_crc32, add_stored, add_size, add_header = (
            column.append for column in columns
        )
        are_outside = False
        top = b""
        for _ in range(count):
            signature, flags, method, crc32, stored, size, length, extra, comment, attributes, header = unpack(
                buffer, at
            )
            if signature != CENTRAL_SIGNATURE:
                raise ValueError(f"no record at byte {at} of it")
            at += CENTRAL_HEADER.size
            add_path(at)
            path = buffer[at : at + length]
            at += length
            if attributes & _DIRECTORY_ATTRIBUTE and not path.endswith(b"/"):
                raise ValueError(
                    f"it calls {path!r} a folder"
                )  # torch would take uninitialized memory for its contents
            if not path.isascii():
                path.decode()
            if not top and b"/" in path:
                top = self.top = b"".join(path.partition(b"/")[:2])
            if not top or not path.startswith(top):
                are_outside = True
            if _UINT32_MAX in {stored, size, header}:
                size, stored, header = _zip64(buffer[at : at + extra], size, stored, header)
            at += extra + comment
            add_length(length)
            add_flags(flags)
            add_method(method)
            add_crc32(crc32)
            add_stored(stored)
            add_size(size)
            add_header(header)
        if at != len(buffer):
            raise ValueError(f"it has {len(buffer)} bytes, its records take {at}")
        return are_outside

    def _sort(self) -> None:
        """Puts the records into the order of the file, and their names into a hash table."""
        if any(after < before for before, after in pairwise(self._headers)):
            order = sorted(range(len(self)), key=self._headers.__getitem__)
            for name in ("_headers", "_stored", "_sizes", "_paths", "_crc32s", "_lengths", "_flags", "_methods"):
                column = getattr(self, name)
                setattr(self, name, array(column.typecode, map(column.__getitem__, order)))
        slots = 1 << (2 * len(self)).bit_length()
        self._table = array("i", bytes(4 * slots))
        for index in range(len(self)):
            slot = self._slot(self.path(index))
            if self._table[slot]:
                raise ValueError("it names a record twice")
            self._table[slot] = index + 1

    def _slot(self, path: bytes) -> int:
        """Where in the table a path is, or would be."""
        table, mask = self._table, len(self._table) - 1
        slot = hash(path) & mask
        while (there := table[slot]) and self.path(there - 1) != path:
            slot = (slot + 1) & mask
        return slot

    def _check(self, url: str) -> None:
        """Refuses what torch would refuse, or would load wrongly."""
        is_packed = any(self._methods) or any(flags & _FLAG_ENCRYPTED for flags in self._flags)
        if is_packed and self.find("constants.pkl") is None:
            raise CheckpointFormatError(
                f"{url} is a checkpoint that another tool packed again, with compression or encryption: "
                "unpack it and pack it without (zip -0 -r)."
            )
        if self._headers[0]:
            raise ValueError("it does not start with the record at the start")
        # torch demands the version. 2.6 and later write .format_version and byteorder; without that torch assumes one.
        for name in ("version", "byteorder") if self.find(".format_version") is not None else ("version",):
            if self.find(name) is None and self.find(f".data/{name}") is None:
                raise ValueError(f"it lacks the record {name}")
        self.are_checked = any(self._crc32s)
        columns = zip(self._sizes, self._stored, self._crc32s, self._methods, strict=True)
        for index, (size, stored, crc32, method) in enumerate(columns):
            if not method and (size != stored or (crc32 and not size)):
                raise ValueError(f"it contradicts itself on the size of record {printable(self.name(index))}")

    def _find_offsets(self, end: int) -> Sequence[int]:
        """Fills in where the data of the records starts; returns the local headers of those for which it is not proven.

        The data ends where the next local header starts, or a data descriptor before that. And it starts where torch's
        padding puts it, on the next multiple of the alignment; or right after the header, as in zip files of other
        tools. Offsets on which both agree for every record are right.

        Args:
            end: Where the last record ends.
        """
        if self._headers[-1] > end or max(self._stored) > end:
            raise ValueError("it has records beyond their end")
        alignment = self._alignment()
        are_proven = True
        offsets = self._offsets
        ends = chain(islice(self._headers, 1, None), (end,))
        columns = zip(self._headers, self._stored, self._flags, self._lengths, ends, strict=True)
        for index, (header, stored, flags, length, stop) in enumerate(columns):
            earliest = header + LOCAL_HEADER_SIZE + length
            aligned = earliest
            if alignment is not None:
                is_large, is_far = stored >= _UINT32_MAX, header >= _UINT32_MAX
                extra = 4 + 4 * (is_large or is_far) + 16 * is_large + 8 * is_far  # the least that torch's padding has
                aligned = -(-(earliest + extra) // alignment) * alignment
            for descriptor in (16, 24) if flags & FLAG_DESCRIPTOR else (0,):
                offset = stop - descriptor - stored
                if offset in {earliest, aligned}:
                    break
            else:
                are_proven = False
                offset = stop - stored
            if offset < earliest:
                raise ValueError(f"it leaves no room for record {printable(self.name(index))}")
            offsets.append(offset)
        # What moves one record may make both ways agree on a wrong offset for another: then none is certain.
        return () if are_proven else self._headers

    def _alignment(self) -> int | None:
        """On what the data of each record starts; None if the directory does not say.

        From torch 2.6 on a record has it as text, and the directory has the CRC32 of that.
        """
        index = self.find(".storage_alignment")
        if index is None:
            return _ALIGNMENT
        crc32, size = self._crc32s[index] & _UINT32_MAX, self._stored[index]
        for power in range(_ALIGNMENT.bit_length() - 1, _MAX_ALIGNMENT.bit_length()):
            text = b"%d" % (1 << power)
            if zlib.crc32(text) == crc32 and len(text) == size:
                return 1 << power
        return None


@dataclass(frozen=True, slots=True)
class Archive:
    """The records of an archive.

    Attributes:
        records: All of them, in the order of the file.
        unproven: Where the local headers of those are whose offset could not be derived with certainty, all or none;
            :meth:`settle` takes it from there. Never any in what torch itself wrote with CRC32s.
        start: Where the central directory starts, that is, where the records end.
    """

    url: str
    records: Records
    unproven: Sequence[int]
    start: int

    def __contains__(self, name: str) -> bool:
        return self.records.find(name) is not None

    def get(self, name: str) -> Record | None:
        """The record of that name, if there is one."""
        return self.records.get(name)

    @property
    def is_torchscript(self) -> bool:
        """Whether ``torch.jit.save`` wrote it; by the same sign as in ``torch.load``."""
        return "constants.pkl" in self

    @property
    def has_crc32s(self) -> bool:
        """Whether any record carries one; none does under ``torch.serialization.set_crc32_options(False)``."""
        return self.records.are_checked

    def settle(self, headers: bytes | bytearray) -> Archive:
        """The archive with the offsets that its local headers give.

        Args:
            headers: The first 30 bytes of each of the :attr:`unproven` ones, one after another.

        Raises:
            CheckpointCorruptError: a header is none, or leaves its record no room.
        """
        return Archive(self.url, self.records.settled(headers, self.start, self.url), (), self.start)

    def local_headers(self) -> Iterator[tuple[int, bytes]]:
        """Offset and bytes of a local header for each record, made from what is known.

        They say where the data starts, as torch reads it there. Together with the padding after them they are
        well-formed.
        """
        for index in range(len(self.records)):
            yield self.records.local_header_offset(index), self.records.local_header(index)

    def whole(self, size: int) -> Layout:
        """The layout of all of the object of ``size`` bytes, with new local headers."""
        return whole(size, self.local_headers)


def sniff(head: bytes) -> str | None:
    """What a file that starts with ``head`` (:data:`SNIFF_SIZE` bytes) looks like, in words; None if nothing known."""
    text = head.lstrip()
    looks = (
        *((name, head.startswith(signature)) for signature, name in _SIGNATURES),
        (LEGACY_FORMAT, any(magic in head[:40] for magic in _LEGACY_MAGIC)),
        ("a tar archive", head[257:].startswith(b"ustar")),
        ("an HTML or XML page, such as a server's error message", text[:16].lower().startswith(_HTML)),
        (SAFETENSORS_FORMAT, head[8:].lstrip(b" \t\n\r")[:1] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32),
        ("a plain pickle, not written by torch.save", head[:1] == b"\x80" and head[1:2] <= b"\x05"),
        (INDEX_FORMAT, text[:1] == b"{" and (b'"weight_map"' in text or b'"metadata"' in text)),
        ("JSON", text[:1] in {b"{", b"["}),
    )
    return next((name for name, matches in looks if matches), None)


def read_archive(content: bytes | bytearray, url: str) -> Archive | None:
    """The directory of an archive that is in memory as a whole.

    Returns:
        None if there is no end record: it is no zip archive, or its end is missing.

    Raises:
        CheckpointCorruptError: it is damaged.
    """
    directory = find_directory(content, len(content), url)
    if directory is None:
        return None
    archive = parse_directory(content[directory.start : directory.start + directory.size], directory, url)
    if archive.unproven:
        archive = archive.settle(b"".join(content[at : at + LOCAL_HEADER_SIZE] for at in archive.unproven))
    return archive


def find_directory(tail: bytes | bytearray | memoryview, size: int, url: str) -> Directory | None:
    """Finds the central directory by the end record.

    Args:
        tail: The last bytes of the object, at least 64 KiB of them where there are so many.
        size: The object's length in bytes.
        url: For error messages.

    Returns:
        None if there is no end record: it is no zip archive, or its end is missing.

    Raises:
        CheckpointCorruptError: the end record contradicts itself or the object's size.
    """
    tail = bytes(tail)
    end = tail.rfind(END_SIGNATURE, max(0, len(tail) - _UINT16_MAX - END.size), len(tail) - END.size + 4)
    if end < 0:
        return None
    _, disk, _, _, count, length, start, comment = END.unpack_from(tail, end)
    if end + END.size + comment > len(tail) or disk not in {0, _UINT16_MAX}:
        raise CheckpointCorruptError(f"{url}: the end record of the archive is damaged.")
    locator = end - END64_LOCATOR.size
    if locator >= 0 and tail[locator : locator + 4] == END64_LOCATOR_SIGNATURE:
        at = END64_LOCATOR.unpack_from(tail, locator)[2] - (size - len(tail))
        if not 0 <= at <= locator - END64.size or tail[at : at + 4] != END64_SIGNATURE:
            raise CheckpointCorruptError(f"{url}: the zip64 end record of the archive is damaged.")
        *_, count, length, start = END64.unpack_from(tail, at)
    if start + length > size - len(tail) + end or count * CENTRAL_HEADER.size > length:
        raise CheckpointCorruptError(f"{url}: the end record points to a central directory that is not there.")
    if length > min(_DIRECTORY_SIZE[0] + _DIRECTORY_SIZE[1] * start, _MAX_DIRECTORY):
        raise CheckpointCorruptError(f"{url}: the central directory is too long for the records before it.")
    return Directory(start, length, count)


def parse_directory(buffer: bytes | bytearray | memoryview, directory: Directory, url: str) -> Archive:
    """Parses a central directory; takes some seconds for a million records.

    Args:
        buffer: Its bytes, all of them.
        directory: Where it is.
        url: For error messages.

    Raises:
        CheckpointCorruptError: it contradicts itself.
        CheckpointFormatError: it is the directory of a zip archive that is no checkpoint.
    """
    try:
        records, unproven = Records.parse(bytes(buffer), directory, url)
    except CheckpointFormatError:
        raise
    except (struct.error, ValueError, OverflowError) as error:
        raise CheckpointCorruptError(f"{url}: the central directory of the archive is damaged: {error}.") from error
    return Archive(url, records, unproven, directory.start)


def _zip64(extra: bytes, *fields: int) -> list[int]:
    """Replaces each field that is 0xFFFFFFFF by the next number of the zip64 extra field."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == _ZIP64_EXTRA:
            numbers = iter(struct.unpack_from(f"<{length // 8}Q", extra, at + 4))
            return [next(numbers, field) if field == _UINT32_MAX else field for field in fields]
        at += 4 + length
    return list(fields)
