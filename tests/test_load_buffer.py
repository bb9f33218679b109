"""The memory that a checkpoint is read into, and what torch makes of it."""

from __future__ import annotations

import gc
import io
import mmap
import os
import weakref
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import torchferry
from torchferry.formats import load_buffer as module
from torchferry.formats.archive import find_directory, parse_directory
from torchferry.formats.load_buffer import LoadBuffer

if TYPE_CHECKING:
    from conftest import CountingStore  # type: ignore[attr-defined]

    from torchferry.formats.archive import Archive

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


@pytest.fixture
def load_buffer(data: bytes, archive: Archive) -> LoadBuffer:
    return LoadBuffer(archive.whole(len(data)))


def load(load_buffer: LoadBuffer) -> Any:
    return load_buffer.load(map_location=None, weights_only=True)


def test_tensors_are_views_of_the_load_buffer_and_no_copy(
    load_buffer: LoadBuffer, data: bytes, archive: Archive
) -> None:
    load_buffer.write(0, data)
    loaded = load(load_buffer)
    record = archive.get("data/0")
    assert record is not None
    load_buffer.write(record.offset, b"\0\0\x28\x42")
    assert loaded["a"][0] == 42


def test_tensors_live_on_when_the_load_buffer_is_gone_and_free_its_memory_with_them(data: bytes) -> None:
    load_buffer = LoadBuffer(len(data))
    load_buffer.write(0, data)
    memory = weakref.ref(load_buffer._memory)
    loaded = load(load_buffer)
    del load_buffer
    gc.collect()
    assert memory() is not None
    loaded["a"] += 1
    assert torch.equal(loaded["a"], CHECKPOINT["a"] + 1)
    del loaded
    gc.collect()
    assert memory() is None


def test_where_torch_takes_no_storage_it_loads_a_copy(
    load_buffer: LoadBuffer, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOADS_IN_PLACE", False)
    load_buffer.write(0, data)
    loaded = load(load_buffer)
    load_buffer.write(0, bytes(len(data)))
    assert torch.equal(loaded["a"], CHECKPOINT["a"])


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")  # Python 3.12; the child only exits
def test_a_forked_child_that_writes_to_a_tensor_does_not_write_to_its_parents(
    load_buffer: LoadBuffer, data: bytes
) -> None:
    load_buffer.write(0, data)
    loaded = load(load_buffer)
    child = os.fork()
    if not child:
        loaded["a"].zero_()
        os._exit(0)
    os.waitpid(child, 0)
    assert torch.equal(loaded["a"], CHECKPOINT["a"])


def test_what_does_not_fit_is_refused(load_buffer: LoadBuffer, data: bytes) -> None:
    for offset, count in ((-1, 1), (len(data), 1), (0, len(data) + 1)):
        with pytest.raises(ValueError, match="not within"):
            load_buffer.view(offset, offset + count)


def test_holes_are_zeros_and_headers_are_made(load_buffer: LoadBuffer, data: bytes, archive: Archive) -> None:
    record = archive.get("data/0")
    assert record is not None
    load_buffer.write(archive.start, data[archive.start :])
    for name in ("data.pkl", "version", "byteorder", ".format_version", ".storage_alignment", ".data/serialization_id"):
        control = archive.get(name)
        assert control is not None
        load_buffer.write(control.offset, data[control.offset : control.end])
    load_buffer.finish()
    loaded = load(load_buffer)
    assert torch.equal(loaded["a"], torch.zeros(20))
    load_buffer.write(record.offset, data[record.offset : record.end])
    assert torch.equal(loaded["a"], CHECKPOINT["a"])


def test_damaged_local_headers_shift_nothing(load_buffer: LoadBuffer, data: bytes, archive: Archive) -> None:
    damaged = bytearray(data)
    for at, _ in archive.local_headers():
        damaged[at + 28] ^= 0x04
    load_buffer.write(0, damaged)
    load_buffer.finish()
    assert torch.equal(load(load_buffer)["a"], CHECKPOINT["a"])


def test_only_ranges_that_are_expected_take_huge_pages() -> None:
    load_buffer = LoadBuffer(64 << 20)
    load_buffer.expect([(5, 8 << 20), (8 << 20, (16 << 20) + 7)])
    before = resident()
    for at in range(0, 64 << 20, 4 << 20):  # a local header here and there
        load_buffer.write(at, b"x")
    assert resident() - before <= (16 << 20) + 16 * mmap.PAGESIZE + (1 << 20)


def test_a_sparse_load_buffer_may_be_larger_than_the_machines_memory() -> None:
    load_buffer = LoadBuffer(1 << 44, sparse=True)
    load_buffer.write(1 << 43, b"x")
    assert bytes(load_buffer.view(1 << 43, (1 << 43) + 2)) == b"x\0"


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_torchs_switch_that_forces_weights_only_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    torchferry.save({"path": Path("x")}, "memory://forced/x.pt")
    assert torchferry.load("memory://forced/x.pt", weights_only=False) == {"path": Path("x")}
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(torchferry.UnsafeCheckpointError):
        torchferry.load("memory://forced/x.pt", weights_only=False)


@pytest.mark.parametrize("keys", [None, ["a", "b"]])
def test_empty_tensors_of_two_dtypes_that_share_a_storage_keep_them(tmp_path: Path, keys: list[str] | None) -> None:
    shared = torch.UntypedStorage(0)
    tensors = {}
    for key, dtype in (("a", torch.float32), ("b", torch.int64)):
        storage = torch.storage.TypedStorage(wrap_storage=shared, dtype=dtype, _internal=True)
        tensors[key] = torch.empty(0, dtype=dtype).set_(storage, 0, (0,), (1,))
    torch.save(tensors, tmp_path / "x.pt")
    loaded = torchferry.load(tmp_path / "x.pt", keys=keys)
    assert [tensor.dtype for tensor in loaded.values()] == [torch.float32, torch.int64]


@pytest.mark.parametrize(
    "options", [{}, {"weights_only": False}, {"keys": ["a"]}, {"into": {"a": torch.ones(300_000)}}]
)
def test_a_tensor_that_was_saved_without_its_data_is_damaged_and_never_what_memory_held(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    """As FSDP leaves parameters between two layers."""
    freed = torch.ones(300_000)
    freed.untyped_storage().resize_(0)
    torch.save({"a": freed}, tmp_path / "x.pt")
    with pytest.raises(torchferry.CheckpointCorruptError):
        torchferry.load(tmp_path / "x.pt", **options)


@pytest.mark.parametrize("keys", [None, ["a"]])
def test_with_map_location_meta_no_storage_is_read(counting_store: CountingStore, keys: list[str] | None) -> None:
    url = counting_store.put({"a": torch.ones(1 << 20), "b": [torch.ones(1 << 20)]})
    loaded = torchferry.load(url, map_location="meta", keys=keys)
    assert loaded["a"].is_meta
    assert loaded["a"].shape == (1 << 20,)
    assert counting_store.nbytes < 200_000


def test_with_map_location_meta_a_file_of_a_big_endian_machine_loads(tmp_path: Path) -> None:
    """torch.load crashes with it: it swaps the bytes of tensors that have none."""
    file = io.BytesIO()
    torch.save({"a": torch.arange(3)}, file)
    source = zipfile.ZipFile(file)
    writer = torch._C.PyTorchFileWriter(str(tmp_path / "x.pt"))
    for name in ("data.pkl", ".format_version", ".storage_alignment", "byteorder", "data/0"):
        content = b"big" if name == "byteorder" else source.read(f"archive/{name}")
        writer.write_record(name, content, len(content))
    writer.write_end_of_file()
    assert torchferry.load(tmp_path / "x.pt", map_location="meta")["a"].shape == (3,)
    assert torchferry.load(tmp_path / "x.pt")["a"].tolist() == [0, 1 << 56, 2 << 56]
