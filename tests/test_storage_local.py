# ruff: noqa: ASYNC230 - tests look at the disk while nothing else runs
from __future__ import annotations

import errno
import os
import resource
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
from fsspec.implementations.local import LocalFileSystem

import torchferry
from torchferry.errors import CheckpointNotFoundError, StorageError, StoragePermissionError
from torchferry.storage.local import LocalBackend
from torchferry.testing import BackendConformance, StoreUnderTest
from torchferry.testing.conformance import stream


class LocalStore(StoreUnderTest):
    options: ClassVar[dict[str, Any]] = {}

    def __init__(self, directory: Path) -> None:
        self.backend = LocalBackend.from_filesystem(LocalFileSystem(), "auto")
        self._directory = directory

    def path(self, name: str) -> str:
        return str(self._directory / name)

    def raw_write(self, path: str, data: bytes) -> None:
        file = Path(path)
        before = file.stat().st_mtime_ns if file.exists() else 0
        file.write_bytes(data)
        # The kernel's clock for files ticks every few milliseconds: two versions can have one time.
        os.utime(file, ns=(before + 1, max(before + 1, file.stat().st_mtime_ns)))

    def raw_read(self, path: str) -> bytes:
        return Path(path).read_bytes()

    def raw_exists(self, path: str) -> bool:
        return Path(path).exists()

    def leftovers(self) -> list[str]:
        return [str(path) for path in self._directory.rglob(".*")]


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


class TestLocal(BackendConformance):
    @pytest.fixture
    def store(self, tmp_path: Path) -> LocalStore:
        return LocalStore(tmp_path)


async def test_missing_directories_are_made(store: LocalStore) -> None:
    path = store.path("some/new/directory/checkpoint.pt")
    await store.write(path, stream(b"12345", 2))
    assert store.raw_read(path) == b"12345"


async def test_permissions_of_a_replaced_file_stay(store: LocalStore) -> None:
    path = store.path("checkpoint.pt")
    store.raw_write(path, b"old")
    Path(path).chmod(0o640)
    await store.write(path, stream(b"new", 3))
    assert stat.S_IMODE(Path(path).stat().st_mode) == 0o640


async def test_link_stays_a_link(store: LocalStore) -> None:
    target, link = store.path("target.pt"), store.path("link.pt")
    store.raw_write(target, b"old")
    Path(link).symlink_to(target)
    await store.write(link, stream(b"new", 3))
    assert Path(link).is_symlink()
    assert store.raw_read(target) == b"new"


async def test_directory_in_the_way_is_refused(store: LocalStore, tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    path = store.path("directory")
    with pytest.raises(StorageError, match="is a directory"):
        await store.write(path, stream(b"new", 3))
    with pytest.raises(StorageError, match="is a directory"):
        await store.stat(path)
    assert (tmp_path / "directory").is_dir()
    assert store.leftovers() == []


def test_name_that_no_file_can_have_is_an_error(tmp_path: Path) -> None:
    for do in (partial(torchferry.save, {"a": 1}), torchferry.load):
        with pytest.raises(StorageError, match="null"):
            do(f"{tmp_path}/a\0b.pt")


async def test_device_is_not_replaced(store: LocalStore) -> None:
    with pytest.raises(StorageError, match="not a regular file"):
        await store.write("/dev/null", stream(b"new", 3))
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


async def test_file_in_place_of_a_directory_is_an_error(store: LocalStore) -> None:
    store.raw_write(store.path("file"), b"12345")
    path = store.path("file/checkpoint.pt")
    with pytest.raises(CheckpointNotFoundError):
        await store.stat(path)
    with pytest.raises(StorageError):
        await store.write(path, stream(b"new", 3))
    assert store.leftovers() == []


async def test_file_that_grows_too_large_leaves_nothing(store: LocalStore) -> None:
    """The limit for the size of a file stands in for a full disk: the same write fails in the same place."""
    path = store.path("checkpoint.pt")
    store.raw_write(path, b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(StorageError, match=r"checkpoint\.pt") as caught:
            await store.write(path, stream(bytes(3 << 20), 1 << 19))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert store.raw_read(path) == b"old"
    assert store.leftovers() == []


async def test_full_disk_says_so() -> None:
    """/dev/full is the kernel's own full disk."""
    from torchferry.storage.local import _translated

    with (
        pytest.raises(StorageError, match="No space left on device") as caught,
        _translated("file:///full", "write"),
        Path("/dev/full").open("wb", buffering=0) as full,
    ):
        full.write(b"1")
    assert caught.value.errno == errno.ENOSPC


async def test_what_is_in_place_is_no_failure_because_of_its_directory(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of mode 0300 can be written to and not read; some filesystems do not flush directories."""
    fsync = os.fsync

    def files_only(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "not for directories")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", files_only)
    path = store.path("x.pt")
    await store.backend.write(path, stream(b"new", 3), size_hint=3)
    assert store.raw_read(path) == b"new"


async def test_clean_up_that_fails_hides_no_error(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unlink(*_args: Any, **_kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, "read-only by now")

    async def chunks() -> AsyncIterator[bytes]:
        yield b"old"
        raise RuntimeError("the real reason")

    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(RuntimeError, match="the real reason"):
        await store.backend.write(store.path("x.pt"), chunks(), size_hint=3)
    assert "read-only by now" in caplog.text


def test_directory_without_permission_is_a_permission_error(tmp_path: Path) -> None:
    """In a process of its own that is nobody: the superuser may write everywhere."""
    (tmp_path / "closed").mkdir(mode=0o555)
    for directory in [tmp_path, *tmp_path.parents[:2]]:  # pytest's own directories, closed to others
        directory.chmod(0o755)
    script = f"""
import asyncio, os
from torchferry.errors import StoragePermissionError
from torchferry.storage.local import LocalBackend
from torchferry.testing.conformance import stream
if os.getuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
try:
    asyncio.run(LocalBackend().write({str(tmp_path / "closed" / "x.pt")!r}, stream(b"1", 1), size_hint=1))
except StoragePermissionError as error:
    print("refused:", error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("refused: Cannot write file://"), done.stderr
    assert issubclass(StoragePermissionError, PermissionError)
