"""Tensors whose bytes come from elsewhere while they are saved: their own memory is reserved, and never touched."""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence

import torch
from anyio import from_thread

from torchferry.engine.types import Chunk
from torchferry.formats.lending import lend

__all__ = ["LazyTensors"]

_MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0
_ALIGNMENT = 64


class LazyTensors:
    """Tensors without bytes, each in a storage of its own.

    Args:
        described: Name, dtype and shape of each, in the order in which their bytes will come.

    Attributes:
        tensors: The tensors, by name.
    """

    def __init__(self, described: Sequence[tuple[str, torch.dtype, tuple[int, ...]]]) -> None:
        ats: list[int] = []
        at = 0
        for _, dtype, shape in described:
            at = -(-at // _ALIGNMENT) * _ALIGNMENT
            ats.append(at)
            at += math.prod(shape) * dtype.itemsize
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        self._memory = mmap.mmap(-1, max(at, 1), flags=flags)
        self.tensors: dict[str, torch.Tensor] = {}
        self._addresses: list[tuple[int, int]] = []
        for (name, dtype, shape), start in zip(described, ats, strict=True):
            nbytes = math.prod(shape) * dtype.itemsize
            if nbytes:
                flat = torch.frombuffer(lend(self._memory, start, nbytes), dtype=torch.uint8)
                self.tensors[name] = flat.view(dtype).reshape(shape)
                self._addresses.append((flat.data_ptr(), nbytes))
            else:
                self.tensors[name] = torch.empty(shape, dtype=dtype)

    def reading(self, chunks: AsyncIterator[Chunk]) -> Callable[[int, int], Iterator[Chunk] | None]:
        """What gives the bytes of a storage, by its address and size: to be called in a thread, in their order.

        It returns None for memory that is none of these tensors'.
        """
        waiting = iter(self._addresses)
        expected = next(waiting, None)

        def take(address: int, nbytes: int) -> Iterator[Chunk] | None:
            nonlocal expected
            if expected is None or address != expected[0]:
                return None
            if nbytes != expected[1]:
                raise RuntimeError("torch.save writes a storage otherwise than in one piece: please report it.")
            expected = next(waiting, None)
            return _taken(chunks, nbytes)

        return take


async def _next(chunks: AsyncIterator[Chunk]) -> Chunk:
    return await anext(chunks)


def _taken(chunks: AsyncIterator[Chunk], nbytes: int) -> Iterator[Chunk]:
    """The next chunks, up to a number of bytes; one by one, as they hold memory."""
    while nbytes:
        chunk = from_thread.run(_next, chunks)
        nbytes -= len(chunk)
        yield chunk
        del chunk
