"""Tensors as the bytes of a safetensors file: a stream of chunks, from their own memory."""

from __future__ import annotations

import ctypes
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from torchferry.engine.cancellation import in_thread
from torchferry.engine.memory import copy_bytes
from torchferry.engine.transfer import current
from torchferry.engine.types import MIB, Chunk
from torchferry.errors import CheckpointValueError
from torchferry.formats.changes import Changes
from torchferry.formats.partial import require_whole
from torchferry.formats.safetensors import Entry
from torchferry.printable import printable

if TYPE_CHECKING:
    from torchferry.engine.memory import Claim

__all__ = ["check_tensors", "copied_bytes", "file_chunks", "view_bytes"]

_ZERO_COPY_FROM = MIB  # a smaller tensor is cheaper to copy than to hand over on its own
_PIECE = 8 * MIB  # a large one is handed over in pieces
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
    return {name: _resolved(tensor) for name, tensor in state.items()}


def copied_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """How many bytes are not sent from the tensors' own memory."""
    return sum(tensor.nbytes for tensor in tensors.values() if not _is_lent(tensor))


async def file_chunks(
    head: bytes, entries: Sequence[Entry], tensors: Mapping[str, torch.Tensor], claim: Claim, url: str
) -> AsyncGenerator[Chunk]:
    """The chunks of a file.

    Args:
        head: What comes before the tensors.
        entries: The tensors, in the order of the file.
        tensors: The same, by name. One that is not contiguous is copied while it is sent.
        claim: Memory for copies of small tensors and of those on a device.
        url: For messages.

    Raises:
        ChangedWhileSavingError: a tensor was changed meanwhile.
    """
    changes = Changes(url)
    lent = [tensor for tensor in tensors.values() if _is_lent(tensor)]
    await in_thread(changes.watch, tensors.values(), [tensor.untyped_storage() for tensor in lent])
    yield Chunk(head)
    copies = _Copies(claim)
    for entry in entries:
        tensor = tensors[entry.name]
        current().tell()
        if not tensor.nbytes:
            continue
        if _is_lent(tensor):
            if (done := copies.take()) is not None:
                yield done
            view = view_bytes(tensor if tensor.is_contiguous() else await in_thread(tensor.contiguous))
            for start in range(0, len(view), _PIECE):
                yield Chunk(view[start : start + _PIECE])
            del view
        else:
            async for full in copies.add_tensor(tensor):
                yield full
    if (done := copies.take()) is not None:
        yield done
    await in_thread(changes.check)  # before anything is published


class _Copies:
    """Copies of what is small, one after the other in blocks."""

    def __init__(self, claim: Claim) -> None:
        self._claim = claim
        self._block = memoryview(b"")
        self._emitted = self._filled = 0

    async def renew(self) -> None:
        """Takes another block, in place of one that is taken."""
        self._block = memoryview(b"")  # let go of before waiting for the next: it may be the one
        self._emitted = self._filled = 0
        self._block = await self._claim.take_async()

    async def add_tensor(self, tensor: torch.Tensor) -> AsyncGenerator[Chunk]:
        """Copies a tensor; yields what fills a block."""
        on_cpu = tensor.device.type == "cpu"
        for start in range(0, tensor.nbytes, self._claim.block_size):
            stop = min(start + self._claim.block_size, tensor.nbytes)
            data = _host(tensor, start, stop) if on_cpu else await in_thread(_host, tensor, start, stop)
            while len(data):
                if self._filled == len(self._block):
                    if (done := self.take()) is not None:
                        yield done
                    await self.renew()
                data = self._add(data)

    def _add(self, data: memoryview) -> memoryview:
        """Copies what there is room for; returns the rest."""
        count = min(len(data), len(self._block) - self._filled)
        copy_bytes(self._block[self._filled : self._filled + count], data[:count])
        self._filled += count
        return data[count:]

    def take(self) -> Chunk | None:
        """What was copied since the last time."""
        if self._emitted == self._filled:
            return None
        chunk = Chunk(self._block[self._emitted : self._filled].toreadonly())
        self._emitted = self._filled
        return chunk


def _is_lent(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.nbytes >= _ZERO_COPY_FROM


def _resolved(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().resolve_conj().resolve_neg()


def _host(tensor: torch.Tensor, start: int, stop: int) -> memoryview:
    """Some of a tensor's bytes, in host memory."""
    flat = tensor.contiguous().reshape(-1)
    size = tensor.element_size()  # divides the size of a block
    return view_bytes(flat[start // size : stop // size].cpu())


def view_bytes(tensor: torch.Tensor) -> memoryview:
    """A contiguous CPU tensor's bytes, as a view that keeps it alive."""
    lent = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    lent.tensor = tensor  # type: ignore[attr-defined]
    return memoryview(lent).cast("B").toreadonly()


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
