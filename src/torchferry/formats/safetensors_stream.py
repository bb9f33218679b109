"""Tensors as the bytes of a safetensors file: a stream of chunks, from their own memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from torchferry.errors import CheckpointValueError
from torchferry.formats.item_stream import Item, ItemStream, memory_of
from torchferry.formats.partial import require_whole
from torchferry.formats.torch_stream import LENT_FROM
from torchferry.printable import printable

if TYPE_CHECKING:
    from torchferry.engine.writer import UploadPlan

__all__ = ["SafetensorsStream", "check_tensors", "resolved", "view_bytes"]

_SHOWN = 5  # names in a message
_INSTEAD = "format='torch' (a URL that does not end in .safetensors) saves anything"


def check_tensors(obj: Any) -> dict[str, torch.Tensor]:
    """The tensors of a module or a state dict, by name, if safetensors can hold them.

    Raises:
        CheckpointValueError: it can not; the message says what to do.
    """
    state = obj.state_dict() if isinstance(obj, nn.Module) else obj
    if not isinstance(state, Mapping):
        raise CheckpointValueError(
            f"safetensors holds a dict of tensors, not a {type(obj).__name__}: pass one, or a module; {_INSTEAD}."
        )
    odd = [key for key, value in state.items() if not isinstance(key, str) or not isinstance(value, torch.Tensor)]
    if odd:
        some = ", ".join(f"{printable(repr(key))} ({type(state[key]).__name__})" for key in odd[:_SHOWN])
        more = f" and {len(odd) - _SHOWN} more" if len(odd) > _SHOWN else ""
        raise CheckpointValueError(
            f"safetensors holds tensors by name, and no other values: leave out {some}{more}, or put strings into "
            f"metadata=; of a nested checkpoint, save the state dict in it; {_INSTEAD}."
        )
    for name, tensor in state.items():
        require_whole(tensor)
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            kind = "meta" if tensor.is_meta else "quantized" if tensor.is_quantized else "sparse"
            raise CheckpointValueError(
                f"safetensors holds plain tensors only, and {printable(name)!r} is {kind}: leave it out; {_INSTEAD}."
            )
    _refuse_shared(state)
    return {name: resolved(tensor) for name, tensor in state.items()}


class SafetensorsStream(ItemStream):
    """The chunks of a safetensors file.

    Args:
        head: What comes before the tensors.
        tensors: The tensors, in the order of the file: what :func:`check_tensors` returned.
        plan_for: As in :class:`.torch_stream.TorchStream`.
        part_size: The same.
        url: The same.
        store_checks: The same; where it does not, no CRC32s are computed.
    """

    def __init__(
        self,
        head: bytes,
        tensors: Sequence[torch.Tensor],
        *,
        plan_for: Callable[[int, int | None], UploadPlan],
        part_size: int | None,
        url: str,
        store_checks: bool,
    ) -> None:
        values: list[torch.Tensor | memoryview] = [memoryview(head), *tensors]
        items = [Item(value.nbytes, partial(_itself, value), is_bare=True) for value in values]
        super().__init__(items, plan_for=plan_for, part_size=part_size, url=url, needs_crc32s=store_checks)
        self._tensors = tensors

    def _torch_save(self) -> None:
        lent = [tensor.untyped_storage() for tensor in self._tensors if _is_lent(tensor)]
        self._changes.watch(self._tensors, lent)
        super()._torch_save()

    def _is_on_device(self, _first: object) -> bool:
        return not all(tensor.is_cpu for tensor in self._tensors)

    def _most_copied(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors if not _is_lent(tensor)) + self._items[0].nbytes


def _itself(value: torch.Tensor | memoryview) -> torch.Tensor | memoryview:
    return value


def _is_lent(tensor: torch.Tensor) -> bool:
    return tensor.is_cpu and tensor.nbytes >= LENT_FROM and tensor.is_contiguous()


def resolved(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor whose memory is its values: not those of a conjugated or negated view."""
    return tensor.detach().resolve_conj().resolve_neg()


def view_bytes(tensor: torch.Tensor) -> memoryview:
    """A contiguous CPU tensor's bytes, as a view that keeps it alive."""
    return memory_of(tensor).toreadonly()


def _refuse_shared(tensors: Mapping[str, torch.Tensor]) -> None:
    extents = []
    for name, tensor in tensors.items():
        if tensor.nbytes:
            span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            extents.append((str(tensor.device), tensor.data_ptr(), span * tensor.element_size(), name))
    extents.sort()
    end, last, device = 0, "", ""
    for where, start, length, name in extents:
        if where == device and start < end:
            raise CheckpointValueError(
                f"{printable(last)!r} and {printable(name)!r} share memory, which safetensors does not keep. Of "
                f"tied weights, leave one out: the model ties them again. Otherwise clone() one; {_INSTEAD}."
            )
        if where != device or start + length > end:
            end, last, device = start + length, name, where
