"""What the zip archive that ``torch.save`` writes looks like: its records, their offsets and their CRC32s. No I/O.

An archive is read from its end: the end record says where the central directory is, and the central directory
where each record is. What it does not say is where a record's data starts: between the record's local header and
its data lies padding of unknown length. torch reads 30 bytes of every local header to learn it. Here it is derived
from the directory alone, wherever two ways to derive it agree (see :func:`_data_offset`).

Sources: PKWARE's APPNOTE.TXT 6.3.10 for zip; ``caffe2/serialize/inline_container.cc`` (``getPadding``) and
``third_party/miniz-3.0.2/miniz.c`` (``mz_zip_writer_add_mem_ex_v2``) in PyTorch for what torch makes of it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from torchferry.errors import CheckpointCorruptError, CheckpointFormatError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = [
    "CENTRAL_HEADER",
    "CENTRAL_SIGNATURE",
    "DESCRIPTOR_SIGNATURE",
    "FLAG_DESCRIPTOR",
    "LEGACY_FORMAT",
    "LOCAL_HEADER",
    "LOCAL_HEADER_SIZE",
    "LOCAL_SIGNATURE",
    "SNIFF_SIZE",
    "ZIP_FORMAT",
    "Archive",
    "Directory",
    "Record",
    "find_directory",
    "parse_directory",
    "sniff",
]

LEGACY_FORMAT = "a checkpoint in torch's legacy format (before 1.6)"
ZIP_FORMAT = "a zip archive"
SNIFF_SIZE = 512

_UINT16_MAX = 0xFFFF
_UINT32_MAX = 0xFFFFFFFF
_ALIGNMENT = 64  # of the data of every record; storages may have a larger one (torch's config.save.storage_alignment)

_MAX_ALIGNMENT = 1 << 15  # the padding's length has 16 bits

LOCAL_HEADER = struct.Struct("<4sHHHHHIIIHH")
LOCAL_HEADER_SIZE = LOCAL_HEADER.size
CENTRAL_HEADER = struct.Struct("<4sHHHHHHIIIHHHHHII")
_END = struct.Struct("<4sHHHHIIH")
_END64_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQHHIIQQQQ")

LOCAL_SIGNATURE = b"PK\x03\x04"
DESCRIPTOR_SIGNATURE = b"PK\x07\x08"
CENTRAL_SIGNATURE = b"PK\x01\x02"
_END_SIGNATURE = b"PK\x05\x06"
_END64_LOCATOR_SIGNATURE = b"PK\x06\x07"
_END64_SIGNATURE = b"PK\x06\x06"

_FLAG_ENCRYPTED = 1
FLAG_DESCRIPTOR = 1 << 3
_DIRECTORY_ATTRIBUTE = 1 << 4
_ZIP64_EXTRA = 1

_SIGNATURES = (
    (LOCAL_SIGNATURE, ZIP_FORMAT),
    (_END_SIGNATURE, "an empty zip archive"),
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


class _Entry(NamedTuple):
    """What the central directory says of a record."""

    header_offset: int
    path: bytes
    flags: int
    method: int
    crc32: int
    stored_size: int
    size: int


@dataclass(frozen=True, slots=True)
class Archive:
    """The records of an archive, in the order of the file.

    Attributes:
        records: All of them.
        unproven: Indices of those whose offset could not be derived with certainty; :meth:`settle` reads them from the
            local headers. Never any in what torch itself wrote.
        start: Where the central directory starts, that is, where the records end.
    """

    url: str
    records: tuple[Record, ...]
    unproven: tuple[int, ...]
    start: int
    _entries: tuple[_Entry, ...] = field(repr=False)
    _index: Mapping[str, int] = field(repr=False)

    def __contains__(self, name: str) -> bool:
        return name in self._index

    def get(self, name: str) -> Record | None:
        """The record of that name, if there is one."""
        index = self._index.get(name)
        return None if index is None else self.records[index]

    @property
    def is_torchscript(self) -> bool:
        """Whether ``torch.jit.save`` wrote it; by the same sign as in ``torch.load``."""
        return "constants.pkl" in self._index

    @property
    def unproven_headers(self) -> list[int]:
        """The offsets of the local headers (of :data:`LOCAL_HEADER_SIZE` bytes) that :meth:`settle` wants to see."""
        return [self._entries[index].header_offset for index in self.unproven]

    @property
    def has_crc32s(self) -> bool:
        """Whether any record carries one; none does under ``torch.serialization.set_crc32_options(False)``."""
        return any(record.crc32 is not None for record in self.records)

    def settle(self, headers: Mapping[int, bytes]) -> Archive:
        """The archive with the offsets that its local headers give.

        Args:
            headers: The first 30 bytes of each of the :attr:`unproven_headers`, by offset.

        Raises:
            CheckpointCorruptError: a header is none, or leaves its record no room.
        """
        records = list(self.records)
        for index in self.unproven:
            entry, record = self._entries[index], records[index]
            fields = LOCAL_HEADER.unpack(headers[entry.header_offset])
            offset = entry.header_offset + LOCAL_HEADER_SIZE + fields[9] + fields[10]
            limit = self._entries[index + 1].header_offset if index + 1 < len(records) else self.start
            least = entry.header_offset + LOCAL_HEADER_SIZE + len(entry.path)
            if fields[0] != LOCAL_SIGNATURE or offset < least or offset + entry.stored_size > limit:
                raise CheckpointCorruptError(f"{self.url}: the local header of record {record.name} is damaged.")
            records[index] = Record(record.name, offset, record.size, record.crc32)
        return Archive(self.url, tuple(records), (), self.start, self._entries, self._index)

    def local_headers(self) -> Iterator[tuple[int, bytes]]:
        """Offset and bytes of a local header for each record, made from what is known.

        They say where the data starts, as torch reads it there. Together with the padding after them they are
        well-formed.
        """
        for entry, record in zip(self._entries, self.records, strict=True):
            extra = record.offset - entry.header_offset - LOCAL_HEADER_SIZE - len(entry.path)
            header = LOCAL_HEADER.pack(
                LOCAL_SIGNATURE,
                20,
                entry.flags & ~FLAG_DESCRIPTOR,
                entry.method,
                0,
                0,
                entry.crc32,
                min(entry.stored_size, _UINT32_MAX),
                min(entry.size, _UINT32_MAX),
                len(entry.path),
                extra,
            )
            padding = struct.pack("<2sH", b"FB", extra - 4) if extra >= 4 else b""  # noqa: PLR2004 - the length of that
            yield entry.header_offset, header + entry.path + padding


def sniff(head: bytes) -> str | None:
    """What a file that starts with ``head`` (:data:`SNIFF_SIZE` bytes) looks like, in words; None if nothing known."""
    text = head.lstrip()
    looks = (
        *((name, head.startswith(signature)) for signature, name in _SIGNATURES),
        (LEGACY_FORMAT, any(magic in head[:40] for magic in _LEGACY_MAGIC)),
        ("a tar archive", head[257:].startswith(b"ustar")),
        ("an HTML or XML page, such as a server's error message", text[:16].lower().startswith(_HTML)),
        ("a safetensors file", head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32),
        ("a plain pickle, not written by torch.save", head[:1] == b"\x80" and head[1:2] <= b"\x05"),
        ("JSON", text[:1] in {b"{", b"["}),
    )
    return next((name for name, matches in looks if matches), None)


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
    end = tail.rfind(_END_SIGNATURE, max(0, len(tail) - _UINT16_MAX - _END.size), len(tail) - _END.size + 4)
    if end < 0:
        return None
    _, disk, _, _, count, length, start, comment = _END.unpack_from(tail, end)
    if end + _END.size + comment > len(tail) or disk not in {0, _UINT16_MAX}:
        raise CheckpointCorruptError(f"{url}: the end record of the archive is damaged.")
    locator = end - _END64_LOCATOR.size
    if locator >= 0 and tail[locator : locator + 4] == _END64_LOCATOR_SIGNATURE:
        at = _END64_LOCATOR.unpack_from(tail, locator)[2] - (size - len(tail))
        if not 0 <= at <= locator - _END64.size or tail[at : at + 4] != _END64_SIGNATURE:
            raise CheckpointCorruptError(f"{url}: the zip64 end record of the archive is damaged.")
        *_, count, length, start = _END64.unpack_from(tail, at)
    if start + length > size - len(tail) + end or count * CENTRAL_HEADER.size > length:
        raise CheckpointCorruptError(f"{url}: the end record points to a central directory that is not there.")
    return Directory(start, length, count)


def parse_directory(buffer: bytes | bytearray | memoryview, directory: Directory, url: str) -> Archive:
    """Parses a central directory; takes about half a second for 100,000 records.

    Args:
        buffer: Its bytes, all of them.
        directory: Where it is.
        url: For error messages.

    Raises:
        CheckpointCorruptError: it contradicts itself.
        CheckpointFormatError: it is the directory of a zip archive that is no checkpoint.
    """
    buffer = bytes(buffer)
    try:
        entries = sorted(_entries(buffer, directory))
    except (struct.error, ValueError) as error:
        raise CheckpointCorruptError(f"{url}: the central directory of the archive is damaged: {error}.") from error
    if not entries:
        raise CheckpointFormatError(f"{url} is an empty zip archive, not a checkpoint.")
    names = _names(entries, url)
    index = {name: number for number, name in enumerate(names)}
    if len(index) < len(names):
        raise CheckpointCorruptError(f"{url}: the central directory names a record twice.")
    _check(entries, index, url)

    records: list[Record] = []
    unproven: list[int] = []
    checked = any(entry.crc32 for entry in entries)  # without them, torch writes 0 for every record
    ends = [entry.header_offset for entry in entries[1:]] + [directory.start]
    for entry, name, end in zip(entries, names, ends, strict=True):
        offset = _data_offset(entry, end)
        if offset is None:
            unproven.append(len(records))
            offset = end - entry.stored_size
        if offset < entry.header_offset + LOCAL_HEADER_SIZE + len(entry.path):
            raise CheckpointCorruptError(f"{url}: the central directory leaves no room for record {name}.")
        if not entry.method and (entry.size != entry.stored_size or (entry.crc32 and not entry.size)):
            raise CheckpointCorruptError(
                f"{url}: the central directory contradicts itself on the size of record {name}."
            )
        crc32 = entry.crc32 if checked and not entry.method else None
        records.append(Record(name, offset, entry.stored_size, crc32))
    return Archive(url, tuple(records), tuple(unproven), directory.start, tuple(entries), index)


def _check(entries: list[_Entry], index: Mapping[str, int], url: str) -> None:
    """Refuses what torch would refuse, or would load wrongly."""
    if "constants.pkl" not in index and any(entry.method or entry.flags & _FLAG_ENCRYPTED for entry in entries):
        raise CheckpointFormatError(
            f"{url} is a checkpoint that another tool packed again, with compression or encryption: "
            "unpack it and pack it without (zip -0 -r)."
        )
    if entries[0].header_offset:
        raise CheckpointCorruptError(f"{url}: the central directory does not start with the record at the start.")
    # torch demands the version. 2.6 and later write .format_version and byteorder; without that torch assumes an order.
    for name in ("version", "byteorder") if ".format_version" in index else ("version",):
        if name not in index and f".data/{name}" not in index:
            raise CheckpointCorruptError(f"{url}: the central directory lacks the record {name}.")


def _names(entries: list[_Entry], url: str) -> list[str]:
    """The records' names, without the top folder that torch expects all of them to be in."""
    top, slash, _ = entries[0].path.partition(b"/")
    prefix = top + slash
    if not slash or not any(entry.path == prefix + b"data.pkl" for entry in entries):
        some = ", ".join(repr(entry.path.decode(errors="replace")) for entry in entries[:4])
        raise CheckpointFormatError(f"{url} is a zip archive but not a checkpoint: it has no data.pkl, but {some}.")
    try:
        names = [entry.path.decode() for entry in entries if entry.path.startswith(prefix)]
    except UnicodeDecodeError as error:
        raise CheckpointCorruptError(f"{url}: the central directory has a name that is not UTF-8.") from error
    if len(names) < len(entries):
        raise CheckpointCorruptError(
            f"{url}: the central directory has records outside the top folder {top.decode()!r}."
        )
    return [name[len(prefix.decode()) :] for name in names]


def _entries(buffer: bytes, directory: Directory) -> Iterator[_Entry]:
    at = 0
    for _ in range(directory.count):
        (
            signature, _, _, flags, method, _, _, crc32, stored_size, size,
            path_length, extra_length, comment_length, _, _, attributes, header_offset,
        ) = CENTRAL_HEADER.unpack_from(buffer, at)  # fmt: skip
        if signature != CENTRAL_SIGNATURE:
            raise ValueError(f"no record at byte {at} of it")
        path_end = at + CENTRAL_HEADER.size + path_length
        path = buffer[at + CENTRAL_HEADER.size : path_end]
        if attributes & _DIRECTORY_ATTRIBUTE and not path.endswith(b"/"):
            raise ValueError(f"it calls {path!r} a folder")  # torch would take uninitialized memory for its contents
        at = path_end + extra_length
        if _UINT32_MAX in {stored_size, size, header_offset}:
            size, stored_size, header_offset = _zip64(buffer[path_end:at], size, stored_size, header_offset)
        at += comment_length
        yield _Entry(header_offset, path, flags, method, crc32, stored_size, size)
    if at != len(buffer):
        raise ValueError(f"it has {len(buffer)} bytes, its records take {at}")


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


def _data_offset(entry: _Entry, end: int) -> int | None:
    """Where the data of a record starts; None where the directory alone does not prove it.

    The data ends where the next local header starts (``end``), or a data descriptor before. And it starts where
    torch's padding puts it, on the next multiple of the alignment; or right after the header, as in zip files of
    other tools. An offset on which both agree is right.
    """
    earliest = entry.header_offset + LOCAL_HEADER_SIZE + len(entry.path)
    extra = 4
    if entry.stored_size >= _UINT32_MAX or entry.header_offset >= _UINT32_MAX:
        extra += 4 + 16 * (entry.stored_size >= _UINT32_MAX) + 8 * (entry.header_offset >= _UINT32_MAX)
    for descriptor in (16, 24) if entry.flags & FLAG_DESCRIPTOR else (0,):
        offset = end - descriptor - entry.stored_size
        if offset == earliest:
            return offset
        alignment = _ALIGNMENT
        while alignment <= _MAX_ALIGNMENT:
            if offset == -(-(earliest + extra) // alignment) * alignment:
                return offset
            alignment *= 2
    return None
