"""How long training waits for saves in the background, and what they cost beside it.

``python -m benchmarks.background``: each line in a process of its own, over http to the benchmark's endpoint. Beside
torchferry: ``torch.distributed.checkpoint.async_save`` (no_dist, its own writer for fsspec) and Lightning's
AsyncCheckpointIO, each with its default settings.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import works
from benchmarks.contenders import CONTENDERS, Task
from benchmarks.endpoint import Store, nginx, seaweedfs
from benchmarks.meter import measuring, warm_memory
from torchferry.testing.forkserver import python

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MIB, GIB = works.MIB, works.GIB
_ROUNDS = 7
_STEPS = 8
_STEP_SECONDS = 1.0
_FLOOR = "bare sockets x1"

# The targets: of what, and the most that it may be.
TARGETS = {
    "returns, over a memcpy": 1.15,
    "until=, upload shorter than the step: returns (ms)": 5.0,
    "until=, upload shorter than the step: added to the step (ms)": 5.0,
    "until=, step in the middle: over a memcpy of what was left": 1.15,
    "loop: time outside the waiting, over none": 1.05,
    "loop, until=: time outside the waiting, over none": 1.05,
    "until=: waiting, over DCP's": 0.5,
    "until=: waiting, over Lightning's": 0.5,
    "memory beside the tensors, less the snapshot (MiB)": 64.0,
    "until=: memory beside the tensors, less what was copied (MiB)": 64.0,
}


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] == "--one":
        _one(json.loads(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=1024, help="MiB of tensors")
    parser.add_argument("--rounds", type=int, default=_ROUNDS)
    parser.add_argument("--endpoint", choices=("nginx", "seaweedfs"), default="nginx")
    parser.add_argument("--only", default="", help="measurements whose names contain this")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "background.json")
    parser.add_argument("--smoke", action="store_true", help="forked processes: no figures worth reading")
    arguments = parser.parse_args()
    interpreter = python() if arguments.smoke else [sys.executable]
    size, rounds, endpoint = arguments.size * MIB, arguments.rounds, arguments.endpoint
    print(table(run(size, rounds, endpoint, arguments.only, arguments.output, interpreter=interpreter)))


def run(
    size: int,
    rounds: int,
    endpoint: str,
    only: str = "",
    output: Path | None = None,
    *,
    interpreter: Sequence[str] = (sys.executable,),
) -> dict[str, Any]:
    """Measures, and returns figures by name. ``interpreter`` is the head of the command of each process."""
    found: dict[str, Any] = {}
    with seaweedfs() if endpoint == "seaweedfs" else nginx() as store:
        for name in MEASUREMENTS:
            if only not in name:
                continue
            order = {"name": name, "size": size, "rounds": rounds, "store": store.as_json()}
            ended = subprocess.run(
                [*interpreter, "-m", "benchmarks.background", "--one", json.dumps(order)],
                cwd=Path(__file__).parent.parent,
                env=os.environ | store.environment(),
                capture_output=True,
                text=True,
                check=False,
            )
            lines = ended.stdout.splitlines()
            found |= json.loads(lines[-1]) if not ended.returncode else {name: ended.stderr.strip()[-300:]}
            store.remove("background")
    for peer in ("DCP", "Lightning"):
        for way in ("", "until=: "):
            ours, theirs = (found.get(f"{name}: waiting (ms)") for name in (f"{way}ours", peer))
            if isinstance(ours, float) and isinstance(theirs, float):
                found[f"{way}waiting, over {peer}'s"] = ours / theirs
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(found, indent=1) + "\n")
    return found


def table(found: dict[str, Any]) -> str:
    """The figures, and whether they meet the targets."""
    lines = []
    for name, value in found.items():
        figure = f"{value:.3f}" if isinstance(value, float) else str(value)
        most = TARGETS.get(name)
        verdict = "" if most is None or not isinstance(value, float) else "met" if value <= most else "MISSED"
        lines.append(f"{name:64} {figure:>10} {'' if most is None else f'at most {most:g}':>14} {verdict}")
    return "\n".join(lines)


# --- one measurement, in a process of its own


def _one(order: dict[str, Any]) -> None:
    store = Store(**order["store"])
    size: int = order["size"]
    state = works.make("flat", size)
    works.forget()
    with warm_memory(3 * size):
        pass
    result = MEASUREMENTS[order["name"]](store, state, order["rounds"])
    print("\n" + json.dumps(result), flush=True)
    os._exit(0)


def _saver(store: Store, **options: Any) -> Callable[..., Any]:
    import torchferry

    def save(obj: Any, **more: Any) -> Any:
        url = f"s3://{store.bucket}/background/x.pt"
        return torchferry.save_in_background(obj, url, storage_options=store.storage_options, **options, **more)

    save(works.make("flat", 4 * MIB)).result()
    works.forget()
    return save


def _returns(store: Store, state: Any, rounds: int) -> dict[str, Any]:
    save = _saver(store)
    seconds = []
    for _ in range(1 + rounds):
        seconds.append(_seconds(lambda: save(state).result, keep := []))
        keep[0]()
    memcpy = _memcpy_seconds(state, rounds)
    later = statistics.median(seconds[1:])
    return {
        "returns, the first time (ms)": 1e3 * seconds[0],
        "returns, later (ms)": 1e3 * later,
        "threaded memcpy into warm memory (ms)": 1e3 * memcpy,
        "returns, over a memcpy": later / memcpy,
    }


def _until_short(store: Store, state: Any, rounds: int) -> dict[str, Any]:
    optimizer = _optimizer()
    save = _saver(store, until=optimizer)
    step = _seconds(optimizer.step)
    returned, stepped, copied = [], [], []
    for _ in range(rounds):
        returned.append(_seconds(lambda: save(state), keep := []))
        keep[0].result()
        stepped.append(_seconds(optimizer.step))
        copied.append(keep[0].copied_bytes)
    return {
        "until=, upload shorter than the step: returns (ms)": 1e3 * statistics.median(returned),
        "until=, upload shorter than the step: added to the step (ms)": 1e3 * (statistics.median(stepped) - step),
        "until=, upload shorter than the step: copied (MiB)": max(copied) / MIB,
    }


def _until_middle(store: Store, state: Any, rounds: int) -> dict[str, Any]:
    optimizer = _optimizer()
    save = _saver(store, until=optimizer)
    whole = statistics.median(_seconds(lambda: save(state).result()) for _ in range(3))
    save(state).copy_rest()  # so that its memory is warm
    ratios, stepped, copied = [], [], []
    bytes_of_state = works.nbytes(state)
    memcpy = _memcpy_seconds(state, rounds) / bytes_of_state
    for _ in range(rounds):
        handle = save(state)
        time.sleep(whole / 3)
        stepped.append(_seconds(optimizer.step))
        handle.result()
        copied.append(handle.copied_bytes)
        if handle.copied_bytes:
            ratios.append(stepped[-1] / (memcpy * handle.copied_bytes))
    return {
        "until=, step in the middle: upload (ms)": 1e3 * whole,
        "until=, step in the middle: copied (MiB)": statistics.median(copied) / MIB,
        "until=, step in the middle: added to the step (ms)": 1e3 * statistics.median(stepped),
        "until=, step in the middle: over a memcpy of what was left": statistics.median(ratios),
    }


def _loop(store: Store, state: Any, rounds: int) -> dict[str, Any]:
    """The same loop without saves, with them, and beside a bare socket that sends as many bytes, in turns.

    The socket is what any save costs that shares the processors and the memory with the loop.
    """
    optimizer, compute = _optimizer(), _computation(_STEP_SECONDS)
    plain, lending = _saver(store), _saver(store, until=optimizer)
    with ThreadPoolExecutor(1) as pool, tempfile.TemporaryDirectory() as directory:
        task = Task(store, Path(directory), "flat", works.nbytes(state))
        send = CONTENDERS["save", _FLOOR].start(task)
        saves: dict[str, Callable[[], Any]] = {
            "none": lambda: None,
            "loop": lambda: plain(state),
            "loop, until=": lambda: lending(state),
            f"loop beside {_FLOOR}": partial(pool.submit, send, state, "background/x"),
        }
        for save in saves.values():
            if (handle := save()) is not None:
                handle.result()
        outside: dict[str, list[float]] = {name: [] for name in saves}
        waiting: dict[str, list[float]] = {name: [] for name in saves}
        for _ in range(max(1, rounds // 2)):
            for name, save in saves.items():
                whole, waited = _train(compute, optimizer, save)
                outside[name].append(whole - waited)
                waiting[name].append(waited)
    none = statistics.median(outside.pop("none"))
    return {f"{name}: waiting (ms a step)": 1e3 * statistics.median(waiting[name]) / _STEPS for name in outside} | {
        f"{name}: time outside the waiting, over none": statistics.median(outside[name]) / none for name in outside
    }


def _train(compute: Callable[[], None], optimizer: Any, save: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of the loop, and those in which it waited for saves."""
    waited = 0.0
    handles = []
    began = time.perf_counter()
    for _ in range(_STEPS):
        compute()
        waited += _seconds(optimizer.step)
        waited += _seconds(save, handles)
    whole = time.perf_counter() - began
    for handle in handles:
        if handle is not None:
            handle.result()
    return whole, waited


def _waiting(store: Store, state: Any, rounds: int) -> dict[str, Any]:
    plain, lending = _saver(store), _saver(store, until=_optimizer())
    return _wait_of(lambda: plain(state), lambda handle: handle.result(), "ours: ", rounds) | _wait_of(
        lambda: lending(state), lambda handle: handle.result(), "until=: ours: ", rounds
    )


def _dcp(store: Store, state: Any, rounds: int) -> dict[str, Any]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

    options = store.storage_options

    def save() -> Any:
        writer = FsspecWriter(f"s3://{store.bucket}/background/dcp", **options)
        return dcp.async_save(state, storage_writer=writer, no_dist=True)

    return _wait_of(save, lambda future: future.result(), "DCP: ", rounds)


def _lightning(store: Store, state: Any, rounds: int) -> dict[str, Any]:
    from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

    io = AsyncCheckpointIO(TorchCheckpointIO())

    def save() -> Any:
        io.save_checkpoint(state, f"s3://{store.bucket}/background/lightning.ckpt")

    def wait(_: Any) -> None:
        executor = io._executor
        executor.submit(lambda: None).result()  # it has one thread

    return _wait_of(save, wait, "Lightning: ", rounds)


def _wait_of(save: Callable[[], Any], wait: Callable[[Any], Any], peer: str, rounds: int) -> dict[str, Any]:
    seconds = []
    for _ in range(1 + rounds):
        seconds.append(_seconds(save, keep := []))
        wait(keep[0])
    return {
        f"{peer}waiting, the first time (ms)": 1e3 * seconds[0],
        f"{peer}waiting (ms)": 1e3 * statistics.median(seconds[1:]),
    }


def _memory(store: Store, state: Any, rounds: int) -> dict[str, Any]:
    del rounds
    save = _saver(store)
    with measuring(store, "save", 0) as measured:
        save(state).result()
        save(state).result()
    return {
        "memory beside the tensors, less the snapshot (MiB)": (measured.peak_bytes - works.nbytes(state)) / MIB,
    }


def _memory_until(store: Store, state: Any, rounds: int) -> dict[str, Any]:
    del rounds
    optimizer = _optimizer()
    save = _saver(store, until=optimizer)
    most = 0
    with measuring(store, "save", 0) as measured:
        for pause in (9.0, 0.2, 0.1):
            handle = save(state)
            with suppress(TimeoutError):
                handle.result(pause)
            optimizer.step()
            handle.result()
            most = max(most, handle.copied_bytes)
    return {
        "until=: memory beside the tensors, less what was copied (MiB)": (measured.peak_bytes - most) / MIB,
    }


MEASUREMENTS: dict[str, Callable[[Store, Any, int], dict[str, Any]]] = {
    "returns": _returns,
    "until-short": _until_short,
    "until-middle": _until_middle,
    "loop": _loop,
    "waiting": _waiting,
    "DCP": _dcp,
    "Lightning": _lightning,
    "memory": _memory,
    "memory-until": _memory_until,
}


# --- what they share


def _optimizer() -> torch.optim.Optimizer:
    """One whose own step takes no time: what is measured is what the save adds to it."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    optimizer = torch.optim.SGD([parameter])
    optimizer.step()
    return optimizer


def _seconds(func: Callable[[], Any], keep: list[Any] | None = None) -> float:
    began = time.perf_counter()
    result = func()
    seconds = time.perf_counter() - began
    if keep is not None:
        keep.append(result)
    return seconds


def _memcpy_seconds(state: Any, rounds: int) -> float:
    """A copy of the tensors into memory that is there, by torch or by threads: the median of the faster one."""
    tensors = [tensor for _, tensor in works.named_tensors(state)]
    copies = [torch.empty_like(tensor) for tensor in tensors]

    def by_torch() -> None:
        for copy, tensor in zip(copies, tensors, strict=True):
            copy.copy_(tensor)

    def by_threads() -> None:
        count = len(os.sched_getaffinity(0))
        pairs = list(zip(copies, tensors, strict=True))

        def move(number: int) -> None:
            for copy, tensor in pairs[number::count]:
                ctypes.memmove(copy.data_ptr(), tensor.data_ptr(), tensor.nbytes)

        threads = [threading.Thread(target=move, args=(number,)) for number in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    medians = []
    for way in (by_torch, by_threads):
        way()
        medians.append(statistics.median(_seconds(way) for _ in range(rounds)))
    return min(medians)


def _computation(seconds: float) -> Callable[[], None]:
    """Some work on one core that takes about so long."""
    torch.set_num_threads(1)
    matrix = torch.rand(512, 512)

    def work(count: int) -> None:
        for _ in range(count):
            torch.mm(matrix, matrix)

    work(20)
    count = max(1, round(20 * seconds / _seconds(lambda: work(20))))
    return lambda: work(count)


if __name__ == "__main__":
    main()
