"""Any fsspec filesystem (memory, sftp, hdfs, ...): a file is written under a temporary name and moved into place."""

from __future__ import annotations

import errno
import logging
import re
import secrets
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from fsspec import AbstractFileSystem
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from torchferry.engine.cancellation import clean_up, in_thread
from torchferry.engine.lending import joined
from torchferry.engine.loops import run_on
from torchferry.engine.transfer import current
from torchferry.engine.types import MIB, Buffer, Chunk, ObjectStat
from torchferry.engine.writer import UploadPlan
from torchferry.errors import (
    CheckpointChangedError,
    CheckpointNotFoundError,
    StorageError,
    mask,
)
from torchferry.storage.base import Backend, Leftover, ListedObject
from torchferry.storage.translate import describe, generic_error, translated

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Callable

__all__ = ["GenericBackend"]

logger = logging.getLogger("torchferry.storage")

T = TypeVar("T")

_TEMPORARY = re.compile(r"(^|/)\.torchferry-[0-9a-f]{16}\.tmp$")
_TIME_FIELDS = ("mtime", "LastModified", "last_modified", "modified", "created")
_BLOCK_SIZE = 8 * MIB

_VERSION_FIELDS = (
    # What filesystems put into info() that changes with an object; fsspec has no common name for it.
    *("ETag", "etag", "e_tag", "version_id", "VersionId", "generation", "checksum", "content_md5", "ino"),
    *("mtime", "modified", "modify", "last_modified", "LastModified", "Last-Modified", "modificationTime", "created"),
    *("Content-MD5", "Digest", "fileId", "unique"),
)


class GenericBackend(Backend):
    """Files behind an fsspec filesystem that has no backend of its own.

    A file is published by the filesystem's own move, or where it has none, by its copy on the server. That is as
    atomic as the store makes it. ``open(..., autocommit=False)`` of fsspec is not used: memory, arrow and others ignore
    it and publish at once, and the ``discard`` of fsspec's base class discards nothing.

    A version is what the filesystem tells in ``info``: an etag, a modification time. Where it tells nothing, only
    the size is checked while reading. User metadata is not stored. What failed is not repeated, but by the filesystem
    itself.
    """

    reads_loans = True
    has_directories = True

    def __init__(self, fs: AbstractFileSystem) -> None:
        self._fs = _usable_in_threads(fs)
        self._turns = _turns_of(self._fs)

    @classmethod
    def from_filesystem(cls, fs: AbstractFileSystem) -> GenericBackend:
        """A backend for any filesystem."""
        return cls(fs)

    def url(self, path: str) -> str:
        """The URL of ``path``, with the filesystem's protocol."""
        url: str = self._fs.unstrip_protocol(path)
        return url

    def upload_plan(self, size: int, part_size: int | None = None) -> UploadPlan:
        """There are no parts; writing takes the block that an fsspec file collects before it sends it, and a copy."""
        return UploadPlan.for_size(size, part_size, memory=2 * _BLOCK_SIZE)

    async def stat(self, path: str) -> ObjectStat:
        """Looks a file up, past the filesystem's listings cache."""
        return await self._stat(path, "look up")

    async def read(self, path: str, start: int, stop: int, stat: ObjectStat) -> Buffer:
        """Reads a range, and then asks for the file's version again."""
        data: bytes = b""
        if stop > start:
            with translated(generic_error, self.url(path), "read"):
                data = await self._ask("cat_file", path, start=start, end=stop)
        # Asked after the read: by now a file that was replaced before or during it has another version.
        now = await self._stat(path, "read")
        if (now.etag, now.size) != (stat.etag, stat.size):
            raise CheckpointChangedError(f"{self.url(path)} was replaced while it was being read.")
        if len(data) != stop - start:
            raise StorageError(
                f"Cannot read the bytes {start} to {stop} of {self.url(path)}: the store returned {len(data)} bytes."
            )
        return data

    async def write(
        self,
        path: str,
        chunks: AsyncIterable[Chunk],
        *,
        plan: UploadPlan,
        metadata: Mapping[str, str] | None = None,
    ) -> ObjectStat:
        """Writes a hidden file in the same directory and moves it; missing directories are made."""
        del plan
        staged = _StagedFile(self._fs, path)
        try:
            with translated(generic_error, self.url(path), "write"):
                await self._in_turn(staged.create)
            size = 0
            async for chunk in chunks:
                with translated(generic_error, self.url(path), "write"):
                    await self._in_turn(staged.append, chunk.data)
                size += len(chunk)
                current().moved(len(chunk))
                del chunk  # its memory may be needed for the next one
            with translated(generic_error, self.url(path), "write"):
                await self._in_turn(staged.publish)
        except BaseException:
            await clean_up(partial(self._take_turn, staged.discard))
            raise
        written = await self.stat(path)
        return ObjectStat(written.url, size, written.etag, dict(metadata or {}))

    async def delete(self, path: str) -> None:
        """Deletes a file."""
        with suppress(CheckpointNotFoundError), translated(generic_error, self.url(path), "delete"):
            await self._in_turn(self._fs.rm_file, path)

    async def list(self, prefix: str) -> AsyncIterator[ListedObject]:
        """Lists files below the directory that ``prefix`` lies in, one directory after the other.

        Says nothing of versions: filesystems tell less of a file in a listing than by itself.
        """
        async for path, info in self._walk(prefix):
            if path.startswith(prefix) and not _TEMPORARY.search(path):
                size = info.get("size")
                if size is None:  # some listings do not tell: fsspec's http
                    size = (await self._stat(path, "list")).size
                yield ListedObject(path, self.url(path), int(size), modified=_modified(info))

    async def leftovers(self, prefix: str) -> AsyncIterator[Leftover]:
        """Lists temporary files where a writer to a path that begins with ``prefix`` puts them.

        Their names do not tell what was being written: that may be another file of the same directory.
        """
        top: str = self._fs._parent(f"{prefix}x")
        async for path, info in self._walk(prefix):
            parent: str = self._fs._parent(path)
            if _TEMPORARY.search(path) and (parent == top or f"{parent}/".startswith(prefix)):
                yield Leftover(path, self.url(path), "temporary file", modified=_modified(info))

    async def discard(self, leftover: Leftover) -> bool:
        """Deletes a temporary file."""
        await self.delete(leftover.path)
        return True

    async def _walk(self, prefix: str) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        """The files below the directory that ``prefix`` lies in.

        Not by fsspec's ``find`` or ``walk``: they leave out what they cannot list, and follow links.
        """
        top: str = self._fs._parent(f"{prefix}x")
        self._fs.invalidate_cache()
        waiting, seen = [top], {top}
        while waiting:
            directory = waiting.pop()
            try:
                infos = await self._list_directory(directory)
            except CheckpointNotFoundError:
                if directory == top:
                    raise
                continue  # deleted meanwhile
            for info in infos:
                path: str = info["name"]
                if info.get("type") != "directory":
                    yield path, info
                elif path.rstrip("/") not in seen:  # some list a directory in itself
                    seen.add(path.rstrip("/"))
                    waiting.append(path.rstrip("/"))

    async def _list_directory(self, directory: str) -> Sequence[dict[str, Any]]:
        """What is in a directory; of links those to files."""
        found = []
        with translated(generic_error, self.url(directory), "list"):
            for info in await self._ask("ls", directory, detail=True):
                if info.get("type", "file") in {"file", "directory"}:
                    found.append(info)
                    continue
                with suppress(FileNotFoundError):
                    target: dict[str, Any] = await self._ask("info", info["name"])
                    if target.get("type") == "file":
                        found.append(target)
        return found

    async def _in_turn(self, func: Callable[..., T], /, *args: object) -> T:
        return await in_thread(self._take_turn, func, *args)

    def _take_turn(self, func: Callable[..., T], /, *args: object) -> T:
        with self._turns:
            return func(*args)

    async def _stat(self, path: str, verb: str) -> ObjectStat:
        with translated(generic_error, self.url(path), verb):
            self._fs.invalidate_cache(self._fs._parent(path))
            info: dict[str, Any] = await self._ask("info", path)
        if info.get("type") == "directory":
            raise StorageError(errno.EISDIR, f"{self.url(path)} is a directory.")
        if info.get("size") is None:
            raise StorageError(f"Cannot {verb} {self.url(path)}: the store does not tell its size.")
        return ObjectStat(self.url(path), int(info["size"]), _version(info))

    async def _ask(self, method: str, /, *args: object, **kwargs: object) -> Any:
        """Calls a method that changes nothing: where the filesystem has coroutines, that, for a cancel to end it."""
        if isinstance(self._fs, AsyncFileSystem):
            return await run_on(self._fs.loop, getattr(self._fs, f"_{method}"), *args, **kwargs)
        return await self._in_turn(partial(getattr(self._fs, method), *args, **kwargs))


def _version(info: Mapping[str, Any]) -> str | None:
    version = [f"{field}={info[field]}" for field in _VERSION_FIELDS if info.get(field) is not None]
    return ";".join([*version, f"size={info['size']}"]) if version else None


def _modified(info: Mapping[str, Any]) -> datetime | None:
    for field in _TIME_FIELDS:
        value = info.get(field)
        if isinstance(value, datetime):
            return value if value.tzinfo else value.replace(tzinfo=UTC)
        if isinstance(value, int | float):
            with suppress(ValueError, OverflowError, OSError):  # no seconds since 1970
                return datetime.fromtimestamp(value, UTC)
    return None


class _StagedFile:
    """A file under a temporary name beside its target. Its methods block."""

    def __init__(self, fs: AbstractFileSystem, path: str) -> None:
        self._fs = fs
        self._path = path
        parent: str = fs._parent(path)
        self._parent = parent
        self._temporary = f"{parent.rstrip('/')}/.torchferry-{secrets.token_hex(8)}.tmp"
        self._file: Any = None

    def create(self) -> None:
        with suppress(FileNotFoundError):
            if self._fs.info(self._path).get("type") == "directory":
                raise IsADirectoryError(errno.EISDIR, "there is a directory of this name", self._path)
        if self._parent.strip("/"):
            with suppress(FileExistsError, NotImplementedError):  # stores without directories
                self._fs.makedirs(self._parent, exist_ok=True)
        self._file = self._fs.open(self._temporary, "wb", block_size=_BLOCK_SIZE)

    def append(self, data: Buffer) -> None:
        view = memoryview(data)
        while view:
            piece = joined([view[:_BLOCK_SIZE]])  # fsspec promises no more than that files take bytes
            written = self._file.write(piece)
            view = view[_BLOCK_SIZE if written is None else written :]

    def publish(self) -> None:
        self._file.close()
        if type(self._fs).mv is not AbstractFileSystem.mv:
            self._fs.mv(self._temporary, self._path)
        else:
            # The base class's mv does the same, but takes "?", "*" and "[" in names for patterns.
            self._fs.cp_file(self._temporary, self._path)
            self._fs.rm_file(self._temporary)
        self._fs.invalidate_cache(self._parent)
        # webhdfs refuses to move a file to the name of another one, and raises nothing.
        with suppress(FileNotFoundError):
            self._fs.info(self._temporary)
            raise FileExistsError(
                errno.EEXIST,
                "this filesystem does not replace a file by a move. The file has not changed: delete it first, or save "
                "under a new name",
                self._path,
            )
        self._file = None

    def discard(self) -> None:
        """Removes the temporary file, if there is one. Raises nothing: the caller has an error to raise."""
        if self._file is not None:
            with suppress(Exception):
                self._file.close()
            try:
                with suppress(FileNotFoundError):
                    self._fs.rm_file(self._temporary)
            except Exception as error:  # noqa: BLE001 - the error that stopped the write matters more
                logger.warning(
                    "A temporary file is left behind at %s: %s", mask(self._temporary), mask(describe(error))
                )
            self._file = None


def _turns_of(fs: AbstractFileSystem) -> AbstractContextManager[Any]:
    """What a thread holds while it uses ``fs``: a lock, or nothing where several threads may use it at once.

    fsspec promises that for asynchronous filesystems only. Two threads that read through one tar or ftp filesystem get
    each other's bytes.
    """
    if isinstance(fs, AsyncFileSystem | MemoryFileSystem):
        return nullcontext()
    turns: AbstractContextManager[Any] = vars(fs).setdefault("_torchferry_turns", threading.Lock())
    return turns


def _usable_in_threads(fs: AbstractFileSystem) -> AbstractFileSystem:
    """``fs``, or where its methods only work inside of its user's event loop, its twin that works in threads."""
    if isinstance(fs, AsyncFileSystem) and fs.asynchronous:
        return type(fs)(*fs.storage_args, **{**fs.storage_options, "asynchronous": False, "loop": None})
    return fs
