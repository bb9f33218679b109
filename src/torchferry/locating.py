"""Finds out whether a URL is that of an object or of a sharded checkpoint. Needs no torch for an object."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from torchferry.arguments import require_path
from torchferry.engine.loops import run_on
from torchferry.errors import StorageError, StorageUnavailableError, UnsupportedURLError, mask
from torchferry.objects.opening import open_reader
from torchferry.storage.registry import open_backend_async

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

    from torchferry.distributed.whole import Contents
    from torchferry.engine.reader import RangeReader
    from torchferry.storage.base import Backend

__all__ = ["locate", "open_object"]


async def locate(
    url: str | os.PathLike[str],
    *,
    storage_options: Mapping[str, Any] | None = None,
    filesystem: AbstractFileSystem | None = None,
) -> tuple[Backend, str]:
    """The store of a checkpoint, and its path there: one that ends in "/" is that of a directory."""
    require_path(url)
    is_directory = os.fspath(url).endswith("/")
    backend, path = await open_backend_async(
        url, storage_options=storage_options, filesystem=filesystem, directory=is_directory
    )
    return backend, f"{path}/" if is_directory else path


async def open_object(
    backend: Backend, path: str, *, weights_only: bool = True, may_be_empty: bool = False
) -> RangeReader | Contents:
    """Opens an object; or the sharded checkpoint, where there is a directory of that name that has one.

    Raises:
        UnsupportedURLError: the path is that of a directory, and there is no sharded checkpoint in it.
        StorageError: there is neither.
    """
    try:
        _refuse_directory(backend, path)
        return await open_reader(backend, path, may_be_empty=may_be_empty)
    except StorageUnavailableError:
        raise
    except (StorageError, UnsupportedURLError):  # stores say in several ways that there is no object of such a name
        from torchferry.distributed.place import METADATA

        with suppress(StorageError):
            # Most often there is none: no torch, no second's wait.
            await run_on(backend.loop, backend.stat, f"{path.rstrip('/')}/{METADATA}")
            from torchferry.distributed.whole import find

            found = await find(backend, path, mask(backend.url(path)), weights_only=weights_only)
            if found is not None:
                return found
        raise


def _refuse_directory(backend: Backend, path: str) -> None:
    if path.endswith("/"):
        raise UnsupportedURLError(
            f"{mask(backend.url(path))} names a directory without a sharded checkpoint: add the name of a file."
        )
