"""Notices that tensors change while they are being sent.

Four looks, from free to dear:

* at where storages are and how large, at the end: ``resize_`` frees their memory, which then is not looked at any more;
* at the tensors' versions (``Tensor._version``), which every operation of torch in place counts up, at the end;
* at 8 bytes in 128 KiB of large storages, at the end: what writes past torch's count (``.data``, numpy, another
  process) and changes whole tensors shows there; what changes few numbers may not. A look takes a millisecond a GiB;
* at the CRC32 of each piece when it has been sent, where the store does not check what it gets.
"""

from __future__ import annotations

import ctypes
import weakref
from collections import deque
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from isal import isal_zlib

from torchferry.errors import ChangedWhileSavingError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import torch

__all__ = ["Changes"]

_SAMPLED = 128 << 10  # bytes of which _LOOK are looked at
_LOOK = 8  # bytes, one of memoryview's "Q": whole numbers, as 0.0 and 1.0 differ in their high bytes only


class Changes:
    """What is known of the tensors of one save, to tell whether they have changed.

    Args:
        url: For messages.

    Attributes:
        recheck: Whether to compute CRC32s a second time; False at first.
    """

    def __init__(self, url: str = "") -> None:
        self.recheck = False
        self._url = url
        self._over = False
        self._versions: list[tuple[Callable[[], torch.Tensor | None], int]] = []
        self._samples: list[tuple[memoryview, bytes]] = []
        self._places: list[tuple[torch.UntypedStorage, tuple[int, int]]] = []
        self._sent: deque[tuple[memoryview, int]] = deque()

    def watch(self, tensors: Iterable[torch.Tensor], storages: Iterable[torch.UntypedStorage]) -> None:
        """Notes the tensors' versions, and how the storages look, as of now.

        Args:
            tensors: Any.
            storages: On the CPU.
        """
        for tensor in tensors:
            self._note(tensor, partial(_itself, tensor))
        for storage in storages:
            memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
            memory.owner = storage  # type: ignore[attr-defined]  # so that it stays
            words = storage.nbytes() // _LOOK * _LOOK
            sampled = memoryview(memory).cast("B")[:words].cast("Q")[:: _SAMPLED // _LOOK]
            self._samples.append((sampled, sampled.tobytes()))
            self._places.append((storage, _place_of(storage)))

    def watch_while_alive(self, tensor: torch.Tensor) -> None:
        """Notes a tensor's version as of now, and keeps nothing: one that is gone by the end was nobody's any more."""
        self._note(tensor, weakref.ref(tensor))

    def _note(self, tensor: torch.Tensor, get: Callable[[], torch.Tensor | None]) -> None:
        with suppress(Exception):  # one that has none: made in inference mode, or of a class of somebody
            self._versions.append((get, tensor._version))  # noqa: SLF001 - there is no public name

    @property
    def takes_time(self) -> bool:
        """Whether :meth:`check` may take more than a moment."""
        return bool(self._samples)

    def sent(self, piece: memoryview, crc32: int) -> None:
        """Notes that a piece has been sent. Safe in a finalizer.

        Args:
            piece: Of the tensors' own memory, which must stay until :meth:`forget`.
            crc32: Computed before it was sent.
        """
        if self.recheck and not self._over:
            self._sent.append((piece, crc32))

    def check_sent(self) -> None:
        """Computes the CRC32 of what was sent since the last time.

        Raises:
            ChangedWhileSavingError: it is not what it was.
        """
        while self._sent:
            piece, crc32 = self._sent.popleft()
            if isal_zlib.crc32(piece) != crc32:
                raise ChangedWhileSavingError.at(self._url)

    def check(self) -> None:
        """Looks at all there is to look at. Takes a millisecond a GiB.

        Raises:
            ChangedWhileSavingError: a tensor has changed since it was noted.
        """
        changed = any(
            (tensor := get()) is not None and tensor._version != version  # noqa: SLF001 - the same
            for get, version in self._versions
        )
        moved = any(_place_of(storage) != place for storage, place in self._places)
        if changed or moved or any(sampled.tobytes() != looked for sampled, looked in self._samples):
            raise ChangedWhileSavingError.at(self._url)
        self.check_sent()

    def forget(self) -> None:
        """Lets go of all tensors and pieces: they may change from now on."""
        self._over = True
        self._versions.clear()
        self._samples.clear()
        self._places.clear()
        self._sent.clear()


def _place_of(storage: torch.UntypedStorage) -> tuple[int, int]:
    return storage.data_ptr(), storage.nbytes()


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
