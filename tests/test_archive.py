from __future__ import annotations

import io
import os
import random
import struct
import subprocess
import textwrap
import zipfile
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils.serialization import config

from torchferry.errors import CheckpointCorruptError, CheckpointFormatError, TorchferryError
from torchferry.formats.archive import (
    CENTRAL_HEADER,
    LEGACY_FORMAT,
    LOCAL_HEADER_SIZE,
    ZIP_FORMAT,
    Archive,
    find_directory,
    parse_directory,
    sniff,
)
from torchferry.formats.checksum import Checksums
from torchferry.testing.forkserver import python

if TYPE_CHECKING:
    from pathlib import Path


def saved(obj: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(obj, file, **options)
    return file.getvalue()


def parse(data: bytes) -> Archive:
    directory = find_directory(data[-70_000:], len(data), "test://x")
    assert directory is not None
    return parse_directory(data[directory.start : directory.start + directory.size], directory, "test://x")


def settle(archive: Archive, data: bytes | bytearray) -> Archive:
    return archive.settle(b"".join(data[at : at + LOCAL_HEADER_SIZE] for at in archive.unproven))


def true_offset(data: bytes, info: zipfile.ZipInfo) -> int:
    path_length, extra_length = struct.unpack_from("<HH", data, info.header_offset + 26)
    offset: int = info.header_offset + LOCAL_HEADER_SIZE + path_length + extra_length
    return offset


def assert_true(archive: Archive, data: bytes) -> None:
    infos = zipfile.ZipFile(io.BytesIO(data)).infolist()
    assert len(infos) == len(archive.records)
    for info in infos:
        record = archive.get(info.filename.partition("/")[2])
        assert record is not None
        assert (record.offset, record.size, record.crc32) == (true_offset(data, info), info.file_size, info.CRC)


CHECKPOINT = {"a": torch.arange(20.0), "none": torch.empty(0), "b": [torch.ones(3, dtype=torch.int8), torch.zeros(70)]}


def test_offsets_come_from_the_directory_alone() -> None:
    data = saved(CHECKPOINT)
    archive = parse(data)
    assert not archive.unproven
    assert_true(archive, data)


@pytest.mark.parametrize("alignment", [1, 96, 128, 4096, 1 << 15])
def test_other_alignments_of_storages_are_told_or_left_to_the_local_headers(alignment: int) -> None:
    config.save.storage_alignment = alignment
    try:
        data = saved(CHECKPOINT)
    finally:
        config.save.storage_alignment = 64
    archive = parse(data)
    assert bool(archive.unproven) == (alignment in {1, 96})
    if archive.unproven:
        archive = settle(archive, data)
    assert not archive.unproven
    assert_true(archive, data)


def test_the_directory_of_a_checkpoint_beyond_4_gib(tmp_path: Path) -> None:
    path = tmp_path / "large.pt"
    tensors = {
        "a": torch.empty(1 << 20),
        "b": torch.empty((4 << 30) + 8, dtype=torch.uint8),
        "c": torch.empty(7),
        "d": 1,
    }
    with torch.serialization.skip_data():  # sparse: headers, no data
        torch.save(tensors, path)
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(-70_000, os.SEEK_END)
        tail = file.read()
        directory = find_directory(tail, size, "test://x")
        assert directory is not None
        file.seek(directory.start)
        archive = parse_directory(file.read(directory.size), directory, "test://x")
        assert not archive.unproven
        assert [record.size for record in archive.records if record.name.startswith("data/")] == [
            4 << 20,
            (4 << 30) + 8,
            28,
        ]
        assert archive.records[-1].offset > 4 << 30
        for record, header in zip(archive.records, dict(archive.local_headers()), strict=True):
            file.seek(header)
            fields = struct.unpack("<4s22xHH", file.read(LOCAL_HEADER_SIZE))
            assert record.offset == header + LOCAL_HEADER_SIZE + fields[1] + fields[2]


def test_archives_that_other_tools_wrote_are_read() -> None:
    source = zipfile.ZipFile(io.BytesIO(saved(CHECKPOINT)))
    plain, extra = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(plain, "w") as archive, zipfile.ZipFile(extra, "w") as archive_extra:
        for name in source.namelist():
            archive.writestr(name, source.read(name))
            info = zipfile.ZipInfo(name)
            info.extra = b"UT\x05\x00\x01\x00\x00\x00\x00"  # a time stamp, as Info-ZIP writes it
            archive_extra.writestr(info, source.read(name))
    parsed = parse(plain.getvalue())
    assert not parsed.unproven
    assert_true(parsed, plain.getvalue())
    data = extra.getvalue()
    parsed = parse(data)
    assert len(parsed.unproven) == len(parsed.records)
    assert_true(settle(parsed, data), data)


@pytest.mark.parametrize("size", [1, 8, 16, 24, 30, 40, 64, 128, 4096])
@pytest.mark.parametrize("alignment", [64, 128])
def test_filler_of_any_size_moves_no_record(alignment: int, size: int) -> None:
    config.save.storage_alignment = alignment
    try:
        data = saved(CHECKPOINT)
    finally:
        config.save.storage_alignment = 64
    data = with_filler(data, size)
    archive = parse(data)
    assert archive.unproven
    assert_true(settle(archive, data), data)


def test_offsets_in_a_file_that_does_not_prove_its_alignment_are_read() -> None:
    torch.serialization.set_crc32_options(False)
    try:
        data = saved(CHECKPOINT)
    finally:
        torch.serialization.set_crc32_options(True)
    archive = parse(data)
    assert archive.unproven
    settled = settle(archive, data)
    infos = zipfile.ZipFile(io.BytesIO(data)).infolist()
    assert [record.offset for record in settled.records] == [true_offset(data, info) for info in infos]


def with_filler(data: bytes, size: int) -> bytes:
    """The same archive with so many bytes before the third record and all after it."""
    archive = parse(data)
    at = archive.records.local_header_offset(2)
    start = archive.start + size
    filled = bytearray(data[:at] + b"f" * size + data[at:])
    entry = start
    for index in range(len(archive.records)):
        fields = list(CENTRAL_HEADER.unpack_from(filled, entry))
        fields[-1] += size if index >= 2 else 0
        CENTRAL_HEADER.pack_into(filled, entry, *fields)
        entry += CENTRAL_HEADER.size + sum(fields[10:13])
    end = filled.rindex(b"PK\x05\x06")
    struct.pack_into("<I", filled, end + 16, start)
    if (locator := filled.rfind(b"PK\x06\x07")) > 0:
        record = filled.rindex(b"PK\x06\x06")
        struct.pack_into("<Q", filled, locator + 8, record)
        struct.pack_into("<Q", filled, record + 48, start)
    return bytes(filled)


def test_a_directory_of_a_million_records_takes_a_hundred_bytes_a_record() -> None:
    program = """
        import pathlib
        from torchferry.formats.archive import CENTRAL_HEADER, Directory, parse_directory
        names = [b"a/data.pkl", *(b"a/data/%d" % n for n in range(1_000_000)), b"a/version"]
        entries, at = bytearray(), 0
        for name in names:
            entries += CENTRAL_HEADER.pack(b"PK\1\2", 20, 20, 8, 0, 0, 0, 1, 4, 4, len(name), 0, 0, 0, 0, 0, at) + name
            at = -(-(at + 34 + len(name)) // 64) * 64 + 20
        directory, buffer = Directory(at, len(entries), len(names)), bytes(entries)
        del entries, names
        pickled = CENTRAL_HEADER.pack(b"PK\1\2", 20, 20, 8, 0, 0, 0, 1, 4, 4, 10, 0, 0, 0, 0, 0, 0) + b"a/data.pkl"
        version = CENTRAL_HEADER.pack(b"PK\1\2", 20, 20, 8, 0, 0, 0, 1, 4, 4, 9, 0, 0, 0, 0, 0, 84) + b"a/version"
        parse_directory(pickled + version, Directory(200, 111, 2), "test://x")
        status = lambda field: int(pathlib.Path("/proc/self/status").read_text().split(field)[1].split()[0]) << 10
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS:")
        archive = parse_directory(buffer, directory, "test://x")
        assert archive.get("data/999999").size == 4
        print(status("VmHWM:") - before)
    """
    command = [*python(), "-W", "ignore", "-c", textwrap.dedent(program)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=200)
    assert int(done.stdout) < 130 << 20


def test_a_directory_as_large_as_its_file_is_refused_before_it_is_read() -> None:
    size = 300 << 20
    tail = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 1, 1, size - 22, 0, 0)
    with pytest.raises(CheckpointCorruptError, match="too long"):
        find_directory(tail, size, "test://x")


def test_a_local_header_that_leaves_its_record_no_room_is_damaged() -> None:
    config.save.storage_alignment = 96
    try:
        data = saved(CHECKPOINT)
    finally:
        config.save.storage_alignment = 64
    archive = parse(data)
    changed = bytearray(data)
    changed[archive.unproven[0] + 29] ^= 0x80
    with pytest.raises(CheckpointCorruptError, match="local header"):
        settle(archive, changed)


def test_local_headers_are_made_well_formed() -> None:
    data = bytearray(saved(CHECKPOINT))
    archive = parse(bytes(data))
    for at, header in archive.local_headers():
        data[at : at + LOCAL_HEADER_SIZE] = bytes(LOCAL_HEADER_SIZE)
        data[at : at + len(header)] = header
    assert zipfile.ZipFile(io.BytesIO(data)).testzip() is None
    assert_true(archive, bytes(data))
    assert torch.equal(torch.load(io.BytesIO(data))["a"], CHECKPOINT["a"])


def test_a_damaged_directory_is_an_error_of_ours_or_the_same_directory() -> None:
    data = saved(CHECKPOINT)
    archive = parse(data)
    start = archive.start
    for at in range(start, len(data)):
        for mask in (0x01, 0x80, 0xFF):
            damaged = bytearray(data)
            damaged[at] ^= mask
            try:
                parsed = parse(bytes(damaged))
            except (TorchferryError, AssertionError):
                continue
            assert all(0 < record.offset <= record.end <= len(data) for record in parsed.records)


def test_random_directories_raise_nothing_but_our_errors() -> None:
    generator = random.Random(0)
    data = saved(CHECKPOINT)
    start = parse(data).start
    for _ in range(2000):
        damaged = bytearray(data)
        for _ in range(generator.randint(1, 6)):
            at = generator.randrange(start, len(data) - 8)
            damaged[at : at + 8] = generator.choice([bytes(8), b"\xff" * 8, generator.randbytes(8)])
        try:
            directory = find_directory(damaged, len(damaged), "test://x")
            if directory is not None:
                parse_directory(damaged[directory.start : directory.start + directory.size], directory, "test://x")
        except TorchferryError as error:
            assert "test://x" in str(error)  # noqa: PT017 - any of ours will do


def test_a_zip_archive_that_is_no_checkpoint_says_what_is_in_it() -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("word/document.xml", "text")
    with pytest.raises(CheckpointFormatError, match=r"no data\.pkl, but 'word/document\.xml'"):
        parse(file.getvalue())


def test_a_compressed_checkpoint_says_how_to_pack_it() -> None:
    source = zipfile.ZipFile(io.BytesIO(saved(CHECKPOINT)))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in source.namelist():
            archive.writestr(name, source.read(name))
    with pytest.raises(CheckpointFormatError, match="zip -0 -r"):
        parse(file.getvalue())


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (saved(1), ZIP_FORMAT),
        (saved(1, _use_new_zipfile_serialization=False), LEGACY_FORMAT),
        (saved(1, _use_new_zipfile_serialization=False, pickle_protocol=4), LEGACY_FORMAT),
        (b"<!DOCTYPE html><html>", "an HTML or XML page, such as a server's error message"),
        (b'<?xml version="1.0"?><Error><Code>NoSuchKey', "an HTML or XML page, such as a server's error message"),
        (struct.pack("<Q", 80) + b'{"weight":{"dtype":"F32"', "a safetensors file"),
        (b"\x80\x04\x95\x10\x00\x00", "a plain pickle, not written by torch.save"),
        (bytes(257) + b"ustar\x00", "a tar archive"),
        (b"\x1f\x8b\x08", "a gzip file"),
        (b'{"a": 1}', "JSON"),
        (b"hello", None),
        (b"", None),
    ],
)
def test_other_formats_are_recognized(head: bytes, expected: str | None) -> None:
    assert sniff(head[:512]) == expected


def test_records_are_checked_in_pieces_of_any_order() -> None:
    data = saved(CHECKPOINT)
    archive = parse(data)
    generator = random.Random(0)
    for _ in range(50):
        cuts = sorted({0, len(data), *(generator.randrange(len(data)) for _ in range(20))})
        pieces = list(pairwise(cuts))
        generator.shuffle(pieces)
        checksums = Checksums(archive.records, "test://x")
        for start, stop in pieces:
            checksums.add(start, data[start:stop])
        checksums.finish()


def test_a_record_that_did_not_arrive_in_full_counts_as_damaged() -> None:
    data = saved(CHECKPOINT)
    archive = parse(data)
    record = archive.get("data/2")
    assert record is not None
    checksums = Checksums(archive.records, "test://x")
    checksums.add(0, data[: record.end - 1])
    checksums.add(record.end, data[record.end :])
    with pytest.raises(CheckpointCorruptError, match="1 records could not be checked"):
        checksums.finish()


def test_a_flipped_bit_names_the_record() -> None:
    data = bytearray(saved(CHECKPOINT))
    archive = parse(bytes(data))
    record = archive.get("data/2")
    assert record is not None
    data[record.offset] ^= 1
    with pytest.raises(CheckpointCorruptError, match="record data/2"):
        Checksums(archive.records, "test://x").add(0, data)
