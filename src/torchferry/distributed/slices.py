"""From the part of a tensor that is wanted to the ranges of bytes that hold it. No I/O."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from torchferry.engine.memory import BLOCK_SIZE, copy_bytes
from torchferry.engine.types import MIB, Buffer
from torchferry.formats.item_stream import is_plain, memory_of

__all__ = ["Direct", "Piece", "cut"]

_DIRECT = MIB  # a run of fewer bytes is read with its neighbours, and copied from there
_GAP = 64 << 10  # runs that are this near are read in one: a request costs more


@dataclass(frozen=True, slots=True)
class Direct:
    """Bytes that are read straight into the memory they are for.

    Attributes:
        start: Where they begin in the file.
        memory: Where they go.
    """

    start: int
    memory: memoryview


@dataclass(frozen=True, slots=True)
class Piece:
    """A few bytes, 4 MiB at most, that are read with their neighbours.

    Attributes:
        start: Where they begin in the file.
        stop: Where they end.
        sink: Called with them, in a worker thread. It must not keep them.
    """

    start: int
    stop: int
    sink: Callable[[Buffer], object]


def cut(target: torch.Tensor, start: int, strides: Sequence[int], dtype: torch.dtype) -> Iterator[Direct | Piece]:
    """The ranges of bytes that fill ``target``.

    Runs of 1 MiB and more go straight into its memory where they lie there as they do in the file. Shorter runs are
    read with those that are at most 64 KiB away.

    Args:
        target: What to fill; converted where its dtype is another.
        start: Where the bytes of its first element are in the file.
        strides: Of its elements in the file.
        dtype: Theirs.
    """
    if not target.numel():
        return
    size = dtype.itemsize
    spans = _spans(target.shape, strides)
    nbytes = target.numel() * size
    is_run = spans[-1][1] == target.numel()
    if is_run and nbytes >= _DIRECT and _takes_bytes(target, strides, dtype):
        yield Direct(start, memory_of(target))
        return
    span = spans[-1][1] * size
    near = all(gap * size <= _GAP for gap, _, _ in spans)
    if near and span <= BLOCK_SIZE:
        yield Piece(start, start + span, partial(_fill, target, tuple(strides), dtype))
        return
    gap, _, dim = spans[-1]
    stride = strides[dim] * size
    row = spans[-2][1] * size
    row_target = target.select(dim, 0)
    row_strides = [*strides[:dim], *strides[dim + 1 :]]
    row_is_run = spans[-2][1] == row_target.numel()
    rows = 1
    straight = row_is_run and row_target.numel() * size >= _DIRECT and _takes_bytes(row_target, row_strides, dtype)
    if not straight and gap * size <= _GAP and row <= BLOCK_SIZE:
        rows = (BLOCK_SIZE - row) // stride + 1
    for first in range(0, target.shape[dim], rows):
        count = min(rows, target.shape[dim] - first)
        if count == 1:
            yield from cut(target.select(dim, first), start + first * stride, row_strides, dtype)
        else:
            yield from cut(target.narrow(dim, first, count), start + first * stride, strides, dtype)


def _spans(shape: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int, int]]:
    """From inside out, for each dimension of more than one: the gap between rows, elements that all span, itself."""
    spans = [(0, 1, -1)]
    for stride, dim in sorted((strides[dim], dim) for dim in range(len(shape)) if shape[dim] > 1):
        inner = spans[-1][1]
        spans.append((stride - inner, inner + (shape[dim] - 1) * stride, dim))
    return spans


def _takes_bytes(target: torch.Tensor, strides: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether the memory of ``target`` is what is in the file, byte for byte."""
    return (
        target.is_cpu
        and target.dtype == dtype
        and is_plain(target)
        and not target.is_conj()
        and not target.is_neg()
        and target.is_contiguous()
        and all(of == there for n, of, there in zip(target.shape, target.stride(), strides, strict=True) if n > 1)
    )


def _fill(target: torch.Tensor, strides: tuple[int, ...], dtype: torch.dtype, data: Buffer) -> None:
    if _takes_bytes(target, strides, dtype):
        copy_bytes(memory_of(target), memoryview(data)[: target.nbytes])
        return
    there = torch.empty(len(data) // dtype.itemsize, dtype=dtype)  # aligned, as what is in the file may not be
    copy_bytes(memory_of(there), memoryview(data))
    target.copy_(there.as_strided(target.shape, strides))
