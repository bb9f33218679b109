"""Checkpoints that are folders of files, as Transformers and accelerate write them, in a store.

A folder's last object, ``torchferry.json``, lists all files with their sizes. It is written when they are there, and is
deleted before they are: a folder is whole, or it does not count.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio

from torchferry.copying import copy_async
from torchferry.engine.cancellation import in_thread
from torchferry.engine.loops import own_loop, run_on
from torchferry.engine.tasks import task_group
from torchferry.engine.transfer import Transfer
from torchferry.engine.types import Chunk
from torchferry.errors import CheckpointCorruptError, CheckpointNotFoundError, mask
from torchferry.series.steps import url_of
from torchferry.storage.local import LocalBackend
from torchferry.storage.registry import open_backend, open_backend_async

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from torchferry.storage.base import ListedObject

__all__ = ["Folders", "delete_async"]

MANIFEST = "torchferry.json"
"""The name of the object that makes a folder whole."""

_LONGEST_MANIFEST = 64 << 20  # bytes
_FILES_AT_ONCE = 4
_DELETED_AT_ONCE = 16


class Folders:
    """The folders below one URL.

    Args:
        url: An fsspec URL or a local path.
        storage_options: As for :func:`torchferry.save`.
        give_up_after: The same.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        storage_options: Mapping[str, Any] | None = None,
        give_up_after: float | None = None,
    ) -> None:
        self.url = url
        self._options = storage_options
        self._give_up_after = give_up_after
        self._backend, self._path = open_backend(url, storage_options=storage_options, directory=True)

    async def list(self, prefix: str = "") -> dict[str, dict[str, ListedObject]]:
        """All objects, by the names of their folders, which begin with ``prefix``, and of their files; whole or not."""
        found: dict[str, dict[str, ListedObject]] = await self._run("list", partial(self._list, prefix))
        return found

    async def is_whole(self, name: str, files: Mapping[str, ListedObject]) -> bool:
        """Whether a folder that was listed has all its files, at their sizes."""
        if MANIFEST not in files:
            return False
        with suppress(CheckpointNotFoundError):  # deleted meanwhile
            expected = await self._manifest(name)
            return all(not size or (path in files and files[path].size == size) for path, size in expected.items())
        return False

    async def send(self, folder: str | os.PathLike[str], name: str) -> None:
        """Copies a local folder to the URL; one of that name that is there does not count from now on."""
        found = await in_thread(_files_of, Path(folder))
        await self._run("delete", partial(self._backend.delete, self._path_of(name, MANIFEST)))
        target_of = partial(self._url_of, name)
        await self._copy_all((Path(folder, path), target_of(path)) for path, size in found.items() if size)
        data = json.dumps({"files": found}, indent=1).encode()
        await self._run("write", partial(self._write, self._path_of(name, MANIFEST), data))

    async def fetch(self, name: str, folder: str | os.PathLike[str]) -> None:
        """Copies a whole folder here. It appears at ``folder`` when all of it is here, in place of what was there.

        Raises:
            CheckpointNotFoundError: there is no whole folder of this name.
            CheckpointCorruptError: a file has not the size that it was sent with.
        """
        expected = await self._manifest(name)
        target = Path(folder)
        staging = target.parent / f".torchferry-{secrets.token_hex(8)}"
        await in_thread(partial(staging.mkdir, parents=True))
        try:
            for path, size in expected.items():
                place = staging / path
                await in_thread(partial(place.parent.mkdir, parents=True, exist_ok=True))
                if not size:
                    await in_thread(place.touch)
            pairs = [(self._url_of(name, path), staging / path) for path, size in expected.items() if size]
            await self._copy_all(pairs, fetching=True)
            await in_thread(_require_sizes, staging, expected, mask(os.fspath(self.url)))
            await in_thread(_put_in_place, staging, target)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise

    async def is_here(self, name: str, folder: str | os.PathLike[str]) -> bool:
        """Whether a local folder has all files of a whole one, at their sizes."""
        expected = await self._manifest(name)
        found = await in_thread(_files_of, Path(folder))
        return all(found.get(path) == size for path, size in expected.items())

    async def delete(self, name: str, files: Mapping[str, ListedObject]) -> None:
        """Deletes all objects of a folder that was listed."""
        if manifest := files.get(MANIFEST):
            await self._run("delete", partial(self._backend.delete, manifest.path))
        paths = [each.path for path, each in files.items() if path != MANIFEST]
        await self._run("delete", partial(_delete_all, self._backend.delete, paths))
        if isinstance(self._backend, LocalBackend):
            await in_thread(_remove_empty, Path(self._path, name))

    # --- how it is done

    async def _list(self, prefix: str) -> dict[str, dict[str, ListedObject]]:
        found: dict[str, dict[str, ListedObject]] = {}
        with suppress(CheckpointNotFoundError):  # nothing was sent there yet
            async for each in self._backend.list(f"{self._path}/{prefix}"):
                name, slash, path = each.path.removeprefix(f"{self._path}/").partition("/")
                if slash:
                    found.setdefault(name, {})[path] = each
        return found

    async def _manifest(self, name: str) -> dict[str, int]:
        data = await self._run("read", partial(self._read, self._path_of(name, MANIFEST)))
        try:
            found: dict[str, int] = json.loads(data)["files"]
            folders = {parent for path in found for parent in Path(path).parents}
            safe = all(_is_inside(path) and type(size) is int and size >= 0 for path, size in found.items())
            safe &= not any(Path(path) in folders for path in found)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            safe = False
        if not safe:
            raise CheckpointCorruptError(f"{mask(os.fspath(self._url_of(name, MANIFEST)))} is not a list of files.")
        return found

    async def _copy_all(
        self, pairs: Iterable[tuple[str | os.PathLike[str], str | os.PathLike[str]]], *, fetching: bool = False
    ) -> None:
        slots = anyio.CapacityLimiter(_FILES_AT_ONCE)
        options: dict[str, Any] = {("source" if fetching else "target") + "_storage_options": self._options}

        async def copy_one(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
            async with slots:
                await copy_async(source, target, verify=False, give_up_after=self._give_up_after, **options)

        async with task_group() as tasks:
            for source, target in pairs:
                tasks.start_soon(copy_one, source, target)

    def _path_of(self, name: str, path: str) -> str:
        return f"{self._path}/{name}/{path}"

    def _url_of(self, name: str, path: str) -> str | os.PathLike[str]:
        return url_of(url_of(self.url, name), path)

    async def _read(self, path: str) -> bytes:
        stat = await self._backend.stat(path)
        if stat.size > _LONGEST_MANIFEST:
            return b""  # which is no list
        return bytes(await self._backend.read(path, 0, stat.size, stat))

    async def _write(self, path: str, data: bytes) -> None:
        async def chunks() -> AsyncIterator[Chunk]:
            yield Chunk(data)

        await self._backend.write(path, chunks(), plan=self._backend.upload_plan(len(data)))

    async def _run(self, verb: str, func: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        with Transfer(verb, mask(os.fspath(self.url)), give_up_after=self._give_up_after).running(None):
            return await run_on(own_loop(self._backend.loop), func)


async def delete_async(
    url: str | os.PathLike[str],
    *,
    storage_options: Mapping[str, Any] | None = None,
    give_up_after: float | None = None,
) -> None:
    """Deletes an object, or a directory with all that is below; what is not there is no error."""
    text = os.fspath(url)
    if await in_thread(os.path.isdir, text):
        await in_thread(partial(shutil.rmtree, text))
        return
    backend, path = await open_backend_async(url, storage_options=storage_options, directory=True)

    async def delete() -> None:
        await backend.delete(path)
        with suppress(CheckpointNotFoundError):
            await _delete_all(backend.delete, [each.path async for each in backend.list(f"{path}/")])

    with Transfer("delete", mask(text), give_up_after=give_up_after).running(None):
        await run_on(own_loop(backend.loop), delete)


async def _delete_all(delete: Callable[[str], Coroutine[Any, Any, None]], paths: Iterable[str]) -> None:
    slots = anyio.CapacityLimiter(_DELETED_AT_ONCE)

    async def delete_one(path: str) -> None:
        async with slots:
            await delete(path)

    async with task_group() as tasks:
        for path in paths:
            tasks.start_soon(delete_one, path)


def _files_of(folder: Path) -> dict[str, int]:
    """The sizes of all files of a folder, by their paths in it."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in found}


def _is_inside(path: str) -> bool:
    """Whether a path leads to a file in its folder: a list of files may come from anybody."""
    parts = path.split("/")
    return not {"", ".", ".."} & set(parts) and not {"\\", "\0"} & set(path) and ":" not in parts[0]


def _remove_empty(folder: Path) -> None:
    """Removes directories that are empty, or have only such in them."""
    for directory in [*sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True), folder]:
        with suppress(OSError):  # a file is in there
            directory.rmdir()


def _require_sizes(folder: Path, expected: Mapping[str, int], url: str) -> None:
    for path, size in expected.items():
        if (folder / path).stat().st_size != size:
            raise CheckpointCorruptError(
                f"{url}: {path} has not the size that it was sent with. Delete the folder that it lies in, and resume "
                "from the one before."
            )


def _put_in_place(staging: Path, target: Path) -> None:
    if target.exists():
        shutil.rmtree(target)
    staging.rename(target)
