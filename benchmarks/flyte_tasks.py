"""A checkpoint from task to task: Flyte 2 and flytekit with torchferry, and the pickle that Flyte 2 falls back to.

python -m benchmarks.flyte_tasks [--size MiB] [--rounds N] [--endpoint seaweedfs]   # torchferry[flyte,flyte2,test]

A hand-over is a save and a load: a task returns the checkpoint, and the next one has it. One process for each; the
endpoint keeps the objects in memory. flyte pickles a value of 10 kB (by sys.getsizeof) through a file; what seems
smaller, as a module does, it puts into the literal whole, which a local run never sends anywhere. The pickle here is
the former. "Local MiB" are those of files that are left behind.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.endpoint import BUCKET, Store, nginx

if TYPE_CHECKING:
    from collections.abc import Iterator

WAYS = ("flyte 2", "flytekit", "flyte 2, pickle", "flytekit, stock")
MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description="Checkpoints between tasks")
    parser.add_argument("--size", type=int, default=1024, help="MiB of tensors")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--way", choices=WAYS, help="used by itself: one measurement, in this process")
    parser.add_argument("--endpoint", choices=("nginx", "seaweedfs"), default="nginx")
    parser.add_argument("--at", help="used by itself: URL, key and secret of the endpoint")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    if options.way:
        print(json.dumps(measure(options.way, options.size * MIB, options.at)))
        return
    results: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with endpoint(options.endpoint) as server:
        for _ in range(options.rounds):
            for way in WAYS:
                command = [sys.executable, "-m", "benchmarks.flyte_tasks", "--way", way, "--size", str(options.size)]
                done = subprocess.run(
                    [*command, "--at", json.dumps([server.url, server.key, server.secret])],
                    capture_output=True, text=True, check=False,
                )  # fmt: skip
                if done.returncode:
                    sys.exit(done.stderr[-3000:])
                results[way].append(json.loads(done.stdout.splitlines()[-1]))
                server.remove("raw")
    first = statistics.median(result["seconds"] for result in results[WAYS[0]])
    print(f"{options.size} MiB, a hand-over (save and load), {options.endpoint}, medians of {options.rounds} rounds\n")
    print("| | seconds | MB/s | peak MiB over the tensors | local MiB | |\n|---|---|---|---|---|---|")
    for way, measured in results.items():
        seconds = statistics.median(result["seconds"] for result in measured)
        peak = statistics.median(result["peak"] for result in measured) / MIB
        local = statistics.median(result["local"] for result in measured) / MIB
        rate = options.size * MIB / 1e6 / seconds
        print(f"| {way} | {seconds:.2f} | {rate:.0f} | {peak:.0f} | {local:.0f} | {seconds / first:.2f}x |")


@contextmanager
def endpoint(name: str) -> Iterator[Any]:
    """The endpoint, with its objects in memory, so that the disk does not count."""
    from s3fs import S3FileSystem

    from torchferry.testing import servers

    if name == "nginx":
        with nginx(keeps=True) as store:
            yield store
        return
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as directory, servers.seaweedfs(Path(directory)) as server:
        store = Store(server.endpoint, server.key, server.secret, servers.REGION)
        S3FileSystem(**store.storage_options).mkdir(BUCKET)
        yield store


class Holder:
    """What flyte pickles: of a class that it does not know, and that says how large it is."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    def __sizeof__(self) -> int:
        return sum(tensor.nbytes for tensor in self.state.values()) + 1


def measure(way: str, size: int, server: str) -> dict[str, float]:
    """One hand-over: seconds; bytes of memory at the highest, over the tensors; bytes of local files."""
    os.environ["TORCHFERRY_TAKE_OVER"] = "0" if way.endswith("stock") else "1"
    os.environ["FLYTE_LOCAL_CACHE_ENABLED"] = "false"
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as directory:
        os.chdir(directory)
        tempfile.tempdir = directory
        run = (flyte2 if way.startswith("flyte 2") else flytekit1)(way, *json.loads(server))
        run(state_of(64 * MIB))  # imports, connections, the store's room for the bucket
        for path in Path(directory).rglob("*"):
            if path.is_file():
                path.unlink()
        state = state_of(size)
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        began = time.perf_counter()
        run(state)
        seconds = time.perf_counter() - began
        local = sum(path.stat().st_size for path in Path(directory).rglob("*") if path.is_file())
        return {"seconds": seconds, "peak": status("VmHWM") - before, "local": local}


def state_of(size: int) -> dict[str, Any]:
    import torch

    return {f"layer{i}": torch.full((4 * MIB,), float(i)) for i in range(size // (16 * MIB))}


def status(field: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) << 10


def flyte2(way: str, endpoint: str, key: str, secret: str) -> Any:
    import flyte
    import flyte.storage

    from torchferry.flyte2 import LoadedCheckpoint, PyTorchCheckpoint

    env = flyte.TaskEnvironment(name="benchmark")
    given: dict[str, Any] = {}
    kind: Any = Holder if "pickle" in way else PyTorchCheckpoint

    async def give() -> Any:
        state = given["state"]
        return Holder(state) if kind is Holder else LoadedCheckpoint({"module_state_dict": state})

    give.__annotations__["return"] = kind
    give_task = env.task(give)

    async def take() -> int:
        received = await give_task()
        return len(received.state if kind is Holder else received["module_state_dict"])

    take.__annotations__["return"] = int
    take_task = env.task(take)
    flyte.init(storage=flyte.storage.S3(endpoint=endpoint, access_key_id=key, secret_access_key=secret))

    def run(state: dict[str, Any]) -> None:
        given["state"] = state
        context = flyte.with_runcontext(mode="local", raw_data_path=f"s3://{BUCKET}/raw")
        [count] = context.run(take_task).outputs()
        assert count == len(state)

    return run


_FLYTEKIT: dict[str, Any] = {}  # the state that is handed over, and the tasks; flytekit takes no nested functions


class StateOnly:
    """What flytekit saves of a module."""

    def state_dict(self) -> Any:
        return _FLYTEKIT["state"]


def give() -> Any:
    from flytekit.extras.pytorch import PyTorchCheckpoint

    return PyTorchCheckpoint(module=StateOnly())


def take(checkpoint: Any) -> Any:
    return len(checkpoint["module_state_dict"])


def hand_over() -> Any:
    return _FLYTEKIT["take"](checkpoint=_FLYTEKIT["give"]())


def flytekit1(_way: str, endpoint: str, key: str, secret: str) -> Any:
    from flytekit import FlyteContextManager, task, workflow
    from flytekit.configuration import DataConfig, S3Config
    from flytekit.core.data_persistence import FileAccessProvider
    from flytekit.extras.pytorch import PyTorchCheckpoint

    give.__annotations__["return"] = PyTorchCheckpoint
    take.__annotations__ |= {"checkpoint": PyTorchCheckpoint, "return": int}
    hand_over.__annotations__["return"] = int
    _FLYTEKIT.update(give=task(give), take=task(take))
    flow = workflow(hand_over)
    config = DataConfig(s3=S3Config(endpoint=endpoint, access_key_id=key, secret_access_key=secret))

    def run(state: dict[str, Any]) -> None:
        _FLYTEKIT["state"] = state
        provider = FileAccessProvider("sandbox", f"s3://{BUCKET}/raw", data_config=config)
        context = FlyteContextManager.current_context().with_file_access(provider)
        with FlyteContextManager.with_context(context):
            assert flow() == len(state)

    return run


if __name__ == "__main__":
    main()
