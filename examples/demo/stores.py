"""The stores of the demo: each is started on this machine, and ends with the block."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import fsspec
from fsspec import AbstractFileSystem

from torchferry.testing.azure import azurite
from torchferry.testing.gcs import fake_gcs_server
from torchferry.testing.servers import S3Server, seaweedfs

BUCKET = "flyte-demo"


@dataclass(frozen=True)
class Store:
    """A store, and what Flyte has to know of it.

    Attributes:
        description: For the table.
        prefix: Where Flyte puts what tasks return.
        fs: Reaches it.
        s3: The settings, which the Flytes have for S3. For the others, fsspec has them: neither Flyte can be told of
            another Google than Google.
    """

    description: str
    prefix: str
    fs: AbstractFileSystem
    s3: S3Server | None = None


@contextmanager
def s3_store() -> Iterator[Store]:
    with seaweedfs() as server:
        fs = fsspec.filesystem("s3", **server.storage_options)
        fs.mkdir(BUCKET)
        fs.pipe_file(f"{BUCKET}/first", b"-")  # SeaweedFS makes room for a bucket at its first write: takes seconds
        yield Store(f"SeaweedFS, an S3 on {server.endpoint}", f"s3://{BUCKET}/raw", fs, server)


@contextmanager
def gcs_store() -> Iterator[Store]:
    with fake_gcs_server() as server:
        fsspec.config.conf["gs"] = server.storage_options
        fs = fsspec.filesystem("gs")
        fs.mkdir(BUCKET)
        yield Store(f"fake-gcs-server, a GCS on {server.endpoint}", f"gs://{BUCKET}/raw", fs)


@contextmanager
def azure_store() -> Iterator[Store]:
    program = Path(__file__).parents[2] / "tests/azurite/node_modules/.bin/azurite-blob"
    with azurite(program=program if program.exists() else None) as server:
        fsspec.config.conf["abfs"] = server.storage_options
        fs = fsspec.filesystem("abfs")
        fs.mkdir(BUCKET)
        yield Store(f"Azurite, an Azure on {server.endpoint}", f"abfs://{BUCKET}/raw", fs)


@contextmanager
def local_store() -> Iterator[Store]:
    with tempfile.TemporaryDirectory(prefix="flyte-demo-store-") as directory:
        yield Store("a directory of this machine", f"{directory}/raw", fsspec.filesystem("file"))


STORES: dict[str, Callable[[], AbstractContextManager[Store]]] = {
    "s3": s3_store,
    "gcs": gcs_store,
    "azure": azure_store,
    "local": local_store,
}
