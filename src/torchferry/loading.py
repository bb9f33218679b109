"""Loads, inspects and verifies checkpoints, whatever their format.

The format is told by the object's first bytes, never by its name.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from torchferry.engine import loops
from torchferry.engine.cancellation import in_thread
from torchferry.engine.reader import RangeReader
from torchferry.engine.transfer import Transfer
from torchferry.errors import mask
from torchferry.formats.archive import INDEX_FORMAT, SAFETENSORS_FORMAT, SNIFF_SIZE, sniff
from torchferry.formats.filling import Target
from torchferry.formats.keys import KeysArgument, as_keys
from torchferry.formats.torch_hooks import TorchModes
from torchferry.locating import locate, open_object
from torchferry.objects.opening import memory_errors
from torchferry.objects.requests import LoadRequest
from torchferry.objects.safetensors_files import fill_safetensors, inspect_safetensors, load_safetensors
from torchferry.objects.safetensors_opening import File, open_file, open_files
from torchferry.objects.torch_files import fill_torch, inspect_torch, load_torch, verify_torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch
    from fsspec import AbstractFileSystem
    from fsspec.callbacks import Callback

    from torchferry.distributed.whole import Contents
    from torchferry.engine.transfer import TransferReport
    from torchferry.manifest import Manifest
    from torchferry.storage.base import Backend

__all__ = [
    "inspect",
    "inspect_async",
    "load",
    "load_async",
    "verify",
    "verify_async",
]


async def load_async(
    url: str | os.PathLike[str],
    *,
    keys: KeysArgument | None = None,
    exclude: KeysArgument | None = None,
    into: torch.nn.Module | Mapping[Any, Any] | Sequence[Any] | None = None,
    strict: bool = True,
    map_location: Any = None,
    weights_only: bool = True,
    verify: bool = True,
    storage_options: Mapping[str, Any] | None = None,
    filesystem: AbstractFileSystem | None = None,
    give_up_after: float | None = None,
    callback: Callback | None = None,
    report: Callable[[TransferReport], object] | None = None,
) -> Any:
    """Loads a checkpoint from a store: any file that ``torch.save`` wrote, safetensors, or a sharded checkpoint.

    Takes memory for the object, or for the part that ``keys`` name, and at most 208 MiB beside. Small tensors lie in
    memory together; a storage of 1 MiB or more frees its own when its tensors are gone. A checkpoint in the legacy
    format (before torch 1.6) is read whole and copied once more. For safetensors in several files, ``url`` is that of
    their index; for a sharded checkpoint, that of its directory.

    Args:
        url: Any fsspec URL, or a local path.
        keys: Load only these values, nested as they are in the checkpoint. Names at any depth, as :func:`inspect` shows
            them: "model.encoder" takes what begins with that and a dot, "model.*.bias" is a glob, and a function is
            asked for the name of each tensor and plain value. Only the storages that they need are read, and what
            ``weights_only`` refuses elsewhere in the checkpoint does not matter. Of a list that is not taken as a whole
            remains a dict, by index.
        exclude: What to leave out, in the same way.
        into: A module or a state dict whose tensors are filled with those of the same name, instead of new ones. It may
            be nested as the checkpoint is, with modules in it: ``into={"model": model}``. Contiguous CPU tensors of
            1 MiB and more are read straight into their own memory: nothing is in memory twice. Tensors of the meta
            device are replaced. If the load fails after it has begun to read, the tensors hold a mixture. It fills
            tensors only: for an optimizer, load its state with ``keys`` and call its ``load_state_dict``.
        strict: Whether names that the checkpoint or ``into`` lacks are an error; before anything is read.
        map_location: As in ``torch.load``.
        weights_only: As in ``torch.load``; its variable ``TORCH_FORCE_WEIGHTS_ONLY_LOAD`` is obeyed, too. With False,
            a checkpoint can run any code: only for those whose author you trust.
        verify: Check the CRC32 of each record that is read.
        storage_options: Arguments for the fsspec filesystem.
        filesystem: An fsspec filesystem to use as it is, instead of ``storage_options``.
        give_up_after: Seconds without progress after which failed requests are not repeated any more; 120 by default.
        callback: Told the number of bytes to read (``set_size``) and those that have arrived (``relative_update``).
        report: Called with the :class:`~torchferry.TransferReport` of what succeeded.

    Returns:
        What was saved; with ``keys`` or ``exclude``, only the part that was asked for, nested in the same way. Of
        safetensors, a dict of tensors. With ``into``, an :class:`~torchferry.IncompatibleKeys`: what did not match.

    Raises:
        TypeError: ``into`` holds something else than modules and tensors.
        CheckpointFormatError: it is not a checkpoint; or no dict, where there are ``keys``; or two of its tensors have
            one name, where there is ``into``.
        CheckpointCorruptError: it is damaged.
        CheckpointKeyError: a key takes nothing of it.
        CheckpointMismatchError: it does not fit ``into``.
        UnsafeCheckpointError: it needs globals that ``weights_only=True`` does not allow.
        CheckpointChangedError: it was replaced meanwhile.
        StorageError: see :class:`~torchferry.storage.base.Backend`.
    """
    modes = TorchModes.of_caller()
    backend, path = await _open(url, storage_options, filesystem)
    forced = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0").lower() in {"1", "y", "yes", "true"}  # as torch.load
    request = LoadRequest(as_keys(keys), as_keys(exclude), map_location, weights_only or forced, verify, strict, modes)
    target = None if into is None else Target(into)
    transfer = Transfer("load", mask(os.fspath(url)), callback=callback, give_up_after=give_up_after)
    with transfer.running(report), memory_errors(url):
        return await loops.run_on(backend.loop, _load, backend, path, request, target)


async def inspect_async(
    url: str | os.PathLike[str],
    *,
    storage_options: Mapping[str, Any] | None = None,
    filesystem: AbstractFileSystem | None = None,
    give_up_after: float | None = None,
) -> Manifest:
    """Says what is in a checkpoint without reading its tensors.

    Of a usual checkpoint it reads 2%, and 2 MiB at most, in two requests side by side.

    Nothing of what the checkpoint contains is run, whatever it is.

    Args:
        url: Any fsspec URL, or a local path.
        storage_options: Arguments for the fsspec filesystem.
        filesystem: An fsspec filesystem to use as it is, instead of ``storage_options``.
        give_up_after: Seconds without progress after which failed requests are not repeated any more; 120 by default.

    Raises:
        CheckpointFormatError: it is not a checkpoint.
        CheckpointCorruptError: its directory or its pickle is damaged.
        StorageError: see :class:`~torchferry.storage.base.Backend`.
    """
    backend, path = await _open(url, storage_options, filesystem)
    transfer = Transfer("inspect", mask(os.fspath(url)), give_up_after=give_up_after)
    with transfer.running(None), memory_errors(url):
        return await loops.run_on(backend.loop, _inspect, backend, path)


async def verify_async(
    url: str | os.PathLike[str],
    *,
    storage_options: Mapping[str, Any] | None = None,
    filesystem: AbstractFileSystem | None = None,
    give_up_after: float | None = None,
    callback: Callback | None = None,
    report: Callable[[TransferReport], object] | None = None,
) -> Manifest:
    """Reads a whole checkpoint and checks the CRC32 of every record; takes at most 208 MiB of memory.

    Args:
        url: Any fsspec URL, or a local path.
        storage_options: Arguments for the fsspec filesystem.
        filesystem: An fsspec filesystem to use as it is, instead of ``storage_options``.
        give_up_after: Seconds without progress after which failed requests are not repeated any more; 120 by default.
        callback: Told the number of bytes to read (``set_size``) and those that have arrived (``relative_update``).
        report: Called with the :class:`~torchferry.TransferReport` of what succeeded.

    Returns:
        What :func:`inspect_async` returns.

    Raises:
        CheckpointCorruptError: a record does not match its CRC32, or the file is damaged otherwise.
        CheckpointFormatError: it is not a checkpoint, or one that carries no CRC32s.
        StorageError: see :class:`~torchferry.storage.base.Backend`.
    """
    backend, path = await _open(url, storage_options, filesystem)
    transfer = Transfer("verify", mask(os.fspath(url)), callback=callback, give_up_after=give_up_after)
    with transfer.running(report), memory_errors(url):
        return await loops.run_on(backend.loop, _verify, backend, path)


load = loops.synchronous(load_async, within=TorchModes.carried)
inspect = loops.synchronous(inspect_async)
verify = loops.synchronous(verify_async)


async def _open(
    url: str | os.PathLike[str], storage_options: Mapping[str, Any] | None, filesystem: AbstractFileSystem | None
) -> tuple[Backend, str]:
    return await locate(url, storage_options=storage_options, filesystem=filesystem)


async def _inspect(backend: Backend, path: str) -> Manifest:
    source = await open_object(backend, path)
    if not isinstance(source, RangeReader):
        return await _inspect_sharded(source)
    if (files := await _safetensors(backend, path, source)) is not None:
        return await in_thread(inspect_safetensors, files, source)
    return await inspect_torch(source)


async def _verify(backend: Backend, path: str) -> Manifest:
    source = await open_object(backend, path)
    if not isinstance(source, RangeReader):
        from torchferry.distributed.whole import verify_contents

        await verify_contents(source)
        return await _inspect_sharded(source)
    if (files := await _safetensors(backend, path, source)) is not None:
        return await in_thread(inspect_safetensors, files, source)
    return await verify_torch(source)


async def _inspect_sharded(found: Contents) -> Manifest:
    from torchferry.distributed.whole import inspect_contents

    return await in_thread(inspect_contents, found)


async def _load(backend: Backend, path: str, request: LoadRequest, target: Target | None) -> Any:
    source = await open_object(backend, path, weights_only=request.weights_only)
    if not isinstance(source, RangeReader):
        return await _load_sharded(source, request, target)
    files = await _safetensors(backend, path, source)
    if target is not None:
        if files is not None:
            return await fill_safetensors(files, request, source.url, target)
        return await fill_torch(source, request, target)
    if files is not None:
        return await load_safetensors(files, request, source.url)
    return await load_torch(source, request)


async def _load_sharded(found: Contents, request: LoadRequest, target: Target | None) -> Any:
    from torchferry.distributed.whole import fill_whole, load_whole

    return await (load_whole(found, request) if target is None else fill_whole(found, request, target))


async def _safetensors(backend: Backend, path: str, source: RangeReader) -> list[File] | None:
    """The files of a checkpoint in safetensors; None if it is none."""
    looks = sniff(await source.read(0, min(source.stat.size, SNIFF_SIZE)))
    if looks == SAFETENSORS_FORMAT:
        return [await open_file(source, path)]
    if looks == INDEX_FORMAT:
        return await open_files(backend, path, source)
    return None
