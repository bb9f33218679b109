from __future__ import annotations

import asyncio
import contextlib
import functools
import http.server
import logging
import socket
import tarfile
import threading
import traceback
import uuid
import zipfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

import torchferry
from torchferry.engine.types import Chunk
from torchferry.errors import (
    CheckpointNotFoundError,
    StorageError,
    StoragePermissionError,
    StorageUnavailableError,
)
from torchferry.storage.base import Leftover
from torchferry.storage.generic import GenericBackend
from torchferry.testing import BackendConformance, StoreUnderTest
from torchferry.testing.conformance import stream


class FsspecStore(StoreUnderTest):
    """A store seen through the same filesystem object: in one process there is no other way into memory://."""

    def __init__(self, fs: Any, prefix: str) -> None:
        self.backend = GenericBackend.from_filesystem(fs)
        self.fs = fs
        self.prefix = prefix

    def path(self, name: str) -> str:
        return f"{self.prefix}/{name}"

    def raw_write(self, path: str, data: bytes) -> None:
        self.fs.makedirs(self.fs._parent(path), exist_ok=True)
        self.fs.pipe_file(path, data)

    def raw_read(self, path: str) -> bytes:
        data: bytes = self.fs.cat_file(path)
        return data

    def raw_exists(self, path: str) -> bool:
        found: bool = self.fs.exists(path)
        return found

    def leftovers(self) -> list[str]:
        names = self.fs.find(self.prefix) if self.fs.exists(self.prefix) else []
        return [name for name in names if name.rpartition("/")[2].startswith(".")]


class TestMemory(BackendConformance):
    @pytest.fixture
    def store(self) -> FsspecStore:
        return FsspecStore(MemoryFileSystem(), f"/{uuid.uuid4().hex}")


class TestFilesystemThatMoves(BackendConformance):
    """One that has a move of its own, as sftp and hdfs have."""

    @pytest.fixture
    def store(self, tmp_path: Path) -> FsspecStore:
        return FsspecStore(fsspec.filesystem("file", auto_mkdir=True), str(tmp_path))


async def test_read_only_filesystem_says_so(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        archive.writestr("inside.pt", b"12345")
    fs = fsspec.filesystem("zip", fo=str(tmp_path / "archive.zip"))
    backend = GenericBackend.from_filesystem(fs)
    found = await backend.stat("inside.pt")
    assert await backend.read("inside.pt", 1, 3, found) == b"23"
    with pytest.raises(StorageError, match=r"zip://new.pt: .* can only be open for reading"):
        await backend.write("new.pt", stream(b"1", 1), plan=backend.upload_plan(1))


@pytest.fixture
def http_url(tmp_path: Path) -> Iterator[str]:
    """A web server that knows no ranges, as Python's does not."""
    (tmp_path / "checkpoint.pt").write_bytes(b"12345")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


async def test_web_server_is_read_only(http_url: str) -> None:
    backend = GenericBackend.from_filesystem(fsspec.filesystem("http", skip_instance_cache=True))
    with pytest.raises(StoragePermissionError, match="read-only"):
        await backend.write(f"{http_url}/new.pt", stream(b"1", 1), plan=backend.upload_plan(1))


async def test_web_server_without_ranges_never_gives_wrong_bytes(http_url: str) -> None:
    backend = GenericBackend.from_filesystem(fsspec.filesystem("http", skip_instance_cache=True))
    found = await backend.stat(f"{http_url}/checkpoint.pt")
    assert found.size == 5
    assert await backend.read(f"{http_url}/checkpoint.pt", 0, 5, found) == b"12345"
    with pytest.raises(StorageError, match="returned 5 bytes"):
        await backend.read(f"{http_url}/checkpoint.pt", 1, 3, found)


async def test_cancelled_read_of_a_web_server_that_hangs_ends_at_once() -> None:
    asked, closed = asyncio.Event(), asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            if b"\r\nRange: bytes=1-" not in await reader.readuntil(b"\r\n\r\n"):
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\n")
                return
            asked.set()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(reader.read(), 30)
                closed.set()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/x.pt"
        backend = GenericBackend.from_filesystem(fsspec.filesystem("http", skip_instance_cache=True))
        reading = asyncio.create_task(backend.read(url, 1, 3, await backend.stat(url)))
        await asked.wait()
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        await closed.wait()


async def test_web_server_that_is_not_there_is_not_a_missing_file(http_url: str) -> None:
    backend = GenericBackend.from_filesystem(fsspec.filesystem("http", skip_instance_cache=True))
    with pytest.raises(CheckpointNotFoundError, match="no such file"):
        await backend.stat(f"{http_url}/missing.pt")
    with socket.create_server(("127.0.0.1", 0)) as unanswered:
        port = unanswered.getsockname()[1]
    with pytest.raises(StorageUnavailableError, match=f"http://127.0.0.1:{port}/x.pt"):
        await backend.stat(f"http://127.0.0.1:{port}/x.pt")


async def test_filesystem_made_for_its_users_loop_works(http_url: str) -> None:
    """An asynchronous instance must not be called from worker threads: its twin with the same settings is."""
    fs = fsspec.filesystem("http", asynchronous=True, skip_instance_cache=True)
    backend = GenericBackend.from_filesystem(fs)
    assert (await backend.stat(f"{http_url}/checkpoint.pt")).size == 5


class RefusesInSilence(MemoryFileSystem):
    """Moves nothing to where there is a file, and does not say so: as webhdfs."""

    protocol = "refusing"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    def mv(self, path1: str, path2: str, **_kwargs: Any) -> None:
        if not self.exists(path2):
            super().mv(path1, path2)


class CannotDelete(MemoryFileSystem):
    """Some may write and not delete: their credentials, or what a store is for (WORM)."""

    protocol = "undeletable"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    def rm_file(self, path: str) -> None:
        raise PermissionError(path)


async def test_temporary_file_that_cannot_be_removed_is_named(caplog: pytest.LogCaptureFixture) -> None:
    store = FsspecStore(CannotDelete(), f"/{uuid.uuid4().hex}")

    async def failing() -> AsyncIterator[Chunk]:
        yield Chunk(b"x")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await store.write(store.path("x.pt"), failing())
    (left,) = store.leftovers()
    assert left in caplog.text


async def test_move_that_is_refused_in_silence_is_an_error() -> None:
    store = FsspecStore(RefusesInSilence(), f"/{uuid.uuid4().hex}")
    path = store.path("x.pt")
    await store.backend.write(path, stream(b"old", 3), plan=store.backend.upload_plan(3))
    with pytest.raises(StorageError, match="does not replace a file by a move"):
        await store.backend.write(path, stream(b"new", 3), plan=store.backend.upload_plan(3))
    assert store.raw_read(path) == b"old"
    assert store.leftovers() == []


def test_filesystem_that_only_one_thread_may_use_gives_the_right_bytes(tmp_path: Path) -> None:
    """tar reads from one file, whose position all threads share."""
    tensors = [torch.full((3 << 20,), i, dtype=torch.uint8) for i in range(16)]
    torch.save(tensors, tmp_path / "x.pt")
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(tmp_path / "x.pt", "x.pt")
    for _ in range(5):
        loaded = torchferry.load(f"tar://x.pt::{tmp_path}/x.tar")
        assert all(torch.equal(one, other) for one, other in zip(loaded, tensors, strict=True))


async def test_directory_in_the_way_is_refused() -> None:
    fs = MemoryFileSystem()
    root = f"/{uuid.uuid4().hex}"
    fs.makedirs(f"{root}/directory")
    store = FsspecStore(fs, root)
    with pytest.raises(StorageError, match="directory"):
        await store.write(store.path("directory"), stream(b"new", 3))
    with pytest.raises(StorageError, match="directory"):
        await store.stat(store.path("directory"))
    assert store.leftovers() == []


async def listed(backend: GenericBackend, prefix: str) -> list[str]:
    return sorted([each.path async for each in backend.list(prefix)])


async def left(backend: GenericBackend, prefix: str) -> list[Leftover]:
    return [each async for each in backend.leftovers(prefix)]


async def test_list_of_a_missing_directory_is_not_found() -> None:
    backend = GenericBackend.from_filesystem(MemoryFileSystem())
    with pytest.raises(CheckpointNotFoundError, match="no-such-directory"):
        await listed(backend, f"/{uuid.uuid4().hex}/no-such-directory/")


class RefusesOneDirectory(MemoryFileSystem):
    protocol = "refuses-one"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
        if path.endswith("secret"):
            raise PermissionError(path)
        return super().ls(path, detail, **kwargs)


async def test_list_leaves_out_nothing_in_silence() -> None:
    fs = RefusesOneDirectory()
    fs.pipe_file("/run/secret/x.pt", b"x")
    fs.pipe_file("/run/open/x.pt", b"x")
    with pytest.raises(StoragePermissionError, match="run/secret"):
        await listed(GenericBackend(fs), "/run/")


async def test_list_follows_no_links_to_directories(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/x.pt").write_bytes(b"x")
    (tmp_path / "run/again").symlink_to(tmp_path / "run")
    (tmp_path / "run/last.pt").symlink_to(tmp_path / "run/x.pt")
    (tmp_path / "run/gone.pt").symlink_to(tmp_path / "run/nothing.pt")
    backend = GenericBackend(fsspec.filesystem("file"))
    assert await listed(backend, f"{tmp_path}/run/") == [f"{tmp_path}/run/last.pt", f"{tmp_path}/run/x.pt"]


async def test_leftovers_of_one_name_are_those_of_its_directory_and_can_be_discarded() -> None:
    fs = MemoryFileSystem()
    root = f"/{uuid.uuid4().hex}"
    names = ["run/.torchferry-0123456789abcdef.tmp", "run/a/.torchferry-0123456789abcdef.tmp", "run/a/x.pt", "x.pt"]
    for name in names:
        fs.pipe_file(f"{root}/{name}", b"x")
    backend = GenericBackend(fs)
    assert [each.path for each in await left(backend, f"{root}/run/a")] == [f"{root}/{names[0]}", f"{root}/{names[1]}"]
    (found,) = await left(backend, f"{root}/run/a/x.pt")
    assert found.path == f"{root}/{names[1]}"
    assert found.kind == "temporary file"
    assert found.modified is not None
    assert found.modified.tzinfo is not None
    assert await backend.discard(found)
    assert await left(backend, f"{root}/run/a/") == []
    assert await listed(backend, f"{root}/") == [f"{root}/{name}" for name in ("run/a/x.pt", "x.pt")]


def test_nothing_that_a_load_says_shows_a_secret(caplog: pytest.LogCaptureFixture) -> None:
    secret, url = uuid.uuid4().hex, f"memory://{uuid.uuid4().hex}/x.pt"
    caplog.set_level(logging.INFO)
    torchferry.save({"a": torch.ones(3)}, f"{url}?apikey={secret}")
    manifest = torchferry.inspect(f"{url}?apikey={secret}")
    assert manifest.url.endswith("/x.pt?apikey=***")

    def refuse(_: Any, __: str) -> Any:
        raise KeyError("mine")

    with pytest.raises(KeyError) as caught:
        torchferry.load(f"{url}?apikey={secret}", map_location=refuse)
    assert "apikey=***" in "".join(caught.value.__notes__)
    assert secret not in "".join(traceback.format_exception(caught.value))
    assert secret not in caplog.text


async def test_no_error_of_a_filesystem_shows_a_secret() -> None:
    secret = uuid.uuid4().hex
    with socket.create_server(("127.0.0.1", 0)) as unanswered:
        port = unanswered.getsockname()[1]
    backend = GenericBackend.from_filesystem(fsspec.filesystem("http", skip_instance_cache=True))
    with pytest.raises(StorageUnavailableError, match=r"apikey=\*\*\*") as caught:
        await backend.stat(f"http://127.0.0.1:{port}/x.pt?apikey={secret}")
    assert secret not in "".join(traceback.format_exception(caught.value))
