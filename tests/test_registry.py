from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

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

S3 = {"key": "key", "secret": "secret", "endpoint_url": "http://127.0.0.1:1"}


def run_python(script: str, *search: Path) -> subprocess.CompletedProcess[str]:
    """Runs a script in a process of its own, with directories in front of its search path."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, search))}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", script], env=environment, capture_output=True, text=True, check=False
    )


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


@pytest.mark.parametrize("plane", ["fsspec", "obstore"])
def test_environment_chooses_the_plane(plane: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHFERRY_PLANE", plane)
    assert open_backend("s3://bucket/key", storage_options=S3)[0].plane == plane


def test_argument_goes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHFERRY_PLANE", "obstore")
    assert open_backend("s3://bucket/key", storage_options=S3, plane="fsspec")[0].plane == "fsspec"


def test_unknown_plane_is_an_error_that_lists_those_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHFERRY_PLANE", "fast")
    with pytest.raises(UnsupportedOptionError, match="auto, fsspec, obstore"):
        open_backend("memory://x")


def test_forced_plane_that_cannot_honour_the_settings_is_an_error() -> None:
    with pytest.raises(UnsupportedOptionError, match="memory://"):
        open_backend("memory://x", plane="obstore")
    with pytest.raises(UnsupportedOptionError, match="version_aware"):
        open_backend("s3://bucket/key", storage_options=S3 | {"version_aware": True}, plane="obstore")


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
    plane = "vault"
""")
    metadata = tmp_path / "vault-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: vault\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[fsspec.specs]\nvault = vault:VaultFileSystem\n[torchferry.storage_backends]\nvault = vault:VaultBackend\n"
    )
    done = run_python(
        "from torchferry.storage.registry import open_backend; print(open_backend('vault://x')[0].plane)", tmp_path
    )
    assert done.stdout == "vault\n", done.stderr


def test_choosing_a_backend_imports_no_cloud_library() -> None:
    done = run_python("""
import sys
from torchferry.storage.registry import open_backend
open_backend("/x")
open_backend("memory://x")
print(sorted({"s3fs", "botocore", "gcsfs", "adlfs", "flytekit"} & set(sys.modules)))
""")
    assert done.stdout == "[]\n", done.stderr
