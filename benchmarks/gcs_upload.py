"""GCS: torchferry beside gcsfs's own upload: the same bytes, the same servers, in turn.

python -m benchmarks.gcs_upload [--size MiB] [--rounds N]     (needs torchferry[gcs,test])

Two servers. The stand-in for Google of torchferry.testing speaks the XML API: the engine sends parts side by side.
fake-gcs-server speaks the JSON API only: it gets one chunk after the other, as from gcsfs itself. It hashes all that it
has with every chunk, so that larger chunks are faster: torchferry's have 64 MiB there, as those of "gcsfs open". Both
servers cost more processor time than the clients: what is seen here is a lower bound.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

# Otherwise gcsfs first asks Google what kind of bucket it is, 60 seconds at a time.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"

import gcsfs

from torchferry.engine.loops import run
from torchferry.engine.types import MIB, Chunk
from torchferry.storage import open_backend
from torchferry.testing.fixtures import GcsClient
from torchferry.testing.gcs import GcsServer, fake_gcs_server, gcs_xml_api

BUCKET = "ferry-benchmark"


def main() -> None:
    parser = argparse.ArgumentParser(description="GCS uploads beside gcsfs's own")
    parser.add_argument("--size", type=int, default=512, help="MiB in an object")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    data = memoryview(os.urandom(64 * MIB) * (options.size // 64))
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # so that the disk does not count
    with ExitStack() as stack:
        place = [Path(stack.enter_context(tempfile.TemporaryDirectory(dir=memory))) for _ in range(2)]
        servers = {
            "stand-in for Google (XML and JSON API)": (stack.enter_context(gcs_xml_api(directory=place[0]))[1], None),
            "fake-gcs-server (JSON API)": (stack.enter_context(fake_gcs_server(place[1])), 64 * MIB),
        }
        for name, (server, part_size) in servers.items():
            compare(name, server, data, options.rounds, part_size)


def compare(title: str, server: GcsServer, data: memoryview, rounds: int, part_size: int | None) -> None:
    client = GcsClient(server.endpoint)
    client.make_bucket(BUCKET)
    fs = gcsfs.GCSFileSystem(**server.storage_options)
    ways = {
        "gcsfs pipe": lambda path: fs.pipe_file(path, data),
        "gcsfs open": lambda path: write_file(fs, path, data),
        "torchferry": lambda path: write(fs, path, data, part_size),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            seconds[name].append(timed(way, f"{BUCKET}/{name}"))
            if fs.info(f"{BUCKET}/{name}", refresh=True)["size"] != len(data):
                raise SystemExit(f"{name} lost bytes")
            fs.rm_file(f"{BUCKET}/{name}")
    client.close()
    print(title)
    medians = {name: [statistics.median(each) for each in zip(*times, strict=True)] for name, times in seconds.items()}
    for name, (wall, cpu) in medians.items():
        ratio = wall / medians["torchferry"][0]
        print(
            f"  {name:12} {wall:6.2f} s  {len(data) / wall / 1e9:.3f} GB/s  {cpu:5.2f} CPU s  "
            f"{ratio:.2f} x torchferry's time"
        )


def timed(way: Callable[[str], object], path: str) -> tuple[float, float]:
    """Seconds on the wall, and of the client's processor."""
    began, used = time.perf_counter(), cpu_seconds()
    way(path)
    return time.perf_counter() - began, cpu_seconds() - used


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def write_file(fs: gcsfs.GCSFileSystem, path: str, data: memoryview) -> None:
    with fs.open(path, "wb", block_size=64 * MIB) as file:
        for start in range(0, len(data), 8 * MIB):
            file.write(data[start : start + 8 * MIB])


def write(fs: gcsfs.GCSFileSystem, path: str, data: memoryview, part_size: int | None) -> None:
    backend, path = open_backend(f"gs://{path}", filesystem=fs)
    run(partial(backend.write, path, stream(data), plan=backend.upload_plan(len(data), part_size)))


async def stream(data: memoryview) -> AsyncIterator[Chunk]:
    for start in range(0, len(data), 8 * MIB):
        yield Chunk(data[start : start + 8 * MIB])


if __name__ == "__main__":
    main()
