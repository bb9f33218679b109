from __future__ import annotations

import io
import mmap
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.serialization import get_default_mmap_options

from torchferry.archive import find_directory, parse_directory
from torchferry.mirror import Mirror, load_mapped

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torchferry.archive import Archive

CHECKPOINT = {"a": torch.arange(20.0), "none": torch.empty(0), "b": torch.ones(3, dtype=torch.int8)}


@pytest.fixture
def data() -> bytes:
    file = io.BytesIO()
    torch.save(CHECKPOINT, file)
    return file.getvalue()


@pytest.fixture
def archive(data: bytes) -> Archive:
    directory = find_directory(data, len(data), "test://x")
    assert directory is not None
    return parse_directory(data[directory.start :][: directory.size], directory, "test://x")


@pytest.fixture(params=["memfd", "temporary file"])
def mirror(
    request: pytest.FixtureRequest, data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Mirror]:
    if request.param == "temporary file":

        def forbidden(*_: object) -> int:
            raise PermissionError("memfd_create is forbidden")

        monkeypatch.setattr(os, "memfd_create", forbidden)
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with Mirror(len(data)) as mirror:
        yield mirror
    assert not list(tmp_path.iterdir())


def load(mirror: Mirror) -> Any:
    return mirror.load(map_location=None, weights_only=True)


def test_tensors_live_on_when_the_mirror_is_closed(data: bytes) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with Mirror(len(data)) as mirror:
        mirror.write(0, data)
        loaded = load(mirror)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert torch.equal(loaded["a"], CHECKPOINT["a"])
    loaded["a"] += 1
    assert torch.equal(loaded["a"], CHECKPOINT["a"] + 1)


def test_tensors_are_the_mirror_and_no_copy(mirror: Mirror, data: bytes, archive: Archive) -> None:
    mirror.write(0, data)
    loaded = load(mirror)
    record = archive.get("data/0")
    assert record is not None
    mirror.write(record.offset, b"\0\0\x28\x42")
    assert loaded["a"][0] == 42
    loaded["a"][1] = 43
    assert Path(mirror.path).read_bytes()[record.offset + 4 :][:4] == b"\0\0\x2c\x42"


def test_holes_are_zeros_and_headers_are_made(mirror: Mirror, data: bytes, archive: Archive) -> None:
    record = archive.get("data/0")
    assert record is not None
    mirror.write(archive.start, data[archive.start :])
    for name in ("data.pkl", "version", "byteorder", ".format_version", ".storage_alignment", ".data/serialization_id"):
        control = archive.get(name)
        assert control is not None
        mirror.write(control.offset, data[control.offset : control.end])
    mirror.write_headers(archive)
    loaded = load(mirror)
    assert torch.equal(loaded["a"], torch.zeros(20))
    mirror.write(record.offset, data[record.offset : record.end])
    assert torch.equal(loaded["a"], CHECKPOINT["a"])


def test_damaged_local_headers_shift_nothing(mirror: Mirror, data: bytes, archive: Archive) -> None:
    damaged = bytearray(data)
    for at, _ in archive.local_headers():
        damaged[at + 28] ^= 0x04
    mirror.write(0, damaged)
    mirror.write_headers(archive)
    assert torch.equal(load(mirror)["a"], CHECKPOINT["a"])


@pytest.mark.parametrize("options", [mmap.MAP_PRIVATE, mmap.MAP_SHARED])
def test_the_callers_mmap_options_are_put_back(data: bytes, options: int) -> None:
    with torch.serialization.set_default_mmap_options(options), Mirror(len(data)) as mirror:
        mirror.write(0, data)
        load(mirror)
        assert get_default_mmap_options() == options
        mirror.write(0, bytes(len(data)))
        with pytest.raises(RuntimeError):
            load(mirror)
        assert get_default_mmap_options() == options


def test_a_private_mapping_leaves_the_file_alone(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(data)
    loaded = load_mapped(str(path), shared=False, map_location=None, weights_only=True)
    loaded["a"].zero_()
    assert path.read_bytes() == data
