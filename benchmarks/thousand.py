"""What 1,000 ranks ask of a bucket, and what ``.metadata`` costs rank 0.

``python -m benchmarks.thousand``: every rank's real writer and reader, one after the other in DCP's order, without a
process group, against the endpoint shaped like S3, which counts the requests by kind. Beside them stands what
docs/sharded.md says. Then the same save against an endpoint that answers 503 to more than so many requests a second;
and the coordinator's part for metadata of many items, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import pickle
import resource
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from benchmarks.endpoint import Store, nginx
from benchmarks.works import MIB
from torchferry.distributed import StorageReader, StorageWriter
from torchferry.distributed.metadata import read_metadata, storage_info, write_metadata
from torchferry.distributed.place import METADATA, Place
from torchferry.distributed.planner import SafeLoadPlanner
from torchferry.engine.loops import run
from torchferry.engine.transfer import TransferReport
from torchferry.formats.item_stream import Written

PART, RANGE = 16 * MIB, 8 * MIB
THREADS = 32  # ranks at once


@dataclass(frozen=True, slots=True)
class Job:
    """Ranks that have tensors of their own.

    Attributes:
        ranks: How many.
        items: Tensors of each.
        nbytes: Of a tensor.
    """

    ranks: int
    items: int
    nbytes: int

    def state(self, rank: int, *, fill: float = 0.0) -> dict[str, torch.Tensor]:
        return {f"{rank:04}.{item}": torch.full((self.nbytes // 4,), fill) for item in range(self.items)}

    @property
    def shard(self) -> int:
        return self.items * self.nbytes


def save(job: Job, url: str, options: dict[str, Any] | None, reports: list[TransferReport]) -> None:
    """What ``dcp.save`` does on each rank, with all ranks in this process."""
    writers = [StorageWriter(url, storage_options=options, report=reports.append) for _ in range(job.ranks)]
    planners = [DefaultSavePlanner() for _ in writers]
    for rank, (writer, planner) in enumerate(zip(writers, planners, strict=True)):
        writer.set_up_storage_writer(rank == 0, rank=rank, use_collectives=True)
        planner.set_up_planner(job.state(rank), writer.storage_meta(), rank == 0)
    locals_ = [writer.prepare_local_plan(p.create_local_plan()) for writer, p in zip(writers, planners, strict=True)]
    plans, metadata = planners[0].create_global_plan(locals_)
    plans = writers[0].prepare_global_plan(plans)

    def write(rank: int) -> list[Any]:
        return writers[rank].write_data(planners[rank].finish_plan(plans[rank]), planners[rank]).value()

    with ThreadPoolExecutor(THREADS) as threads:
        results = list(threads.map(write, range(job.ranks)))
    writers[0].finish(metadata, results)


def load(job: Job, url: str, options: dict[str, Any]) -> None:
    """What ``torchferry.distributed.load`` does on each rank: rank 0 reads ``.metadata`` for all."""
    readers = [StorageReader(url, storage_options=options) for _ in range(job.ranks)]
    data = run(readers[0].read_metadata_bytes)
    metadata = read_metadata(data, url, weights_only=True)

    def read(rank: int) -> None:
        state, planner, reader = job.state(rank, fill=1.0), SafeLoadPlanner(), readers[rank]
        planner.set_up_planner(state, metadata, rank == 0)
        reader.set_up_storage_reader(metadata, rank == 0)
        reader.read_data(reader.prepare_local_plan(planner.create_local_plan()), planner).wait()
        assert not any(tensor.any() for tensor in state.values())

    with ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(read, range(job.ranks)))


def keep(job: Job, store: Store, prefix: str) -> str:
    """Puts a checkpoint where the endpoint serves it from, as if it had been saved there."""
    directory = store.path(prefix)
    save(job, str(directory), None, [])
    url = f"s3://{store.bucket}/{prefix}"
    place = Place.open(url, storage_options=store.storage_options)
    path = directory / METADATA
    metadata = pickle.loads(path.read_bytes())
    added = metadata.storage_meta.torchferry
    added["url"] = url

    async def look() -> None:
        for shard in added["shards"]:
            stat = await place.backend.stat(place.at(shard))
            added["shards"][shard] = (stat.size, stat.etag)

    async def look_there() -> None:
        from torchferry.engine.loops import run_on

        await run_on(place.backend.loop, look)

    run(look_there)
    path.write_bytes(pickle.dumps(metadata))
    return url


def counted(store: Store, act: Callable[[], object]) -> tuple[dict[str, int], float]:
    before, began = store.requests(), perf_counter()
    act()
    seconds = perf_counter() - began
    return {kind: number - before[kind] for kind, number in store.requests().items() if number != before[kind]}, seconds


def expected_of_save(job: Job) -> dict[str, int]:
    """docs/sharded.md: a save over a checkpoint that is there."""
    metadata = {"head": 2, "get": 1, "put": 1, "delete": job.ranks}
    if job.shard <= PART:
        return metadata | {"put": 1 + job.ranks}
    parts = job.ranks * math.ceil(job.shard / PART)
    return metadata | {"create": job.ranks, "part": parts, "complete": job.ranks}


def expected_of_load(job: Job) -> dict[str, int]:
    """The same: a load of what each rank has saved."""
    return {"head": 1, "get": 1 + job.ranks * math.ceil(job.shard / RANGE)}


def requests(job: Job) -> None:
    print(f"\n{job.ranks} ranks, {job.items} tensors of {job.nbytes / MIB:g} MiB each")
    with nginx(shaped=True) as store:
        options = store.storage_options
        url = keep(job, store, "there")
        found, seconds = counted(store, lambda: load(job, url, options))
        show("load", found, expected_of_load(job), seconds)
        found, seconds = counted(store, lambda: save(job, url, options, []))
        show("save over it", found, expected_of_save(job), seconds)


def show(what: str, found: dict[str, int], expected: dict[str, int], seconds: float) -> None:
    print(f"  {what}: {seconds:.1f} s")
    for kind in sorted({*found, *expected}):
        print(f"    {kind:10} {found.get(kind, 0):7,}   docs: {expected.get(kind, 0):7,}")


def slowed(job: Job, most: int) -> None:
    """The same save where the store takes only so many requests a second."""
    reports: list[TransferReport] = []
    with nginx(shaped=True, most=most) as store:
        found, seconds = counted(store, lambda: save(job, f"s3://{store.bucket}/run", store.storage_options, reports))
        done = len(list(store.path("run").rglob("*.distcp")))
    retries = [report.retries for report in reports]
    mean = sum(retries) / len(retries)
    print(f"\n{job.ranks} ranks, the store takes {most} requests a second: {seconds:.1f} s, {done:,} shards are there")
    print(f"  {found.get('slowed', 0):,} answers of 503; a rank repeated {mean:.1f} requests, {max(retries)} at most")


# --- the coordinator


def metadata_of(items: int) -> tuple[Metadata, dict[MetadataIndex, Any]]:
    """Metadata of ranks with 500 tensors each."""
    entries: dict[str, Any] = {}
    infos: dict[MetadataIndex, Any] = {}
    properties = TensorProperties(dtype=torch.float32)
    size, offsets = torch.Size((1024, 1024)), torch.Size((0, 0))
    for item in range(items):
        name = f"model.layers.{item // 10}.block.{item % 10}.weight"
        entries[name] = TensorStorageMetadata(properties, size, [ChunkStorageMetadata(offsets, size)])
        written = Written(item % 500 * (4 * MIB + 800), 4 * MIB + 800, 640, item * 7919 & 0xFFFFFFFF)
        path = f"save-20260115T101530Z-1f2e3d4c/__{item // 500}_0.distcp"
        infos[MetadataIndex(name, offsets, 0)] = storage_info(path, written)
    return Metadata(entries, {name: (name,) for name in entries}), infos


def coordinator(items: int, url: str, options: dict[str, Any], path: str) -> None:
    """Measures in this process; a forked one is the other rank."""
    with tempfile.TemporaryDirectory() as directory:
        child = os.fork()
        rank = int(child == 0)
        if rank:
            torch.set_num_threads(1)
        figures: dict[str, float] = {}
        data = b""
        if not rank:
            metadata, infos = metadata_of(items)
            shards = {
                info.relative_path: (1 << 31, '"0123456789abcdef0123456789abcdef-128"') for info in infos.values()
            }
            began = process_time()
            data = write_metadata(metadata, infos, url, "save-20260115T101530Z-1f2e3d4c", shards)
            figures["pickle"] = process_time() - began
            figures["MB"] = len(data) / 1e6
            del metadata, infos
        dist.init_process_group("gloo", init_method=f"file://{directory}/group", rank=rank, world_size=2)
        dist.barrier()
        began = perf_counter()
        dist.broadcast_object_list([data] if not rank else [None], src=0)
        dist.barrier()
        figures["broadcast"] = perf_counter() - began
        dist.destroy_process_group()
        if rank:
            os._exit(0)
        os.waitpid(child, 0)
    place = Place.open(url, storage_options=options)
    began = perf_counter()
    run(place.put, METADATA, data)
    figures["put"] = perf_counter() - began
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(data)  # the endpoint keeps nothing
    began = perf_counter()
    data, _ = run(place.get, METADATA)
    figures["get"] = perf_counter() - began
    for name, is_checked in (("unpickle on rank 0", False), ("on the others", True)):
        began = process_time()
        read_metadata(data, url, weights_only=True, is_checked=is_checked)
        figures[name] = process_time() - began
    figures["peak MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(figures))


def coordinators(counts: list[int]) -> None:
    print("\n.metadata: seconds (of a core for pickling and unpickling), but for MB and peak MiB")
    with nginx(shaped=True) as store:
        for items in counts:
            url, path = f"s3://{store.bucket}/m", str(store.path("m/.metadata"))
            what = {"items": items, "url": url, "options": store.storage_options, "path": path}
            command = [sys.executable, "-m", "benchmarks.thousand", "--coordinator", json.dumps(what)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            figures = json.loads(done.stdout.splitlines()[-1])
            texts = [f"{name} {value:.2f}" for name, value in figures.items()]
            print(f"  {items:9,} items: {', '.join(texts)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.thousand", description=__doc__)
    parser.add_argument("--ranks", type=int, default=1000)
    parser.add_argument("--most", type=int, default=40, help="requests a second, of the store that slows ranks down")
    parser.add_argument("--items", type=int, nargs="*", default=[100_000], help="of .metadata; 20 kB of memory each")
    parser.add_argument("--coordinator", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("torchferry").setLevel(logging.ERROR)  # a line for each 503
    torch.set_num_threads(1)
    if arguments.coordinator:
        coordinator(**json.loads(arguments.coordinator))
        return
    requests(Job(arguments.ranks, 2, 32 << 10))
    requests(Job(max(arguments.ranks // 50, 1), 5, 8 * MIB))
    slowed(Job(arguments.ranks, 2, 32 << 10), arguments.most)
    coordinators(arguments.items)


if __name__ == "__main__":
    main()
