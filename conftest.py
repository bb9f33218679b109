"""Fixtures that every test shares: a real S3 server, started once a session when a test first asks for it."""
# ruff: noqa: E402 - the environment is cleaned before a cloud library can read it

from __future__ import annotations

import ctypes
import gc
import os
import sys
import uuid
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before any cloud library is imported: tests are the same for everyone, and never talk to a real cloud.
for _name in list(os.environ):
    if _name.startswith(("AWS_", "AZURE_", "FLYTE_", "FSSPEC_", "GOOGLE_", "TORCHFERRY_")):
        del os.environ[_name]
os.environ.update(
    AWS_CONFIG_FILE=os.devnull,
    AWS_SHARED_CREDENTIALS_FILE=os.devnull,
    AWS_EC2_METADATA_DISABLED="true",
    GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT="false",  # else gcsfs probes for the kind of bucket, 60 s at a time
    NO_PROXY="127.0.0.1,localhost",
    no_proxy="127.0.0.1,localhost",
    OMP_WAIT_POLICY="PASSIVE",  # else torch's threads wait for work by turning, on processors that others need
)

import botocore.session
import pytest
from fsspec.asyn import AsyncFileSystem

from torchferry.testing.faultproxy import Fault, FaultProxy
from torchferry.testing.servers import S3Server, seaweedfs, storage_options_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytest_plugins = ["torchferry.testing.fixtures"]

_MOST_KEPT = 100 << 20  # bytes
_MOST_FILESYSTEMS = 4
_M_ARENA_MAX = -8  # of glibc's malloc.h
_KEPT = pytest.StashKey[int]()

if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
    mallopt(_M_ARENA_MAX, 2)  # else each of a hundred threads keeps what it freed: 500 MB in a worker


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Gives memory back: the whole suite must run on a small machine, two files at a time.

    Tensors wait in reference cycles, with the exceptions that tests catch, for a collector that counts objects, not
    bytes; malloc keeps what is freed; objects in memory:// stay until somebody deletes them; and fsspec keeps each
    filesystem, 40 MB of botocore in it where it is S3's, that was made for a test's own proxy.
    """
    if memory := sys.modules.get("fsspec.implementations.memory"):
        memory.MemoryFileSystem.store.clear()
    is_last = nextitem is None or nextitem.path != item.path
    for kind in _kinds(AsyncFileSystem):
        if len(kind._cache) > (0 if is_last else _MOST_FILESYSTEMS):  # noqa: SLF001 - fsspec tells it nowhere else
            kind.clear_instance_cache()
    if sys.platform == "linux" and (is_last or _resident() > item.config.stash.get(_KEPT, 0) + _MOST_KEPT):
        gc.collect()
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc has it
            trim(0)
        item.config.stash[_KEPT] = _resident()


def _kinds(kind: type[AsyncFileSystem]) -> Iterator[type[AsyncFileSystem]]:
    for more in kind.__subclasses__():
        yield more
        yield from _kinds(more)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """Takes back what libraries leave in the environment, such as the ranks that Lightning and accelerate look for."""
    before = dict(os.environ)
    yield
    now = dict(os.environ)
    for name in now.keys() - before.keys() - {"PYTEST_CURRENT_TEST"}:
        del os.environ[name]
    os.environ.update({name: value for name, value in before.items() if now.get(name) != value})


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """SeaweedFS on loopback: .endpoint, .port, .key, .secret, .region, .storage_options."""
    with seaweedfs() as server:
        yield server


@pytest.fixture
def s3_storage_options(s3_server: S3Server) -> dict[str, Any]:
    """What fsspec's s3:// filesystem takes to reach the server."""
    return s3_server.storage_options


@pytest.fixture(scope="session")
def s3_client(s3_server: S3Server) -> Iterator[Any]:
    """A plain botocore client: the way around everything under test."""
    client = botocore.session.get_session().create_client(
        "s3",
        endpoint_url=s3_server.endpoint,
        region_name=s3_server.region,
        aws_access_key_id=s3_server.key,
        aws_secret_access_key=s3_server.secret,
    )
    yield client
    client.close()


@pytest.fixture(scope="module")
def s3_bucket(s3_client: Any) -> Iterator[str]:
    """The name of a bucket, fresh for the file of tests; deleting it gives back what it took of the disk."""
    name = f"ferry-{uuid.uuid4().hex[:12]}"
    s3_client.create_bucket(Bucket=name)
    yield name
    s3_client.delete_bucket(Bucket=name)  # SeaweedFS deletes it with what is in it


@pytest.fixture
def s3_url(s3_bucket: str) -> str:
    """A prefix that no other test uses: "s3://bucket/prefix"."""
    return f"s3://{s3_bucket}/{uuid.uuid4().hex}"


@dataclass(frozen=True, slots=True)
class FaultyS3:
    """The S3 server behind a proxy that injects faults.

    Attributes:
        proxy: The proxy; its ``log`` says what was asked of the server.
        storage_options: What fsspec's s3:// filesystem takes to go through the proxy.
    """

    proxy: FaultProxy
    storage_options: dict[str, Any]


@pytest.fixture
def faulty_s3(s3_server: S3Server) -> Iterator[Callable[..., FaultyS3]]:
    """Makes proxies to the server: ``faulty_s3(Fault(method="PUT", status=503), ...)`` gives a FaultyS3."""
    with ExitStack() as stack:

        def make(*faults: Fault) -> FaultyS3:
            proxy = stack.enter_context(FaultProxy(s3_server.port, *faults))
            options = storage_options_for(proxy.endpoint, s3_server.key, s3_server.secret, s3_server.region)
            return FaultyS3(proxy, options)

        yield make
