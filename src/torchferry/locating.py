"""Finds out whether a URL is that of an object or of a sharded checkpoint. Needs no torch for an object."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from torchferry.errors import StorageError, StorageUnavailableError, mask
from torchferry.objects.opening import open_reader

if TYPE_CHECKING:
    from torchferry.distributed.whole import Contents
    from torchferry.engine.reader import RangeReader
    from torchferry.storage.base import Backend

__all__ = ["open_object"]


async def open_object(backend: Backend, path: str, *, weights_only: bool = True) -> RangeReader | Contents:
    """Opens an object; or the sharded checkpoint, where there is a directory of that name that has one.

    Raises:
        StorageError: there is neither.
    """
    try:
        return await open_reader(backend, path)
    except StorageUnavailableError:
        raise
    except StorageError:  # stores say in several ways that there is no object of a directory's name
        from torchferry.distributed.place import METADATA

        with suppress(StorageError):
            await backend.stat(f"{path.rstrip('/')}/{METADATA}")  # most often there is none: no torch, no second's wait
            from torchferry.distributed.whole import find

            found = await find(backend, path, mask(backend.url(path)), weights_only=weights_only)
            if found is not None:
                return found
        raise
