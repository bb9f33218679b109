"""GCS over the fsspec plane beside gcsfs's own upload: the same bytes, the same server, in turn.

python -m benchmarks.gcs_upload [--size MiB] [--rounds N]     (needs torchferry[gcs,test])

The server is fake-gcs-server, which costs more processor time than both clients, and copies and hashes the bytes of a
compose once more, where Google copies nothing: what is seen here is a lower bound.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

# Otherwise gcsfs first asks Google what kind of bucket it is, 60 seconds at a time.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"

import gcsfs

from torchferry.engine.loops import run
from torchferry.storage import MIB, open_backend
from torchferry.testing.fixtures import GcsClient
from torchferry.testing.gcs import fake_gcs_server

BUCKET = "ferry-benchmark"


def main() -> None:
    parser = argparse.ArgumentParser(description="GCS uploads beside gcsfs's own")
    parser.add_argument("--size", type=int, default=512, help="MiB in an object")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    data = memoryview(os.urandom(64 * MIB) * (options.size // 64))
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # so that the disk does not count
    with tempfile.TemporaryDirectory(dir=memory) as directory, fake_gcs_server(Path(directory)) as server:
        client = GcsClient(server.endpoint)
        client.make_bucket(BUCKET)
        fs = gcsfs.GCSFileSystem(**server.storage_options)
        ways = {
            "gcsfs pipe": lambda path: fs.pipe_file(path, data),
            "gcsfs open": lambda path: write_file(fs, path, data),
            "torchferry": lambda path: write(fs, path, data),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.rounds):
            for name, way in ways.items():
                seconds[name].append(timed(way, f"{BUCKET}/{name}"))
                if fs.info(f"{BUCKET}/{name}", refresh=True)["size"] != len(data):
                    raise SystemExit(f"{name} lost bytes")
                fs.rm_file(f"{BUCKET}/{name}")
        client.close()
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, median in medians.items():
        ratio = median / medians["torchferry"]
        print(f"{name:12} {median:6.2f} s  {len(data) / median / 1e9:.3f} GB/s  {ratio:.2f} x torchferry's time")


def timed(way: Callable[[str], object], path: str) -> float:
    began = time.perf_counter()
    way(path)
    return time.perf_counter() - began


def write_file(fs: gcsfs.GCSFileSystem, path: str, data: memoryview) -> None:
    with fs.open(path, "wb", block_size=64 * MIB) as file:
        for start in range(0, len(data), 8 * MIB):
            file.write(data[start : start + 8 * MIB])


def write(fs: gcsfs.GCSFileSystem, path: str, data: memoryview) -> None:
    backend, path = open_backend(f"gs://{path}", filesystem=fs, plane="fsspec")
    run(backend.write, path, stream(data), size_hint=len(data))


async def stream(data: memoryview) -> AsyncIterator[memoryview]:
    for start in range(0, len(data), 8 * MIB):
        yield data[start : start + 8 * MIB]


if __name__ == "__main__":
    main()
