"""Where the bytes of a tensor are in an item that somebody else's writer wrote: a ``torch.save`` archive."""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from isal import isal_zlib

from torchferry.errors import CheckpointCorruptError
from torchferry.formats.archive import (
    LOCAL_HEADER_SIZE,
    SNIFF_SIZE,
    ZIP_FORMAT,
    Archive,
    find_directory,
    parse_directory,
    read_archive,
    sniff,
)
from torchferry.formats.checksum import Checksums
from torchferry.formats.opcodes import scan_pickle
from torchferry.formats.stand_ins import STORAGE_DTYPES

__all__ = ["Guess", "Item", "StoredTensor", "contiguous_strides", "find_tensor", "read_directory"]

_STORAGES = {name: dtype for name, dtype in STORAGE_DTYPES.items() if not name.startswith("Q")}  # not quantized


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in an item.

    Attributes:
        dtype: Of its elements.
        shape: Its sizes.
        strides: Of its elements.
        first: Where its first element is in the item, in bytes.
        record_offset: Where its storage is in the item.
        record_size: Bytes of that.
        crc32: Theirs; None where the archive carries none.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    first: int
    record_offset: int
    record_size: int
    crc32: int | None


class Guess:
    """Where the tensor of an item should be, as in another one that was looked into; its archive, which tells.

    Args:
        stored: Where; without a CRC32.
        length: Of the item.

    Attributes:
        stored: As above.
        head: Memory for the item's bytes before its storage.
        tail: Memory for those behind it.
    """

    def __init__(self, stored: StoredTensor, length: int) -> None:
        self.stored = stored
        self.head = bytearray(stored.record_offset)
        self.tail = bytearray(length - stored.record_offset - stored.record_size)
        self._length = length

    @classmethod
    def like(cls, other: StoredTensor, shape: Sequence[int], length: int) -> Guess | None:
        """What is to be expected of an item of the same dtype, as many dimensions and as large an archive.

        Args:
            other: What was found in the one that was looked into.
            shape: Of the item's tensor.
            length: Of the item.

        Returns:
            None where the other one is not all of its storage, in order.
        """
        nbytes = torch.Size(shape).numel() * other.dtype.itemsize
        is_whole = other.record_size == torch.Size(other.shape).numel() * other.dtype.itemsize
        if not is_whole or other.strides != contiguous_strides(other.shape) or other.record_offset + nbytes >= length:
            return None
        strides = contiguous_strides(shape)
        return cls(replace(other, shape=tuple(shape), strides=strides, record_size=nbytes, crc32=None), length)

    def confirmed(self, url: str) -> StoredTensor | None:
        """What the archive says when it is there, with its CRC32; None where that is something else.

        Args:
            url: For messages.
        """
        try:
            found = find_tensor(bytes(self.head), bytes(self.tail), self._length, url)
        except CheckpointCorruptError:
            return None  # what was taken for the archive's bytes may be others
        return found if found is not None and replace(found, crc32=None) == self.stored else None


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(size, 1))
    return tuple(reversed(strides[: len(shape)]))


def find_tensor(head: bytes, tail: bytes, length: int, url: str) -> StoredTensor | None:
    """The tensor of an archive whose first and last bytes are known.

    Args:
        head: Of the item; up to its storage at least.
        tail: Of the item; from the end of its storage at least.
        length: Of the item.
        url: For messages.

    Returns:
        None where it is not one plain tensor with one storage, or its pickle is damaged: torch has to load it.

    Raises:
        CheckpointCorruptError: the archive is damaged.
    """
    archive = read_directory(head, tail, length, url)
    return None if archive is None else _tensor_of(archive, head, url)


def _tensor_of(  # noqa: PLR0911 - there are many ways not to be one
    archive: Archive, head: bytes | bytearray, url: str
) -> StoredTensor | None:
    pickled = archive.get("data.pkl")
    if pickled is None or pickled.end > len(head):
        return None
    if pickled.crc32 is not None and isal_zlib.crc32(head[pickled.offset : pickled.end]) != pickled.crc32:
        return None  # whoever loads all of it says that it is damaged
    scan_pickle(bytes(head[pickled.offset : pickled.end]), url)
    try:
        found = _Unpickler(io.BytesIO(head[pickled.offset : pickled.end])).load()
    except Exception:  # noqa: BLE001 - whatever it is: torch has to look at it
        return None
    if not isinstance(found, _Tensor):
        return None
    record = archive.get(f"data/{found.key}")
    byteorder = archive.get("byteorder")
    if record is None or (
        byteorder is not None and bytes(head[byteorder.offset : byteorder.end]) not in {b"", b"little"}
    ):
        return None
    if not _is_within(found, record.size):
        return None
    first = record.offset + found.offset * found.dtype.itemsize
    return StoredTensor(found.dtype, found.shape, found.strides, first, record.offset, record.size, record.crc32)


def read_directory(head: bytes | bytearray, tail: bytes | bytearray, length: int, url: str) -> Archive | None:
    """The directory of an archive whose first and last bytes are known; None where it is not in them, or is none.

    Raises:
        CheckpointCorruptError: it is damaged.
    """
    directory = find_directory(tail, length, url)
    if directory is None or directory.start < length - len(tail):
        return None
    start = directory.start - (length - len(tail))
    archive = parse_directory(tail[start : start + directory.size], directory, url)
    if archive.unproven:
        pieces = [head[at : at + LOCAL_HEADER_SIZE] or _in_tail(tail, length, at) for at in archive.unproven]
        if any(len(piece) != LOCAL_HEADER_SIZE for piece in pieces):
            return None
        archive = archive.settle(b"".join(pieces))
    return archive


class Item:
    """An item that is in memory as a whole.

    Args:
        content: Its bytes; complete before anything is asked.
        url: For messages.

    Attributes:
        content: As above.
    """

    def __init__(self, content: bytearray, url: str) -> None:
        self.content = content
        self._url = url

    @cached_property
    def _archive(self) -> Archive | None:
        is_archive = sniff(bytes(self.content[:SNIFF_SIZE])) == ZIP_FORMAT
        return read_archive(self.content, self._url) if is_archive else None

    def check(self) -> None:
        """Checks every CRC32.

        Raises:
            CheckpointCorruptError: a record does not match, or the archive is damaged.
        """
        if self._archive is not None:
            checksums = Checksums(self._archive.records, self._url)
            checksums.add(0, self.content)
            checksums.finish()

    def tensor(self) -> torch.Tensor | None:
        """The tensor, in the item's memory; twice as fast as what torch makes of it.

        Returns:
            None where it is not one plain tensor: torch has to load it.

        Raises:
            CheckpointCorruptError: the archive is damaged.
        """
        stored = None if self._archive is None else _tensor_of(self._archive, self.content, self._url)
        if stored is None:
            return None
        record = memoryview(self.content)[stored.record_offset : stored.record_offset + stored.record_size]
        first = (stored.first - stored.record_offset) // stored.dtype.itemsize
        try:
            return torch.frombuffer(record, dtype=stored.dtype).as_strided(stored.shape, stored.strides, first)
        except (RuntimeError, TypeError, ValueError):  # it is empty, or of a dtype that this does not take
            return None


def _in_tail(tail: bytes | bytearray, length: int, at: int) -> bytes | bytearray:
    at -= length - len(tail)
    return tail[at : at + LOCAL_HEADER_SIZE] if at >= 0 else b""


def _is_within(found: _Tensor, nbytes: int) -> bool:
    """Whether all elements lie in a storage of so many bytes."""
    numbers = (found.offset, *found.shape, *found.strides)
    if len(found.shape) != len(found.strides) or not all(type(n) is int and n >= 0 for n in numbers):
        return False
    last = found.offset + sum((n - 1) * stride for n, stride in zip(found.shape, found.strides, strict=True))
    return 0 in found.shape or (last + 1) * found.dtype.itemsize <= nbytes


@dataclass(frozen=True, slots=True)
class _Tensor:
    dtype: torch.dtype
    key: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Unpickler(pickle.Unpickler):
    """Unpickles one plain tensor, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if (module, name) == ("torch._utils", "_rebuild_tensor_v3"):
            return _rebuild_with_dtype
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module in {"torch", "torch.storage"} and name.endswith("Storage"):
            return _STORAGES[name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> tuple[torch.dtype, str]:
        _, dtype, key, location, _ = pid
        if location != "cpu":
            raise pickle.UnpicklingError(location)
        return dtype, key


def _rebuild(storage: Any, offset: int, size: Any, stride: Any, _grad: Any, _hooks: Any, more: Any = None) -> _Tensor:
    if more:
        raise pickle.UnpicklingError("a conjugate")
    dtype, key = storage
    return _Tensor(dtype, key, offset, tuple(size), tuple(stride))


def _rebuild_with_dtype(
    storage: Any, offset: int, size: Any, stride: Any, _grad: Any, _hooks: Any, dtype: torch.dtype, more: Any = None
) -> _Tensor:
    if more:
        raise pickle.UnpicklingError("a conjugate")
    return _Tensor(dtype, storage[1], offset, tuple(size), tuple(stride))
