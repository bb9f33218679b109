from __future__ import annotations

import asyncio
import io
import warnings
import zipfile
from typing import TYPE_CHECKING, Any

import pytest
import torch
from fsspec.callbacks import Callback

import torchferry
from torchferry.errors import CheckpointCorruptError, CheckpointFormatError
from torchferry.formats.graph import read_graph
from torchferry.loading import inspect_async, verify_async

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import CountingStore  # type: ignore[attr-defined]

MIB = 1 << 20


def saved(obj: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(obj, file, **options)
    return file.getvalue()


class Unknown:
    def __init__(self) -> None:
        self.weight = torch.ones(3)


async def listed(store: CountingStore, obj: Any) -> list[tuple[str, torch.dtype, tuple[int, ...], int, str | None]]:
    manifest = await inspect_async(store.put(obj))
    return [(info.key, info.dtype, info.shape, info.nbytes, info.record) for info in manifest.tensors]


async def test_a_manifest_says_where_everything_is(counting_store: CountingStore) -> None:
    model = torch.nn.Linear(3, 4)
    data = saved({"module_state_dict": model.state_dict(), "lr": 0.1})
    manifest = await inspect_async(counting_store.put(data))
    assert (manifest.url, manifest.size, manifest.etag) == (
        "count://x",
        len(data),
        str(id(counting_store.objects["x"])),
    )
    assert [(info.key, info.dtype, info.shape, info.nbytes, info.record) for info in manifest.tensors] == [
        ("module_state_dict.weight", torch.float32, (4, 3), 48, "data/0"),
        ("module_state_dict.bias", torch.float32, (4,), 16, "data/1"),
    ]
    assert manifest.storage_nbytes == 64
    archive = zipfile.ZipFile(io.BytesIO(data))
    assert [record.name for record in manifest.records] == [name.partition("/")[2] for name in archive.namelist()]
    for record in manifest.records:
        assert data[record.offset : record.end] == archive.read(f"archive/{record.name}")
        assert record.crc32 == archive.getinfo(f"archive/{record.name}").CRC


async def test_keys_lead_through_containers_attributes_and_wrappers(counting_store: CountingStore) -> None:
    one = torch.ones(1)
    obj = {
        "list": [one, (2, {3: one, ("a", 1): one})],
        "parameter": torch.nn.Parameter(one),
        "module": torch.nn.Linear(1, 1, bias=False),
        "unknown": Unknown(),
        5: one,
    }
    assert [key for key, *_ in await listed(counting_store, obj)] == [
        "list.0",
        "list.1.1.3",
        "list.1.1.tuple",
        "parameter",
        "module._parameters.weight",
        "unknown.weight",
        "5",
    ]
    assert await listed(counting_store, one) == [("", torch.float32, (1,), 4, "data/0")]


async def test_views_and_shared_tensors_name_one_record(counting_store: CountingStore) -> None:
    base = torch.zeros(4, 5)
    assert await listed(counting_store, {"base": base, "row": base[1], "again": base, "t": base.t()}) == [
        ("base", torch.float32, (4, 5), 80, "data/0"),
        ("row", torch.float32, (5,), 20, "data/0"),
        ("again", torch.float32, (4, 5), 80, "data/0"),
        ("t", torch.float32, (5, 4), 80, "data/0"),
    ]


async def test_special_tensors_are_listed(counting_store: CountingStore) -> None:
    with warnings.catch_warnings(action="ignore"):  # deprecated, and in beta
        quantized = torch.quantize_per_tensor(torch.ones(5), 0.1, 0, torch.qint8)
        csr = torch.eye(3).to_sparse_csr()
    obj = {
        "quantized": quantized,
        "sparse": torch.eye(3).to_sparse(),
        "csr": csr,
        "meta": torch.empty(5, 6, device="meta"),
        "uint16": torch.zeros(3, dtype=torch.uint16),
        "float8": torch.zeros(3, dtype=torch.float8_e4m3fn),
        "storage": torch.zeros(3, dtype=torch.uint8).untyped_storage(),
        "empty": torch.empty(0, 7),
    }
    assert await listed(counting_store, obj) == [
        ("quantized", torch.qint8, (5,), 5, "data/0"),
        ("sparse.indices", torch.int64, (2, 3), 48, "data/1"),
        ("sparse.values", torch.float32, (3,), 12, "data/2"),
        ("csr.crow_indices", torch.int64, (4,), 32, "data/3"),
        ("csr.col_indices", torch.int64, (3,), 24, "data/4"),
        ("csr.values", torch.float32, (3,), 12, "data/5"),
        ("meta", torch.float32, (5, 6), 120, None),
        ("uint16", torch.uint16, (3,), 6, "data/6"),
        ("float8", torch.float8_e4m3fn, (3,), 3, "data/7"),
        ("storage", torch.uint8, (3,), 3, "data/8"),
        ("empty", torch.float32, (0, 7), 0, "data/9"),
    ]


async def test_an_object_that_contains_itself_is_listed_once(counting_store: CountingStore) -> None:
    obj: dict[str, Any] = {"a": torch.ones(1)}
    obj["self"] = obj
    assert [key for key, *_ in await listed(counting_store, obj)] == ["a"]


def test_deep_nesting_is_no_problem() -> None:
    graph = read_graph(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", "test://x")
    assert list(graph.tensors()) == []
    assert graph.storages_of(graph.root) == {}


async def test_inspecting_a_2_gib_checkpoint_costs_3_requests_and_2_mib(
    counting_store: CountingStore, tmp_path: Path
) -> None:
    counting_store.range_size = 8 * MIB
    path = tmp_path / "large.pt"
    with torch.serialization.skip_data():  # sparse: headers, no data
        torch.save({f"layer.{i}.weight": torch.empty(1024, 1024) for i in range(512)}, path)
    manifest = await inspect_async(counting_store.put(path))
    assert manifest.storage_nbytes == 2 << 30
    assert len(manifest.tensors) == 512
    assert counting_store.requests <= 3
    assert counting_store.nbytes <= 2 * MIB


async def test_a_directory_and_a_pickle_of_any_length_are_read_whole(counting_store: CountingStore) -> None:
    tensors = {f"layer.{i}.{'weight' * 10}": torch.ones(1) for i in range(5000)}
    url = counting_store.put(tensors)
    manifest = await inspect_async(url)
    assert [info.key for info in manifest.tensors] == list(tensors)
    assert len(set(counting_store.reads)) == len(counting_store.reads)


@pytest.mark.parametrize("pickle_protocol", [2, 3, 4, 5])
async def test_every_pickle_protocol_can_be_inspected(counting_store: CountingStore, pickle_protocol: int) -> None:
    data = saved({"a": torch.ones(3), "b": Unknown()}, pickle_protocol=pickle_protocol)
    assert [key for key, *_ in await listed(counting_store, data)] == ["a", "b.weight"]


async def test_torchscript_can_be_inspected_and_verified(counting_store: CountingStore) -> None:
    file = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 3)), file)
    url = counting_store.put(file.getvalue())
    manifest = await verify_async(url)
    assert [(info.key, info.shape) for info in manifest.tensors] == [("weight", (3, 2)), ("bias", (3,))]
    assert manifest == await inspect_async(url)


async def test_the_legacy_format_can_be_inspected_without_its_values(counting_store: CountingStore) -> None:
    """Five of nine checkpoints found in wheels on PyPI are in it. Its pickles come first."""
    shared = torch.arange(1 << 20)
    obj = {"a": torch.ones(3), "b": [shared, shared[5:]], "c": torch.nn.Linear(2, 2), "empty": torch.empty(0)}
    data = saved(obj, _use_new_zipfile_serialization=False)
    url = counting_store.put(data)
    manifest = await inspect_async(url)
    tensors = {info.key: (info.dtype, info.shape) for info in manifest.tensors}
    assert tensors["b.1"] == (torch.int64, ((1 << 20) - 5,))
    assert tensors["c._parameters.weight"] == (torch.float32, (2, 2))
    records = {record.name: record for record in manifest.records}
    record = records[next(info.record for info in manifest.tensors if info.key == "b.0") or ""]
    assert data[record.offset : record.end] == bytes(memoryview(shared.numpy()).cast("B"))
    assert sum(stop - start for start, stop in counting_store.reads) < 2.1 * (1 << 20)


async def test_a_truncated_legacy_checkpoint_is_found_by_inspect(counting_store: CountingStore) -> None:
    data = saved({"a": torch.ones(300)}, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointCorruptError, match="truncated"):
        await inspect_async(counting_store.put(data[:-1]))


async def test_the_legacy_format_has_nothing_to_verify(counting_store: CountingStore) -> None:
    url = counting_store.put(saved({"a": torch.ones(3)}, _use_new_zipfile_serialization=False))
    with pytest.raises(CheckpointFormatError, match="no checksums to verify"):
        await verify_async(url)


@pytest.mark.parametrize("act", [inspect_async, verify_async])
async def test_what_is_no_checkpoint_is_named(counting_store: CountingStore, act: Any) -> None:
    with pytest.raises(CheckpointFormatError, match="HTML"):
        await act(counting_store.put(b"<!DOCTYPE html>"))
    with pytest.raises(CheckpointFormatError, match="empty"):
        await act(counting_store.put(b""))
    with pytest.raises(CheckpointCorruptError, match="truncated"):
        await act(counting_store.put(saved({"a": 1})[:-30]))


async def test_a_damaged_pickle_is_found_by_inspect(counting_store: CountingStore) -> None:
    data = bytearray(saved({"a": torch.ones(3)}))
    data[90] ^= 1
    with pytest.raises(CheckpointCorruptError, match=r"record data\.pkl"):
        await inspect_async(counting_store.put(bytes(data)))


async def test_verify_reads_everything_once_and_returns_the_manifest(counting_store: CountingStore) -> None:
    url = counting_store.put({"a": torch.arange(1 << 18), "b": torch.ones(3)})
    callback = Callback()
    manifest = await verify_async(url, callback=callback)
    assert counting_store.nbytes == len(counting_store.objects["x"]) == callback.size == callback.value
    assert counting_store.most_under_way <= counting_store.range_concurrency
    assert manifest == await inspect_async(url)


async def test_verify_finds_a_flipped_bit_in_any_record(counting_store: CountingStore) -> None:
    data = saved({"a": torch.arange(1 << 18), "b": torch.ones(3)})
    manifest = await inspect_async(counting_store.put(data))
    for record in manifest.records:
        for at in (record.offset, record.end - 1):
            damaged = bytearray(data)
            damaged[at] ^= 0x10
            with pytest.raises(CheckpointCorruptError, match=f"count://x .* record {record.name}"):
                await verify_async(counting_store.put(bytes(damaged)))


async def test_verify_says_when_there_is_nothing_to_verify(counting_store: CountingStore) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        url = counting_store.put({"a": torch.ones(3)})
    finally:
        torch.serialization.set_crc32_options(True)
    assert all(record.crc32 is None for record in (await inspect_async(url)).records)
    with pytest.raises(CheckpointFormatError, match="carries no checksums"):
        await verify_async(url)


async def test_local_files_are_inspected_and_verified(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    await asyncio.to_thread(torch.save, {"a": torch.ones(3)}, path)
    assert (await inspect_async(path)) == (await verify_async(path))


def test_the_synchronous_functions_are_the_same(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"a": torch.ones(3)}, path)
    assert torchferry.inspect(path) == torchferry.verify(path)


@pytest.mark.parametrize("nbytes", [1_200_000, 1_900_000, 2_200_000])
async def test_a_range_that_is_longer_than_a_small_block_is_read_whole(tmp_path: Path, nbytes: int) -> None:
    """What is neither head nor tail of such a file is one range of 64 KiB to 2 MiB."""
    path = tmp_path / "x.pt"
    torch.save(torch.zeros(nbytes, dtype=torch.uint8), path)
    assert (await verify_async(path)).size == path.stat().st_size
