# ruff: noqa: ASYNC230 - tests look at the disk while nothing else runs
from __future__ import annotations

import asyncio
import errno
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
from fsspec.implementations.local import LocalFileSystem

import torchferry
from torchferry.engine.types import MIB, Chunk
from torchferry.errors import CheckpointNotFoundError, StorageError, StoragePermissionError
from torchferry.storage import local
from torchferry.storage.local import LocalBackend
from torchferry.testing import BackendConformance, StoreUnderTest
from torchferry.testing.conformance import stream


class LocalStore(StoreUnderTest):
    options: ClassVar[dict[str, Any]] = {}

    def __init__(self, directory: Path) -> None:
        self.backend = LocalBackend.from_filesystem(LocalFileSystem())
        self._directory = directory

    def path(self, name: str) -> str:
        return str(self._directory / name)

    def raw_write(self, path: str, data: bytes) -> None:
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
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
    await store.write(path, stream(b"new", 3))
    assert store.raw_read(path) == b"new"


async def test_clean_up_that_fails_hides_no_error(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unlink(*_args: Any, **_kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, "read-only by now")

    async def chunks() -> AsyncIterator[Chunk]:
        yield Chunk(b"old")
        raise RuntimeError("the real reason")

    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(RuntimeError, match="the real reason"):
        await store.write(store.path("x.pt"), chunks())
    assert "read-only by now" in caplog.text


def test_directory_without_permission_is_a_permission_error(tmp_path: Path) -> None:
    """In a process of its own that is nobody: the superuser may write everywhere."""
    (tmp_path / "closed").mkdir(mode=0o555)
    for directory in [tmp_path, *tmp_path.parents[:2]]:  # pytest's own directories, closed to others
        directory.chmod(0o755)
    script = f"""
import asyncio, os
from torchferry.engine.writer import UploadPlan
from torchferry.errors import StoragePermissionError
from torchferry.storage.local import LocalBackend
from torchferry.testing.conformance import stream
if os.getuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
try:
    asyncio.run(LocalBackend().write({str(tmp_path / "closed" / "x.pt")!r}, stream(b"1", 1), plan=UploadPlan()))
except StoragePermissionError as error:
    print("refused:", error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("refused: Cannot write file://"), done.stderr
    assert issubclass(StoragePermissionError, PermissionError)


# --- the disk


async def test_cancel_does_not_wait_for_the_disk(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is busy for minutes: the flush is given up, the old file stays, and nothing else."""
    path = store.path("checkpoint.pt")
    store.raw_write(path, b"old")
    flushing, busy = threading.Event(), threading.Event()

    def fsync(_fd: int) -> None:
        flushing.set()
        busy.wait()

    monkeypatch.setattr(os, "fsync", fsync)
    task = asyncio.create_task(store.write(path, stream(b"new", 3)))
    try:
        await asyncio.to_thread(flushing.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert store.raw_read(path) == b"old"
        assert store.leftovers() == []
    finally:
        busy.set()


async def test_flush_begins_while_the_rest_is_written(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = threading.Event()
    monkeypatch.setattr(local, "_FLUSHED", MIB)
    monkeypatch.setattr(os, "fdatasync", lambda _fd: flushed.set())

    async def chunks() -> AsyncIterator[Chunk]:
        yield Chunk(bytes(MIB))
        await asyncio.to_thread(flushed.wait)
        yield Chunk(b"the end")

    path = store.path("checkpoint.pt")
    await store.write(path, chunks())
    assert store.raw_read(path) == bytes(MIB) + b"the end"


@pytest.mark.parametrize("nbytes", [MIB, 20 * MIB])
async def test_disk_error_in_any_flush_fails_the_save(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, nbytes: int
) -> None:
    """The kernel reports it to one flush, which may be the only early one, or one of several."""
    reported = threading.Event()

    def fdatasync(_fd: int) -> None:
        if not reported.is_set():
            reported.set()
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(local, "_FLUSHED", MIB)
    monkeypatch.setattr(os, "fdatasync", fdatasync)
    path = store.path("checkpoint.pt")
    with pytest.raises(StorageError, match="Input/output error") as caught:
        await store.write(path, stream(bytes(nbytes), MIB))
    assert caught.value.errno == errno.EIO
    assert not store.raw_exists(path)
    assert store.leftovers() == []


async def test_file_takes_no_more_room_than_its_bytes(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_FLUSHED", MIB)
    path = store.path("checkpoint.pt")
    await store.write(path, stream(bytes(5 * MIB), MIB))
    assert Path(path).stat().st_blocks * 512 <= 6 * MIB


async def test_room_that_cannot_be_had_at_once_is_no_error(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the disk has less than is asked for, or cannot be asked at all."""
    monkeypatch.setattr(local, "_FLUSHED", MIB)
    monkeypatch.setattr(local, "_ALLOCATED", 1 << 60)
    path = store.path("checkpoint.pt")
    await store.write(path, stream(bytes(5 * MIB), MIB))
    assert store.raw_read(path) == bytes(5 * MIB)


# --- what killed saves leave


async def test_save_removes_what_a_killed_one_left(store: LocalStore) -> None:
    path = store.path("checkpoint.pt")
    store.raw_write(path, b"old")
    with _save_under_way(path) as saving:
        assert len(store.leftovers()) == 1
        saving.send_signal(signal.SIGKILL)
        saving.wait()
    assert len(store.leftovers()) == 1, "nobody removes anything while it is being killed"
    assert store.raw_read(path) == b"old"
    await store.write(store.path("another.pt"), stream(b"new", 3))
    assert store.leftovers() == []


async def test_save_of_another_process_is_never_touched(store: LocalStore) -> None:
    path = store.path("checkpoint.pt")
    with _save_under_way(path) as saving:
        (under_way,) = store.leftovers()
        await store.write(path, stream(b"mine", 3))
        assert store.leftovers() == [under_way]
        (found,) = await store.backend_leftovers(path)
        assert not await store.backend.discard(found), "nor by who looks for leftovers"
        out, _ = saving.communicate("go on\n")
    assert out.endswith("saved\n")
    assert store.raw_read(path) == b"theirs"
    assert store.leftovers() == []


async def test_other_save_of_this_process_is_never_touched(store: LocalStore) -> None:
    path, other = store.path("checkpoint.pt"), store.path("other.pt")

    async def chunks() -> AsyncIterator[Chunk]:
        yield Chunk(b"1")
        await store.write(other, stream(b"new", 3))
        yield Chunk(b"2")

    await store.write(path, chunks())
    assert (store.raw_read(path), store.raw_read(other)) == (b"12", b"new")


def make_unlistable(directory: Path) -> None:
    """Fills a directory so that it cannot be listed, not even by root: one in it has too long a path."""
    directory.mkdir(exist_ok=True)
    fd = os.open(directory, os.O_RDONLY)
    for _ in range(17):
        os.mkdir("d" * 250, dir_fd=fd)
        below = os.open("d" * 250, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)


async def test_a_directory_that_cannot_be_listed_is_an_error_and_not_left_out(tmp_path: Path) -> None:
    make_unlistable(tmp_path)
    backend = LocalBackend()
    for verb in (backend.list, backend.leftovers):
        with pytest.raises(StorageError, match="Cannot list"):
            [found async for found in verb(f"{tmp_path}/")]


async def test_listing_looks_only_at_names_that_begin_with_its_prefix(tmp_path: Path) -> None:
    make_unlistable(tmp_path / "lost+found")
    (tmp_path / "step-1.pt").write_bytes(b"1")
    (tmp_path / "step-2").mkdir()
    (tmp_path / "step-2" / "shard").write_bytes(b"2")
    listed = [found.path async for found in LocalBackend().list(f"{tmp_path}/step-")]
    assert sorted(listed) == [f"{tmp_path}/step-1.pt", f"{tmp_path}/step-2/shard"]
    make_unlistable(tmp_path / "step-3")
    with pytest.raises(StorageError, match="Cannot list"):
        [found async for found in LocalBackend().list(f"{tmp_path}/step-")]


async def test_listing_passes_over_links_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "good").write_bytes(b"x")
    (tmp_path / "link").symlink_to("good")
    (tmp_path / "broken").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "through a file").symlink_to("good/x")
    (tmp_path / "too long").symlink_to("x" * 300)
    listed = [found.path async for found in LocalBackend().list(f"{tmp_path}/")]
    assert sorted(listed) == [f"{tmp_path}/good", f"{tmp_path}/link"]


async def test_leftover_that_this_machine_cannot_judge_stays_until_it_is_discarded(store: LocalStore) -> None:
    """Of another host, of another filesystem, of a boot before, of torchferry 0.1."""
    directory = Path(store.path("."))
    owner = local._owner(directory)
    assert owner is not None
    boot, device = owner.split("-")
    token = "0123456789abcdef"
    names = [f"{'0' * len(boot)}-{device}-1-{token}", f"{boot}-{device}0-1-{token}", token]
    temporary = [directory / f".torchferry-{name}.tmp" for name in names]
    for file in temporary:
        file.write_bytes(b"theirs")
    await store.write(store.path("checkpoint.pt"), stream(b"new", 3))
    assert all(file.exists() for file in temporary)
    found = await store.backend_leftovers(f"{directory}/")
    assert {leftover.path for leftover in found} == {str(file) for file in temporary}
    assert all([await store.backend.discard(leftover) for leftover in found])
    assert store.leftovers() == []


async def test_temporary_file_that_is_taken_for_abandoned_before_it_is_locked_is_created_again(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock = local.fcntl.flock
    removed: list[Path] = []

    def after_another_save_looked(fd: int, operation: int) -> None:
        if not removed:
            removed.append(Path(f"/proc/self/fd/{fd}").readlink())
            removed[0].unlink()
        flock(fd, operation)

    monkeypatch.setattr(local.fcntl, "flock", after_another_save_looked)
    path = store.path("checkpoint.pt")
    await store.write(path, stream(b"new", 3))
    assert removed
    assert store.raw_read(path) == b"new"
    assert store.leftovers() == []


async def test_filesystem_without_locks_will_do(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(_fd: int, _operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    async def chunks() -> AsyncIterator[Chunk]:
        yield Chunk(b"1")
        (temporary,) = store.leftovers()
        assert local._owner(Path(temporary).parent) not in temporary, "so that nobody judges it by its lock"
        yield Chunk(b"2")

    monkeypatch.setattr(local.fcntl, "flock", flock)
    path = store.path("checkpoint.pt")
    await store.write(path, chunks())
    assert store.raw_read(path) == b"12"
    assert store.leftovers() == []
    store.raw_write(store.path(".torchferry-0123456789abcdef.tmp"), b"theirs")
    (found,) = await store.backend_leftovers(path)
    assert await store.backend.discard(found)
    assert store.leftovers() == []


@contextmanager
def _save_under_way(path: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has begun to save b"theirs" at ``path``, and goes on when it is sent a line."""
    script = f"""
import asyncio, sys
from torchferry.engine.types import Chunk
from torchferry.engine.writer import UploadPlan
from torchferry.storage.local import LocalBackend
async def chunks():
    yield Chunk(b"the")
    print("under way", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    yield Chunk(b"irs")
asyncio.run(LocalBackend().write({path!r}, chunks(), plan=UploadPlan()))
print("saved", flush=True)
"""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", script], stdin=pipe, stdout=pipe, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "under way\n"
            yield process
        finally:
            process.kill()
