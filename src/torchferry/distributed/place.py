"""Where a sharded checkpoint is: a directory of a store, small objects in it, and the names of its saves."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import AsyncIterator, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio

from torchferry.engine.cancellation import in_thread
from torchferry.engine.loops import run_on
from torchferry.engine.reader import RangeReader
from torchferry.engine.tasks import task_group
from torchferry.engine.types import MIB, Buffer, Chunk, ObjectStat
from torchferry.errors import CheckpointValueError, UnsupportedURLError, mask
from torchferry.storage.base import Backend
from torchferry.storage.local import LocalBackend
from torchferry.storage.registry import open_backend

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

__all__ = [
    "METADATA",
    "Place",
    "bytes_of",
    "delete_several",
    "inside",
    "is_shard_name",
    "new_save_name",
    "require_one",
    "save_name_of",
    "shard_path",
]

METADATA = ".metadata"
"""The object whose appearance makes a checkpoint: it names all shards."""

_SAVE_NAME = re.compile(r"save-(\d{8}T\d{6}Z)-[0-9a-f]{8}")
_SHARD_NAME = re.compile(r"__\d+_\d+\.distcp")
_DELETES = 16  # under way at once


@dataclass(frozen=True, slots=True)
class Place:
    """A directory of a store.

    Attributes:
        backend: Of the store.
        path: The directory, as the backend's verbs take it, without a slash at the end.
        url: What the caller said, without the secrets of a URL.
    """

    backend: Backend
    path: str
    url: str

    @classmethod
    def open(
        cls,
        url: str | os.PathLike[str],
        *,
        storage_options: Mapping[str, Any] | None = None,
        filesystem: AbstractFileSystem | None = None,
    ) -> Place:
        """Finds the backend. May take a second; raises as ``open_backend``."""
        backend, path = open_backend(inside(url, METADATA), storage_options=storage_options, filesystem=filesystem)
        return cls(backend, path.removesuffix(METADATA).rstrip("/"), mask(os.fspath(url)))

    @classmethod
    async def open_async(cls, url: str | os.PathLike[str], **options: Any) -> Place:
        """:meth:`open` in a thread."""
        return await in_thread(partial(cls.open, url, **options))

    @property
    def whole_url(self) -> str:
        """The full URL, without secrets: of a relative path too."""
        return mask(self.url_of(""))

    @property
    def is_local(self) -> bool:
        """Whether it is a directory of this machine."""
        return isinstance(self.backend, LocalBackend)

    def at(self, relative_path: str) -> str:
        """The path of an object in here."""
        return f"{self.path}/{relative_path}"

    def url_of(self, relative_path: str) -> str:
        """The full URL of an object in here."""
        return self.backend.url(self.at(relative_path))

    async def get(self, relative_path: str) -> tuple[bytes, ObjectStat]:
        """Reads a whole object. Raises as :class:`~torchferry.storage.base.Backend`."""
        path = self.at(relative_path)
        stat = await run_on(self.backend.loop, self.backend.stat, path)
        return await RangeReader(self.backend, path, stat).read(0, stat.size), stat

    async def put(self, relative_path: str, data: bytes) -> ObjectStat:
        """Writes an object, atomically."""
        plan = self.backend.upload_plan(len(data))
        return await run_on(
            self.backend.loop, partial(self.backend.write, plan=plan), self.at(relative_path), bytes_of(data)
        )

    async def delete(self, relative_paths: Iterable[str]) -> None:
        """Deletes objects, several at once. Those that are not there are no error."""
        paths = [self.at(relative_path) for relative_path in relative_paths]
        await delete_several(self.backend, paths)
        if self.is_local:
            for directory in {str(Path(path).parent) for path in paths} - {self.path}:
                with suppress(OSError):  # somebody's file is in there
                    await in_thread(os.rmdir, directory)


def require_one(urls: Collection[str], verb: str) -> None:
    """Raises a CheckpointValueError where the ranks have not all the same URL."""
    if len(urls) > 1:
        raise CheckpointValueError(
            f"The ranks {verb} several places as if they were one: {', '.join(sorted(urls))}. Give all of them one "
            "URL; where it is a relative path, they must have one working directory."
        )


async def delete_several(backend: Backend, paths: Iterable[str]) -> None:
    """Deletes objects of a store, 16 at once. Those that are not there are no error."""
    limiter = anyio.CapacityLimiter(_DELETES)

    async def delete(path: str) -> None:
        async with limiter:
            await run_on(backend.loop, backend.delete, path)

    async with task_group() as tasks:
        for path in paths:
            tasks.start_soon(delete, path)


def inside(url: str | os.PathLike[str], relative_path: str) -> str | os.PathLike[str]:
    """The URL of an object in a directory."""
    if isinstance(url, Path):
        return url / relative_path
    text = os.fspath(url).rstrip("/")
    if not text or text.endswith(":"):
        raise UnsupportedURLError(f"{os.fspath(url)!r} names no directory for a sharded checkpoint.")
    joined = f"{text}/{relative_path}"
    return joined if isinstance(url, str) else Path(joined)


async def bytes_of(data: Buffer) -> AsyncIterator[Chunk]:
    """The chunks of some bytes."""
    view = memoryview(data)
    for start in range(0, len(view), 8 * MIB):
        yield Chunk(view[start : start + 8 * MIB])


def new_save_name() -> str:
    """The name of a save, in which its shards lie: nobody else's, and it tells when the save began."""
    return f"save-{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}"


def shard_path(save: str, number: int) -> str:
    """Where a shard of a save lies, below the checkpoint's directory: that of a rank, or of so many in a copy."""
    return f"{save}/__{number}_0.distcp"


def is_shard_name(name: str) -> bool:
    """Whether a file may be a shard, by its name."""
    return _SHARD_NAME.fullmatch(name) is not None


def save_name_of(relative_path: str) -> tuple[str, datetime] | None:
    """The save that a shard belongs to, and when that began; None for a shard that torchferry did not write."""
    name, slash, _ = relative_path.partition("/")
    found = _SAVE_NAME.fullmatch(name)
    if not slash or found is None:
        return None
    return name, datetime.strptime(found[1], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
