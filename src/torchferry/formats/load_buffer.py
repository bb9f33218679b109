"""The memory that a stored checkpoint is read into, and that its tensors then lie in.

The mirror is as long as the object. What is needed of the object is written to the same offsets, from many threads at
once; the rest stays untouched, and takes no memory. Then torch unpickles it, and every tensor is a view of it: nothing
is copied again.

It is ordinary private memory, in huge pages where the system has them: filling those takes a sixth of the time that
filling small ones takes, or a file in memory (Linux 6.18, ``benchmarks/``).
"""

from __future__ import annotations

import inspect
import mmap
import pickle
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import _weights_only_unpickler, serialization

from torchferry.engine.memory import copy_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torchferry.engine.types import Buffer
    from torchferry.formats.archive import Archive

__all__ = ["Mirror"]

_HUGE_PAGE = 2 << 20  # bytes, on x86 and on arm64 with small pages of 4 KiB
_MAP_NORESERVE = 0x4000  # Linux, on all architectures that torch runs on; Python has a name for it since 3.13

# torch.load maps a file and hands the mapping to this function. Ours is no file, so it is called directly: it is the
# same from torch 2.7 to 2.14. Where it is not what it was, torch.load reads the mirror as a file object, and copies.
_PARAMETERS = set(inspect.signature(serialization._load).parameters)  # noqa: SLF001
_LOADS_FROM_STORAGE = {"zip_file", "map_location", "pickle_module", "overall_storage"} <= _PARAMETERS
_TAKES_WEIGHTS_ONLY = "weights_only" in _PARAMETERS  # from torch 2.14: it then checks the indices of sparse tensors


class Mirror:
    """``size`` bytes of memory with the bytes of an object.

    The memory is freed when the mirror and all tensors in it are gone.

    Args:
        size: Of the object, in bytes.
        sparse: Whether little of it may be needed: then the object may be larger than the machine's memory.

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
        """Prepares for ranges to be filled: with huge pages, where they are large enough for some.

        Only there: a huge page takes 2 MiB, however little is written to it, such as a local header.
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
            raise ValueError(f"The bytes {start} to {stop} are not within the {len(self._memory)} of the mirror.")
        return memoryview(self._memory)[start:stop]

    def write(self, offset: int, buffer: Buffer) -> None:
        """Writes the bytes that the object has at ``offset``. May be called in many threads at once."""
        copy_bytes(self.view(offset, offset + len(buffer)), buffer)

    def write_headers(self, archive: Archive) -> None:
        """Writes a local header for each record of the archive over what may be there, damaged or not read at all.

        torch learns from them where a record's data starts. To be called after everything is written.
        """
        for offset, header in archive.local_headers():
            self._memory[offset : offset + len(header)] = header

    def load(self, *, map_location: Any, weights_only: bool) -> Any:
        """What ``torch.load`` makes of an archive in the mirror; its tensors lie in the mirror."""
        if not _LOADS_FROM_STORAGE:
            return self.load_copy(map_location=map_location, weights_only=weights_only)
        storage = torch.frombuffer(self._memory, dtype=torch.uint8).untyped_storage()  # keeps the memory
        self._memory.seek(0)
        unpickler = _weights_only_unpickler if weights_only else pickle
        options = {"weights_only": weights_only} if _TAKES_WEIGHTS_ONLY else {}
        with serialization._open_zipfile_reader(self._memory) as reader:  # type: ignore[arg-type]  # noqa: SLF001
            return serialization._load(  # type: ignore[no-untyped-call]  # noqa: SLF001
                reader, map_location, unpickler, overall_storage=storage, encoding="utf-8", **options
            )

    def load_copy(self, *, map_location: Any, weights_only: bool) -> Any:
        """``torch.load`` of the mirror as of a file, in any format; the tensors are copies."""
        self._memory.seek(0)
        return torch.load(self._memory, map_location=map_location, weights_only=weights_only)  # type: ignore[arg-type]
