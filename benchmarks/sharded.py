"""Suite ``dcp``: sharded checkpoints, saved and loaded by 1, 2 and 4 ranks.

``python -m benchmarks.sharded``: torchferry beside the stock writers and readers, and s3torchconnector's. The ranks are
forked from one process, talk over gloo, and are used for all measurements, in another order each round; a measurement
begins when all ranks are ready and ends when the last has returned. Tensors are split by rows; each has the values that
it was saved with, or the measurement fails.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import pickle
import random
import statistics
import sys
import tempfile
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from time import perf_counter
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import torchferry
import torchferry.distributed as ferry
from benchmarks.endpoint import Store, nginx
from benchmarks.meter import measuring
from benchmarks.works import MIB

BROADCAST = "torchferry, broadcast"
FERRY, STOCK, CONNECTOR, DISK = "torchferry", "stock, fsspec", "s3torchconnector", "stock, local files"
SHARED = (FERRY, STOCK, CONNECTOR)
TIMEOUT = 300


# --- what the ranks do


def value_of(name: str) -> float:
    return float(zlib.crc32(name.encode()) % 1000)


def make_alike(names: list[str], rows: int, *, fill: bool) -> dict[str, Any]:
    """Tensors that every rank has all of, as under DDP."""
    return {name: torch.full((rows, 1024), value_of(name) if fill else -1.0) for name in names}


def make(names: list[str], rows: int, world: int, *, fill: bool) -> dict[str, Any]:
    """DTensors of ``rows`` rows of 4 KiB each, split by rows."""
    mesh = init_device_mesh("cpu", (world,))
    state = {}
    for name in names:
        rank = dist.get_rank()
        chunk = -(-rows // world)
        local = torch.empty(max(0, min(rows, (rank + 1) * chunk) - min(rows, rank * chunk)), 1024)
        local.fill_(value_of(name) if fill else -1.0)  # every page is there
        state[name] = DTensor.from_local(
            local, mesh, [Shard(0)], run_check=False, shape=torch.Size((rows, 1024)), stride=(1024, 1)
        )
    return state


def check(state: dict[str, Any]) -> None:
    for name, value in state.items():
        local = value.to_local() if isinstance(value, DTensor) else value
        if local.numel() and not bool((local == value_of(name)).all()):
            raise ValueError(f"{name} was loaded with other values than it was saved with.")


def saver(contender: str, store: Store, url: str) -> Callable[[dict[str, Any]], object]:
    if contender == FERRY:
        return lambda state: ferry.save(state, url, storage_options=store.storage_options)
    if contender == STOCK:
        return lambda state: dcp.save(state, storage_writer=FsspecWriter(url, **store.storage_options))
    if contender == DISK:
        return lambda state: dcp.save(state, storage_writer=dcp.FileSystemWriter(url))
    from s3torchconnector.dcp import S3StorageWriter

    return lambda state: dcp.save(state, storage_writer=S3StorageWriter(store.region, url))


def loader(contender: str, store: Store, url: str) -> Callable[[dict[str, Any]], object]:
    if contender == FERRY:
        return lambda state: ferry.load(state, url, storage_options=store.storage_options)
    if contender == BROADCAST:
        return lambda state: ferry.load(state, url, storage_options=store.storage_options, broadcast=True)
    if contender == STOCK:
        return lambda state: dcp.load(state, storage_reader=FsspecReader(url, **store.storage_options))
    if contender == DISK:
        return lambda state: dcp.load(state, storage_reader=dcp.FileSystemReader(url))
    from s3torchconnector.dcp import S3StorageReader

    return lambda state: dcp.load(state, storage_reader=S3StorageReader(store.region, url))


def measured(store: Store, verb: str, act: Callable[[], object]) -> tuple[float, int]:
    gc.collect()
    dist.barrier()
    with measuring(store, verb, 0) as result:
        act()
    return result.seconds, result.peak_bytes


def job_save(store: Store, world: int, contender: str, url: str, names: list[str], rows: int) -> tuple[float, int]:
    state = make(names, rows, world, fill=True)
    save = saver(contender, store, url)
    save_warm = saver(contender, store, f"{url}-warm")
    save_warm(make(names[:2], 64, world, fill=True))
    return measured(store, "save", lambda: save(state))


def job_load(
    store: Store, world: int, contender: str, url: str, names: list[str], rows: int, warm: str
) -> tuple[float, int]:
    state = make(names, rows, world, fill=False)
    loader(contender, store, warm)(make(["w0", "w1"], 64, world, fill=False))
    load = loader(contender, store, url)
    result = measured(store, "load", lambda: load(state))
    check(state)
    return result


def job_load_alike(
    store: Store, world: int, contender: str, url: str, names: list[str], rows: int, warm: str
) -> tuple[float, int]:
    """Every rank loads all of it."""
    state = make_alike(names, rows, fill=False)
    loader(contender, store, warm)(make(["w0", "w1"], 64, world, fill=False))
    load = loader(contender, store, url)
    result = measured(store, "load", lambda: load(state))
    check(state)
    return result


def job_whole(store: Store, world: int, url: str, names: list[str]) -> tuple[float, int]:
    """``torchferry.load`` of a URL, whatever is there."""
    del world
    loaded: dict[str, Any] = {}
    result = measured(store, "load", lambda: loaded.update(torchferry.load(url, storage_options=store.storage_options)))
    check({name: loaded[name] for name in names})
    return result


def job_async(store: Store, world: int, contender: str, url: str, names: list[str], rows: int) -> tuple[float, int]:
    """How long the caller waits; the second time, when memory is there."""
    state = make(names, rows, world, fill=True)
    waits = []
    for turn in range(3):
        dist.barrier()
        began = perf_counter()
        if contender == FERRY:
            save: Any = ferry.async_save(state, f"{url}-{turn}", storage_options=store.storage_options)
        else:
            save = dcp.async_save(state, storage_writer=FsspecWriter(f"{url}-{turn}", **store.storage_options))
        waits.append(perf_counter() - began)
        save.result()
    return min(waits[1:]), 0


def job_keep(store: Store, world: int, directory: str, names: list[str], rows: int, how: str) -> tuple[float, int]:
    """Puts a checkpoint where the endpoint serves it from."""
    del store
    state = make(names, rows, world, fill=True)
    if how == "one file":
        torchferry.save({name: value.to_local() for name, value in state.items()}, f"{directory}/one.pt", shards=True)
    elif how == FERRY:
        ferry.save(state, directory)
    else:
        dcp.save(state, storage_writer=dcp.FileSystemWriter(directory))
    return 0.0, 0


def serve(orders: BinaryIO, answers: BinaryIO) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    while True:
        try:
            name, rank, world, group, arguments = pickle.load(orders)
        except EOFError:
            return
        try:
            dist.init_process_group(
                "gloo", init_method=f"file://{group}", rank=rank, world_size=world, timeout=timedelta(seconds=TIMEOUT)
            )
            try:
                answer = ("done", globals()[name](world=world, **arguments))
            finally:
                dist.destroy_process_group()
        except BaseException:  # noqa: BLE001 - reported with the results
            answer = ("failed", traceback.format_exc())
        pickle.dump(answer, answers)
        answers.flush()


# --- who asks them


class Ranks:
    """Processes forked from this one."""

    def __init__(self, count: int, directory: str) -> None:
        self._directory = directory
        self._number = 0
        self._pipes: list[tuple[BinaryIO, BinaryIO]] = []
        for _ in range(count):
            their_orders, orders = os.pipe()
            answers, their_answers = os.pipe()
            if os.fork() == 0:
                os.close(orders)
                os.close(answers)
                for pipes in self._pipes:
                    for pipe in pipes:
                        pipe.close()
                with os.fdopen(their_orders, "rb") as source, os.fdopen(their_answers, "wb") as sink:
                    serve(source, sink)
                os._exit(0)
            os.close(their_orders)
            os.close(their_answers)
            self._pipes.append((os.fdopen(orders, "wb"), os.fdopen(answers, "rb")))

    def run(self, job: str, world: int, **arguments: Any) -> tuple[float, int]:
        """Runs a job on all ranks of a group; seconds and peak memory are the largest of any."""
        self._number += 1
        group = f"{self._directory}/group-{self._number}"
        for rank, (orders, _) in enumerate(self._pipes[:world]):
            pickle.dump((job, rank, world, group, arguments), orders)
            orders.flush()
        outcomes = [pickle.load(answers) for _, answers in self._pipes[:world]]
        for outcome, answer in outcomes:
            if outcome == "failed":
                raise RuntimeError(answer)
        return max(seconds for _, (seconds, _) in outcomes), max(peak for _, (_, peak) in outcomes)


class Bench:
    """Measures, and keeps the figures."""

    def __init__(self, store: Store, ranks: Ranks, rounds: int) -> None:
        self.figures: dict[str, dict[str, Any]] = {}
        self._store = store
        self._ranks = ranks
        self._rounds = rounds

    def measure(self, case: str, jobs: dict[str, Callable[[int], tuple[float, int]]], needed: int, verb: str) -> None:
        """Runs each job in each round; ``needed`` is how many bytes have to move."""
        found: dict[str, list[tuple[float, int, int]]] = {name: [] for name in jobs}
        for number in range(self._rounds):
            for name in random.Random(number).sample(sorted(jobs), len(jobs)):
                if found[name] is None:
                    continue
                before = self._count(verb)
                try:
                    seconds, peak = jobs[name](number)
                except RuntimeError as error:
                    print(f"  {case}, {name} failed: {str(error).splitlines()[-1]}", file=sys.stderr)
                    continue
                found[name].append((seconds, peak, self._count(verb) - before))
        print(f"\n{case}")
        for name, results in found.items():
            if results:
                seconds = statistics.median(result[0] for result in results)
                peak = max(result[1] for result in results)
                moved = statistics.median(result[2] for result in results)
                entry = {"seconds": seconds, "peak_mib": peak / MIB, "moved": moved / needed if needed else None}
                self.figures.setdefault(case, {})[name] = entry
                moved_text = f"{moved / needed:6.3f}x" if needed else ""
                print(f"  {name:24} {seconds:7.3f} s {peak / MIB:8.0f} MiB {moved_text}", flush=True)

    def _count(self, verb: str) -> int:
        return self._store.counters()["received" if verb == "save" else "sent"]


def run(  # noqa: C901, PLR0912, PLR0915 - one case after the other
    size: int, rounds: int, parts: set[str]
) -> dict[str, Any]:
    """Measures the parts of the suite that are asked for."""
    with nginx() as store, tempfile.TemporaryDirectory() as directory, environment(store):
        ranks = Ranks(4, directory)
        bench = Bench(store, ranks, rounds)
        names = [f"layers.{index}.weight" for index in range(64)]
        rows = size // 64 // 4096
        here = str(store.path(""))
        shared = {"store": store}

        def url(prefix: str) -> str:
            return f"s3://{store.bucket}/{prefix}"

        def keep(world: int, how: str, *, named: list[str] = names, of: int = rows) -> str:
            prefix = f"kept-{world}-{how.partition(',')[0].replace(' ', '-')}-{len(named)}-{of}"
            where = {"directory": f"{here}/{prefix}", "how": how}
            ranks.run("job_keep", world, names=named, rows=of, **where, **shared)
            return prefix

        def warm(world: int, how: str) -> str:
            return url(keep(world, how, named=["w0", "w1"], of=64))

        def layout(contender: str) -> str:
            return FERRY if contender == FERRY else STOCK

        for world in (1, 2, 4):
            if f"save{world}" in parts:

                def save(number: int, contender: str, world: int = world) -> tuple[float, int]:
                    target = url(f"saved/{contender.partition(',')[0]}-{world}-{number}")
                    result = ranks.run(
                        "job_save", world, contender=contender, url=target, names=names, rows=rows, **shared
                    )
                    store.remove("saved")
                    return result

                jobs = {c: (lambda number, c=c: save(number, c)) for c in SHARED}
                bench.measure(f"save, {world} ranks", jobs, size, "save")
            if f"load{world}" in parts:
                jobs = {}
                for contender in SHARED:
                    how = layout(contender)
                    what = {"url": url(keep(world, how)), "warm": warm(world, how), "names": names, "rows": rows}
                    jobs[contender] = lambda _, c=contender, w=world, what=what: ranks.run(
                        "job_load", w, contender=c, **what, **shared
                    )
                    if contender == FERRY:
                        others = {**what, "url": url(keep(world, STOCK)), "warm": warm(world, STOCK)}
                        jobs["torchferry, of the stock writer's"] = lambda _, w=world, what=others: ranks.run(
                            "job_load", w, contender=FERRY, **what, **shared
                        )
                bench.measure(f"load, {world} ranks", jobs, size, "load")
        if "alike" in parts:
            jobs = {}
            for contender in (FERRY, BROADCAST, STOCK):
                how = layout(FERRY if contender == BROADCAST else contender)
                what = {"url": url(keep(2, how)), "warm": warm(2, how), "names": names, "rows": rows}
                jobs[contender] = lambda _, c=contender, what=what: ranks.run(
                    "job_load_alike", 2, contender=c, **what, **shared
                )
            bench.measure("load, 2 ranks, all of it on each", jobs, size, "load")
        if "reshard" in parts:
            jobs = {}
            for contender in SHARED:
                how = layout(contender)
                what = {"url": url(keep(2, how)), "warm": warm(2, how), "names": names, "rows": rows}
                jobs[contender] = lambda _, c=contender, what=what: ranks.run(
                    "job_load", 3, contender=c, **what, **shared
                )
            bench.measure("load, saved by 2, loaded by 3", jobs, size, "load")
        if "scattered" in parts:
            small = [f"{index:03}" for index in range(512)]
            of = size // 512 // 4096
            jobs = {}
            for contender in SHARED:
                how = layout(contender)
                what = {
                    "url": url(keep(2, how, named=small, of=of)),
                    "warm": warm(1, how),
                    "names": small[7::32],
                    "rows": of,
                }
                jobs[contender] = lambda _, c=contender, what=what: ranks.run(
                    "job_load", 1, contender=c, **what, **shared
                )
            bench.measure("load, 16 scattered tensors of 512, 1 rank", jobs, size // 32, "load")
        if "whole" in parts:
            one = url(keep(1, "one file")) + "/one.pt"
            what = {"url": url(keep(1, FERRY)), "warm": warm(1, FERRY), "names": names, "rows": rows}
            jobs = {
                "torchferry.load, one file": lambda _: ranks.run("job_whole", 1, url=one, names=names, **shared),
                "torchferry.load, sharded": lambda _: ranks.run("job_whole", 1, url=what["url"], names=names, **shared),
                "into tensors": lambda _: ranks.run("job_load", 1, contender=FERRY, **what, **shared),
            }
            bench.measure("load, whole model, 1 rank", jobs, size, "load")
        if "async" in parts:
            jobs = {
                c: lambda n, c=c: ranks.run(
                    "job_async",
                    2,
                    contender=c,
                    url=url(f"saved/async-{c[:3]}-{n}"),
                    names=names,
                    rows=rows // 4,
                    **shared,
                )
                for c in (FERRY, STOCK)
            }
            bench.measure("async_save, 2 ranks, a quarter of the size: the caller waits", jobs, 0, "save")
        return bench.figures


@contextmanager
def environment(store: Store) -> Iterator[None]:
    """The settings that cloud clients read."""
    os.environ.update(store.environment())
    yield


def main() -> None:
    everything = [
        "save1",
        "save2",
        "save4",
        "load1",
        "load2",
        "load4",
        "alike",
        "reshard",
        "scattered",
        "whole",
        "async",
    ]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sharded", description=__doc__)
    parser.add_argument("--size", type=int, default=1024, help="MiB of all tensors")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", default=",".join(everything), help="comma-separated")
    parser.add_argument("--output", type=Path, help="a JSON file; figures of other parts in it stay")
    arguments = parser.parse_args()
    figures = run(arguments.size * MIB, arguments.rounds, set(arguments.parts.split(",")))
    if arguments.output:
        kept = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
        arguments.output.write_text(json.dumps(kept | figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
