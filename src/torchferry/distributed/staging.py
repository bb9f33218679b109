"""Staging: what an asynchronous save copies before the caller goes on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint.metadata import STATE_DICT_TYPE
from torch.distributed.tensor import DTensor

from torchferry.formats.item_stream import is_plain
from torchferry.formats.snapshot import Snapshots

__all__ = ["Stager"]


class Stager:
    """The members of DCP's runtime protocol ``AsyncStager``: a writer that has them stages for itself.

    The memory of a snapshot is kept for the next one, pinned where it comes from a GPU.
    """

    _synchronize_after_execute = False

    def __init__(self) -> None:
        super().__init__()
        self._snapshots = Snapshots()

    @property
    def should_synchronize_after_execute(self) -> bool:
        """Whether DCP has to wait for the copies: they are there when :meth:`stage` returns."""
        return self._synchronize_after_execute

    def stage(self, state_dict: STATE_DICT_TYPE) -> STATE_DICT_TYPE:  # type: ignore[type-arg]  # torch's own alias
        """A copy of ``state_dict`` in host memory, all of it at once. What is no tensor is copied deeply.

        Raises:
            OSError: the machine has no memory for it.
        """
        storages: dict[int, torch.UntypedStorage] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            storages.setdefault(storage._cdata, storage)  # noqa: SLF001  # what tells storages apart
            return tensor

        _mapped(state_dict, note)
        copies = dict(zip(storages, self._snapshots.copy(list(storages.values())), strict=True))

        def take(tensor: torch.Tensor) -> torch.Tensor:
            copied = torch.empty(0, dtype=tensor.dtype)
            storage = copies[tensor.untyped_storage()._cdata]  # noqa: SLF001  # the same
            return copied.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())

        staged: dict[str, Any] = _mapped(state_dict, take)
        return staged

    def synchronize_staging(self) -> None:
        """Nothing is left to wait for."""

    def close(self) -> None:
        """Frees the memory, when the save that uses it is over."""
        self._snapshots.free()


def _mapped(  # noqa: PLR0911 - one for each kind of value
    value: Any, of_tensor: Callable[[torch.Tensor], torch.Tensor]
) -> Any:
    """``value`` with other tensors; the parts of sharded ones that this rank has among them."""
    if isinstance(value, DTensor):
        staged: Any = copy.copy(value.detach())
        staged._local_tensor = _mapped(value.to_local(), of_tensor)  # noqa: SLF001  # on the CPU, whatever its mesh is
        return staged
    if isinstance(value, ShardedTensor):
        staged = copy.copy(value)
        shards = []
        for shard in value.local_shards():
            shards.append(copy.copy(shard))
            shards[-1].tensor = _mapped(shard.tensor, of_tensor)
        staged._local_shards = shards  # noqa: SLF001  # there is no public way to replace them
        return staged
    if isinstance(value, torch.Tensor):
        tensor = value.detach()
        if is_plain(tensor) and not (tensor.is_conj() or tensor.is_neg()):
            return of_tensor(tensor)
        return tensor.resolve_conj().resolve_neg().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _mapped(item, of_tensor) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_mapped(item, of_tensor) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return copy.deepcopy(value)
