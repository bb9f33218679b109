"""Saving: ``torch.save`` as a stream of chunks, and the chunks into a store."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from torchferry.engine.loops import own_loop, run_on, synchronous
from torchferry.storage.base import Backend, ObjectStat
from torchferry.engine.cancellation import in_thread
from torchferry.storage.metadata import require_storable
from torchferry.storage.registry import open_backend
from torchferry.formats.torch_stream import CheckpointStream

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem
    from fsspec.callbacks import Callback

__all__ = ["save", "save_async"]


async def save_async(
    obj: Any,
    url: str | os.PathLike[str],
    *,
    storage_options: Mapping[str, Any] | None = None,
    filesystem: AbstractFileSystem | None = None,
    part_size: int | None = None,
    metadata: Mapping[str, str] | None = None,
    callback: Callback | None = None,
) -> ObjectStat:
    """Saves ``obj`` to ``url``; what is stored is byte for byte what ``torch.save(obj, file)`` writes.

    Nothing goes through a local file, and CPU tensors are sent from their own memory: do not change them
    until this returns. The object appears at ``url`` when it is complete, or not at all; what was there
    before stays until then. What must be copied, storages below 1 MiB and those on a device,
    takes at most 48 MiB in all saves of the process together (more only for part sizes above 16 MiB), and up to 208
    MiB more on the host for those on a device, plus one of these storages at a time.

    Args:
        obj: Anything that ``torch.save`` takes.
        url: An fsspec URL or a local path.
        storage_options: Arguments for the fsspec filesystem of ``url``.
        filesystem: An fsspec filesystem to use as it is, instead of ``storage_options``.
        part_size: Bytes in a part of a multipart upload, instead of 16 MiB (5 MiB where most of it is copied; more
            where the size needs it).
        metadata: User metadata to store with the object, where the store can: names that HTTP takes for a field, and
            strings of printable characters.
        callback: Told the size in bytes, and of bytes as they are handed to the store; in the thread that
            the store's event loop runs in.

    Returns:
        What is now at ``url``.

    Raises:
        UnsupportedOptionError: an option is not one that this store, or any, can honour; the message names it.
        StorageError: the store refused or failed; subclasses say which way (see :mod:`torchferry.errors`).
        Exception: whatever ``torch.save`` raises for an object that cannot be pickled.
    """
    require_storable(os.fspath(url), metadata or {})
    backend, path = await in_thread(
        partial(open_backend, url, storage_options=storage_options, filesystem=filesystem)
    )
    return await run_on(own_loop(backend.loop), _save, obj, backend, path, part_size, metadata, callback)


save = synchronous(save_async)


async def _save(
    obj: Any,
    backend: Backend,
    path: str,
    part_size: int | None,
    metadata: Mapping[str, str] | None,
    callback: Callback | None,
) -> ObjectStat:
    write_cost = partial(backend.write_cost, part_size=part_size)
    stream = CheckpointStream(obj, write_cost=write_cost, part_size=part_size, callback=callback)
    async with stream.running():
        return await backend.write(
            path, stream, size_hint=stream.size_hint, part_size=stream.part_size, metadata=metadata
        )
