"""The memory that a stored checkpoint is read into, and that its tensors then lie in.

A load buffer is as long as the object. What the load needs of the object is written to the same offsets, from many
threads at once. The rest is never written, and takes no memory. Then torch unpickles the buffer, and every tensor is a
view of it: nothing is copied again.

The memory is private and anonymous, in huge pages where the system has them. Filling huge pages takes a sixth of the
time of filling small pages or a file in memory (Linux 6.18, ``benchmarks/``).
"""

from __future__ import annotations

import mmap
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

from torchferry.engine.memory import copy_bytes
from torchferry.formats.graph import check_legacy
from torchferry.formats.torch_hooks import LOADS_IN_PLACE, load_in_place

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torchferry.engine.types import Buffer
    from torchferry.formats.archive import Archive

__all__ = ["LoadBuffer"]

_HUGE_PAGE = 2 << 20  # bytes, on x86 and on arm64 with small pages of 4 KiB
_MAP_NORESERVE = 0x4000  # Linux, on all architectures that torch runs on; Python has a name for it since 3.13


class LoadBuffer:
    """``size`` bytes of memory with the bytes of an object.

    The memory is freed when the buffer and all tensors that are views of it are gone.

    Args:
        size: Of the object, in bytes.
        sparse: Whether only a part may be needed. Then the object may be larger than the machine's memory.

    Raises:
        OSError: there is no memory for all of it, and all of it is needed.
    """

    def __init__(self, size: int, *, sparse: bool = False) -> None:
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
            for start, stop in ranges:
                if stop - start >= _HUGE_PAGE:
                    first = start // mmap.PAGESIZE * mmap.PAGESIZE  # so that neighbours overlap, and become one
                    self._memory.madvise(mmap.MADV_HUGEPAGE, first, stop - first)

    def view(self, start: int, stop: int) -> memoryview:
        """The memory for the bytes ``start`` to ``stop`` of the object: to be written to, from any thread."""
        if not 0 <= start <= stop <= len(self._memory):
            raise ValueError(f"The bytes {start} to {stop} are not within the {len(self._memory)} of the load buffer.")
        return memoryview(self._memory)[start:stop]

    def write(self, offset: int, buffer: Buffer) -> None:
        """Writes the bytes that the object has at ``offset``. May be called in many threads at once."""
        copy_bytes(self.view(offset, offset + len(buffer)), buffer)

    def write_headers(self, archive: Archive) -> None:
        """Writes a new local header for each record of the archive; call it after everything else is written.

        torch reads there where a record's data starts. Those of the object may be damaged, or were not read.
        """
        for offset, header in archive.local_headers():
            self._memory[offset : offset + len(header)] = header

    def load(self, *, map_location: Any, weights_only: bool) -> Any:
        """What ``torch.load`` makes of an archive in the buffer; its tensors are views of the buffer.

        Where this torch has no function for that, they are copies.
        """
        if not LOADS_IN_PLACE:
            return self.load_copy(map_location=map_location, weights_only=weights_only)
        return load_in_place(self._memory, map_location=map_location, weights_only=weights_only)

    def check_legacy(self, url: str, *, weights_only: bool) -> None:
        """Checks a checkpoint in the legacy format before torch sees it (:func:`.graph.check_legacy`).

        Raises:
            CheckpointCorruptError: it is damaged, or would take too much time or memory.
        """
        check_legacy(self._memory, url, weights_only=weights_only)

    def load_copy(self, *, map_location: Any, weights_only: bool) -> Any:
        """``torch.load`` of the buffer as a file object, in any format; the tensors are copies."""
        self._memory.seek(0)
        return torch.load(self._memory, map_location=map_location, weights_only=weights_only)  # type: ignore[arg-type]
