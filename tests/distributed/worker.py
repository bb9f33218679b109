"""The ranks of the tests: run jobs that come through a pipe, by name, and answer through another.

A process is used for many jobs, in process groups of different sizes: starting one takes seconds.
"""

from __future__ import annotations

import gc
import os
import pickle
import signal
import socket
import sys
import threading
import traceback
import warnings
import zlib
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, StateDictType, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import torchferry
import torchferry.distributed as ferry
from torchferry.distributed import api
from torchferry.formats import torch_hooks
from torchferry.series import steps
from torchferry.series.ranks import Ranks
from torchferry.series.restoring import Restorer

if TYPE_CHECKING:
    from collections.abc import Iterator

warnings.filterwarnings("ignore")


class Net(nn.Module):
    """Sizes that no number of ranks divides, and one tensor that is read straight into memory."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(37, 53)
        self.large = nn.Linear(1024, 1501, bias=False)
        self.second = nn.Linear(53, 41)
        self.norm = nn.BatchNorm1d(41)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.second(self.first(x)))


def make(kind: str, world: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    model: nn.Module = Net()
    if kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    elif kind == "fsdp2":
        mesh = init_device_mesh("cpu", (world,))
        for layer in (model.first, model.large, model.second):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif kind == "hsdp":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
        fully_shard(model, mesh=mesh)
    elif kind == "tp":
        mesh = init_device_mesh("cpu", (world,))
        plan = {"first": ColwiseParallel(), "second": RowwiseParallel(), "large": RowwiseParallel()}
        parallelize_module(model, mesh, plan)
    elif kind == "fsdp1":
        model = FullyShardedDataParallel(
            model, use_orig_params=True, sharding_strategy=ShardingStrategy.FULL_SHARD, device_id=torch.device("cpu")
        )
        FullyShardedDataParallel.set_state_dict_type(model, StateDictType.SHARDED_STATE_DICT)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def value_of(name: str, shape: Any, dtype: torch.dtype) -> torch.Tensor:
    """What a tensor of that name has for values, whoever holds it."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    values = torch.rand(tuple(shape), generator=generator)
    return (values * 100).to(dtype)


def parts(state: dict[str, Any]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The local part of each tensor, and what is to be in it."""
    for name, value in flatten_state_dict(state)[0].items():
        if isinstance(value, DTensor):
            shape, offset = compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)
            whole = value_of(name, value.shape, value.dtype)
            yield value.to_local(), whole[tuple(slice(at, at + n) for at, n in zip(offset, shape, strict=True))]
        elif isinstance(value, ShardedTensor):
            whole = value_of(name, value.size(), value.dtype)
            for shard in value.local_shards():
                of, sizes = shard.metadata.shard_offsets, shard.metadata.shard_sizes
                yield shard.tensor, whole[tuple(slice(at, at + n) for at, n in zip(of, sizes, strict=True))]
        elif isinstance(value, torch.Tensor):
            yield value, value_of(name, value.shape, value.dtype)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    weights, state = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": state, "step": 7, "note": ["as it is", (1, 2.5)]}


def write(state: dict[str, Any], url: str, options: dict[str, Any], how: str) -> None:
    if how == "stock":
        dcp.save(state, storage_writer=FsspecWriter(url, **options))
    elif how == "stock with ours":
        dcp.save(state, storage_writer=ferry.StorageWriter(url, storage_options=options))
    else:
        ferry.save(state, url, storage_options=options)


def read(state: dict[str, Any], url: str, options: dict[str, Any], how: str) -> int:
    reports: list[torchferry.TransferReport] = []
    if how == "stock":
        dcp.load(state, storage_reader=FsspecReader(url, **options))
    elif how == "stock with ours":
        dcp.load(state, storage_reader=ferry.StorageReader(url, storage_options=options, report=reports.append))
    else:
        ferry.load(state, url, storage_options=options, report=reports.append)
    return sum(report.nbytes for report in reports)


# --- jobs


def save_model(kind: str, url: str, options: dict[str, Any], how: tuple[str, ...], world: int) -> None:
    """Saves a model and its optimizer, each way to a URL of its own."""
    state = state_of(*make(kind, world))
    with torch.no_grad():
        for local, values in parts(state):
            local.copy_(values)
    for way in how:
        write(state, f"{url}/{way.replace(' ', '-')}", options, way)


def load_model(kind: str, url: str, options: dict[str, Any], how: tuple[tuple[str, str], ...], world: int) -> list[int]:
    """Loads what was saved one way with a reader, on other ranks or in other placements; returns bytes read."""
    model, optimizer = make(kind, world)
    moved = []
    for saved, reader in how:
        state = state_of(model, optimizer)
        with torch.no_grad():
            for local, _ in parts(state):
                local.zero_()
        state["step"], state["note"] = 0, ["", (0, 0.0)]
        moved.append(read(state, f"{url}/{saved.replace(' ', '-')}", options, reader))
        for local, values in parts(state):
            assert torch.equal(local, values), (kind, saved, reader, local.shape)
        assert (state["step"], state["note"]) == (7, ["as it is", (1, 2.5)])
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return moved


def save_one_object(path: str, world: int) -> list[str]:
    """Saves what must not be saved as one object, and what may; returns what was said of each."""
    mesh = init_device_mesh("cpu", (world,))
    sharded = distribute_tensor(torch.ones(64, 8), mesh, [Shard(0)], src_data_rank=None)
    replicated = distribute_tensor(torch.ones(64, 8), mesh, [Replicate()], src_data_rank=None)
    flat = FullyShardedDataParallel(nn.Linear(8, 8), use_orig_params=False, device_id=torch.device("cpu"))
    said = []
    for number, value in enumerate((sharded, {"deep": [{"x": sharded}]}, flat._flat_param, replicated)):
        try:
            torchferry.save({"value": value}, f"{path}/{dist.get_rank()}-{number}.pt")
            said.append("")
        except torchferry.CheckpointValueError as error:
            said.append(str(error))
    torchferry.save({"value": sharded}, f"{path}/{dist.get_rank()}-part.pt", shards=True)
    return said


def save_tensors(url: str, options: dict[str, Any], world: int, nbytes: int = 3 << 20, fill: float = 1.0) -> None:
    """Saves tensors that all ranks have a part of."""
    ferry.save(_sharded(world, nbytes, fill), url, storage_options=options)


def load_tensors(url: str, options: dict[str, Any], world: int, nbytes: int = 3 << 20) -> float:
    """Loads them; returns their one value."""
    state = _sharded(world, nbytes, 0.0)
    ferry.load(state, url, storage_options=options)
    values = {float(value) for tensor in state.values() for value in tensor.to_local().unique()}
    assert len(values) == 1, values
    return values.pop()


def load_alike(url: str, options: dict[str, Any], world: int, kind: str = "ddp", other: bool = False) -> int:
    """Loads what all ranks ask for alike, read once; returns the bytes that this rank has read.

    With ``other``, one rank wants a tensor in another dtype.
    """
    model, optimizer = make(kind, world)
    state = state_of(model, optimizer)
    with torch.no_grad():
        for local, _ in parts(state):
            local.zero_()
    state["model"]["first.weight"] = torch.zeros(37, 53).t()  # of other strides
    if other and dist.get_rank():
        state["model"]["first.weight"] = torch.zeros(53, 37, dtype=torch.float64)
    state["step"], state["note"] = 0, ["", (0, 0.0)]
    reports: list[torchferry.TransferReport] = []
    ferry.load(state, url, storage_options=options, broadcast=True, report=reports.append)
    for local, values in parts(state):
        assert torch.equal(local, values.to(local.dtype)), local.shape
    assert (state["step"], state["note"]) == (7, ["as it is", (1, 2.5)])
    return sum(report.nbytes for report in reports)


def load_alike_and_die(url: str, options: dict[str, Any], world: int) -> None:
    """One rank dies when it has read, before it sends anything."""
    if dist.get_rank() == 1:
        from torchferry.distributed import sharing

        sharing.Broadcast.exchange = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    load_alike(url, options, world)


def load_rows(url: str, options: dict[str, Any], world: int, nbytes: int = 3 << 20) -> tuple[list[float], list[str]]:
    """Loads one tensor that is split by rows; returns its values, and the warnings of this rank's reports."""
    reports: list[torchferry.TransferReport] = []
    state = {"rows": _sharded(world, nbytes, 0.0)["rows"]}
    planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
    ferry.load(state, url, storage_options=options, planner=planner, report=reports.append)
    return state["rows"].to_local().unique().tolist(), [text for report in reports for text in report.warnings]


def manage(url: str, options: dict[str, Any], world: int, background: bool) -> tuple[list[int], float, int | None]:
    """A series of sharded checkpoints: saved, resumed; returns its steps, what was restored, and from which."""
    state = _sharded(world, 1 << 20, 0.0)
    with torchferry.CheckpointManager(
        url, sharded=True, max_to_keep=2, background=background, storage_options=options
    ) as manager:
        for step in range(1, 5):
            for tensor in state.values():
                tensor.to_local().fill_(step)
            manager.save(step, state, {"loss": 1.0 / step})
        manager.wait_until_finished()
        there = manager.all_steps() if dist.get_rank() == 0 else []
        manager.restore(into=state)
        values = {float(value) for tensor in state.values() for value in tensor.to_local().unique()}
        assert len(values) == 1
        return there, values.pop(), manager.restored_step


def manage_with_failures(url: str, world: int) -> tuple[list[str], int | None]:
    """The first rank cannot store metrics of step 1, the last has none that can be stored of step 2."""
    state = _sharded(world, 1 << 20, 1.0)
    rank, said = dist.get_rank(), []
    with torchferry.CheckpointManager(url, sharded=True) as manager:
        for step in (1, 2, 3):
            stat_sharded = steps.Series.stat_sharded
            if step == 1 and rank == 0:
                steps.Series.stat_sharded = _refuse
            metrics: Any = {"loss": object() if step == 2 and rank == world - 1 else 0.5}
            try:
                manager.save(step, state, metrics)
                manager.wait_until_finished()
            except Exception as error:  # noqa: BLE001 - the test looks at it
                said.append(str(error))
            steps.Series.stat_sharded = stat_sharded
        return said, manager.latest_step()


async def _refuse(*_: Any) -> Any:
    raise torchferry.StorageError("not today")


def save_and_die(url: str, options: dict[str, Any], world: int, when: str, victim: int) -> None:
    """Saves, and one rank kills itself."""
    if dist.get_rank() == victim:
        _die(when)
    save_tensors(url, options, world, fill=2.0)


def save_two_at_once(url: str, options: dict[str, Any], world: int) -> None:  # noqa: ARG001 - as all jobs
    """The first half of the ranks saves one checkpoint, the second half another, to one URL."""
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = dist.get_rank() // 2
    state = {"a": torch.full((300_000,), 1.0 + mine), "b": torch.full((400_000,), 1.0 + mine)}
    for _ in range(3):
        ferry.save(state, url, storage_options=options, process_group=halves[mine])


class Broken:
    """A part of a training's state that cannot be saved."""

    def state_dict(self) -> dict[str, Any]:
        raise ValueError("no state yet")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError

    def __deepcopy__(self, memo: Any) -> Broken:
        raise ValueError("no state yet")


def save_after_a_failure(url: str, options: dict[str, Any], world: int, how: str) -> list[str]:
    """The last rank cannot save step 1; all of them save step 2. Returns the error of step 1, on each rank."""
    said = []
    for step in (1.0, 2.0):
        state: dict[str, Any] = _sharded(world, 1 << 20, step)
        if step == 1 and dist.get_rank() == world - 1:
            state["broken"] = Broken()
        try:
            if how == "save":
                ferry.save(state, url, storage_options=options)
            else:
                ferry.async_save(state, url, storage_options=options).result(60)
        except torchferry.TorchferryError as error:
            said.append(str(error))
    return said


def save_to_several_places(urls: list[str], world: int) -> None:  # noqa: ARG001 - as all jobs
    """Each rank saves to another URL."""
    ferry.save({"a": torch.ones(3), "of": {str(dist.get_rank()): torch.ones(3)}}, urls[dist.get_rank()])


def load_from_several_places(urls: list[str], world: int) -> None:  # noqa: ARG001 - as all jobs
    """Each rank loads from another URL."""
    ferry.load({"a": torch.ones(3)}, urls[dist.get_rank()])


def save_and_destroy_the_group(url: str, world: int) -> str:  # noqa: ARG001 - as all jobs
    """Destroys the process group before the background has begun to save; returns what the save's result raises."""
    begin = threading.Event()
    api._uploads.executor.submit(begin.wait)
    saving = ferry.async_save({"rank": {str(dist.get_rank()): torch.ones(3)}, "a": torch.ones(3)}, url)
    dist.barrier()
    dist.destroy_process_group()
    begin.set()
    error = saving.upload_completion.exception(60)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # for the end of the job
    return f"{type(error).__name__}: {error}"


def series_of_a_part_of_the_ranks(url: str, world: int) -> tuple[list[int | None], int]:  # noqa: ARG001 - as all jobs
    """Each half of the ranks opens a series of its own, closes it, and opens it again, three times.

    Returns:
        The latest step each time; how many names their groups had: under a name that was there before, a rank that
        comes early waits for the last group's addresses.
    """
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = dist.get_rank() // 2
    latest, names = [], set()
    for step in range(3):
        with torchferry.CheckpointManager(f"{url}/{mine}", process_group=halves[mine]) as manager:
            assert manager._ranks is not None
            names.add(manager._ranks._group.group_name)
            manager.save(step, {"a": torch.full((1000,), float(step))})
            manager.wait_until_finished()
            latest.append(manager.latest_step())
    return latest, len(names)


class Reluctant(Broken):
    """A part of a training's state that says what it has, and takes nothing on the last rank."""

    def state_dict(self) -> dict[str, Any]:
        return {"x": torch.zeros(3)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if dist.get_rank() == dist.get_world_size() - 1:
            raise ValueError(f"not with {sorted(state)}")


def load_into_what_fails(url: str, world: int) -> list[str]:
    """Loads into objects of which one fails on the last rank: as it is asked for its state, or given one."""
    ferry.save({"part": {"x": torch.ones(3)}}, url)
    said = []
    for part in (Broken() if dist.get_rank() == world - 1 else {"x": torch.zeros(3)}, Reluctant()):
        try:
            ferry.load({"part": part}, url)
        except torchferry.TorchferryError as error:
            said.append(str(error))
    return said


def restore_what_is_replaced(url: str, world: int, times: int) -> list[float] | str:  # noqa: ARG001 - as all jobs
    """Restores a step that another job replaces after the first rank has loaded it, so many times."""
    path = f"{url}/step-0000000001.pt"
    if dist.get_rank() == 0:
        torchferry.save(torch.zeros(2), path)
    dist.barrier()
    load = Restorer._load
    loads = 0

    async def load_and_replace(self: Restorer, options: Any, candidate: Any) -> Any:
        nonlocal loads
        loaded = await load(self, options, candidate)
        if dist.get_rank() == 0 and loads < times:
            loads += 1
            await torchferry.save_async(torch.full((2,), float(loads)), path)
        return loaded

    Restorer._load = load_and_replace  # type: ignore[method-assign]
    try:
        return torchferry.CheckpointManager(url).restore().tolist()
    except torchferry.CheckpointChangedError as error:
        return str(error)
    finally:
        Restorer._load = load  # type: ignore[method-assign]


def timeouts_of_groups(world: int) -> list[float]:  # noqa: ARG001 - as all jobs
    """Seconds that the groups of background saves and of series wait."""
    made = [torch_hooks.kept_gloo_group("saves"), Ranks()._group]
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in made]


def _die(when: str) -> None:
    from torchferry.distributed import writer

    def die(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if when == "before its shard":
        writer.StorageWriter.write_data = die
    elif when == "during its shard":
        writer.ItemStream.__anext__ = die
    elif when == "after its shard":
        writer.storage_info = die
    elif when == "before .metadata":
        writer.write_metadata = die
    elif when == "after .metadata":
        writer.remove_before = die


def _sharded(world: int, nbytes: int, fill: float) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (world,))
    whole = torch.full((nbytes // 4 // 64, 64), fill)
    return {
        "rows": distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None),
        "columns": distribute_tensor(whole[:100], mesh, [Shard(1)], src_data_rank=None),
        "replicated": distribute_tensor(whole[:10], mesh, [Replicate()], src_data_rank=None),
    }


def serve(orders: int, answers: int) -> None:
    """Runs the jobs that come through a pipe, until it ends."""
    torch.set_num_threads(1)
    with os.fdopen(orders, "rb") as source, os.fdopen(answers, "wb") as sink:
        while True:
            try:
                name, rank, world, store, timeout, arguments = pickle.load(source)
            except EOFError:
                return
            pickle.dump(run(name, rank, world, store, timeout, arguments), sink)
            sink.flush()


def run(name: str, rank: int, world: int, store: str, timeout: float, arguments: dict[str, Any]) -> tuple[str, Any]:
    """Runs a job as a rank of a process group of its own."""
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=timeout)
        )
        try:
            return "done", globals()[name](world=world, **arguments)
        finally:
            dist.destroy_process_group()
    except BaseException as error:  # noqa: BLE001 - the test looks at it
        failures = {of: type(e).__name__ for of, e in getattr(error, "failures", {}).items()}
        return "failed", (type(error).__name__, str(error), failures, traceback.format_exc())


def main() -> None:
    """Forks a rank for each pair of pipes that comes through a socket: what takes seconds to import is there."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    gc.collect()
    gc.freeze()  # what is imported stays shared
    with socket.socket(fileno=int(sys.argv[1])) as control:
        while True:
            _, pipes, _, _ = socket.recv_fds(control, 1, 2)
            if not pipes:
                return
            if os.fork() == 0:
                control.close()
                serve(*pipes)
                os._exit(0)
            for pipe in pipes:
                os.close(pipe)


if __name__ == "__main__":
    main()
