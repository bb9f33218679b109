"""Files of this machine: written under a temporary name, made durable, and put in place atomically.

Three things cost time on a disk, and none of them is left for the end (1 GiB, ext4, a disk of 500 MB/s):

* Writing what is in the page cache to the disk: begins after 32 MiB, beside the writing of the rest. Saves 0.3 s.
* Finding room block by block: all of it is asked for at the start. Saves 0.2 s.
* Freeing the blocks of the file that is replaced, or of one that is given up: done in a thread, and nobody waits for
  it. Saves 0.7 s.

A process that is killed leaves its temporary file behind. The next save to the directory removes it, once it has
proof that no process works on it: see :class:`_StagedFile`.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import logging
import os
import re
import secrets
import stat as stat_module
import sys
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from torchferry.engine.cancellation import ThreadPool, clean_up, in_thread
from torchferry.engine.lending import reading
from torchferry.engine.transfer import current
from torchferry.engine.types import MIB, Buffer, Chunk, ObjectStat
from torchferry.engine.writer import UploadPlan
from torchferry.errors import CheckpointChangedError, CheckpointNotFoundError, StorageError, StoragePermissionError
from torchferry.storage.base import Backend, Leftover, ListedObject

if sys.platform != "win32":
    import fcntl

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator, Mapping, Sequence

    from fsspec import AbstractFileSystem

__all__ = ["LocalBackend"]

logger = logging.getLogger("torchferry.storage")

_ENCODED = re.compile("%(?=[0-9A-Fa-f]{2})")
_TEMPORARY = re.compile(r"(^|/)\.torchferry-([0-9a-f]+-[0-9a-f]+-[0-9]+-)?[0-9a-f]{16}\.tmp$")
_WRITTEN = 2 * MIB  # at once; who lent the memory may wait for it
_FLUSHED = 32 * MIB  # when so many bytes are new, and no flush is under way, the next one begins
_ALLOCATED = 256 * MIB  # room that is asked for at once
_FALLOC_FL_KEEP_SIZE = 1  # Linux, linux/falloc.h
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}  # what a filesystem without them answers
_background = ThreadPool(16, "torchferry-disk")  # for what a cancelled save need not wait for


class LocalBackend(Backend):
    """Files of this machine.

    A file's version is its inode, modification time and size: a replaced file is a new inode, one changed in
    place has a new time. User metadata is not stored. All file work happens in worker threads.
    """

    has_directories = True

    @classmethod
    def from_filesystem(cls, fs: AbstractFileSystem) -> LocalBackend:
        """A backend for fsspec's local filesystem."""
        del fs
        return cls()

    def url(self, path: str) -> str:
        """The ``file://`` URL of ``path``; a ``%`` that would be decoded is written as ``%25``."""
        return f"file://{_ENCODED.sub('%25', path)}"

    reads_loans = True

    async def stat(self, path: str) -> ObjectStat:
        """Looks a file up; a directory or device is not a checkpoint and raises a StorageError."""
        return await in_thread(self._stat, path)

    async def read(self, path: str, start: int, stop: int, stat: ObjectStat) -> Buffer:
        """Reads a range of the file, whose version is checked before and after."""
        data = bytearray(stop - start)
        await self.read_into(path, start, [memoryview(data)], stat)
        return data

    async def read_into(self, path: str, start: int, buffers: Sequence[memoryview], stat: ObjectStat) -> None:
        """Reads a range of the file into memory that is there."""
        await in_thread(self._read_into, path, start, buffers, stat)
        current().moved(sum(map(len, buffers)))

    async def write(
        self,
        path: str,
        chunks: AsyncIterable[Chunk],
        *,
        plan: UploadPlan,
        metadata: Mapping[str, str] | None = None,
    ) -> ObjectStat:
        """Writes a hidden file in the same directory and renames it; missing directories are made.

        A cancel does not wait for the disk: a flush that is under way ends later, on a file that has no name any more.
        """
        del plan
        staged = _StagedFile()
        try:
            await in_thread(self._stage, path, staged)
            async for chunk in chunks:
                await in_thread(self._append, path, staged, chunk.data)
                current().moved(len(chunk))
                del chunk  # its memory may be needed for the next one
            flushed = await in_thread(self._finish, path, staged)
            with _translated(self.url(path), "write"):
                await asyncio.wrap_future(flushed)
            written = await in_thread(self._publish, path, staged)
        except BaseException:
            await clean_up(staged.discard)
            raise
        return replace(written, metadata=dict(metadata or {}))

    async def delete(self, path: str) -> None:
        """Deletes a file."""
        await in_thread(self._delete, path)

    async def list(self, prefix: str) -> AsyncIterator[ListedObject]:
        """Lists files; in the directory that ``prefix`` lies in, only names that begin with its end are looked at."""
        directory, begins = os.path.split(prefix)
        for path, result in await in_thread(self._walk, directory, begins):
            if not _TEMPORARY.search(path):
                found = self._object_stat(path, result)
                yield ListedObject(path, found.url, found.size, found.etag, _modified(result))

    async def leftovers(self, prefix: str) -> AsyncIterator[Leftover]:
        """Lists temporary files of writers below the directory that ``prefix`` lies in."""
        directory, _ = os.path.split(prefix)  # their names say nothing of the target's
        for path, result in await in_thread(self._walk, directory, ""):
            if _TEMPORARY.search(path):
                yield Leftover(path, self.url(path), "temporary file", modified=_modified(result))

    async def discard(self, leftover: Leftover) -> bool:
        """Deletes a temporary file; returns False where a save under way has it locked."""
        return await in_thread(self._discard, leftover.path)

    def _discard(self, path: str) -> bool:
        with _translated(self.url(path), "delete"), suppress(FileNotFoundError):
            try:
                return _remove_unlocked(Path(path))
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
            os.unlink(path)  # noqa: PTH108 - a path like fsspec's, not a Path
        return True

    def _walk(self, top: str, begins: str) -> Sequence[tuple[str, os.stat_result]]:
        """The files below a directory; of its own entries, those whose names begin so."""
        found = []
        with _translated(self.url(f"{top}/{begins}"), "list"):
            os.scandir(top).close()  # raises where there is no such directory
            for directory, directories, names in os.walk(top, onerror=_raise_unless_gone):
                if directory == top:
                    directories[:] = [name for name in directories if name.startswith(begins)]
                    names = [name for name in names if name.startswith(begins)]  # noqa: PLW2901 - as the line above
                for name in names:
                    path = os.path.join(directory, name)  # noqa: PTH118 - a path like fsspec's, not a Path
                    result = _stat_unless_gone(path)
                    if result is not None and stat_module.S_ISREG(result.st_mode):
                        found.append((path, result))
        return found

    def _stat(self, path: str) -> ObjectStat:
        with _translated(self.url(path), "look up"):
            return self._object_stat(path, os.stat(path))  # noqa: PTH116 - a path like fsspec's, not a Path

    def _object_stat(self, path: str, result: os.stat_result) -> ObjectStat:
        if not stat_module.S_ISREG(result.st_mode):
            kind = "a directory" if stat_module.S_ISDIR(result.st_mode) else "not a regular file"
            raise StorageError(errno.EISDIR if kind == "a directory" else errno.EINVAL, f"{self.url(path)} is {kind}.")
        etag = f"{result.st_ino:x}-{result.st_mtime_ns:x}-{result.st_size:x}"
        return ObjectStat(self.url(path), result.st_size, etag)

    def _read_into(self, path: str, start: int, buffers: Sequence[memoryview], stat: ObjectStat) -> None:
        with _translated(self.url(path), "read"), open(path, "rb", buffering=0) as file:  # noqa: PTH123
            self._check_version(path, file.fileno(), stat)
            at = start
            for buffer in buffers:
                done = 0
                while done < len(buffer) and (count := os.preadv(file.fileno(), [buffer[done:]], at)):
                    done += count
                    at += count
            self._check_version(path, file.fileno(), stat)
        if at < start + (nbytes := sum(map(len, buffers))):
            raise StorageError(f"Cannot read {nbytes} bytes from {start} of {self.url(path)}: it ends at {at}.")

    def _check_version(self, path: str, fd: int, expected: ObjectStat) -> None:
        if self._object_stat(path, os.fstat(fd)).etag != expected.etag:
            raise CheckpointChangedError(f"{self.url(path)} was replaced while it was being read.")

    def _stage(self, path: str, staged: _StagedFile) -> None:
        with _translated(self.url(path), "write"):
            # A link stays a link: what it points to is replaced.
            target = Path(os.path.realpath(path))
            with suppress(FileNotFoundError):
                self._object_stat(path, target.stat())  # raises for what must not be replaced
            target.parent.mkdir(parents=True, exist_ok=True)
            staged.create(target)

    def _append(self, path: str, staged: _StagedFile, data: Buffer) -> None:
        with _translated(self.url(path), "write"):
            staged.append(data)

    def _finish(self, path: str, staged: _StagedFile) -> Future[None]:
        with _translated(self.url(path), "write"):
            return staged.finish()

    def _publish(self, path: str, staged: _StagedFile) -> ObjectStat:
        with _translated(self.url(path), "write"):
            return self._object_stat(path, staged.publish())

    def _delete(self, path: str) -> None:
        with _translated(self.url(path), "delete"), suppress(FileNotFoundError):
            os.unlink(path)  # noqa: PTH108 - a path like fsspec's, not a Path


def _stat_unless_gone(path: str) -> os.stat_result | None:
    """What ``path`` is; None where it is gone, or a link that leads nowhere."""
    try:
        return os.stat(path)  # noqa: PTH116 - a path like fsspec's, not a Path
    except FileNotFoundError:
        return None
    except OSError:
        if os.path.islink(path):  # noqa: PTH114 - the same
            return None
        raise


def _raise_unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _modified(result: os.stat_result) -> datetime:
    return datetime.fromtimestamp(result.st_mtime, UTC)


class _StagedFile:
    """A file under a temporary name in the directory of its target.

    Who owns it is in the name: ``.torchferry-<boot id>-<device>-<process id>-<random>.tmp``. And it is locked
    (``flock``) as long as it is open; the kernel ends the lock with the process, however that ends. So an unlocked
    file of the same boot of the same kernel, on the same mounted filesystem, is abandoned. Of all others this machine
    cannot tell, and leaves them alone: other hosts' on a shared filesystem, those from before a reboot, and those on a
    filesystem without locks, which have no owner in their names.
    """

    def __init__(self) -> None:
        self._target = Path()
        self._temporary: Path | None = None
        self._fd: int | None = None
        self._size = 0
        self._allocated = 0
        self._unflushed = 0
        self._flush: Future[None] = Future()  # the last one of several
        self._flush.set_result(None)

    def create(self, target: Path) -> None:
        """Creates the file; first removes what killed processes left in its directory."""
        self._target = target
        owner = _owner(target.parent)
        if owner is not None:
            _remove_abandoned(target.parent, owner)
        while not self._create(owner):
            owner = None

    def append(self, data: Buffer) -> None:
        """Writes ``data``, and has what was written before flushed meanwhile."""
        fd = self._open_fd()
        if self._size >= _FLUSHED and self._size + len(data) > self._allocated:
            self._allocate(len(data) + _ALLOCATED)
        view = memoryview(data)
        while view:
            with reading(view[:_WRITTEN]) as memory:
                count = os.write(fd, memory)
            view = view[count:]
            self._size += count
            self._unflushed += count
        if self._unflushed >= _FLUSHED and self._flush.done():
            self._flush.result()  # the kernel tells of a failure once
            self._flush = self._start_flush(getattr(os, "fdatasync", os.fsync))  # macOS has the latter alone
            self._unflushed = 0

    def finish(self) -> Future[None]:
        """Gives the file its permissions and its size, and returns the flush of all of it, which has begun."""
        fd = self._open_fd()
        with suppress(FileNotFoundError):
            os.fchmod(fd, stat_module.S_IMODE(self._target.stat().st_mode))
        os.ftruncate(fd, self._size)  # gives back the room that was not needed
        return self._start_flush(os.fsync)

    def publish(self) -> os.stat_result:
        """Puts the flushed file in place: a crash leaves the old file or the new one, never less."""
        assert self._temporary is not None  # noqa: S101 - created before
        self._flush.result()
        result = os.fstat(self._open_fd())
        with _freed_in_background(self._target):
            self._temporary.replace(self._target)
        self._temporary = None
        self._close()
        # It is in place: what the directory cannot do (be read, in one of mode 0300; be flushed) is no failure of it.
        with suppress(OSError):
            directory = os.open(self._target.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        return result

    def discard(self) -> None:
        """Removes what is there, which may be nothing; the error that is on its way says what went wrong."""
        if self._temporary is not None:
            try:
                self._temporary.unlink(missing_ok=True)
            except OSError as error:
                logger.warning("A temporary file is left behind: %s", error)
        self._close()

    def _create(self, owner: str | None) -> bool:
        """Creates the file, and locks it where it has an owner; False where the filesystem has no locks."""
        while True:
            name = f".torchferry-{owner}-{os.getpid()}-" if owner else ".torchferry-"
            temporary = self._target.with_name(f"{name}{secrets.token_hex(8)}.tmp")
            self._fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            self._temporary = temporary
            if owner is None:
                return True
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pass
            except OSError:
                self.discard()
                return False
            else:
                if temporary.exists():
                    return True
            # Between open and flock, another save took it for abandoned, and removes it.
            self._close()

    def _allocate(self, size: int) -> None:
        """Has the filesystem find room for the next ``size`` bytes in large pieces.

        Where it cannot, it finds room as the bytes come, and a write says so if there is not enough. Not with
        os.posix_fallocate: glibc writes a byte to each block of a filesystem that cannot.
        """
        self._allocated = self._size + size
        fallocate = getattr(ctypes.CDLL(None), "fallocate", None)
        fd = self._open_fd()
        if fallocate and fallocate(fd, _FALLOC_FL_KEEP_SIZE, ctypes.c_int64(self._size), ctypes.c_int64(size)):
            os.ftruncate(fd, self._size)  # gives back what it found, where that was less

    def _start_flush(self, sync: Callable[[int], None]) -> Future[None]:
        fd = os.dup(self._open_fd())  # its own: it goes on when the save is cancelled
        flush = _in_background(sync, fd)
        flush.add_done_callback(lambda _: os.close(fd))
        return flush

    def _open_fd(self) -> int:
        assert self._fd is not None  # noqa: S101 - created before
        return self._fd

    def _close(self) -> None:
        if self._fd is not None:
            fd, self._fd = self._fd, None
            _in_background(os.close, fd)


def _in_background(func: Callable[[int], None], fd: int) -> Future[None]:
    """Calls ``func(fd)`` in a thread; right here, where the interpreter ends and there are no threads."""
    try:
        return _background.executor.submit(func, fd)
    except RuntimeError:
        done: Future[None] = Future()
        try:
            func(fd)
        except OSError as error:
            done.set_exception(error)
        else:
            done.set_result(None)
        return done


@contextmanager
def _freed_in_background(path: Path) -> Iterator[None]:
    """Keeps the file at ``path`` alive while it is replaced: with its last descriptor, a thread frees its blocks."""
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC) if sys.platform == "linux" else None
    except OSError:  # there is none
        fd = None
    try:
        yield
    finally:
        if fd is not None:
            _in_background(os.close, fd)


@cache
def _boot_id() -> str | None:
    """Names this run of this kernel, the same in all its containers; None where the system has no such name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip().replace("-", "")
    except OSError:
        return None


def _owner(directory: Path) -> str | None:
    """Names those whose locks on files in ``directory`` this process sees; None where that is not known."""
    boot_id = _boot_id()
    return boot_id and f"{boot_id}-{directory.stat().st_dev:x}"


def _remove_abandoned(directory: Path, owner: str) -> None:
    """Removes the temporary files of ``owner`` that nobody has locked; what cannot be looked at stays."""
    with suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            if entry.name.startswith(f".torchferry-{owner}-") and entry.name.endswith(".tmp"):
                with suppress(OSError):
                    _remove_unlocked(Path(entry.path))


def _remove_unlocked(path: Path) -> bool:
    """Removes a temporary file; returns False, and leaves it, where a process has it locked."""
    fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    except BlockingIOError:
        return False
    finally:
        _in_background(os.close, fd)
    logger.info("Removed what a killed save had left: %s", path)
    return True


@contextmanager
def _translated(url: str, verb: str) -> Iterator[None]:
    """Turns the operating system's errors into torchferry's."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        number = error.errno or errno.EIO
        message = f"Cannot {verb} {url}: {error.strerror or error}."
        if isinstance(error, FileNotFoundError) or (verb in {"look up", "read"} and number == errno.ENOTDIR):
            raise CheckpointNotFoundError(number, message) from error
        if number in {errno.EACCES, errno.EPERM, errno.EROFS}:
            raise StoragePermissionError(number, message) from error
        raise StorageError(number, message) from error
    except ValueError as error:  # a name that no file can have
        raise StorageError(errno.EINVAL, f"Cannot {verb} {url!r}: {error}.") from error
