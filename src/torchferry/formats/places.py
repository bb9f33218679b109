"""What a checkpoint's tensors are, and where they lie in their storages: read from stand-ins, which nobody trusts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from torchferry.formats.stand_ins import META, PARAMETERS, StandIn, StorageRef, is_tensor

__all__ = ["TensorInfo", "TensorPlace", "place_of", "tensor_info"]

_INT64_MAX = (1 << 63) - 1
_MOST_DIMENSIONS = 1000  # of a tensor; most of torch stops at 64


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a checkpoint.

    Attributes:
        key: Where it is in the object: the keys of dicts, the indices of lists and tuples and the names of attributes
            that lead to it, with dots between, such as "module_state_dict.layer.weight". Empty if the object is itself
            a tensor. A sparse tensor is listed as the tensors that it is made of, such as "a.indices", "a.values".
        dtype: Of its elements.
        shape: Its sizes.
        nbytes: Bytes of its elements. Its storage may have more (a view of a larger tensor), and may be shared.
        record: The record that holds its storage, such as "data/0"; None for a meta tensor, which has none.
    """

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    record: str | None


def tensor_info(key: str, tensor: StandIn | StorageRef) -> TensorInfo:
    """What is known of a tensor, or of a storage that stands alone.

    Raises:
        Exception: it is not made as torch makes it; whatever that leads to.
    """
    if isinstance(tensor, StorageRef):
        return TensorInfo(key, tensor.dtype, (tensor.numel,), tensor.nbytes, tensor.record)
    if tensor.path == META:
        dtype, shape, record = _dtype(tensor.args[0]), _shape(tensor.args[1]), None
    else:
        storage = tensor.args[0]
        dtype, shape, record = storage.dtype, _shape(tensor.args[2]), storage.record
        if tensor.path == "torch._utils._rebuild_tensor_v3":
            dtype = _dtype(tensor.args[6])
    return TensorInfo(key, dtype, shape, _nbytes(shape, dtype), record)


class TensorPlace(NamedTuple):
    """How a tensor lies in its storage.

    Attributes:
        storage: The storage.
        dtype: Of the tensor's elements.
        shape: Its sizes.
        stride: Its strides, in elements.
        offset: Its first element.
        is_plain: Whether it is a tensor as it lies there, no view that is conjugated and the like.
    """

    storage: StorageRef
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    is_plain: bool

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return _nbytes(self.shape, self.dtype)

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements lie one after the other, within the storage."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return 0 in self.shape
            expected *= size
        return (self.offset + expected) * self.dtype.itemsize <= self.storage.nbytes


def place_of(leaf: Any) -> TensorPlace | None:
    """How a tensor, or the tensor in a parameter, lies in its storage; None for other kinds of tensors and values.

    Raises:
        Exception: it is not made as torch makes it; whatever that leads to.
    """
    if isinstance(leaf, StandIn) and leaf.path in PARAMETERS:
        leaf = leaf.args[0]
    if isinstance(leaf, StorageRef) or not is_tensor(leaf) or leaf.path == META or leaf.path.endswith("_qtensor"):
        return None
    info = tensor_info("", leaf)
    storage, offset, _, stride = leaf.args[:4]
    strides = _shape(stride)
    if type(offset) is not int or not 0 <= offset <= _INT64_MAX or len(strides) != len(info.shape):
        raise ValueError("a tensor is at no place of its storage")
    is_plain = not any(leaf.args[7 if leaf.path.endswith("_v3") else 6 :])
    return TensorPlace(storage, info.dtype, info.shape, strides, offset, is_plain)


def _nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    if len(shape) > _MOST_DIMENSIONS or (nbytes := math.prod(shape) * dtype.itemsize) > _INT64_MAX:
        raise ValueError("a tensor is too large")
    return nbytes


def _dtype(standin: Any) -> torch.dtype:
    name = standin.path.rpartition(".")[2]
    dtype = vars(torch).get(name)  # getattr would import what torch imports late
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name} is no dtype")
    return dtype


def _shape(size: Any) -> tuple[int, ...]:
    sizes = size.args[0] if isinstance(size, StandIn) else size
    if not isinstance(sizes, tuple | list) or not all(type(n) is int and 0 <= n <= _INT64_MAX for n in sizes):
        raise TypeError("the shape of a tensor is none")
    return tuple(sizes)
