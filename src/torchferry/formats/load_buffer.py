"""The memory that a stored checkpoint is read into, and that its tensors then lie in.

A load buffer is laid out as the object is, or, where a load needs only a part of it, as an archive of that part
(:class:`~torchferry.formats.layout.Layout`). It is written to from many threads at once. Then torch unpickles it, and
every tensor is a view of it: nothing is copied again.

The memory is private and anonymous, in huge pages where the system has them. Filling huge pages takes a sixth of the
time of filling small pages or a file in memory (Linux 6.18, ``benchmarks/``).
"""

from __future__ import annotations

import mmap
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

from torchferry.engine.memory import address_of, copy_bytes
from torchferry.formats.layout import Layout, whole
from torchferry.formats.legacy import check_legacy
from torchferry.formats.lending import lend
from torchferry.formats.torch_hooks import LOADS_IN_PLACE, NO_MODES, TorchModes, load_in_place, torch_load

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torchferry.engine.types import Buffer
    from torchferry.formats.graph import Graph

__all__ = ["LoadBuffer"]

_HUGE_PAGE = 2 << 20  # bytes, on x86 and on arm64 with small pages of 4 KiB
_MAP_NORESERVE = 0x4000  # Linux, on all architectures that torch runs on; Python has a name for it since 3.13


class LoadBuffer:
    """Memory with the bytes of an object.

    The memory is freed when the buffer and all tensors that are views of it are gone; that of a storage of 1 MiB or
    more when its own tensors are.

    Args:
        layout: How it is laid out; a number for all of an object of so many bytes.
        sparse: Whether only a part may be written. Then it may be larger than the machine's memory.

    Raises:
        OSError: there is no memory for all of it, and all of it is needed.
    """

    def __init__(self, layout: Layout | int, *, sparse: bool = False) -> None:
        self._layout = whole(layout) if isinstance(layout, int) else layout
        size = self._layout.size
        if sys.platform == "win32":
            self._memory = mmap.mmap(-1, size)
            return
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        if sparse and sys.platform == "linux":
            flags |= _MAP_NORESERVE
        self._memory = mmap.mmap(-1, size, flags=flags)

    def expect(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Asks for huge pages for those of the ranges, soon to be filled, that have at least 2 MiB.

        Not for all: a huge page takes 2 MiB of memory, even if only a local header of 30 bytes is written to it.
        """
        if not hasattr(mmap, "MADV_HUGEPAGE"):
            return
        with suppress(OSError):  # a kernel without huge pages
            for start, stop, at in (part for extent in ranges for part in self._layout.parts(*extent)):
                if stop - start >= _HUGE_PAGE:
                    first = at // mmap.PAGESIZE * mmap.PAGESIZE  # so that neighbours overlap, and become one
                    self._memory.madvise(mmap.MADV_HUGEPAGE, first, at + stop - start - first)

    def view(self, start: int, stop: int) -> memoryview:
        """The memory for the bytes ``start`` to ``stop`` of the object: to be written to, from any thread."""
        parts = list(self._layout.parts(start, stop))
        if len(parts) != 1 or parts[0][:2] != (start, stop):
            raise ValueError(f"The bytes {start} to {stop} of the object are not within the load buffer.")
        at = parts[0].at
        return memoryview(self._memory)[at : at + stop - start]

    @property
    def address(self) -> int:
        """Where in memory it begins."""
        return address_of(memoryview(self._memory))

    def write(self, offset: int, buffer: Buffer) -> None:
        """Writes what the load needs of the bytes that the object has at ``offset``. May be called in many threads."""
        data = memoryview(buffer)
        for start, stop, at in self._layout.parts(offset, offset + len(data)):
            view = memoryview(self._memory)[at : at + stop - start]
            copy_bytes(view, data[start - offset : stop - offset])

    def finish(self) -> None:
        """Writes what the layout says that does not come from the object, such as a new local header for each record.

        Call it after everything else is written. torch reads in local headers where a record's data starts. Those of
        the object may be damaged, or were not read.
        """
        for offset, data in self._layout.written():
            self._memory[offset : offset + len(data)] = data

    def tensor(self, at: int, shape: Sequence[int], dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        """A tensor that is a view of the buffer's memory, from ``at`` on, and keeps it alive."""
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        if not nbytes:
            return torch.empty(tuple(shape), dtype=dtype)
        flat = torch.frombuffer(lend(self._memory, at, nbytes), dtype=torch.uint8)
        return flat.view(dtype).view(tuple(shape))

    def load(self, *, map_location: Any, weights_only: bool, modes: TorchModes = NO_MODES) -> Any:
        """What ``torch.load`` makes of an archive in the buffer; its tensors are views of the buffer.

        Where this torch has no function for that, they are copies.
        """
        if not LOADS_IN_PLACE:
            return self.load_copy(map_location=map_location, weights_only=weights_only, modes=modes)
        return load_in_place(self._memory, map_location=map_location, weights_only=weights_only, modes=modes)

    def check_legacy(self, url: str, *, weights_only: bool) -> Graph | None:
        """Checks a checkpoint in the legacy format before torch sees it (:func:`.legacy.check_legacy`).

        Returns:
            What is in it, where there is to be ``weights_only``.

        Raises:
            CheckpointCorruptError: it is damaged, or would take too much time or memory.
        """
        return check_legacy(self._memory, url, weights_only=weights_only)

    def load_copy(self, *, map_location: Any, weights_only: bool, modes: TorchModes = NO_MODES) -> Any:
        """``torch.load`` of the buffer as a file object, in any format; the tensors are copies."""
        self._memory.seek(0)
        file: Any = self._memory
        with modes.applied():
            return torch_load(file, map_location=map_location, weights_only=weights_only)
