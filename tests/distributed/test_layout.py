"""What is stored, byte for byte, and how much is read of it."""

from __future__ import annotations

import asyncio
import io
import json
import pickle
import subprocess
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from fsspec.callbacks import Callback
from s3fs import S3FileSystem
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties as OldTensorProperties
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

import torchferry
import torchferry.distributed as ferry
from torchferry.distributed import writer as writer_module
from torchferry.distributed.metadata import nest
from torchferry.distributed.place import Place
from torchferry.distributed.sharing import Broadcast, Shared, cpu_group
from torchferry.engine.types import MIB, Chunk, ObjectStat
from torchferry.formats.item_stream import memory_of
from torchferry.storage.local import LocalBackend
from torchferry.testing.forkserver import python

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator

TENSORS = {
    "large": torch.randn(700, 1000),
    "large.t": torch.randn(1000, 700).t(),
    "view": torch.randn(4, 400, 1000)[2],
    "columns": torch.randn(1000, 900)[:, 100:700],
    "small": torch.randn(7, 3),
    "small.t": torch.randn(7, 3).t(),
    "small.again": torch.randn(7, 3),
    "scalar": torch.tensor(3.0),
    "empty": torch.empty(0, 3),
    "bool": torch.tensor([True, False]),
    "bfloat16": torch.randn(5).to(torch.bfloat16),
    "float8": torch.randn(5).to(torch.float8_e4m3fn),
    "complex": torch.randn(5, dtype=torch.complex64),
    "int": torch.arange(9),
    "parameter": torch.nn.Parameter(torch.randn(3)),
}
NEIGHBOURS = 16 << 10  # small tensors are read together with what lies between them
STATE = {"model": TENSORS, "step": 7, "nested": {"list": [1, torch.ones(2), {"x": 2.5}]}}


@pytest.fixture(autouse=True)
def no_process_group() -> Iterator[None]:
    """DCP says that there is none; torch warns of its own classes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def blank() -> dict[str, Any]:
    """A state dict to load into."""
    tensors = {name: torch.zeros(value.shape, dtype=value.dtype) for name, value in TENSORS.items()}
    return {"model": tensors, "step": 0, "nested": {"list": [0, torch.zeros(2), {"x": 0.0}]}}


def check(state: dict[str, Any]) -> None:
    for name, value in TENSORS.items():
        assert torch.equal(bits(state["model"][name]), bits(value.detach())), name
    assert state["step"] == 7
    assert state["nested"]["list"][0] == 1
    assert torch.equal(state["nested"]["list"][1], torch.ones(2))
    assert state["nested"]["list"][2] == {"x": 2.5}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor


def test_each_item_is_what_torch_save_writes_of_the_contiguous_tensor(tmp_path: Path) -> None:
    ferry.save(STATE, tmp_path)
    metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    for index, info in metadata.storage_data.items():
        data = (tmp_path / info.relative_path).read_bytes()[info.offset : info.offset + info.length]
        if (name := index.fqn.removeprefix("model.")) in TENSORS:
            file = io.BytesIO()
            torch.save(TENSORS[name].detach().resolve_conj().contiguous().clone(), file)
            assert data == file.getvalue(), name


def test_stock_readers_read_what_we_wrote(tmp_path: Path) -> None:
    ferry.save(STATE, tmp_path / "ours")
    state = blank()
    dcp.load(state, checkpoint_id=tmp_path / "ours")
    check(state)
    dcp_to_torch_save(tmp_path / "ours", tmp_path / "one.pt")
    check(torch.load(tmp_path / "one.pt"))


@pytest.mark.parametrize("threads", [1, 3])
def test_we_read_what_the_stock_writer_wrote(tmp_path: Path, threads: int) -> None:
    dcp.save(STATE, storage_writer=dcp.FileSystemWriter(tmp_path / "stock", thread_count=threads))
    state = blank()
    ferry.load(state, tmp_path / "stock")
    check(state)
    check(torchferry.load(tmp_path / "stock"))
    assert torchferry.verify(tmp_path / "stock").size > 8 * MIB


def test_stock_files_cost_two_small_requests_and_no_more_bytes(
    tmp_path: Path, s3_url: str, s3_storage_options: dict[str, Any]
) -> None:
    """One of many items that are alike is looked into; what tells where the others are comes along with them."""
    state = {f"layer{number}": torch.full((3 << 17,), float(number)) for number in range(40)}  # 1.5 MiB each
    dcp.save(state, checkpoint_id=tmp_path)
    fs = S3FileSystem(**s3_storage_options)
    fs.put(f"{tmp_path}/", f"{s3_url}/", recursive=True)
    shard = (tmp_path / "__0_0.distcp").stat().st_size
    loaded = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    reports: list[torchferry.TransferReport] = []
    ferry.load(loaded, s3_url, storage_options=s3_storage_options, report=reports.append)
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.items())
    (report,) = reports
    assert report.nbytes < shard + NEIGHBOURS
    assert report.requests <= 3 + -(-40 // 5)  # its version, two ends, and five items at a time


@pytest.mark.parametrize("verify", [True, False])
def test_a_stock_item_that_is_laid_out_otherwise_than_the_one_like_it_is_read_where_it_is(
    tmp_path: Path, verify: bool
) -> None:
    """Of the same dtype, as many dimensions and bytes beside the tensor, but its rows are columns."""
    state = {"a": torch.randn(600, 700), "b": torch.randn(700, 600).t(), "c": torch.randn(600, 700)}
    dcp.save(state, checkpoint_id=tmp_path)
    loaded = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    columns = {**loaded, "c": torch.zeros(700, 600).t()}
    for target in (loaded, columns):
        ferry.load(target, tmp_path, verify=verify)
        assert all(torch.equal(tensor, state[name]) for name, tensor in target.items())


def test_what_is_read_of_stock_files_beside_tensors_is_no_part_of_them(tmp_path: Path) -> None:
    """Two dtypes, converted and not, whole and in part, twice: each in its place."""
    state = {f"{number}": torch.randn(512, 1024) for number in range(6)}
    state |= {f"half{number}": torch.randn(512, 1024).half() for number in range(6)}
    dcp.save(state, checkpoint_id=tmp_path)
    loaded = {name: torch.zeros(512, 1024, dtype=torch.float64) for name in ("0", "1", "half2")}
    loaded |= {name: torch.zeros_like(state[name]) for name in ("2", "3", "half0", "half1")}
    ferry.load(loaded, tmp_path)
    assert all(torch.equal(tensor, state[name].to(tensor.dtype)) for name, tensor in loaded.items())


def test_a_lazy_conjugate_is_stored_as_what_it_is(tmp_path: Path) -> None:
    value = torch.randn(200_000, dtype=torch.complex64)
    ferry.save({"a": value.conj()}, tmp_path / "ours")
    dcp.save({"a": value.conj()}, checkpoint_id=tmp_path / "stock")
    for name in ("ours", "stock"):
        state = {"a": torch.zeros_like(value)}
        ferry.load(state, tmp_path / name)
        assert torch.equal(state["a"], value.conj().resolve_conj())


def test_tensors_of_other_dtypes_and_strides_are_filled(tmp_path: Path) -> None:
    ferry.save(STATE, tmp_path)
    state = blank()
    state["model"]["large"] = torch.zeros(700, 1000, dtype=torch.float64)
    state["model"]["view"] = torch.zeros(1000, 400).t()
    state["model"]["large.t"] = torch.zeros(700, 2000)[:, ::2]
    ferry.load(state, tmp_path)
    assert torch.equal(state["model"]["large"].float(), TENSORS["large"])
    assert torch.equal(state["model"]["view"], TENSORS["view"])
    assert torch.equal(state["model"]["large.t"], TENSORS["large.t"])


def test_a_checkpoint_loads_without_a_process_group_and_by_its_keys(tmp_path: Path) -> None:
    ferry.save(STATE, tmp_path / "c")
    check(torchferry.load(tmp_path / "c"))
    assert torchferry.load(tmp_path / "c", keys=["step"]) == {"step": 7}
    with pytest.raises(torchferry.CheckpointKeyError, match="nothing"):
        torchferry.load(tmp_path / "c", keys=["nothing"])
    assert torchferry.load(tmp_path / "c", map_location="meta")["model"]["large"].is_meta
    manifest = torchferry.inspect(tmp_path / "c")
    shapes = {tensor.key: tensor.shape for tensor in manifest.tensors}
    assert shapes["model.large"] == (700, 1000)
    assert torchferry.verify(tmp_path / "c").size == manifest.size


def test_a_save_replaces_a_checkpoint_and_removes_its_shards(tmp_path: Path) -> None:
    dcp.save({"a": torch.zeros(3)}, checkpoint_id=tmp_path)
    ferry.save({"a": torch.ones(3)}, tmp_path)
    ferry.save({"a": torch.full((3,), 2.0)}, tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 2
    assert torchferry.load(tmp_path)["a"].tolist() == [2, 2, 2]
    with pytest.raises(torchferry.CheckpointValueError, match="overwrite=True"):
        ferry.save({"a": torch.ones(3)}, tmp_path, overwrite=False)


def test_a_planner_that_caches_plans_never_writes_to_shards_that_are_there(tmp_path: Path) -> None:
    for step in range(3):
        planner = dcp.DefaultSavePlanner(enable_plan_caching=True)
        ferry.save({"a": torch.full((3,), float(step))}, tmp_path / f"{step}", planner=planner)
        ferry.save({"a": torch.full((3,), step + 10.0)}, tmp_path / "again", planner=planner)
    for step in range(3):
        assert torchferry.load(tmp_path / f"{step}")["a"].tolist() == [step] * 3
    assert torchferry.load(tmp_path / "again")["a"].tolist() == [12] * 3


def test_metadata_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w').close()",))

    ferry.save({"a": torch.ones(3)}, tmp_path / "c")
    path = tmp_path / "c/.metadata"
    metadata = pickle.loads(path.read_bytes())
    metadata.planner_data = Evil()
    path.write_bytes(pickle.dumps(metadata))
    for load in (torchferry.load, torchferry.inspect, lambda url: ferry.load({"a": torch.ones(3)}, url)):
        with pytest.raises(torchferry.UnsafeCheckpointError, match="exec"):
            load(tmp_path / "c")
    assert not (tmp_path / "ran").exists()


def test_metadata_that_torch_wrote_up_to_2_1_is_read(tmp_path: Path) -> None:
    dcp.save({"a": torch.arange(1000.0)}, checkpoint_id=tmp_path, no_dist=True)
    path = tmp_path / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    metadata.state_dict_metadata["a"].properties = OldTensorProperties(dtype=torch.float32)
    for name in ("storage_meta", "version"):
        vars(metadata).pop(name, None)
    path.write_bytes(pickle.dumps(metadata))
    assert OldTensorProperties.__module__.encode() in path.read_bytes()
    loaded = {"a": torch.zeros(1000)}
    ferry.load(loaded, tmp_path)
    assert torch.equal(loaded["a"], torch.arange(1000.0))
    assert torch.equal(torchferry.load(tmp_path)["a"], loaded["a"])
    assert torchferry.inspect(tmp_path).tensors[0].shape == (1000,)
    torchferry.verify(tmp_path)


def test_what_an_extension_transformed_is_refused_by_all_that_read_it_and_copied_with_a_warning(
    tmp_path: Path,
) -> None:
    url = tmp_path / "c"
    dcp.save({"a": torch.arange(300_000.0), "b": [1, 2]}, checkpoint_id=url, no_dist=True)
    metadata = pickle.loads((url / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.transform_descriptors = ["stream.z/1"]
    (url / ".metadata").write_bytes(pickle.dumps(metadata))
    (shard,) = url.glob("*.distcp")
    shard.write_bytes(bytes(byte ^ 1 for byte in shard.read_bytes()))
    for read in (
        torchferry.load,
        torchferry.verify,
        lambda url: ferry.load({"a": torch.zeros(300_000)}, url),
        lambda url: ferry.consolidate(url, tmp_path / "one.pt"),
        lambda url: torchferry.convert(url, tmp_path / "one.safetensors", exclude="b"),
        lambda url: torchferry.diff(url, url),
    ):
        with pytest.raises(torchferry.CheckpointFormatError, match="transformed by an extension"):
            read(url)
    reports: list[torchferry.TransferReport] = []
    torchferry.copy(f"{url}/", f"{tmp_path}/d/", report=reports.append)
    (copied,) = (tmp_path / "d").rglob("*.distcp")
    assert copied.read_bytes() == shard.read_bytes()
    assert "an extension transformed" in reports[0].warnings[0]


def test_metadata_that_names_files_outside_is_refused(tmp_path: Path) -> None:
    ferry.save({"a": torch.ones(3)}, tmp_path / "c")
    path = tmp_path / "c/.metadata"
    metadata = pickle.loads(path.read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../secret"
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(torchferry.CheckpointFormatError, match="not within"):
        torchferry.load(tmp_path / "c")


@pytest.mark.parametrize("writer", ["ours", "stock"])
def test_a_flipped_bit_is_found(tmp_path: Path, writer: str) -> None:
    if writer == "ours":
        ferry.save(STATE, tmp_path)
    else:
        dcp.save(STATE, checkpoint_id=tmp_path)
    (shard,) = tmp_path.rglob("*.distcp")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 4
    shard.write_bytes(data)
    for load in (torchferry.load, torchferry.verify, lambda url: ferry.load(blank(), url)):
        with pytest.raises(torchferry.CheckpointCorruptError, match="damaged"):
            load(tmp_path)


def test_a_shard_of_another_save_is_an_error(tmp_path: Path) -> None:
    ferry.save(STATE, tmp_path / "a")
    other = {**STATE, "model": {**TENSORS, "large": torch.zeros(700, 1000)}}
    ferry.save(other, tmp_path / "b")
    (mine,), (others,) = (tmp_path / "a").rglob("*.distcp"), (tmp_path / "b").rglob("*.distcp")
    others.rename(mine)
    with pytest.raises(torchferry.CheckpointCorruptError):
        torchferry.load(tmp_path / "a")


def test_an_asynchronous_save_keeps_what_was_there_when_it_began(tmp_path: Path) -> None:
    tied = torch.ones(1000, 1000)
    state = {"a": tied, "b": tied[:10], "step": [1]}
    saves = []
    for step in range(3):
        tied.fill_(step)
        state["step"][0] = step
        saves.append(ferry.async_save(state, tmp_path / f"{step}"))
    tied.fill_(9)
    for step, save in enumerate(saves):
        save.result(60)
        loaded = torchferry.load(tmp_path / f"{step}")
        assert (loaded["a"].unique().tolist(), loaded["b"].unique().tolist(), loaded["step"]) == (
            [step],
            [step],
            [step],
        )


def test_the_stock_async_save_uses_the_writer_as_its_stager(tmp_path: Path) -> None:
    writer = ferry.StorageWriter(tmp_path)
    tensor = torch.ones(1000)
    save = dcp.async_save({"a": tensor}, storage_writer=writer)
    tensor.zero_()
    save.result()
    writer.close()
    assert torchferry.load(tmp_path)["a"].unique().tolist() == [1]


def test_a_tensor_that_changes_while_it_is_saved_is_noticed(tmp_path: Path) -> None:
    ferry.save(STATE, tmp_path)
    tensors = [torch.zeros(4 << 20), torch.zeros(3)]

    class Changing(Callback):
        def relative_update(self, inc: int = 1) -> None:
            del inc
            for tensor in tensors:
                tensor.add_(1)

    with pytest.raises(torchferry.ChangedWhileSavingError, match="Nothing was stored"):
        ferry.save({"a": tensors}, tmp_path, callback=Changing())
    check(torchferry.load(tmp_path))


def test_a_tensor_of_one_element_is_broadcast_whatever_its_stride() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        index = MetadataIndex("a")
        size = torch.Size([1])
        item = ReadItem(LoadItemType.TENSOR, index, torch.Size([0]), index, torch.Size([0]), size)
        tensor = torch.arange(4.0)[3::4]
        assert tensor.stride() == (4,)
        Broadcast(cpu_group(None), Shared((0,), (0,)), [item], [tensor], {}).exchange({})
        assert tensor.tolist() == [3.0]
    finally:
        dist.destroy_process_group()


CHANGING_DTENSORS = """
import sys, pytest, torch, torchferry, torchferry.distributed as ferry
from fsspec.callbacks import Callback
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

changed, place = sys.argv[1:]
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
tensors = [distribute_tensor(torch.zeros(size), mesh, [Shard(0)]) for size in (4 << 20, 3)]
if changed == "parameter":
    tensors = [torch.nn.Parameter(tensor) for tensor in tensors]

class Changing(Callback):
    def relative_update(self, inc=1):
        with torch.no_grad():
            for tensor in tensors:
                (tensor.to_local() if changed == "local" else tensor).add_(1)

with pytest.raises(torchferry.ChangedWhileSavingError, match="Nothing was stored"):
    ferry.save({"a": tensors}, place, callback=Changing())
dist.destroy_process_group()
"""


@pytest.mark.parametrize("changed", ["whole", "parameter", "local"])
def test_a_dtensor_that_changes_while_it_is_saved_is_noticed(tmp_path: Path, changed: str) -> None:
    """In a process of its own: torch keeps a DTensor's group in the thread that changed it, a fork may hang then."""
    ferry.save(STATE, tmp_path)
    command = [*python(), "-c", CHANGING_DTENSORS, changed, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    check(torchferry.load(tmp_path))


@pytest.mark.parametrize("count", [16])
def test_scattered_tensors_and_slices_cost_their_own_bytes(tmp_path: Path, count: int) -> None:
    """2 MiB of each 16 MiB tensor, and a third of it."""
    state = {f"{i}": torch.randn(2048, 512) for i in range(count)}
    ferry.save(state, tmp_path)
    reports: list[torchferry.TransferReport] = []
    some = {name: torch.zeros(2048, 512) for name in list(state)[::4]}
    ferry.load(some, tmp_path, report=reports.append, planner=dcp.DefaultLoadPlanner(allow_partial_load=True))
    assert reports[0].nbytes == len(some) * 4 * MIB
    for name, value in some.items():
        assert torch.equal(value, state[name])


def test_a_checkpoint_becomes_one_object_as_torch_save_writes_it(tmp_path: Path) -> None:
    ferry.save(STATE, tmp_path / "ours")
    dcp.save(STATE, checkpoint_id=tmp_path / "stock")
    for name in ("ours", "stock"):
        stat = ferry.consolidate(tmp_path / name, tmp_path / f"{name}.pt")
        check(torch.load(tmp_path / f"{name}.pt"))
        check(torchferry.load(tmp_path / f"{name}.pt"))
        assert torchferry.verify(tmp_path / f"{name}.pt").size == stat.size
    (shard,) = (tmp_path / "ours").rglob("*.distcp")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 4
    shard.write_bytes(data)
    with pytest.raises(torchferry.CheckpointCorruptError, match="damaged"):
        ferry.consolidate(tmp_path / "ours", tmp_path / "damaged.pt")
    assert not (tmp_path / "damaged.pt").exists()


def test_a_checkpoint_of_tensors_becomes_a_safetensors_file(tmp_path: Path) -> None:
    tensors = {name: value.detach() for name, value in TENSORS.items()}
    ferry.save(tensors, tmp_path / "c")
    ferry.consolidate(tmp_path / "c", tmp_path / "c.safetensors")
    data = (tmp_path / "c.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for name, value in tensors.items():
        first, last = header[name]["data_offsets"]
        stored = value.resolve_conj().contiguous()
        assert header[name]["shape"] == list(value.shape)
        assert data[8 + length + first : 8 + length + last] == bytes(memory_of(stored)), name
    ferry.save(STATE, tmp_path / "more")
    with pytest.raises(torchferry.CheckpointValueError, match="step"):
        ferry.consolidate(tmp_path / "more", tmp_path / "more.safetensors")


def test_an_object_becomes_a_checkpoint_that_any_ranks_load(tmp_path: Path) -> None:
    shared = torch.randn(500, 1000)
    torch.save({**STATE, "tied": {"a": shared, "b": shared, "c": shared[10:20]}}, tmp_path / "one.pt")
    ferry.save({"old": torch.ones(3)}, tmp_path / "c")
    ferry.shard(tmp_path / "one.pt", tmp_path / "c")
    state = {**blank(), "tied": {name: torch.zeros(500, 1000) for name in "ab"} | {"c": torch.zeros(10, 1000)}}
    ferry.load(state, tmp_path / "c")
    check(state)
    assert torch.equal(state["tied"]["b"], shared)
    assert torch.equal(state["tied"]["c"], shared[10:20])
    again = {**blank(), "tied": {name: torch.zeros(500, 1000) for name in "ab"} | {"c": torch.zeros(10, 1000)}}
    dcp.load(again, checkpoint_id=tmp_path / "c")
    check(again)
    torch.save(STATE, tmp_path / "two.pt")
    ferry.shard(tmp_path / "two.pt", tmp_path / "d")
    check(torchferry.load(tmp_path / "d"))
    assert len(list((tmp_path / "c").rglob("*.distcp"))) == 1


class Holder:
    """An object that is no container of torch's, and holds a tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


@pytest.mark.parametrize("verb", ["shard", "convert"])
def test_tensors_within_other_objects_are_stored_with_their_values_by(verb: str, tmp_path: Path) -> None:
    """In the middle of the file: its ends are read anyway."""
    pad = {name: torch.rand(1 << 20) for name in "xy"}
    inner: dict[str, Any] = {
        "tuple": (torch.arange(500.0), 7),
        "deep": [({"a": [torch.arange(9)]},), torch.ones(3)],
        "storage": torch.arange(5).untyped_storage(),
    }
    if verb == "shard":
        inner["object"] = Holder(torch.arange(4.0))
    torch.save({"x": pad["x"], **inner, "shared": inner["tuple"][0][:7], "y": pad["y"]}, tmp_path / "one.pt")

    def make() -> None:
        if verb == "shard":
            ferry.shard(tmp_path / "one.pt", tmp_path / "c", weights_only=False)
        else:
            torchferry.convert(tmp_path / "one.pt", f"{tmp_path}/c/")

    make()
    torchferry.verify(tmp_path / "c")
    loaded = torchferry.load(tmp_path / "c", weights_only=False)
    for name, tensor in pad.items():
        assert torch.equal(loaded[name], tensor)
    assert torch.equal(loaded["tuple"][0], inner["tuple"][0])
    assert torch.equal(loaded["shared"], inner["tuple"][0][:7])
    assert torch.equal(loaded["deep"][0][0]["a"][0], torch.arange(9))
    assert torch.equal(loaded["deep"][1], torch.ones(3))
    assert bytes(loaded["storage"]) == bytes(inner["storage"])
    if verb == "shard":
        assert torch.equal(loaded["object"].tensor, torch.arange(4.0))
    data = bytearray((tmp_path / "one.pt").read_bytes())
    data[data.index(bytes(memory_of(inner["tuple"][0]))) + 900] ^= 4
    (tmp_path / "one.pt").write_bytes(data)
    with pytest.raises(torchferry.CheckpointCorruptError, match="damaged"):
        make()


def made_anew(tensor: torch.Tensor) -> torch.Tensor:
    return tensor + 1


class Computed:
    """Unpickled, it is a tensor that lies in no storage of the file."""

    def __reduce__(self) -> Any:
        return made_anew, (torch.ones(3),)


def test_a_tensor_that_is_computed_as_it_is_unpickled_is_not_sharded(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3), "computed": Computed()}, tmp_path / "one.pt")
    with pytest.raises(torchferry.CheckpointFormatError, match="computed is not stored as plain bytes"):
        ferry.shard(tmp_path / "one.pt", tmp_path / "c", weights_only=False)
    assert not (tmp_path / "c").exists()


def test_what_shard_has_made_of_an_empty_tensor_is_verified_and_copied(tmp_path: Path) -> None:
    state = {"empty": torch.empty(0, 3), "view": torch.ones(5)[2:2], "full": torch.ones(3)}
    torch.save(state, tmp_path / "one.pt")
    ferry.shard(tmp_path / "one.pt", tmp_path / "c")
    torchferry.verify(tmp_path / "c")
    torchferry.copy(tmp_path / "c", tmp_path / "d")
    for name in "cd":
        loaded = torchferry.load(tmp_path / name)
        assert {key: value.shape for key, value in loaded.items()} == {key: value.shape for key, value in state.items()}


def test_an_object_of_another_byte_order_is_not_sharded(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(4.0)}, tmp_path / "one.pt")
    with zipfile.ZipFile(tmp_path / "one.pt") as mine, zipfile.ZipFile(tmp_path / "other.pt", "w") as other:
        for name in mine.namelist():
            other.writestr(name, b"big" if name.endswith("/byteorder") else mine.read(name))
    with pytest.raises(torchferry.CheckpointFormatError, match="byte order"):
        ferry.shard(tmp_path / "other.pt", tmp_path / "c")


def test_small_tensors_are_written_many_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {f"k{number}": torch.full((4,), float(number)) for number in range(100)}
    torch.save(state, tmp_path / "one.pt")
    write, sizes = LocalBackend.write, []

    async def noted(chunks: AsyncIterable[Chunk]) -> AsyncIterator[Chunk]:
        async for chunk in chunks:
            sizes.append(len(chunk))
            yield chunk

    async def write_noted(self: LocalBackend, path: str, chunks: AsyncIterable[Chunk], **options: Any) -> ObjectStat:
        return await write(self, path, noted(chunks), **options)

    monkeypatch.setattr(LocalBackend, "write", write_noted)
    ferry.shard(tmp_path / "one.pt", tmp_path / "c")
    (shard,) = (tmp_path / "c").rglob("*.distcp")
    assert sum(sizes) >= shard.stat().st_size
    assert len(sizes) < len(state) / 10
    torchferry.verify(tmp_path / "c")
    assert all(torch.equal(value, state[name]) for name, value in torchferry.load(tmp_path / "c").items())


def test_an_object_of_many_storages_becomes_a_checkpoint(tmp_path: Path) -> None:
    """Its directory is longer than what is read of its end, so that records before it are not read with that."""
    state = {"pad": torch.rand(1 << 18), **{f"k{number}": torch.full((4,), float(number)) for number in range(400)}}
    path = tmp_path / f"{'x' * 200}.pt"  # torch repeats it in the name of each record
    torch.save(state, path)
    ferry.shard(path, tmp_path / "c")
    loaded = torchferry.load(tmp_path / "c")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("writer", ["ours", "stock"])
def test_a_checkpoint_is_copied_whole_or_not_at_all(tmp_path: Path, writer: str) -> None:
    if writer == "ours":
        ferry.save(STATE, tmp_path / "c")
    else:
        dcp.save(STATE, checkpoint_id=tmp_path / "c")
    ferry.save({"old": torch.ones(3)}, tmp_path / "copy")
    torchferry.copy(tmp_path / "c", tmp_path / "copy")
    check(torchferry.load(tmp_path / "copy"))
    assert len(list((tmp_path / "copy").rglob("*.distcp"))) == 1
    (shard,) = (tmp_path / "c").rglob("*.distcp")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 4
    shard.write_bytes(data)
    with pytest.raises(torchferry.CheckpointCorruptError):
        torchferry.copy(tmp_path / "c", tmp_path / "copy")
    check(torchferry.load(tmp_path / "copy"))


def test_clean_finds_shards_that_no_metadata_names(tmp_path: Path) -> None:
    ferry.save({"a": torch.ones(3)}, tmp_path / "c")
    ferry.save({"a": torch.ones(3)}, tmp_path / "died")
    (tmp_path / "died/.metadata").unlink()
    assert torchferry.clean(tmp_path).removed == ()
    (found,) = torchferry.clean(tmp_path, older_than=0).removed
    assert found.kind == "shards of an unfinished save"
    assert not list((tmp_path / "died").rglob("*.distcp"))
    assert torchferry.load(tmp_path / "c")["a"].tolist() == [1, 1, 1]


def test_into_is_filled_from_the_shards_and_only_what_it_wants_is_read(tmp_path: Path) -> None:
    """Whatever dtype and strides it has; tied tensors one after the other; meta tensors are replaced."""
    ferry.save(STATE, tmp_path)
    large, turned = torch.zeros(700, 1000), torch.zeros(1000, 700).t()
    wide, meta = torch.zeros(400, 1000, dtype=torch.float64), torch.empty(1000, 600, device="meta")
    both = torch.zeros(7, 3)
    into = {"large": large, "large.t": turned, "view": wide, "columns": meta, "small": both, "small.again": both}
    reports: list[torchferry.TransferReport] = []
    addresses = large.data_ptr(), turned.data_ptr(), wide.data_ptr()
    result = torchferry.load(tmp_path, into={"model": into}, strict=False, report=reports.append)
    assert (large.data_ptr(), turned.data_ptr(), wide.data_ptr()) == addresses
    assert torch.equal(large, TENSORS["large"])
    assert torch.equal(turned, TENSORS["large.t"])
    assert torch.equal(wide.float(), TENSORS["view"])
    assert torch.equal(into["columns"], TENSORS["columns"])
    assert torch.equal(both, TENSORS["small.again"])
    assert "model.float8" in result.unexpected_keys
    needed = sum(TENSORS[name].nbytes for name in into)
    assert needed <= reports[0].nbytes < needed + NEIGHBOURS


def test_a_module_is_filled_in_its_own_memory(tmp_path: Path) -> None:
    saved, module = (torch.nn.Sequential(torch.nn.Linear(600, 700), torch.nn.BatchNorm1d(700)) for _ in range(2))
    ferry.save({"model": saved.state_dict(), "epoch": 3}, tmp_path)
    address = module[0].weight.data_ptr()
    with pytest.raises(torchferry.CheckpointMismatchError, match="below 'model'"):
        torchferry.load(tmp_path, into=module)
    assert torchferry.load(tmp_path, into={"model": module}) == ([], [])
    assert module[0].weight.data_ptr() == address
    for name, value in saved.state_dict().items():
        assert torch.equal(module.state_dict()[name], value), name


def test_into_that_does_not_fit_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    ferry.save({"a": torch.ones(3), "b": torch.ones(4)}, tmp_path)
    into = {"a": torch.zeros(3), "b": torch.zeros(5)}
    with pytest.raises(torchferry.CheckpointMismatchError, match="b is 4 there and 5 here"):
        torchferry.load(tmp_path, into=into)
    assert not into["a"].any()


def test_keys_read_only_the_items_that_they_take(tmp_path: Path) -> None:
    ferry.save(STATE, tmp_path)
    reports: list[torchferry.TransferReport] = []
    loaded = torchferry.load(tmp_path, keys=["model.large.t", "model.scalar"], report=reports.append)
    assert sorted(loaded["model"]) == ["large.t", "scalar"]
    needed = TENSORS["large.t"].nbytes + TENSORS["scalar"].nbytes
    assert needed <= reports[0].nbytes < needed + NEIGHBOURS


class Sizes(Callback):
    """What a call said that it would read."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def set_size(self, size: int) -> None:
        self.sizes.append(size)


def test_diff_takes_sharded_checkpoints_on_either_side(tmp_path: Path) -> None:
    """By CRC32s, ours and those of the stock writer's archives; by reading only where a side carries none."""
    changed = {**STATE, "step": 8, "model": {**TENSORS, "large": TENSORS["large"] + 1, "small.t": torch.ones(4)}}
    torch.save(STATE, tmp_path / "one.pt")
    torchferry.save(
        {name: value.detach().resolve_conj() for name, value in TENSORS.items()}, tmp_path / "t.safetensors"
    )
    ferry.save(STATE, tmp_path / "ours")
    ferry.save(changed, tmp_path / "changed")
    ferry.save(STATE["model"], tmp_path / "tensors")
    dcp.save(STATE, checkpoint_id=tmp_path / "stock")
    for other in ("stock", "ours"):
        callback = Sizes()
        assert not torchferry.diff(tmp_path / "ours", tmp_path / other, callback=callback)
        turned = sum(TENSORS[name].nbytes for name in ("large.t", "small.t")) if other == "stock" else 0
        assert turned <= max(callback.sizes) < turned + NEIGHBOURS  # the values
        for first, second in (("changed", other), (other, "changed")):
            found = torchferry.diff(tmp_path / first, tmp_path / second)
            assert found.changed == ("model.large",)
            assert list(found.reshaped) == ["model.small.t"]
            assert list(found.values) == ["step"]
            assert sorted(found.values["step"]) == [7, 8]
    assert not torchferry.diff(tmp_path / "ours", tmp_path / "one.pt")
    assert torchferry.diff(tmp_path / "one.pt", tmp_path / "changed").changed == ("model.large",)
    assert not torchferry.diff(tmp_path / "t.safetensors", tmp_path / "tensors")
    assert torchferry.diff(tmp_path / "tensors", tmp_path / "one.pt").added[0] == "model.large"


def test_what_is_sharded_and_joined_again_is_the_same_object(tmp_path: Path) -> None:
    """Keys of any type, empty dicts, OrderedDicts and their ``_metadata``; stock readers find what they always do."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.rand(3, 2)).sum().backward()
    optimizer.step()
    odd = {None: 1, True: 2, 2.5: 3, (0, 1): torch.ones(2), "x": {}, 7: [torch.ones(1), {"y": {}}], "t": ()}
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "odd": odd, "none": {}}
    torch.save(state, tmp_path / "one.pt")
    ferry.shard(tmp_path / "one.pt", tmp_path / "c")
    torchferry.convert(tmp_path / "c", tmp_path / "two.pt")
    torchferry.copy(tmp_path / "c", tmp_path / "copy")
    for found in (torchferry.load(tmp_path / "c"), torch.load(tmp_path / "two.pt"), torchferry.load(tmp_path / "copy")):
        assert repr(found) == repr(torch.load(tmp_path / "one.pt"))
        assert found["model"]._metadata == state["model"]._metadata
    for other in ("c", "two.pt", "copy"):
        assert not torchferry.diff(tmp_path / "one.pt", tmp_path / other)
    ferry.save(state, tmp_path / "stock")  # as DCP flattens it
    assert torchferry.diff(tmp_path / "c", tmp_path / "stock").values["optimizer.state.0"] == (
        "a key of type int",
        None,
    )
    assert [*torchferry.load(tmp_path / "c", keys="optimizer.state.0")["optimizer"]["state"]] == [0]
    torchferry.convert(tmp_path / "c", tmp_path / "part.pt", keys="optimizer", strip_prefix="optimizer.")
    torch.optim.Adam(model.parameters()).load_state_dict(part := torch.load(tmp_path / "part.pt"))
    assert repr(part) == repr(optimizer.state_dict())
    into = {"model": {name: torch.zeros_like(value) for name, value in model.state_dict().items()}}
    dcp.load(into, checkpoint_id=tmp_path / "c")
    assert torch.equal(into["model"]["0.weight"], model[0].weight)


def test_a_key_that_a_sharded_checkpoint_cannot_keep_is_refused(tmp_path: Path) -> None:
    torch.save({"a": {torch.Size([1]): torch.ones(2)}}, tmp_path / "one.pt")
    with pytest.raises(torchferry.CheckpointFormatError, match="'a' has a Size as a key"):
        ferry.shard(tmp_path / "one.pt", tmp_path / "c")
    assert [path.name for path in tmp_path.iterdir()] == ["one.pt"]


def test_nesting_that_is_no_tree_is_damage() -> None:
    inner = ["a"]
    round_and_round: dict[str, object] = {}
    round_and_round["self"] = round_and_round
    for tree in ({"x": inner, "y": inner}, round_and_round, {"x": 1}):
        with pytest.raises(torchferry.CheckpointCorruptError, match="no tree"):
            nest(tree, {"a": 1}, lambda _: True, "memory://x")


def test_diff_compares_tensors_in_other_values_of_sharded_checkpoints(tmp_path: Path) -> None:
    for name, last in (("a", 1.0), ("b", 2.0)):
        torch.save({"pair": (torch.tensor([0.0, last]), 3)}, tmp_path / f"{name}.pt")
        ferry.shard(tmp_path / f"{name}.pt", tmp_path / name)
        assert not torchferry.diff(tmp_path / name, tmp_path / f"{name}.pt")
    assert torchferry.diff(tmp_path / "a", tmp_path / "b").changed == ("pair.0",)


def test_a_sharded_checkpoint_is_converted_whole_or_in_part(tmp_path: Path) -> None:
    """To torch.save as it is nested, to safetensors by its names, in one file or several."""
    ferry.save(STATE, tmp_path / "c")
    torchferry.convert(tmp_path / "c", tmp_path / "one.pt")
    check(torch.load(tmp_path / "one.pt"))
    torchferry.convert(tmp_path / "c", tmp_path / "some.pt", keys="model.small", strip_prefix="model.")
    assert torch.equal(torch.load(tmp_path / "some.pt")["small"], TENSORS["small"])
    with pytest.raises(torchferry.CheckpointValueError, match=r"'step'.*exclude="):
        torchferry.convert(tmp_path / "c", tmp_path / "m.safetensors")
    options = {"keys": "model", "strip_prefix": "model.", "metadata": {"run": "7"}}
    torchferry.convert(tmp_path / "c", tmp_path / "m.safetensors", **options)
    torchferry.convert(tmp_path / "c", tmp_path / "s", format="safetensors", max_shard_size=4 * MIB, **options)
    assert torchferry.inspect(tmp_path / "m.safetensors").metadata["run"] == "7"
    for name in ("m.safetensors", "s.safetensors.index.json"):
        loaded = torchferry.load(tmp_path / name)
        assert {**loaded}.keys() == TENSORS.keys()
        for key, value in TENSORS.items():
            assert torch.equal(bits(loaded[key]), bits(value.detach().resolve_conj())), key
    assert len(list(tmp_path.glob("s-*.safetensors"))) == 3
    with pytest.raises(torchferry.CheckpointKeyError, match="nothing"):
        torchferry.convert(tmp_path / "c", tmp_path / "x.pt", keys="nothing")
    with pytest.raises(torchferry.CheckpointValueError, match="would be called"):
        ferry.save({"a": torch.ones(1), "x.a": torch.ones(1)}, tmp_path / "d")
        torchferry.convert(tmp_path / "d", tmp_path / "x.pt", strip_prefix="x.")


def test_what_is_left_out_of_a_conversion_is_not_read(tmp_path: Path) -> None:
    ferry.save(STATE, tmp_path / "c")
    (shard,) = (tmp_path / "c").rglob("*.distcp")
    metadata = pickle.loads((tmp_path / "c/.metadata").read_bytes())
    (info,) = (info for index, info in metadata.storage_data.items() if index.fqn == "model.view")
    data = bytearray(shard.read_bytes())
    data[info.offset + info.length // 2] ^= 4
    shard.write_bytes(data)
    torchferry.convert(tmp_path / "c", tmp_path / "x.pt", exclude="model.view")
    with pytest.raises(torchferry.CheckpointCorruptError, match="view"):
        torchferry.convert(tmp_path / "c", tmp_path / "y.pt")
    assert not (tmp_path / "y.pt").exists()


def test_a_target_that_ends_in_a_slash_becomes_a_sharded_checkpoint(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "one.pt")
    stat = torchferry.convert(tmp_path / "one.pt", f"{tmp_path}/c/")
    assert stat.url.endswith("c/.metadata")
    check(torchferry.load(tmp_path / "c"))
    torchferry.convert(tmp_path / "one.pt", tmp_path / "d", format="sharded")
    check(torchferry.load(tmp_path / "d"))
    with pytest.raises(torchferry.CheckpointFormatError, match=r"sharded already: copy\(\)"):
        torchferry.convert(tmp_path / "c", f"{tmp_path}/e/")
    with pytest.raises(torchferry.UnsupportedOptionError, match="keys="):
        torchferry.convert(tmp_path / "one.pt", f"{tmp_path}/e/", keys="step")
    torchferry.save({"a": torch.ones(3)}, tmp_path / "x.safetensors")
    with pytest.raises(torchferry.CheckpointFormatError, match=r"torch\.save"):
        torchferry.convert(tmp_path / "x.safetensors", f"{tmp_path}/e/")
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize("lacking", ["state_dict_metadata", "storage_data"])
def test_metadata_that_lacks_a_part_is_no_checkpoint(tmp_path: Path, lacking: str) -> None:
    metadata = Metadata({}, storage_data={})
    del metadata.__dict__[lacking]
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    for call in (torchferry.load, torchferry.inspect, torchferry.verify):
        with pytest.raises(torchferry.CheckpointFormatError, match="not the metadata of a checkpoint"):
            call(tmp_path)


@pytest.mark.parametrize("what", ["small", "text", "number", "conjugate", "large"])
def test_one_flipped_bit_of_a_stock_item_is_found_wherever_it_is(tmp_path: Path, what: str) -> None:
    """In the tensor or, of what is no tensor and of a large one's strides, in the pickle."""
    state = {
        "small": torch.randn(100),
        "text": "hello world",
        "number": 0.3141,
        "conjugate": torch.randn(200_000, dtype=torch.complex64).conj(),
        "large": torch.randn(512, 512),
        "behind": torch.randn(512, 512),
    }
    dcp.save(state, checkpoint_id=tmp_path)
    metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    info = next(info for index, info in metadata.storage_data.items() if index.fqn == what)
    path = tmp_path / info.relative_path
    data = bytearray(path.read_bytes())
    item = bytes(data[info.offset : info.offset + info.length])
    stride = b"M\x00\x02K\x01\x86"  # (512, 1)
    found = {"text": b"llo world", "number": b"G\x3f\xd4", "large": stride}
    at = item.index(found[what]) + 1 if what in found else len(item) // 2
    data[info.offset + at] ^= 1
    path.write_bytes(data)
    blank = {
        name: torch.zeros_like(value) if isinstance(value, torch.Tensor) else None for name, value in state.items()
    }
    for load in (torchferry.load, torchferry.verify, lambda url: ferry.load(dict(blank), url)):
        with pytest.raises(torchferry.CheckpointCorruptError):
            load(tmp_path)


@pytest.mark.parametrize("writer", ["ours", "stock"])
def test_an_item_with_two_targets_gives_each_all_its_bits(tmp_path: Path, writer: str) -> None:
    saved = torch.randn(400, 1000)
    if writer == "ours":
        ferry.save({"x": saved}, tmp_path)
    else:
        dcp.save({"x": saved}, checkpoint_id=tmp_path)
    rough, exact = torch.zeros(400, 1000, dtype=torch.bfloat16), torch.zeros(400, 1000)
    reader = ferry.StorageReader(tmp_path)
    metadata = reader.read_metadata()
    [index] = metadata.storage_data
    nothing = torch.Size((0, 0))
    item = ReadItem(LoadItemType.TENSOR, index, nothing, index, nothing, saved.shape)
    asyncio.run(reader.read_items(metadata, [item, item], [rough, exact], {}))
    assert torch.equal(rough, saved.to(torch.bfloat16))
    assert torch.equal(exact, saved)


def test_requests_of_one_item_may_have_elements_in_common(tmp_path: Path) -> None:
    """As only a planner of one's own asks: a part, the whole, and a part that meets the first."""
    saved = torch.randn(400, 1000)
    ferry.save({"x": saved}, tmp_path)
    reader = ferry.StorageReader(tmp_path)
    metadata = reader.read_metadata()
    [index] = metadata.storage_data
    nothing = torch.Size((0, 0))
    boxes = [((100, 0), (50, 1000)), ((0, 0), (400, 1000)), ((120, 10), (200, 300))]
    items = [
        ReadItem(LoadItemType.TENSOR, index, nothing, index, torch.Size(offsets), torch.Size(lengths))
        for offsets, lengths in boxes
    ]
    targets = [torch.zeros(lengths) for _, lengths in boxes]
    asyncio.run(reader.read_items(metadata, items, targets, {}))
    for ((row, column), (rows, columns)), target in zip(boxes, targets, strict=True):
        assert torch.equal(target, saved[row : row + rows, column : column + columns])


def test_any_flipped_bit_of_our_metadata_is_found(tmp_path: Path) -> None:
    ferry.save({"x": torch.arange(1000.0), "y": {"z": [torch.ones(2), "text"]}}, tmp_path)
    path = tmp_path / ".metadata"
    whole = path.read_bytes()
    for at in range(0, len(whole), 11):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        with pytest.raises(torchferry.CheckpointCorruptError, match="damaged"):
            torchferry.load(tmp_path)
    path.write_bytes(whole[: -len(b" crc32 by torchferry: ") - 4])
    with pytest.raises(torchferry.CheckpointCorruptError, match="lacks the CRC32"):
        torchferry.load(tmp_path)


def test_damaged_metadata_of_the_stock_writer_raises_documented_errors_only(tmp_path: Path) -> None:
    dcp.save({"x": torch.arange(100.0), "y": {"z": [torch.ones(2), "text"]}}, checkpoint_id=tmp_path)
    path = tmp_path / ".metadata"
    whole = path.read_bytes()
    refused = 0
    for at in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        try:
            torchferry.load(tmp_path)
        except torchferry.TorchferryError:
            refused += 1
    assert refused > 100


def test_metadata_whose_parts_are_not_all_of_a_tensor_is_damaged(tmp_path: Path) -> None:
    dcp.save({"x": torch.ones(100)}, checkpoint_id=tmp_path)
    path = tmp_path / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    metadata.state_dict_metadata["x"].size = torch.Size((200,))
    path.write_bytes(pickle.dumps(metadata))
    loads = (torchferry.load, torchferry.verify, lambda url: ferry.load({"x": torch.zeros(200)}, url))
    for load in loads:
        with pytest.raises(torchferry.CheckpointCorruptError, match="have 100 elements, and it has 200"):
            load(tmp_path)


@pytest.mark.parametrize("where", ["all", "first", "last"])
def test_verify_finds_a_stock_item_that_is_no_file_any_more(tmp_path: Path, where: str) -> None:
    dcp.save({"x": torch.randn(1000, 100)}, checkpoint_id=tmp_path)
    [shard] = tmp_path.rglob("*.distcp")
    data = bytearray(shard.read_bytes())
    damaged = {"all": slice(None), "first": slice(4096), "last": slice(-4096, None)}[where]
    data[damaged] = bytes(len(data[damaged]))
    shard.write_bytes(data)
    with pytest.raises(torchferry.CheckpointCorruptError):
        torchferry.verify(tmp_path)


class Casting(DefaultSavePlanner):
    """Stores other tensors than its plan says."""

    def __init__(self, cast: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self._cast = cast

    def transform_object(self, write_item: Any, object: Any) -> Any:  # noqa: A002 - torch's signature
        value = super().transform_object(write_item, object)
        return self._cast(value) if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int32])
@pytest.mark.parametrize("rows", [10, 1000])
def test_a_planner_may_store_another_dtype_than_its_plan_says(tmp_path: Path, dtype: torch.dtype, rows: int) -> None:
    state = {"x": torch.randn(rows, 300) * 100}
    ferry.save(state, tmp_path, planner=Casting(lambda tensor: tensor.to(dtype)))
    right = {"x": torch.zeros(rows, 300)}
    dcp.load(right, checkpoint_id=tmp_path)
    filled = {"x": torch.zeros(rows, 300)}
    ferry.load(filled, tmp_path)
    assert torch.equal(filled["x"], right["x"])
    assert torch.equal(torchferry.load(tmp_path)["x"], right["x"])
    torchferry.verify(tmp_path)


def test_what_could_not_be_loaded_is_refused(tmp_path: Path) -> None:
    with pytest.raises(torchferry.CheckpointValueError, match="x is a sparse tensor"):
        ferry.save({"x": torch.eye(3).to_sparse()}, tmp_path)
    with pytest.raises(torchferry.CheckpointValueError, match="its plan says"):
        ferry.save({"x": torch.eye(3)}, tmp_path, planner=Casting(torch.flatten))
    assert not (tmp_path / ".metadata").exists()


def test_a_quantized_tensor_is_loaded_into_one_that_has_its_scale(tmp_path: Path) -> None:
    value = torch.quantize_per_tensor(torch.randn(100), 0.1, 3, torch.quint8)
    ferry.async_save({"x": value}, tmp_path).result(60)
    loaded = {"x": torch.quantize_per_tensor(torch.zeros(100), 0.1, 3, torch.quint8)}
    ferry.load(loaded, tmp_path)
    assert torch.equal(loaded["x"].int_repr(), value.int_repr())
    with pytest.raises(torchferry.UnsupportedOptionError, match="whose scale is not stored"):
        torchferry.load(tmp_path)


def test_an_asynchronous_save_stores_lazy_conjugates_and_negatives_as_what_they_are(tmp_path: Path) -> None:
    value = torch.randn(1000, dtype=torch.complex64)
    ferry.async_save({"a": value.conj(), "b": value.conj().imag}, tmp_path).result(60)
    loaded = torchferry.load(tmp_path)
    assert torch.equal(loaded["a"], value.conj().resolve_conj())
    assert torch.equal(loaded["b"], -value.imag)


def test_clean_never_takes_a_save_that_metadata_above_it_names(tmp_path: Path) -> None:
    ferry.save({"a": torch.ones(3)}, tmp_path)
    [shard] = tmp_path.rglob("*.distcp")
    assert torchferry.clean(shard.parent, older_than=0).removed == ()
    assert torchferry.load(tmp_path)["a"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("when", ["while .metadata is answered", "while the old shards are removed"])
def test_an_interrupt_after_the_commit_leaves_the_new_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    ferry.save({"a": torch.zeros(3)}, tmp_path)
    if when == "while .metadata is answered":
        put = Place.put

        async def put_and_stop(self: Place, relative_path: str, data: bytes) -> Any:
            await put(self, relative_path, data)
            raise KeyboardInterrupt

        monkeypatch.setattr(Place, "put", put_and_stop)
    else:

        async def stop(*_: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(writer_module, "remove_before", stop)
    with pytest.raises(KeyboardInterrupt):
        ferry.save({"a": torch.ones(3)}, tmp_path)
    assert torchferry.load(tmp_path)["a"].tolist() == [1, 1, 1]
    torchferry.verify(tmp_path)
