"""Saving: ``torch.save`` as a stream of chunks, and the chunks into a store."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from torchferry.engine.cancellation import in_thread
from torchferry.engine.loops import own_loop, run_on, synchronous
from torchferry.engine.transfer import Transfer, TransferReport, current
from torchferry.engine.types import ObjectStat
from torchferry.errors import mask
from torchferry.formats.torch_stream import TorchStream
from torchferry.storage.base import Backend
from torchferry.storage.metadata import require_storable
from torchferry.storage.registry import open_backend

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
    give_up_after: float | None = None,
    callback: Callback | None = None,
    report: Callable[[TransferReport], object] | None = None,
) -> ObjectStat:
    """Saves ``obj`` to ``url``; what is stored is byte for byte what ``torch.save(obj, file)`` writes.

    Nothing goes through a local file, and CPU tensors are sent from their own memory: do not change them
    until this returns. The object appears at ``url`` when it is complete, or not at all; what was there
    before stays until then. What must be copied (storages below 1 MiB, and those on a device) takes at most 48 MiB in
    all saves of CPU tensors of the process together, and at most 208 MiB in all saves from a device, plus one storage
    at a time.

    Args:
        obj: Anything that ``torch.save`` takes.
        url: An fsspec URL or a local path.
        storage_options: Arguments for the fsspec filesystem of ``url``.
        filesystem: An fsspec filesystem to use as it is, instead of ``storage_options``.
        part_size: Bytes in a part of a multipart upload, instead of 16 MiB (5 MiB where most of it is copied; more
            where the size needs it).
        metadata: User metadata to store with the object, where the store can: names that HTTP takes for a field, and
            strings of printable characters.
        give_up_after: Seconds without progress after which failed requests are not repeated any more; 120 by default.
        callback: Told the size in bytes, and of bytes as the store acknowledges them; in the thread that
            the store's event loop runs in.
        report: Called with the :class:`~torchferry.TransferReport` of a save that succeeded.

    Returns:
        What is now at ``url``.

    Raises:
        ChangedWhileSavingError: a tensor was changed while it was being sent. Nothing was stored.
        UnsupportedOptionError: an option is not one that this store, or any, can honour; the message names it.
        StorageError: the store refused or failed; subclasses say which way (see :mod:`torchferry.errors`).
        Exception: whatever ``torch.save`` raises for an object that cannot be pickled.
    """
    require_storable(os.fspath(url), metadata or {})
    backend, path = await in_thread(partial(open_backend, url, storage_options=storage_options, filesystem=filesystem))
    transfer = Transfer("save", mask(os.fspath(url)), callback=callback, give_up_after=give_up_after)
    with transfer.running(report):
        return await run_on(own_loop(backend.loop), _save, obj, backend, path, part_size, metadata)


save = synchronous(save_async)


async def _save(
    obj: Any, backend: Backend, path: str, part_size: int | None, metadata: Mapping[str, str] | None
) -> ObjectStat:
    stream = TorchStream(obj, plan_for=backend.upload_plan, part_size=part_size)
    transfer = current()
    async with stream.running(), transfer.telling():
        transfer.set_size(stream.size_hint)
        stat = await backend.write(path, stream, plan=stream.plan, metadata=metadata)
        transfer.set_size(stat.size)
        transfer.moved_at_least(stat.size)
    return stat
