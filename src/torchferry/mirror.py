"""A sparse file in memory with the bytes of a stored checkpoint, for torch to map.

The mirror is as long as the object, and all holes at first. What is needed of the object is written to the same
offsets; then ``torch.load`` maps the file, and the tensors lie in it: they are not copied again.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch.serialization import set_default_mmap_options

if TYPE_CHECKING:
    from torchferry.archive import Archive
    from torchferry.storage.base import Chunk

__all__ = ["Mirror", "load_mapped"]

_MMAP_OPTIONS = threading.RLock()


class Mirror:
    """A sparse file of ``size`` bytes: a memfd on Linux, a temporary file elsewhere.

    A context manager: at its end the file is closed and gone. What torch has mapped of it lives on, as long as a
    tensor needs it. ``write`` may be called in many threads at once.

    Attributes:
        path: The file's path, for as long as it is open.
    """

    def __init__(self, size: int) -> None:
        self._unlink = False
        try:
            self._fd = os.memfd_create("torchferry", os.MFD_CLOEXEC)
            self.path = f"/proc/self/fd/{self._fd}"
        except (AttributeError, OSError):  # no Linux, or a sandbox that forbids it
            self._fd, self.path = tempfile.mkstemp(prefix="torchferry-")
            self._unlink = True
        try:
            os.ftruncate(self._fd, size)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)
        if self._unlink:
            Path(self.path).unlink()

    def write(self, offset: int, buffer: Chunk) -> None:
        """Writes the bytes that the object has at ``offset``."""
        view = memoryview(buffer).cast("B")
        while view:
            written = os.pwrite(self._fd, view, offset)
            offset += written
            view = view[written:]

    def write_headers(self, archive: Archive) -> None:
        """Writes a local header for each record of the archive over what may be there, damaged or not read at all.

        torch learns from them where a record's data starts. To be called after everything is written.
        """
        for offset, header in archive.local_headers():
            os.pwrite(self._fd, header, offset)

    def load(self, *, map_location: Any, weights_only: bool) -> Any:
        """``torch.load`` of the archive; its tensors share their memory with the mirror."""
        return load_mapped(self.path, shared=True, map_location=map_location, weights_only=weights_only)


def load_mapped(path: str, *, shared: bool, map_location: Any, weights_only: bool) -> Any:
    """``torch.load(path, mmap=True)``, with the mapping shared with the file or private to this process.

    Writing to a tensor in a shared mapping writes to the file, and costs no memory beyond it; in a private one the
    page is copied first.

    torch takes the kind of mapping from a setting that, in some versions, belongs to the whole process. It is set
    under a lock and put back at once.
    """
    with _MMAP_OPTIONS, set_default_mmap_options(mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE):
        return torch.load(path, mmap=True, map_location=map_location, weights_only=weights_only)
