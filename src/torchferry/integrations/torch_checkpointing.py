"""torch_checkpointing: a ``Storage`` below any URL.

``CheckpointManager.Config(storage_config=TorchferryStorageConfig("s3://bucket/run"))`` is all. What is stored is what
torch_checkpointing stores in files.
"""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
from torch_checkpointing.metadata_serialization import METADATA_FILE_NAME
from torch_checkpointing.storage.base_storage import ReadArgs, Storage, StorageConfig
from torch_checkpointing.storage.filesystem import LocalFileSystemStorage, LocalFileSystemStorageConfig

from torchferry.copying import copy_async
from torchferry.distributed.place import Place, bytes_of
from torchferry.engine.loops import run, run_on
from torchferry.engine.tasks import task_group
from torchferry.engine.transfer import Transfer
from torchferry.errors import CheckpointChangedError, CheckpointNotFoundError, StorageError
from torchferry.objects.files import RangeFile, UploadFile

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from torchferry.engine.types import ObjectStat

__all__ = ["TorchferryStorage", "TorchferryStorageConfig"]

T = TypeVar("T")

_COPIES = 16  # under way at once


@dataclass
class TorchferryStorageConfig(StorageConfig):  # type: ignore[misc]  # of a library that mypy skips
    """A storage whose paths are relative to a URL: checkpoint ``"step-100"`` lies in ``<url>/step-100``.

    It can be pickled, as asynchronous saves do.

    Attributes:
        url: An fsspec URL of a directory, a prefix or a bucket, or a local path.
        storage_options: Arguments for the fsspec filesystem.
    """

    url: str | os.PathLike[str]
    storage_options: Mapping[str, Any] | None = field(default=None, repr=False)  # it may hold secrets

    def create_storage(self) -> TorchferryStorage:
        """The storage. May take a second; raises as :func:`torchferry.storage.open_backend`."""
        place = Place.open(self.url, storage_options=self.storage_options)
        return (_LocalStorage if place.is_local else TorchferryStorage)(place, self.storage_options)


class TorchferryStorage(Storage):  # type: ignore[misc]  # the same
    """Objects below a URL. Made by :class:`TorchferryStorageConfig`.

    A slash at the start of a path means nothing; ``..`` and URLs are refused. A directory is what has objects below it.

    Args:
        place: The directory that paths are relative to.
        storage_options: What it was opened with.
    """

    def __init__(self, place: Place, storage_options: Mapping[str, Any] | None) -> None:
        self._place = place
        self._options = storage_options

    @property
    def mmap_fill_workers(self) -> int:
        """One: each read is of many ranges at once."""
        return 1

    def stream_read(self, path: Path, read_args: ReadArgs | None = None) -> io.RawIOBase | io.BytesIO:
        """Opens an object; by default reads all of it. All reads are of one version.

        Raises:
            CheckpointNotFoundError: there is none; a ``FileNotFoundError``.
            CheckpointChangedError: it was replaced, or is not as long as ``known_size_bytes``; an ``OSError``.
        """
        args = read_args or ReadArgs()
        name = self._object(path)
        stat = self._run(self._place.backend.stat, self._place.at(name))
        if args.known_size_bytes not in {None, stat.size}:
            raise CheckpointChangedError(f"{stat.url} has {stat.size} bytes, and not {args.known_size_bytes}.")
        file = RangeFile(self._place.backend, self._place.at(name), stat)
        return io.BytesIO(file.readall()) if args.pre_read_full_file else file

    def stream_write(self, path: Path) -> io.RawIOBase:
        """A stream whose bytes go out in parts. The object appears when it is closed; see :meth:`get_write_stream`."""
        return self.get_write_stream(path, None)

    def get_write_stream(self, path: Path, data: object) -> io.RawIOBase:
        """A stream for ``torch.save(data, stream)``: large CPU tensors go out from their own memory.

        The object appears when the stream is closed, or not at all: not where a ``with`` of it ends by an exception.
        """
        return UploadFile(self._place.backend, self._place.at(self._object(path)), data)

    def write(self, path: Path, data: Buffer) -> None:
        """Writes an object, all or nothing."""
        self._run(self._write, self._object(path), memoryview(data).cast("B"))

    def delete(self, path: Path) -> None:
        """Deletes an object. Raises a ``FileNotFoundError`` where there is none."""
        name = self._object(path)
        self._run(self._place.backend.stat, self._place.at(name))
        self._run(self._place.delete, [name])

    def mkdir(self, path: Path, recursive: bool = True) -> None:
        """Does nothing: a directory is there as soon as something is in it."""
        del recursive
        self._name(path)

    def rmdir(self, path: Path) -> None:
        """Deletes a directory's objects, its metadata first. Raises a ``FileNotFoundError`` where there are none."""
        self._run(self._rmdir, self._object(path))

    def rename(
        self, src_path: Path, dst_path: Path, is_directory: bool = False, background_cleanup: bool = False
    ) -> None:
        """Copies objects, a directory's metadata last, and deletes the old ones: as the table of ``Storage`` says.

        The store copies by itself where it can (S3: objects of up to 1 GiB; Google Cloud Storage); else they go
        through this machine. What was copied is deleted again where a copy fails.

        Raises:
            FileExistsError: the destination is occupied.
            CheckpointNotFoundError: there is nothing at the source; a ``FileNotFoundError``.
        """
        del background_cleanup  # the deletes take a moment, 16 at once
        self._run(self._rename, self._object(src_path), self._object(dst_path), is_directory)

    def ls(self, path: Path) -> list[str]:
        """The names in a directory, in order. Raises a ``FileNotFoundError`` where there is none."""
        name = self._name(path)
        found = self._run(self._below, name)
        if not found and name:
            raise _not_there(self._place.url_of(name))
        prefix = f"{name}/" if name else ""
        return sorted({each.removeprefix(prefix).partition("/")[0] for each in found} - {""})

    def exists(self, path: Path) -> bool:
        """Whether there is an object, or a directory."""
        name = self._name(path)
        return not name or self._run(self._stat, name) is not None or self.isdir(path)

    def isdir(self, path: Path) -> bool:
        """Whether objects lie below this path."""
        name = self._name(path)
        return not name or bool(self._run(self._below, name))

    def getsize(self, path: Path) -> int:
        """The bytes of an object."""
        stat: ObjectStat = self._run(self._place.backend.stat, self._place.at(self._object(path)))
        return stat.size

    def remap_path(self, path: Path) -> str:
        """The URL of a path."""
        name = self._name(path)
        return self._place.url_of(name) if name else self._place.backend.url(self._place.path)

    # --- how it is done

    def _name(self, path: str | os.PathLike[str]) -> str:
        """A path relative to the place; "" for the place itself."""
        name = PurePosixPath(path).as_posix().strip("/")
        parts = name.split("/")
        if ".." in parts or parts[0].endswith(":"):
            raise ValueError(
                f"{os.fspath(path)!r} is not a path below {self._place.url}: give it without '..' or a URL."
            )
        return "" if name == "." else name

    def _object(self, path: str | os.PathLike[str]) -> str:
        if name := self._name(path):
            return name
        raise IsADirectoryError(errno.EISDIR, f"{self._place.url} is the directory that all paths are relative to.")

    def _run(self, func: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> T:
        result: T = run(run_on, self._place.backend.loop, func, *args)
        return result

    async def _write(self, name: str, view: memoryview) -> None:
        backend = self._place.backend
        with Transfer("save", self._place.url_of(name)).running(None):
            plan = backend.upload_plan(len(view))
            await backend.write(self._place.at(name), bytes_of(view), plan=plan)

    async def _stat(self, name: str) -> ObjectStat | None:
        try:
            return await self._place.backend.stat(self._place.at(name))
        except CheckpointNotFoundError:
            return None

    async def _below(self, name: str) -> dict[str, int]:
        """The objects of a directory, and their sizes."""
        top = f"{self._place.path}/"
        try:
            found = self._place.backend.list(self._place.at(f"{name}/") if name else top)
            return {each.path.removeprefix(top): each.size async for each in found}
        except CheckpointNotFoundError:
            return {}

    async def _rmdir(self, name: str) -> None:
        found = await self._below(name)
        if not found:
            raise _not_there(self._place.url_of(name))
        await self._delete_directory(name, found)

    async def _delete_directory(self, name: str, found: Iterable[str]) -> None:
        """Deletes the objects of a directory, its metadata first: what is left of it is no checkpoint."""
        metadata = f"{name}/{METADATA_FILE_NAME}"
        await self._place.delete([metadata] if metadata in found else [])
        await self._place.delete({*found} - {metadata})

    async def _rename(self, source: str, target: str, is_directory: bool) -> None:
        found = await self._below(source)
        if found or is_directory:
            if not any(map(_is_object, found)):
                raise _not_there(self._place.url_of(source))
            if target.startswith(f"{source}/"):
                raise OSError(errno.EINVAL, f"{self._place.url_of(target)} lies in what would be renamed to it.")
            if await self._stat(target) is not None:
                raise self._occupied(target, errno.ENOTDIR)
            if any(map(_is_object, await self._below(target))):
                raise self._occupied(target, errno.ENOTEMPTY)
            copied = {name: size for name, size in found.items() if _is_object(name)}
            pairs = {name: (target + name.removeprefix(source), size) for name, size in copied.items()}
        else:
            stat = await self._place.backend.stat(self._place.at(source))
            if await self._below(target):
                raise self._occupied(target, errno.EISDIR)
            if source == target:
                return
            pairs = {source: (target, stat.size)}
        last = f"{source}/{METADATA_FILE_NAME}"
        try:
            await self._copy_all((name, *pair) for name, pair in pairs.items() if name != last)
            await self._copy_all((name, *pair) for name, pair in pairs.items() if name == last)
        except BaseException:
            if found:  # a file may have replaced another one, which is not to be had back
                with anyio.CancelScope(shield=True):
                    await self._delete_directory(target, [each for each, _ in pairs.values()])
            raise
        await self._delete_directory(source, found or pairs)

    async def _copy_all(self, pairs: Iterable[tuple[str, str, int]]) -> None:
        place, slots = self._place, anyio.CapacityLimiter(_COPIES)
        options: dict[str, Any] = {"source_storage_options": self._options, "target_storage_options": self._options}

        async def copy(source: str, target: str, size: int) -> None:
            async with slots:
                if not await place.backend.copy(place.at(source), place.at(target), size):
                    await copy_async(place.url_of(source), place.url_of(target), verify=False, **options)

        async with task_group() as tasks:
            for each in pairs:
                tasks.start_soon(copy, *each)

    def _occupied(self, target: str, number: int) -> FileExistsError:
        return FileExistsError(number, f"{self._place.url_of(target)} is occupied: delete it if it is to be replaced.")


class _LocalStorage(TorchferryStorage):
    """Files: bytes go through the engine, and are whole or not at all; the rest is torch_checkpointing's own."""

    def __init__(self, place: Place, storage_options: Mapping[str, Any] | None) -> None:
        super().__init__(place, storage_options)
        self._files: Any = LocalFileSystemStorage(LocalFileSystemStorageConfig(use_direct_io=False))

    def delete(self, path: Path) -> None:
        self._files.delete(self._file(path))

    def mkdir(self, path: Path, recursive: bool = True) -> None:
        self._files.mkdir(self._file(path), recursive)

    def rmdir(self, path: Path) -> None:
        self._object(path)
        self._files.rmdir(self._file(path))

    def rename(
        self, src_path: Path, dst_path: Path, is_directory: bool = False, background_cleanup: bool = False
    ) -> None:
        self._files.rename(self._file(src_path), self._file(dst_path), is_directory, background_cleanup)

    def ls(self, path: Path) -> list[str]:
        return sorted(self._files.ls(self._file(path)))

    def exists(self, path: Path) -> bool:
        return bool(self._files.exists(self._file(path)))

    def isdir(self, path: Path) -> bool:
        return bool(self._files.isdir(self._file(path)))

    def _file(self, path: Path) -> Path:
        return Path(self._place.path, self._name(path))


def _is_object(name: str) -> bool:
    """Whether it is more than what stands for a directory, as consoles of S3 put it there."""
    return not name.endswith("/")


def _not_there(url: str) -> StorageError:
    return CheckpointNotFoundError(errno.ENOENT, f"{url}: there is no such directory.")
