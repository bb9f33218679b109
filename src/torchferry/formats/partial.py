"""Tensors that are parts of larger ones: a file of them looks complete, and is not."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from torchferry.errors import CheckpointValueError

__all__ = ["parts_allowed", "require_whole"]

_allowed: ContextVar[bool] = ContextVar("torchferry_parts_allowed", default=False)
_FLAT = "_is_flat_param"  # on the parameters that FSDP makes of many, whose class is Parameter


@contextmanager
def parts_allowed(allowed: bool) -> Generator[None]:
    """Whether :func:`require_whole` lets parts pass, in here and in the threads that work for it."""
    token = _allowed.set(allowed)
    try:
        yield
    finally:
        _allowed.reset(token)


def require_whole(obj: object) -> None:
    """Refuses a tensor that is a part of another: a DTensor that is not replicated, a shard of FSDP.

    Raises:
        CheckpointValueError: it is one, and the caller has not said that it is meant.
    """
    kind = type(obj)
    if kind is torch.Tensor or not issubclass(kind, torch.Tensor):
        return
    if (kind is torch.nn.Parameter and not hasattr(obj, _FLAT)) or _allowed.get():
        return
    if (part := _part(obj)) is not None:
        raise CheckpointValueError(
            f"{part}: what was saved of it would look complete, and be a part. Either gather it, and save it on one "
            "rank: get_state_dict(..., options=StateDictOptions(full_state_dict=True, cpu_offload=True)) of "
            "torch.distributed.checkpoint.state_dict. Or save it sharded, on all ranks: torchferry.distributed.save. "
            "shards=True saves this rank's part, for who puts the parts together again."
        )


def _part(tensor: Any) -> str | None:
    """What a tensor is a part of, in words; None where it is whole. Imports nothing that is not there already."""
    if is_lazy(tensor):  # of a LazyLinear: it has no shape yet
        return None
    shape = tuple(tensor.shape)
    if (dtensor := _class("torch.distributed.tensor", "DTensor")) and isinstance(tensor, dtensor):
        local = tuple(tensor._local_tensor.shape)  # noqa: SLF001  # to_local() may wait for collectives
        if local == shape and not any(placement.is_partial() for placement in tensor.placements):
            return None
        placements = ", ".join(map(str, tensor.placements))
        return f"This rank has {local} of a DTensor of shape {shape} ({placements})"
    if (sharded := _class("torch.distributed._shard.sharded_tensor", "ShardedTensor")) and isinstance(tensor, sharded):
        sizes = [tuple(shard.metadata.shard_sizes) for shard in tensor.local_shards()]
        return None if sizes == [shape] else f"This rank has {sizes or 'nothing'} of a ShardedTensor of shape {shape}"
    if getattr(tensor, _FLAT, False):
        whole = getattr(tensor, "_unpadded_unsharded_size", tensor.shape).numel()
        return (
            None if tensor.numel() >= whole else f"This rank has {tensor.numel()} of {whole} numbers of FSDP's shards"
        )
    return None


def _class(module: str, name: str) -> Any:
    return getattr(sys.modules.get(module), name, None)
