"""Saves state dicts as safetensors: one object, or shards and their index."""

from __future__ import annotations

import secrets
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any

from torchferry.engine.cancellation import in_thread, run_shielded
from torchferry.engine.loops import run_on
from torchferry.engine.memory import BLOCK_SIZE, CPU_SAVES, EVERYTHING_ELSE
from torchferry.engine.reader import RangeReader
from torchferry.engine.transfer import current
from torchferry.engine.types import Chunk, ObjectStat
from torchferry.errors import CheckpointFormatError, CheckpointNotFoundError, StorageError
from torchferry.formats.safetensors import (
    INDEX_SUFFIX,
    LONGEST_INDEX,
    index_bytes,
    lay_out,
    parse_index,
    shard_names,
    split,
)
from torchferry.formats.safetensors_stream import check_tensors, copied_bytes, file_chunks

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Collection, Mapping, Sequence

    import torch

    from torchferry.storage.base import Backend

__all__ = ["prepare", "publish_index", "save_safetensors"]

_PYTORCH = {"format": "pt"}  # what Hugging Face's libraries want to see in the header
_ABORT_PATIENCE = 0.7  # seconds that a cancel waits for the shards to be deleted


async def save_safetensors(
    obj: Any,
    backend: Backend,
    path: str,
    *,
    part_size: int | None,
    metadata: Mapping[str, str] | None,
    max_shard_size: int | None,
) -> ObjectStat:
    """Saves a state dict as one file, or, where it has more than ``max_shard_size`` bytes, as shards and an index.

    Returns:
        What is now at the path: of shards, their index.

    Raises:
        CheckpointValueError: safetensors cannot hold it.
    """
    with current().stage("pickling"):
        tensors = await in_thread(check_tensors, obj)
    total = sum(tensor.nbytes for tensor in tensors.values())
    transfer = current()
    async with transfer.telling():
        transfer.set_size(total)
        if max_shard_size is None or (total <= max_shard_size and not path.endswith(INDEX_SUFFIX)):
            return await _write_file(tensors, backend, path, part_size, metadata)
        shards = split({name: tensor.nbytes for name, tensor in tensors.items()}, max_shard_size)
        names, index, replaced = await prepare(backend, path, len(shards))
        written: list[str] = []
        try:
            for name, members in zip(names, shards, strict=True):
                written.append(name)
                part = {member: tensors[member] for member in members}
                await _write_file(part, backend, name, part_size, metadata)
            files = [(member, _base(name)) for name, members in zip(names, shards, strict=True) for member in members]
            stat = await publish_index(backend, index, files, total)
        except BaseException:
            await run_shielded(delete_all, backend, written, patience=lambda: _ABORT_PATIENCE)
            raise
        await delete_all(backend, replaced - {*names})
        return stat


async def prepare(backend: Backend, path: str, count: int) -> tuple[list[str], str, set[str]]:
    """Chooses the paths of shards so that what is there already stays whole until their index replaces its index.

    Returns:
        The paths of the shards, that of the index, and the paths of the shards that an index there names now.
    """
    names, index = shard_names(path, count)
    try:
        stat = await run_on(backend.loop, backend.stat, index)
    except CheckpointNotFoundError:
        return names, index, set()
    stem = index.removesuffix(INDEX_SUFFIX)
    names, _ = shard_names(f"{stem}-{secrets.token_hex(4)}", count)
    if stat.size > LONGEST_INDEX:
        return names, index, set()
    data = await RangeReader(backend, index, stat).read(0, stat.size)
    with suppress(CheckpointFormatError):
        folder = index[: index.rfind("/") + 1]
        return names, index, {folder + file for file in parse_index(data, stat.url).files.values()}
    return names, index, set()


async def publish_index(backend: Backend, path: str, files: Sequence[tuple[str, str]], total: int) -> ObjectStat:
    """Writes an index, which makes the shards that it names a checkpoint."""
    data = await in_thread(index_bytes, files, total)
    return await backend.write(path, _one(data), plan=backend.upload_plan(len(data)), metadata=None)


async def delete_all(backend: Backend, paths: Collection[str]) -> None:
    """Deletes what can be deleted of these."""
    for path in paths:
        with suppress(StorageError):
            await run_on(backend.loop, backend.delete, path)


async def _write_file(
    tensors: Mapping[str, torch.Tensor],
    backend: Backend,
    path: str,
    part_size: int | None,
    metadata: Mapping[str, str] | None,
) -> ObjectStat:
    described = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    head, header = await in_thread(lay_out, described, {**_PYTORCH, **(metadata or {})})
    size = len(head) + sum(tensor.nbytes for tensor in tensors.values())
    plan = backend.upload_plan(size, part_size)
    ledger = CPU_SAVES if all(tensor.device.type == "cpu" for tensor in tensors.values()) else EVERYTHING_ELSE
    need = min(copied_bytes(tensors) + len(head), plan.part_size + BLOCK_SIZE)
    claim = await ledger.claim_async(need + plan.memory)
    try:
        async with aclosing(file_chunks(head, header.entries, tensors, claim)) as chunks:
            return await backend.write(path, chunks, plan=plan, metadata=metadata)
    finally:
        claim.close()


async def _one(data: bytes) -> AsyncGenerator[Chunk]:
    yield Chunk(data)


def _base(path: str) -> str:
    return path[path.rfind("/") + 1 :]
