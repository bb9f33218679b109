"""What a GPU adds: snapshots from its memory, training beside background saves, loading onto it.

``python benchmarks/gpu.py`` needs torch and this checkout (and what that needs: fsspec, anyio, isal), no store and no
network. A process of its own (``sink.py``) takes the bytes over HTTP on 127.0.0.1, and drops them. Without a GPU it
measures the same on the CPU, in small, and says so: those figures say that the program works.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "storage_backends")]

import torch  # noqa: E402
from fsspec import AbstractFileSystem  # noqa: E402

import torchferry  # noqa: E402
from torchferry import background  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

MIB = 1 << 20
GIB = 1 << 30
_TENSORS = 32
_ROUNDS = 5


class SinkFileSystem(AbstractFileSystem):
    """Files that are sent to the sink, piece by piece, over one connection each."""

    protocol = "sink"
    cachable = False

    def __init__(self, port: int) -> None:
        super().__init__()
        self.port = port
        self._sizes: dict[str, int] = {}

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        assert mode == "wb"
        return _SinkFile(self, path)

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        if path not in self._sizes:
            raise FileNotFoundError(path)
        return {"name": path, "type": "file", "size": self._sizes[path], "created": self._sizes[path]}

    def mv(self, path1: str, path2: str, **_: Any) -> None:
        self._sizes[path2] = self._sizes.pop(path1)

    def rm_file(self, path: str) -> None:
        self._sizes.pop(path, None)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        pass

    def received(self) -> int:
        """How many bytes the sink has received so far."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        connection.request("GET", "/")
        return int(connection.getresponse().read())


class _SinkFile(io.RawIOBase):
    def __init__(self, fs: SinkFileSystem, path: str) -> None:
        self._fs = fs
        self._path = path
        self._size = 0
        self._connection = http.client.HTTPConnection("127.0.0.1", fs.port)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._connection.request("PUT", "/", body=data)
        self._connection.getresponse().read()
        self._size += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._connection.close()
            self._fs._sizes[self._path] = self._size
        super().close()


# --- what is measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=float, help="GiB of tensors (default: 8 on a GPU, 0.25 without)")
    parser.add_argument("--rounds", type=int, default=_ROUNDS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    size = int((arguments.size or (8 if device.type == "cuda" else 0.25)) * GIB)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU ({platform.machine()}): no GPU",
        "torch": torch.__version__,
        "cpus": len(os.sched_getaffinity(0)),
        "gib": size / GIB,
    }
    print(f"{result['device']}, torch {result['torch']}, {result['cpus']} CPUs, {result['gib']:g} GiB", flush=True)
    sink = subprocess.Popen([sys.executable, Path(__file__).with_name("sink.py")], stdout=subprocess.PIPE, text=True)
    assert sink.stdout is not None
    fs = SinkFileSystem(int(sink.stdout.readline()))
    try:
        result |= snapshots(device, size, fs, arguments.rounds)
        result |= training(device, size, fs, arguments.rounds)
        result |= loads(device, size, arguments.rounds)
    finally:
        sink.kill()
        sink.communicate()
    for name, value in result.items():
        print(f"{name:52} {value:.4f}" if isinstance(value, float) else f"{name:52} {value}")
    print(json.dumps(result))


def snapshots(device: torch.device, size: int, fs: SinkFileSystem, rounds: int) -> dict[str, Any]:
    """Seconds until a save in the background returns, against plain copies of the same bytes to the host."""
    state = {f"layers.{i}": torch.rand(size // _TENSORS // 4, device=device) for i in range(_TENSORS)}
    before = fs.received()
    returned = []
    for _ in range(1 + rounds):
        seconds, save = _timed(device, lambda: torchferry.save_in_background(state, "sink://x.pt", filesystem=fs))
        save.result()
        returned.append(seconds)
    moved = fs.received() - before
    assert moved >= (1 + rounds) * size, f"the sink got {moved} bytes"
    background.free_snapshots()
    plain = [
        _timed(device, lambda: {name: t.to("cpu", copy=True) for name, t in state.items()})[0] for _ in range(rounds)
    ]
    result = {
        "snapshot, the first (s)": returned[0],
        "snapshot, later ones (s)": statistics.median(returned[1:]),
        "copy to new host memory (s)": statistics.median(plain),
    }
    host = {name: torch.empty_like(t, device="cpu", pin_memory=device.type == "cuda") for name, t in state.items()}

    def copy() -> None:
        for name, tensor in state.items():
            host[name].copy_(tensor, non_blocking=True)

    copy()
    result["copy to pinned memory that is there (s)"] = statistics.median(
        _timed(device, copy)[0] for _ in range(rounds)
    )
    result["a snapshot over that copy"] = (
        result["snapshot, later ones (s)"] / result["copy to pinned memory that is there (s)"]
    )
    return result


def training(device: torch.device, size: int, fs: SinkFileSystem, rounds: int) -> dict[str, Any]:
    """Seconds of a step, with a save in the background each few steps, and without."""
    width = int((size / _TENSORS / 4 / 3) ** 0.5)  # with Adam's state, three times the weights
    module = torch.nn.Sequential(*[torch.nn.Linear(width, width, bias=False) for _ in range(_TENSORS)]).to(device)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-6)
    batch = torch.randn(4096 if device.type == "cuda" else 64, width, device=device)

    def step() -> None:
        optimizer.zero_grad()
        module(batch).square().mean().backward()
        optimizer.step()

    def checkpoint() -> dict[str, Any]:
        return {"model": module.state_dict(), "optimizer": optimizer.state_dict()}

    for _ in range(3):
        step()
    alone = statistics.median(_timed(device, step)[0] for _ in range(rounds))
    result: dict[str, Any] = {"step (s)": alone}
    for name, until in (("", None), (", until=optimizer", optimizer)):
        torchferry.save_in_background(checkpoint(), "sink://x.pt", filesystem=fs).result()
        waited, beside = [], []
        for _ in range(rounds):
            seconds, save = _timed(
                device,
                lambda: torchferry.save_in_background(checkpoint(), "sink://x.pt", filesystem=fs, until=until),  # noqa: B023
            )
            waited.append(seconds)
            while not save.done():
                beside.append(_timed(device, step)[0])
            save.result()
        result[f"save in the background{name}: returns after (s)"] = statistics.median(waited)
        result[f"save in the background{name}: step beside it (s)"] = statistics.median(beside) if beside else alone
        result[f"save in the background{name}: slowest step (s)"] = max(beside, default=alone)
    return result


def loads(device: torch.device, size: int, rounds: int) -> dict[str, Any]:
    """Seconds to load a local file onto the device, from the page cache."""
    state = {f"layers.{i}": torch.rand(size // _TENSORS // 4) for i in range(_TENSORS)}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "x.pt")
        torch.save(state, path)
        expected = float(state["layers.3"].sum())
        del state
        ways: dict[str, Callable[[], Any]] = {
            "torchferry.load": lambda: torchferry.load(path, map_location=device),
            "torch.load": lambda: torch.load(path, map_location=device),
            "torch.load, mmap": lambda: torch.load(path, map_location=device, mmap=True),
        }
        result: dict[str, Any] = {}
        for name, load in ways.items():
            seconds = []
            for _ in range(rounds):
                taken, loaded = _timed(device, lambda: {k: v + 0 for k, v in load().items()})  # noqa: B023
                assert abs(float(loaded["layers.3"].sum()) / expected - 1) < 1e-3
                seconds.append(taken)
                del loaded
            result[f"{name} onto the device (s)"] = statistics.median(seconds)
    return result


def _timed(device: torch.device, func: Callable[[], Any]) -> tuple[float, Any]:
    _synchronize(device)
    began = time.perf_counter()
    result = func()
    _synchronize(device)
    return time.perf_counter() - began, result


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
