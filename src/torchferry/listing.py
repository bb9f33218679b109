"""Objects below a prefix, and their removal. Needs no torch."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from torchferry.distributed.place import METADATA, delete_several
from torchferry.engine.cancellation import in_thread
from torchferry.engine.loops import own_loop, run_on, synchronous
from torchferry.engine.reader import RangeReader
from torchferry.errors import (
    CheckpointFormatError,
    CheckpointNotFoundError,
    StorageError,
    StorageUnavailableError,
    TorchferryError,
    mask,
)
from torchferry.formats.safetensors import LONGEST_INDEX, parse_index
from torchferry.locating import locate
from torchferry.storage.base import ListedObject
from torchferry.storage.local import LocalBackend
from torchferry.storage.registry import open_backend_async

if TYPE_CHECKING:
    from torchferry.engine.types import ObjectStat
    from torchferry.storage.base import Backend

__all__ = ["delete", "has_below", "list_objects", "objects_of", "stat"]

_INDEX_SUFFIX = ".json"  # an index may have any name: model.safetensors.index.fp16.json


async def _list_objects(
    url: str | os.PathLike[str], *, storage_options: Mapping[str, Any] | None = None
) -> list[tuple[str, ListedObject]]:
    """The objects below a prefix, a bucket or a directory, with their names in it, in order.

    Raises:
        CheckpointNotFoundError: there is no such bucket or directory, or nothing below the prefix.
    """
    backend, path = await open_backend_async(url, storage_options=storage_options, directory=True)
    return await run_on(own_loop(backend.loop), _below, backend, path)


async def _below(backend: Backend, path: str) -> list[tuple[str, ListedObject]]:
    folder = f"{path}/"
    found = [item async for item in backend.list(folder)]
    if not found and "/" in path and not backend.has_directories:  # a bucket may be empty; a prefix is its objects
        with suppress(CheckpointNotFoundError):
            stat = await run_on(backend.loop, backend.stat, path)
            raise StorageError(errno.ENOTDIR, f"{stat.url} is an object: nothing is below it.")
        raise CheckpointNotFoundError(errno.ENOENT, f"There is nothing below {mask(backend.url(path))}.")
    return sorted(((item.path[len(folder) :], item) for item in found if item.path.startswith(folder)), key=_name)


async def _has_below(url: str | os.PathLike[str], *, storage_options: Mapping[str, Any] | None = None) -> bool:
    """Whether there is an object below a prefix, a bucket or a directory: looks no further than the first one."""
    backend, path = await open_backend_async(url, storage_options=storage_options, directory=True)
    return await run_on(own_loop(backend.loop), _any_below, backend, f"{path}/")


async def _any_below(backend: Backend, folder: str) -> bool:
    listed = backend.list(folder)
    try:
        async for item in listed:
            if item.path.startswith(folder):
                return True
        return False
    finally:
        if isinstance(listed, AsyncGenerator):
            await listed.aclose()


def _name(pair: tuple[str, ListedObject]) -> str:
    return pair[0]


async def _stat(url: str | os.PathLike[str], *, storage_options: Mapping[str, Any] | None = None) -> ObjectStat:
    """One object."""
    backend, path = await open_backend_async(url, storage_options=storage_options)
    return await run_on(backend.loop, backend.stat, path)


async def _objects_of(
    url: str | os.PathLike[str], *, recursive: bool = False, storage_options: Mapping[str, Any] | None = None
) -> list[ListedObject]:
    """The objects that a checkpoint is made of, or all below a prefix; what makes others a checkpoint comes first.

    Raises:
        CheckpointNotFoundError: there is none.
        CheckpointFormatError: the metadata of a sharded checkpoint is damaged, so that nothing names its shards.
    """
    if recursive:
        return [item for _, item in await _list_objects(url, storage_options=storage_options)]
    backend, path = await locate(url, storage_options=storage_options)
    return await run_on(own_loop(backend.loop), _parts, backend, path)


async def _parts(backend: Backend, path: str) -> list[ListedObject]:
    if path.endswith("/"):
        if (parts := await _sharded_parts(backend, path.rstrip("/"))) is None:
            raise CheckpointNotFoundError(f"There is no sharded checkpoint at {mask(backend.url(path))}.")
        return parts
    try:
        stat = await run_on(backend.loop, backend.stat, path)
    except StorageUnavailableError:
        raise
    except StorageError:
        if (parts := await _sharded_parts(backend, path)) is None:
            raise
        return parts
    objects = [ListedObject(path, stat.url, stat.size, stat.etag)]
    if path.endswith(_INDEX_SUFFIX) and stat.size <= LONGEST_INDEX:
        data = await RangeReader(backend, path, stat).read(0, stat.size)
        with suppress(CheckpointFormatError):
            folder = path[: path.rfind("/") + 1]
            names = dict.fromkeys(parse_index(data, stat.url).files.values())
            common = os.path.commonprefix([*names])  # noqa: RUF071 - of names; there are no folders in them
            there = {item.path: item async for item in backend.list(folder + common)}
            objects += [there[folder + name] for name in names if folder + name in there]
    return objects


async def _sharded_parts(backend: Backend, path: str) -> list[ListedObject] | None:
    """The objects of the sharded checkpoint in a directory: its metadata, and the shards that it names."""
    try:
        await run_on(backend.loop, backend.stat, f"{path}/{METADATA}")  # most often there is none: no torch
    except StorageUnavailableError:
        raise
    except StorageError:
        return None
    from torchferry.distributed.metadata import shards_of
    from torchferry.distributed.whole import find

    try:
        found = await find(backend, path, mask(backend.url(path)))
    except TorchferryError as error:
        error.add_note("Nothing else says which its shards are. rm -r removes all that is in a directory.")
        raise
    if found is None:
        return None
    there = {item.path: item async for item in backend.list(f"{path}/")}
    names = (METADATA, *shards_of(found.metadata))
    return [there[at] for name in names if (at := f"{path}/{name}") in there]


async def _delete(
    url: str | os.PathLike[str], objects: Sequence[ListedObject], *, storage_options: Mapping[str, Any] | None = None
) -> None:
    """Deletes objects of the store of ``url``: first what makes others a checkpoint, then the others, several at once.

    Of a sharded checkpoint, local directories that are empty then go, too.
    """
    backend, _ = await open_backend_async(url, storage_options=storage_options, directory=True)
    paths = [item.path for item in objects]
    heads = (f"/{METADATA}", _INDEX_SUFFIX)
    await delete_several(backend, [path for path in paths if path.endswith(heads)])
    await delete_several(backend, [path for path in paths if not path.endswith(heads)])
    if isinstance(backend, LocalBackend):
        folders = [path.removesuffix(f"/{METADATA}") for path in paths if path.endswith(f"/{METADATA}")]
        within = {path.rpartition("/")[0] for path in paths}
        for folder in folders:
            for path in sorted((at for at in within if f"{at}/".startswith(f"{folder}/")), key=len, reverse=True):
                with suppress(OSError):  # somebody's file is in there
                    await in_thread(os.rmdir, path)


has_below = synchronous(_has_below)
list_objects = synchronous(_list_objects)
stat = synchronous(_stat)
objects_of = synchronous(_objects_of)
delete = synchronous(_delete)
