"""What is saved and loaded: checkpoints of a known content, so that what arrives can be checked."""

from __future__ import annotations

import ctypes
import zlib
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20
GIB = 1 << 30
PAGE = 4096  # bytes
SMALL_TENSOR = 4096  # bytes
_TENSORS = 64


def make(work: str, size: int) -> dict[str, Any]:
    """A checkpoint, every page of it written.

    Args:
        work: "flat": 64 tensors. "adam": the same with the optimizer's state, three times the bytes.
            "small": as many tensors of 4 KiB as fit into ``size``.
        size: Bytes of the module's tensors.
    """
    count = size // SMALL_TENSOR if work == "small" else _TENSORS
    module = {f"layers.{i}.weight": _tensor(f"layers.{i}.weight", size // count) for i in range(count)}
    checkpoint: dict[str, Any] = {"module_state_dict": module}
    if work == "adam":
        state = {i: _adam_state(i, size // count) for i in range(count)}
        groups = [{"lr": 0.001, "betas": (0.9, 0.999), "eps": 1e-08, "params": list(range(count))}]
        checkpoint["optimizer_state_dict"] = {"state": state, "param_groups": groups}
    return checkpoint


def named_tensors(checkpoint: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """The large tensors of a checkpoint, of one part of it, or of a mapping from names to tensors."""
    if not {"module_state_dict", "optimizer_state_dict"} & set(checkpoint):
        yield from checkpoint.items()
        return
    yield from checkpoint.get("module_state_dict", {}).items()
    for i, state in checkpoint.get("optimizer_state_dict", {}).get("state", {}).items():
        yield f"{i}.exp_avg", state["exp_avg"]
        yield f"{i}.exp_avg_sq", state["exp_avg_sq"]


def nbytes(checkpoint: dict[str, Any]) -> int:
    """Bytes of the large tensors."""
    return sum(tensor.nbytes for _, tensor in named_tensors(checkpoint))


def touch(checkpoint: dict[str, Any]) -> None:
    """Reads a byte of each page: a tensor whose pages are not there yet is not loaded yet."""
    for _, tensor in named_tensors(checkpoint):
        if tensor.nbytes > 16 * PAGE:
            tensor.detach().view(-1).view(torch.uint8)[::PAGE].sum()
        else:
            start = tensor.data_ptr()  # far cheaper than four torch calls, where there are 100,000 tensors
            for address in range(start, start + tensor.nbytes, PAGE):
                ctypes.c_ubyte.from_address(address).value  # noqa: B018 - reading it is the purpose


def check(checkpoint: dict[str, Any], expected_bytes: int) -> None:
    """Raises ValueError unless the tensors are all there, each with the values that :func:`make` gave it."""
    if (arrived := nbytes(checkpoint)) != expected_bytes:
        raise ValueError(f"{arrived} bytes of tensors were loaded, and {expected_bytes} saved.")
    for name, tensor in named_tensors(checkpoint):
        if not torch.equal(tensor.detach(), _tensor(name, tensor.nbytes)):
            raise ValueError(f"The tensor {name} was loaded with other values than it was saved with.")


def _adam_state(i: int, size: int) -> dict[str, torch.Tensor]:
    names = ("exp_avg", "exp_avg_sq")
    return {"step": torch.tensor(1.0)} | {name: _tensor(f"{i}.{name}", size) for name in names}


_blocks: dict[int, torch.Tensor] = {}


def _tensor(name: str, size: int) -> torch.Tensor:
    """Random numbers, the same for each size, plus one that depends on the name: cheap to make and to make again."""
    if size not in _blocks:
        _blocks.clear()
        _blocks[size] = torch.rand(size // 4, generator=torch.Generator().manual_seed(size))
    return _blocks[size] + zlib.crc32(name.encode()) % 1000


def forget() -> None:
    """Frees what :func:`make` keeps."""
    _blocks.clear()
