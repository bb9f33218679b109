"""Saves state dicts as safetensors: one object, or shards and their index."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchferry.engine.cancellation import in_thread
from torchferry.engine.transfer import current
from torchferry.engine.types import ObjectStat
from torchferry.formats.safetensors import lay_out
from torchferry.formats.safetensors_dtypes import dtype_name
from torchferry.formats.safetensors_stream import SafetensorsStream, check_tensors
from torchferry.objects.safetensors_opening import publish

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from torchferry.storage.base import Backend

__all__ = ["save_safetensors"]

_PYTORCH = {"format": "pt"}  # what Hugging Face's libraries want to see in the header


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

        async def write(file: str, members: Sequence[str]) -> ObjectStat:
            part = {member: tensors[member] for member in members}
            return await _write_file(part, backend, file, part_size, metadata)

        sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
        return await publish(backend, path, sizes, max_shard_size, write)


async def _write_file(
    tensors: Mapping[str, torch.Tensor],
    backend: Backend,
    path: str,
    part_size: int | None,
    metadata: Mapping[str, str] | None,
) -> ObjectStat:
    described = {name: (dtype_name(tensor.dtype, name), tuple(tensor.shape)) for name, tensor in tensors.items()}
    head, header = await in_thread(lay_out, described, {**_PYTORCH, **(metadata or {})})
    stream = SafetensorsStream(
        head,
        [tensors[entry.name] for entry in header.entries],
        plan_for=backend.upload_plan,
        part_size=part_size,
        url=backend.url(path),
        store_checks=backend.checks_chunks,
    )
    async with stream.running():
        return await backend.write(path, stream, plan=stream.plan, metadata=metadata)
