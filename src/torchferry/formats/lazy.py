"""Tensors whose bytes come from elsewhere while they are saved: their own memory is reserved, and never touched."""

from __future__ import annotations

import ctypes
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
        left: How many storages have not been asked for yet.
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
        self._extent = (0, 0)  # of the memory
        self._addresses: list[tuple[int, int]] = []
        if at:
            start = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
            self._extent = (start, start + at)
        for (name, dtype, shape), start in zip(described, ats, strict=True):
            nbytes = math.prod(shape) * dtype.itemsize
            if nbytes:
                flat = torch.frombuffer(lend(self._memory, start, nbytes), dtype=torch.uint8)
                self.tensors[name] = flat.view(dtype).reshape(shape)
                self._addresses.append((flat.data_ptr(), nbytes))
            else:
                self.tensors[name] = torch.empty(shape, dtype=dtype)
        self.left = len(self._addresses)

    def reading(self, chunks: AsyncIterator[Chunk]) -> Callable[[int, int], Iterator[Chunk] | None]:
        """What gives the bytes of a storage, by its address and size: to be called in a thread, in their order.

        It returns None for memory that is none of these tensors': what is never read from theirs is zeros.
        """
        waiting = iter(self._addresses)
        first, end = self._extent

        def take(address: int, nbytes: int) -> Iterator[Chunk] | None:
            if not first <= address < end:
                return None
            if (address, nbytes) != next(waiting, None):
                raise RuntimeError("torch.save writes storages in another order, or in pieces: please report it.")
            self.left -= 1
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
