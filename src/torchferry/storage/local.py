"""Files of this machine: written under a temporary name, made durable, and put in place atomically."""

from __future__ import annotations

import errno
import logging
import os
import re
import secrets
import stat as stat_module
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from torchferry.engine.cancellation import clean_up, in_thread
from torchferry.engine.transfer import current
from torchferry.engine.types import Buffer, Chunk, ObjectStat
from torchferry.engine.writer import UploadPlan
from torchferry.errors import CheckpointChangedError, CheckpointNotFoundError, StorageError, StoragePermissionError
from torchferry.storage.base import Backend, Leftover, ListedObject

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator, Iterator, Mapping, Sequence

    from fsspec import AbstractFileSystem

__all__ = ["LocalBackend"]

logger = logging.getLogger("torchferry.storage")

_ENCODED = re.compile("%(?=[0-9A-Fa-f]{2})")
_TEMPORARY = re.compile(r"(^|/)\.torchferry-[0-9a-f]{16}\.tmp$")


class LocalBackend(Backend):
    """Files of this machine.

    A file's version is its inode, modification time and size: a replaced file is a new inode, one changed in
    place has a new time. User metadata is not stored. All file work happens in worker threads.
    """

    @classmethod
    def from_filesystem(cls, fs: AbstractFileSystem) -> LocalBackend:
        """A backend for fsspec's local filesystem."""
        del fs
        return cls()

    def url(self, path: str) -> str:
        """The ``file://`` URL of ``path``; a ``%`` that would be decoded is written as ``%25``."""
        return f"file://{_ENCODED.sub('%25', path)}"

    async def stat(self, path: str) -> ObjectStat:
        """Looks a file up; a directory or device is not a checkpoint and raises a StorageError."""
        return await in_thread(self._stat, path)

    async def read(self, path: str, start: int, stop: int, stat: ObjectStat) -> Buffer:
        """Reads a range of the file, whose version is checked before and after."""
        data = bytearray(stop - start)
        await self.read_into(path, start, memoryview(data), stat)
        return data

    async def read_into(self, path: str, start: int, buffer: memoryview, stat: ObjectStat) -> None:
        """Reads a range of the file into memory that is there."""
        await in_thread(self._read_into, path, start, buffer, stat)
        current().moved(len(buffer))

    async def write(
        self,
        path: str,
        chunks: AsyncIterable[Chunk],
        *,
        plan: UploadPlan,
        metadata: Mapping[str, str] | None = None,
    ) -> ObjectStat:
        """Writes a hidden file in the same directory and renames it; missing directories are made."""
        del plan
        staged = _StagedFile()
        try:
            await in_thread(self._stage, path, staged)
            async for chunk in chunks:
                await in_thread(self._append, path, staged, chunk.data)
                current().moved(len(chunk))
            written = await in_thread(self._publish, path, staged)
        except BaseException:
            await clean_up(staged.discard)
            raise
        return replace(written, metadata=dict(metadata or {}))

    async def delete(self, path: str) -> None:
        """Deletes a file."""
        await in_thread(self._delete, path)

    async def list(self, prefix: str) -> AsyncIterator[ListedObject]:
        """Lists files; the directory that ``prefix`` lies in is walked."""
        for path, result in await in_thread(self._walk, prefix):
            if path.startswith(prefix) and not _TEMPORARY.search(path):
                found = self._object_stat(path, result)
                yield ListedObject(path, found.url, found.size, found.etag, _modified(result))

    async def leftovers(self, prefix: str) -> AsyncIterator[Leftover]:
        """Lists temporary files of writers below the directory that ``prefix`` lies in."""
        for path, result in await in_thread(self._walk, prefix):
            if _TEMPORARY.search(path):
                yield Leftover(path, self.url(path), "temporary file", modified=_modified(result))

    async def discard(self, leftover: Leftover) -> bool:
        """Deletes a temporary file."""
        await self.delete(leftover.path)
        return True

    def _walk(self, prefix: str) -> Sequence[tuple[str, os.stat_result]]:
        top = os.path.dirname(f"{prefix}x")  # noqa: PTH120 - a path like fsspec's, not a Path
        found = []
        with _translated(self.url(prefix), "list"):
            os.stat(top)  # noqa: PTH116 - raises where there is no such directory
            for directory, _, names in os.walk(top):
                for name in names:
                    path = os.path.join(directory, name)  # noqa: PTH118 - the same
                    with suppress(FileNotFoundError):  # gone meanwhile
                        result = os.stat(path)  # noqa: PTH116 - the same
                        if stat_module.S_ISREG(result.st_mode):
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

    def _read_into(self, path: str, start: int, buffer: memoryview, stat: ObjectStat) -> None:
        with _translated(self.url(path), "read"), open(path, "rb", buffering=0) as file:  # noqa: PTH123
            self._check_version(path, file.fileno(), stat)
            done = 0
            while done < len(buffer) and (count := os.preadv(file.fileno(), [buffer[done:]], start + done)):
                done += count
            self._check_version(path, file.fileno(), stat)
        if done < len(buffer):
            raise StorageError(
                f"Cannot read {len(buffer)} bytes from {start} of {self.url(path)}: it ends at {start + done}."
            )

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

    def _publish(self, path: str, staged: _StagedFile) -> ObjectStat:
        with _translated(self.url(path), "write"):
            return self._object_stat(path, staged.publish())

    def _delete(self, path: str) -> None:
        with _translated(self.url(path), "delete"), suppress(FileNotFoundError):
            os.unlink(path)  # noqa: PTH108 - a path like fsspec's, not a Path


def _modified(result: os.stat_result) -> datetime:
    return datetime.fromtimestamp(result.st_mtime, UTC)


class _StagedFile:
    """A file under a temporary name in the directory of its target."""

    def __init__(self) -> None:
        self._target = Path()
        self._temporary: Path | None = None
        self._fd: int | None = None

    def create(self, target: Path) -> None:
        temporary = target.with_name(f".torchferry-{secrets.token_hex(8)}.tmp")
        self._fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._target, self._temporary = target, temporary

    def append(self, data: Buffer) -> None:
        assert self._fd is not None  # noqa: S101 - created before
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]

    def publish(self) -> os.stat_result:
        """Makes the bytes durable, then the name: a crash leaves the old file or the new one, never less."""
        assert self._fd is not None  # noqa: S101 - created before
        assert self._temporary is not None  # noqa: S101 - the same
        with suppress(FileNotFoundError):
            os.fchmod(self._fd, stat_module.S_IMODE(self._target.stat().st_mode))
        os.fsync(self._fd)
        result = os.fstat(self._fd)
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
        with suppress(OSError):
            self._close()
        if self._temporary is not None:
            try:
                self._temporary.unlink(missing_ok=True)
            except OSError as error:
                logger.warning("A temporary file is left behind: %s", error)

    def _close(self) -> None:
        if self._fd is not None:
            fd, self._fd = self._fd, None
            os.close(fd)


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
