from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
import uuid
import zipfile
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from s3fs import S3FileSystem

import torchferry
from torchferry.errors import (
    BackendNotInstalledError,
    CheckpointNotFoundError,
    UnsupportedOptionError,
    UnsupportedURLError,
)
from torchferry.storage.generic import GenericBackend
from torchferry.storage.local import LocalBackend
from torchferry.storage.registry import open_backend
from torchferry.testing import BackendConformance, StoreUnderTest
from torchferry.testing.forkserver import python

fsspec_registry = import_module("fsspec.registry")  # fsspec has another "registry" of this name

S3 = {"key": "key", "secret": "secret", "endpoint_url": "http://127.0.0.1:1"}


def run_python(script: str, *search: Path, fresh: bool = False) -> subprocess.CompletedProcess[str]:
    """Runs a script in a process of its own, with directories in front of its search path; fresh: with no imports."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [*search, *filter(None, sys.path)]))}
    warnings = ("-W", "error", "-W", "ignore:Failed to initialize NumPy")
    command = [*([sys.executable] if fresh else python()), *warnings, "-c", script]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("as_url", [str, Path, lambda path: f"file://{path}"], ids=["str", "Path", "URL"])
def test_paths_are_local_files(as_url: Any, tmp_path: Path) -> None:
    backend, path = open_backend(as_url(tmp_path / "a b#c?.pt"))
    assert isinstance(backend, LocalBackend)
    assert path == str(tmp_path / "a b#c?.pt")


@pytest.mark.parametrize("url", ["s3:/bucket/x.pt", "s3:bucket/x.pt", "gs:/bucket/x.pt"])
def test_slip_in_a_url_is_no_local_path(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnsupportedURLError, match=r"bucket/x\.pt"):
        torchferry.save({"a": 1}, url)
    assert list(tmp_path.iterdir()) == []


def test_relative_path_is_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_backend("checkpoint.pt")[1] == str(tmp_path / "checkpoint.pt")


def test_any_fsspec_filesystem_will_do() -> None:
    backend, path = open_backend("memory://a/b.pt")
    assert isinstance(backend, GenericBackend)
    assert path == "/a/b.pt"
    assert backend.url(path) == "memory:///a/b.pt"


def test_instance_is_used_as_it_is() -> None:
    fs = MemoryFileSystem()
    backend, path = open_backend("memory://a/b.pt", filesystem=fs)
    assert isinstance(backend, GenericBackend)
    assert backend._fs is fs
    assert path == "/a/b.pt"


@pytest.mark.parametrize("name", ["a b", "a#b", "a?b", "a%20b", "a+b", "ü"])
def test_names_in_urls_are_taken_literally(name: str) -> None:
    assert open_backend(f"s3://bucket/{name}/x.pt", storage_options=S3)[1] == f"bucket/{name}/x.pt"


def test_unknown_protocol_is_a_value_error_that_names_it() -> None:
    with pytest.raises(UnsupportedURLError, match="'gopher'") as caught:
        open_backend("gopher://host/x.pt")
    assert isinstance(caught.value, ValueError)


def test_chain_that_starts_from_nothing_is_a_missing_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"none\.zip"):
        open_backend(f"zip://checkpoint.pt::{tmp_path}/none.zip")


def test_all_threads_share_a_filesystem() -> None:
    """Up to fsspec 2026.3 even s3fs would be another one in each thread, with connections of its own."""
    with ThreadPoolExecutor(2) as threads:
        start = threading.Barrier(2)
        opened = [threads.submit(lambda: (start.wait(), open_backend("memory://a"))[1][0]) for _ in range(2)]
        first, second = (future.result() for future in opened)
    assert isinstance(first, GenericBackend)
    assert isinstance(second, GenericBackend)
    assert first._fs is second._fs


def test_directory_of_a_store_is_reached_as_the_store_is(tmp_path: Path) -> None:
    nested = DirFileSystem("b", DirFileSystem(str(tmp_path / "a"), LocalFileSystem()))
    backend, path = open_backend("run[1]/x?.pt", filesystem=nested)
    assert isinstance(backend, LocalBackend)
    assert path == str(tmp_path / "a/b/run[1]/x?.pt")


def test_filesystem_that_does_not_connect_holds_up_no_other(tmp_path: Path) -> None:
    begun, ended = threading.Event(), threading.Event()

    class Slow(MemoryFileSystem):
        protocol = "slow"

        def __init__(self) -> None:
            begun.set()
            ended.wait()
            raise EOFError("no greeting")

    fsspec.register_implementation("slow", Slow, clobber=True)
    with ThreadPoolExecutor(1) as pool:
        opening = pool.submit(open_backend, "slow://x.pt")
        try:
            begun.wait()
            torchferry.save("x", tmp_path / "x.pt")
            open_backend("memory://x.pt")
            assert not opening.done()
        finally:
            ended.set()
        with pytest.raises(torchferry.StorageError, match=r"slow://x\.pt: EOFError: no greeting"):
            opening.result()


def test_server_that_refuses_the_connection_of_a_filesystem_is_unavailable() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # and not listened on
        with pytest.raises(torchferry.StorageUnavailableError, match="Cannot open ftp://127"):
            torchferry.load(f"ftp://127.0.0.1:{held.getsockname()[1]}/x.pt")


async def test_a_cancel_does_not_wait_for_a_filesystem_that_does_not_connect() -> None:
    begun, ended = threading.Event(), threading.Event()

    class Stuck(MemoryFileSystem):
        protocol = "stuck"

        def __init__(self) -> None:
            begun.set()
            ended.wait()
            raise EOFError("no greeting")

    fsspec.register_implementation("stuck", Stuck, clobber=True)
    task = asyncio.create_task(torchferry.load_async("stuck://x.pt"))
    await asyncio.to_thread(begun.wait)
    task.cancel()
    try:
        done, _ = await asyncio.wait([task], timeout=30)
        assert done
        assert task.cancelled()
    finally:
        ended.set()


def test_credentials_that_are_not_there_are_a_permission_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "missing.json"))
    with pytest.raises(torchferry.StoragePermissionError, match=r"missing\.json was not found"):
        open_backend("gs://bucket/x.pt", storage_options={"token": "google_default", "project": "p"})


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of FTPFileSystem's own __del__
def test_setting_that_the_filesystem_needs_is_named() -> None:
    with pytest.raises(UnsupportedOptionError, match="host"):
        open_backend("ftp:///x.pt")


@pytest.mark.parametrize("url", ["memory://a/", "s3://bucket/", "/tmp/", "file:///tmp/a/"])
def test_url_of_a_directory_is_refused(url: str) -> None:
    with pytest.raises(UnsupportedURLError, match=r"checkpoint\.pt"):
        open_backend(url)


def test_storage_options_and_filesystem_contradict_each_other() -> None:
    with pytest.raises(UnsupportedOptionError, match="not both"):
        open_backend("memory://x", storage_options={"a": 1}, filesystem=MemoryFileSystem())


def test_url_of_another_filesystem_than_the_given_one_is_refused() -> None:
    with pytest.raises(UnsupportedOptionError, match=r"s3://bucket/x is not a URL of .* LocalFileSystem"):
        open_backend("s3://bucket/x", filesystem=LocalFileSystem())


def test_local_file_in_a_store_is_refused(s3_storage_options: dict[str, Any]) -> None:
    fs = S3FileSystem(**s3_storage_options)
    with pytest.raises(UnsupportedOptionError, match=r"file:///tmp/x\.pt is a file of this machine.*S3FileSystem"):
        torchferry.save([], "file:///tmp/x.pt", filesystem=fs)
    with pytest.raises(UnsupportedURLError, match="names no bucket"):
        torchferry.save([], "s3:///tmp/x.pt", storage_options=s3_storage_options)
    with pytest.raises(UnsupportedURLError, match="names no bucket"):
        torchferry.load("s3:///tmp/x.pt", storage_options=s3_storage_options)


# --- "::" in a name, chains, file:// URLs


@pytest.mark.parametrize("name", ["dir/model::best.pt", "enc::w.pt", "::x.pt", "a::b::c.pt"])
@pytest.mark.parametrize("as_path", [str, Path], ids=["str", "Path"])
def test_path_with_colons_is_a_path(name: str, as_path: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    backend, path = open_backend(as_path(name))
    assert isinstance(backend, LocalBackend)
    assert path == str(tmp_path / name)


def test_two_names_with_colons_are_two_files(tmp_path: Path) -> None:
    for name in ("model::best.pt", "model::last.pt", "zip::memory"):
        torchferry.save({"name": name}, tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model::best.pt", "model::last.pt", "zip::memory"]
    torch.save({"name": "torch"}, tmp_path / "enc::w.pt")
    loaded: Any = torchferry.load(str(tmp_path / "enc::w.pt"))
    assert loaded == {"name": "torch"}


@pytest.mark.parametrize(
    ("url", "path"), [("s3://bucket/run/a::b.pt", "bucket/run/a::b.pt"), ("file:///tmp/a::b.pt", "/tmp/a::b.pt")]
)
def test_key_with_colons_is_a_key(url: str, path: str) -> None:
    assert open_backend(url, storage_options=S3 if url.startswith("s3:") else None)[1] == path


def test_key_with_colons_does_not_replace_another() -> None:
    url = f"memory://{uuid.uuid4().hex}/a"
    torchferry.save({"name": "a"}, url)
    torchferry.save({"name": "a::b"}, f"{url}::b.pt")
    loaded: Any = torchferry.load(url), torchferry.load(f"{url}::b.pt")
    assert loaded == ({"name": "a"}, {"name": "a::b"})


def test_chain_stays_a_chain(tmp_path: Path) -> None:
    torch.save({"a": 1}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "a b.zip", "w") as archive:
        archive.write(tmp_path / "x.pt", "x.pt")
    for last in (tmp_path / "a b.zip", f"file://{tmp_path}/a b.zip", (tmp_path / "a b.zip").as_uri()):
        loaded: Any = torchferry.load(f"zip://x.pt::{last}")
        assert loaded == {"a": 1}


@pytest.mark.parametrize(
    "url",
    [
        "memory://a::s3://bucket/x.pt",
        "model::zip",
        "dir/model::zip://x.pt",
        "zip://x.pt::dir/a::b.zip",
        "s3::bucket/x.pt",
        "x.pt::memory://y.pt",
    ],
)
def test_what_is_neither_a_path_nor_a_chain_is_refused(url: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnsupportedURLError, match=r"neither one URL nor a chain|is no URL"):
        torchferry.save({"a": 1}, url)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a b.pt", "ü#?.pt", "100%.pt", "a%20b.pt", "%41.pt", b"\xff.pt"])
@pytest.mark.parametrize("filesystem", [None, LocalFileSystem()], ids=["URL", "filesystem"])
def test_file_url_is_decoded_as_pathlib_encodes_it(name: Any, filesystem: Any, tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(name)
    path.write_bytes(b"x")
    backend, found = open_backend(path.as_uri(), filesystem=filesystem)
    assert found == str(path)
    if isinstance(name, str):
        assert open_backend(backend.url(found))[1] == found


# --- caches


class CachedStore(StoreUnderTest):
    """Memory with a cache in front; what is put around the cache is not in it."""

    def __init__(self, protocol: str, directory: Path) -> None:
        self.prefix = f"/{uuid.uuid4().hex}"
        self.backend, _ = open_backend(
            f"{protocol}::memory:/{self.prefix}/x", storage_options={protocol: {"cache_storage": str(directory)}}
        )
        self.fs = MemoryFileSystem()

    def path(self, name: str) -> str:
        return f"{self.prefix}/{name}"

    def raw_write(self, path: str, data: bytes) -> None:
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


class TestSimpleCache(BackendConformance):
    @pytest.fixture
    def store(self, tmp_path: Path) -> CachedStore:
        return CachedStore("simplecache", tmp_path)


class TestFileCache(BackendConformance):
    @pytest.fixture
    def store(self, tmp_path: Path) -> CachedStore:
        return CachedStore("filecache", tmp_path)


CACHES = ["simplecache", "filecache", "blockcache"]


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # fsspec's, in blockcache
@pytest.mark.parametrize("protocol", CACHES)
def test_cache_is_read_after_the_first_load(protocol: str, tmp_path: Path) -> None:
    torch.save({"a": torch.arange(100_000)}, tmp_path / "x.pt")
    url = f"{protocol}::file://{tmp_path}/x.pt"
    options = {protocol: {"cache_storage": str(tmp_path / "cache")}}
    for _ in range(2):
        loaded: Any = torchferry.load(url, storage_options=options)
        assert torch.equal(loaded["a"], torch.arange(100_000))
    assert any((tmp_path / "cache").iterdir())


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # fsspec's, in blockcache
@pytest.mark.parametrize("protocol", CACHES)
def test_what_is_saved_through_a_cache_is_what_is_loaded_through_it(protocol: str, tmp_path: Path) -> None:
    url = f"{protocol}::file://{tmp_path}/x.pt"
    options = {protocol: {"cache_storage": str(tmp_path / "cache")}}
    for step in range(3):
        torchferry.save({"step": torch.full((100_000,), step)}, url, storage_options=options)
        for _ in range(2):
            loaded: Any = torchferry.load(url, storage_options=options)
            assert loaded["step"][0] == step


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # fsspec's, in blockcache
@pytest.mark.parametrize("protocol", CACHES)
def test_cache_of_s3_works(protocol: str, s3_url: str, s3_storage_options: dict[str, Any], tmp_path: Path) -> None:
    options = {"s3": s3_storage_options, protocol: {"cache_storage": str(tmp_path)}}
    url = f"{protocol}::{s3_url}/x.pt"
    written = torchferry.save({"a": torch.arange(3_000_000)}, url, storage_options=options)
    assert written.url == f"{s3_url}/x.pt"
    loaded: Any = torchferry.load(url, storage_options=options)
    assert torch.equal(loaded["a"], torch.arange(3_000_000))


def test_cache_that_decompresses_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedOptionError, match="compression="):
        open_backend(f"filecache::{tmp_path}/x.pt", storage_options={"filecache": {"compression": "gzip"}})


# --- forks


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize("cached", [False, True], ids=["s3fs", "simplecache"])
def test_forked_child_uses_the_filesystem_of_its_parent(
    cached: bool, s3_url: str, s3_storage_options: dict[str, Any]
) -> None:
    script = f"""
import os, fsspec, torchferry, warnings
warnings.filterwarnings("ignore", ".*multi-threaded.*fork", DeprecationWarning)
fs = fsspec.filesystem("s3", **{s3_storage_options!r})
if {cached}:
    fs = fsspec.filesystem("simplecache", fs=fs)
torchferry.save({{"a": 1}}, "{s3_url}/x.pt", filesystem=fs)
if child := os.fork():
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
else:
    torchferry.save({{"a": 2}}, "{s3_url}/y.pt", filesystem=fs)
    loaded = torchferry.load("{s3_url}/x.pt", filesystem=fs), torchferry.load("{s3_url}/y.pt", filesystem=fs)
    os._exit(0 if loaded == ({{"a": 1}}, {{"a": 2}}) else 7)
assert torchferry.load("{s3_url}/y.pt", filesystem=fs) == {{"a": 2}}
"""
    done = run_python(script)
    assert done.stdout == "0\n", done.stderr


# --- options


@pytest.mark.parametrize(
    ("option", "meant"),
    [
        ("endpoint", "endpoint_url"),
        ("aws_access_key_id", "key"),
        ("anonn", "anon"),
        ("region_name", "client_kwargs={'region_name': ...}"),
        ("use_list_cache", "use_listings_cache"),
    ],
)
def test_misspelt_storage_option_is_refused_with_the_nearest_right_one(option: str, meant: str) -> None:
    with pytest.raises(UnsupportedOptionError) as caught:
        open_backend("s3://bucket/x.pt", storage_options={option: "value"})
    assert f"S3FileSystem has no option {option!r}. Did you mean {meant}?" in str(caught.value)


def test_option_like_no_other_is_refused_with_all_there_are() -> None:
    with pytest.raises(UnsupportedOptionError, match=r"has no option 'colour'. There are: anon, .*endpoint_url"):
        open_backend("s3://bucket/x.pt", storage_options={"colour": "blue"})


def test_options_that_s3fs_passes_on_are_taken() -> None:
    open_backend("s3://bucket/x.pt", storage_options={**S3, "profile": None, "use_listings_cache": False})


def test_misspelt_option_of_any_filesystem_is_named() -> None:
    class Strict(MemoryFileSystem):
        protocol = "strict"

        def __init__(self, host: str = "") -> None:
            super().__init__()
            self.host = host

    fsspec.register_implementation("strict", Strict, clobber=True)
    with pytest.raises(
        UnsupportedOptionError, match=r"strict://x\.pt: Strict has no option 'hots'. Did you mean host\?"
    ):
        open_backend("strict://x.pt", storage_options={"hots": "x"})


# --- obstore, whose filesystem Flyte 2 registers for s3, gs, abfs and abfss


def test_url_gets_s3fs_whatever_is_registered(s3_url: str, s3_storage_options: dict[str, Any]) -> None:
    pytest.importorskip("obstore")
    script = f"""
import fsspec, obstore.fsspec, torchferry
obstore.fsspec.register(["s3", "gs", "abfs", "abfss"])
assert issubclass(fsspec.get_filesystem_class("s3"), obstore.fsspec.FsspecStore)
torchferry.save({{"a": 1}}, "{s3_url}/x.pt", storage_options={s3_storage_options!r})
print(torchferry.load("{s3_url}/x.pt", storage_options={s3_storage_options!r}))
"""
    done = run_python(script)
    assert done.stdout == "{'a': 1}\n", done.stderr


@pytest.mark.parametrize("chain", ["zip://a/x.pt::{}/x.zip", "simplecache::zip://a/x.pt::{}/x.zip", "dir://x.pt::{}/a"])
def test_chain_lies_on_s3fs_whatever_is_registered(
    chain: str, s3_url: str, s3_storage_options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Strange(fsspec.AbstractFileSystem):  # type: ignore[misc]
        def __init__(self, **options: Any) -> None:
            raise AssertionError(options)

    torchferry.save({"a": 1}, f"{s3_url}/a/x.pt", storage_options=s3_storage_options)
    store = S3FileSystem(**s3_storage_options)
    with store.open(f"{s3_url}/x.zip", "wb") as file, zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/x.pt", store.cat_file(f"{s3_url}/a/x.pt"))
    monkeypatch.setitem(fsspec_registry._registry, "s3", Strange)
    loaded = torchferry.load(chain.format(s3_url), storage_options={"s3": s3_storage_options})
    assert loaded == {"a": 1}


@pytest.mark.parametrize("registered", [False, True], ids=["FsspecStore", "registered"])
def test_filesystem_of_obstore_works_as_any_other(registered: bool, s3_url: str, s3_server: Any) -> None:
    pytest.importorskip("obstore")
    script = f"""
import asyncio, fsspec, obstore.fsspec, torch, torchferry
from torchferry.storage import open_backend
settings = dict(
    config=dict(
        endpoint={s3_server.endpoint!r}, access_key_id={s3_server.key!r}, secret_access_key={s3_server.secret!r},
        region={s3_server.region!r}, virtual_hosted_style_request=False,
    ),
    client_options={{"allow_http": True}},
)
if {registered}:
    obstore.fsspec.register(["s3"])
    fs = fsspec.filesystem("s3", **settings)
else:
    fs = obstore.fsspec.FsspecStore("s3", **settings)
for step in range(2):
    written = torchferry.save({{"a": torch.full((3_000_000,), step)}}, "{s3_url}/run/x.pt", filesystem=fs)
    loaded = torchferry.load("{s3_url}/run/x.pt", filesystem=fs)
    assert loaded["a"].unique().tolist() == [step]
backend, path = open_backend("{s3_url}/run/x.pt", filesystem=fs)
assert type(backend).__name__ == "GenericBackend"

async def look():
    prefix = path.removesuffix("x.pt")
    return [(e.path, e.size) async for e in backend.list(prefix)], [e.path async for e in backend.leftovers(prefix)]

listed, left = asyncio.run(look())
assert listed == [(path, written.size)], listed
assert left == []
try:
    torchferry.load("{s3_url}/run/missing.pt", filesystem=fs)
except torchferry.CheckpointNotFoundError:
    print(written.url)
"""
    done = run_python(script)
    assert done.stdout == f"{s3_url}/run/x.pt\n", done.stderr


# --- which backend


@pytest.mark.parametrize(
    ("protocol", "library", "extra"),
    [("s3", "s3fs", "s3"), ("s3a", "s3fs", "s3"), ("gs", "gcsfs", "gcs"), ("abfs", "adlfs", "azure")],
)
def test_missing_library_is_named_with_the_extra_that_brings_it(protocol: str, library: str, extra: str) -> None:
    script = f"""
import sys
sys.modules[{library!r}] = None  # Python's own way to say that a module is not there
from torchferry.errors import BackendNotInstalledError
from torchferry.storage.registry import open_backend
try:
    open_backend("{protocol}://bucket/key")
except BackendNotInstalledError as error:
    print(error)
"""
    done = run_python(script)
    assert f"pip install 'torchferry[{extra}]'" in done.stdout, done.stderr
    assert issubclass(BackendNotInstalledError, ImportError)


def test_backend_of_a_stranger_is_found_by_its_entry_point(tmp_path: Path) -> None:
    (tmp_path / "vault.py").write_text("""
from fsspec.implementations.memory import MemoryFileSystem
from torchferry.storage.generic import GenericBackend

class VaultFileSystem(MemoryFileSystem):
    protocol = "vault"

class VaultBackend(GenericBackend):
    pass
""")
    metadata = tmp_path / "vault-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: vault\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[fsspec.specs]\nvault = vault:VaultFileSystem\n[torchferry.storage_backends]\nvault = vault:VaultBackend\n"
    )
    done = run_python(
        "from torchferry.storage.registry import open_backend; print(type(open_backend('vault://x')[0]).__name__)",
        tmp_path,
        fresh=True,
    )
    assert done.stdout == "VaultBackend\n", done.stderr


def test_choosing_a_backend_imports_no_cloud_library() -> None:
    done = run_python(
        """
import sys
from torchferry.storage.registry import open_backend
open_backend("/x")
open_backend("memory://x")
print(sorted({"s3fs", "botocore", "gcsfs", "adlfs", "flytekit"} & set(sys.modules)))
""",
        fresh=True,
    )
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("url", ["s3://", "gs://", "abfs://"])
def test_a_prefix_without_a_bucket_says_so(url: str) -> None:
    options = {"account_name": "unused", "account_key": "dW51c2Vk"} if url == "abfs://" else {}
    options |= {"token": "anon"} if url == "gs://" else {}
    with pytest.raises(UnsupportedURLError, match="names no bucket"):
        open_backend(url, storage_options=options, directory=True)
