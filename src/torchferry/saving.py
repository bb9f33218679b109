"""Saving: ``torch.save`` as a stream of chunks, and the chunks into a store."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from torchferry.arguments import require_choice, require_nbytes
from torchferry.engine.loops import own_loop, run_on, synchronous
from torchferry.engine.transfer import Transfer, TransferReport, current
from torchferry.engine.types import ObjectStat
from torchferry.errors import UnsupportedOptionError, mask
from torchferry.formats.partial import parts_allowed
from torchferry.formats.safetensors import INDEX_SUFFIX, SUFFIX
from torchferry.formats.torch_hooks import TorchModes
from torchferry.formats.torch_stream import TorchStream
from torchferry.objects.saving_safetensors import save_safetensors
from torchferry.storage.base import Backend
from torchferry.storage.metadata import require_storable
from torchferry.storage.registry import open_backend_async

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem
    from fsspec.callbacks import Callback

__all__ = ["SaveFormat", "save", "save_async"]

SaveFormat: TypeAlias = Literal["torch", "safetensors"]


async def save_async(
    obj: Any,
    url: str | os.PathLike[str],
    *,
    storage_options: Mapping[str, Any] | None = None,
    filesystem: AbstractFileSystem | None = None,
    format: SaveFormat | None = None,  # noqa: A002 - what it is
    max_shard_size: int | None = None,
    part_size: int | None = None,
    metadata: Mapping[str, str] | None = None,
    give_up_after: float | None = None,
    shards: bool = False,
    callback: Callback | None = None,
    report: Callable[[TransferReport], object] | None = None,
) -> ObjectStat:
    """Saves ``obj`` to ``url``; what is stored is byte for byte what ``torch.save(obj, file)`` or safetensors writes.

    Nothing goes through a local file, and CPU tensors are sent from their own memory: do not change them
    until this returns. The object appears at ``url`` when it is complete, or not at all; what was there
    before stays until then. What must be copied (storages below 1 MiB, and those on a device) takes at most 48 MiB in
    all saves of CPU tensors of the process together, and at most 208 MiB in all saves from a device, plus one storage
    at a time.

    Args:
        obj: Anything that ``torch.save`` takes; as safetensors, a state dict or a module.
        url: An fsspec URL or a local path.
        storage_options: Arguments for the fsspec filesystem of ``url``.
        filesystem: An fsspec filesystem to use as it is, instead of ``storage_options``.
        format: "torch" or "safetensors"; by default that of the URL: safetensors if it ends in ".safetensors".
        max_shard_size: Bytes of a file of safetensors. A larger checkpoint becomes several files and an index
            (``model-00001-of-00003.safetensors``, ``model.safetensors.index.json``), which appears when all are there.
            Where there are files of such names already, the new ones have the time of the save in theirs. What is there
            in the other form, one file or several, is then removed: else its URL would go on to load it.
        part_size: Bytes in a part of a multipart upload, instead of 16 MiB (5 MiB where most of it is copied; more
            where the size needs it).
        metadata: User metadata to store with the object, where the store can: names that HTTP takes for a field, and
            strings of printable characters. Safetensors have it in their header, too.
        give_up_after: Seconds without progress after which failed requests are not repeated any more; 120 by default.
        shards: Save tensors that are a part of larger ones (a DTensor that is not replicated, a shard of FSDP), for who
            puts the parts together again. By default they are refused: what is stored would look complete.
        callback: Told the size in bytes, and of bytes as the store acknowledges them; in the thread that
            the store's event loop runs in.
        report: Called with the :class:`~torchferry.TransferReport` of a save that succeeded.

    Returns:
        What is now at ``url``; of several files, their index.

    Raises:
        CheckpointValueError: safetensors cannot hold ``obj``: other values than tensors, or tensors that share memory.
        ChangedWhileSavingError: a tensor was changed while it was being sent. Nothing was stored.
        CheckpointValueError: a tensor is a part of a larger one, and ``shards`` is not set.
        UnsupportedOptionError: an option is not one that this store, or any, can honour; the message names it.
        StorageError: the store refused or failed; subclasses say which way (see :mod:`torchferry.errors`).
        Exception: whatever ``torch.save`` raises for an object that cannot be pickled.
    """
    modes = TorchModes.of_caller()
    require_choice("format", format, get_args(SaveFormat))
    require_nbytes("max_shard_size", max_shard_size)
    require_storable(os.fspath(url), metadata)
    backend, path = await open_backend_async(url, storage_options=storage_options, filesystem=filesystem)
    transfer = Transfer("save", mask(os.fspath(url)), callback=callback, give_up_after=give_up_after)
    with transfer.running(report), parts_allowed(shards):
        if (format or _format_of(path)) == "torch":
            if max_shard_size is not None:
                raise UnsupportedOptionError(f"{mask(os.fspath(url))}: max_shard_size= is for format='safetensors'.")
            return await run_on(own_loop(backend.loop), _save, obj, backend, path, part_size, metadata, modes)
        save_it = partial(save_safetensors, part_size=part_size, metadata=metadata, max_shard_size=max_shard_size)
        return await run_on(own_loop(backend.loop), save_it, obj, backend, path)


save = synchronous(save_async, within=TorchModes.carried)


def _format_of(path: str) -> SaveFormat:
    return "safetensors" if path.endswith((SUFFIX, INDEX_SUFFIX)) else "torch"


async def _save(
    obj: Any,
    backend: Backend,
    path: str,
    part_size: int | None,
    metadata: Mapping[str, str] | None,
    modes: TorchModes,
) -> ObjectStat:
    stream = TorchStream(
        obj,
        plan_for=backend.upload_plan,
        part_size=part_size,
        url=backend.url(path),
        store_checks=backend.checks_chunks,
        store_reads_loans=backend.reads_loans,
        modes=modes,
    )
    transfer = current()
    async with stream.running(), transfer.telling():
        transfer.set_size(stream.size_hint)
        stat = await backend.write(path, stream, plan=stream.plan, metadata=metadata)
        transfer.set_size(stat.size)
        transfer.moved_at_least(stat.size)
    return stat
