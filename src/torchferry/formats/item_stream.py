"""Many items as one stream of chunks: each a ``torch.save`` archive of one tensor, or bytes as they are.

That is what a shard of ``torch.distributed.checkpoint`` is, and a safetensors file. Contiguous CPU tensors of 1 MiB or
more are lent, whatever storage they are a part of; everything else is copied into blocks of the memory ledger, at most
4 MiB at a time: small tensors, tensors on a device, tensors that are not contiguous. An archive stores its tensor
contiguous, and nothing else of its storage.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from isal import isal_zlib

from torchferry.engine.memory import BLOCK_SIZE, CPU_SAVES, EVERYTHING_ELSE, Claim, address_of
from torchferry.engine.types import Chunk
from torchferry.engine.writer import UploadPlan
from torchferry.formats.changes import Changes
from torchferry.formats.checksum import Crc32Filler
from torchferry.formats.torch_hooks import torch_save
from torchferry.formats.torch_stream import (
    DEVICE_SHARE,
    LENT_FROM,
    PIECE,
    SMALL_PART,
    ChunkWriter,
    Storages,
    TorchStream,
    fills_crc32s,
)

if TYPE_CHECKING:
    from torchferry.engine.types import Buffer

__all__ = ["Item", "ItemStream", "Written", "memory_of", "pieces_of", "stand_in_for"]

_ITEM_OVERHEAD = 2048  # bytes of an archive beside the tensor, about
_KEPT = 1024  # kinds of tensors whose archives are remembered
_SHORT = 64 << 10  # bytes: what torch writes around a tensor is shorter
_MAP_NORESERVE = 0x4000  # Linux; Python has a name for it since 3.13


@dataclass(frozen=True, slots=True)
class Item:
    """Something to be written.

    Attributes:
        nbytes: About how many bytes it has.
        resolve: Called in the thread that writes, when its turn has come: a tensor, or bytes to be stored as they are.
        is_bare: Whether of a tensor only the bytes of its elements are stored, and no archive.
        held_by: Called just before: tensors that somebody keeps; where one of them changes, this one has changed.
    """

    nbytes: int
    resolve: Callable[[], torch.Tensor | memoryview]
    is_bare: bool = False
    held_by: Callable[[], Iterable[torch.Tensor]] = tuple


@dataclass(frozen=True, slots=True)
class Written:
    """Where an item is in the stream.

    Attributes:
        offset: Of its first byte.
        length: In bytes.
        data_offset: Where in the item the tensor's bytes begin, which are contiguous there; None where the item is no
            archive of a plain tensor, or the tensor is empty.
        crc32: Of the tensor's bytes where there is a ``data_offset``; of the whole item where there is none. 0 where
            nobody needs it.
    """

    offset: int
    length: int
    data_offset: int | None
    crc32: int


class ItemStream(TorchStream):
    """The chunks of many items, one after the other.

    Args:
        items: What to write, in order.
        plan_for: As in :class:`TorchStream`.
        part_size: The same.
        url: The same.
        needs_crc32s: Whether the chunks of bare items are to have CRC32s.

    Attributes:
        written: Where each item is; complete when all chunks were taken.
    """

    def __init__(
        self,
        items: Sequence[Item],
        *,
        plan_for: Callable[[int, int | None], UploadPlan] = UploadPlan.for_size,
        part_size: int | None = None,
        url: str,
        needs_crc32s: bool = True,
    ) -> None:
        super().__init__(None, plan_for=plan_for, part_size=part_size, url=url)
        self.written: list[Written] = []
        self._items = items
        self._needs_crc32s = needs_crc32s

    def _torch_save(self) -> None:
        first = self._items[0].resolve() if self._items else None
        has_archives = not all(item.is_bare for item in self._items)
        writer = _ItemWriter(
            self._chunks.put,
            self._changes,
            fill=has_archives and torch.serialization.get_crc32_options() and fills_crc32s(),
            needs_crc32s=self._needs_crc32s,
        )
        writer.begin(self._begin_items(on_device=self._is_on_device(first)), self.plan)
        try:
            for index, item in enumerate(self._items):
                self._changes.watch(item.held_by(), ())
                value = item.resolve() if index or first is None else first
                first = None
                if isinstance(value, torch.Tensor):
                    self._changes.watch_while_alive(value)  # the rest of a save may take minutes
                self.written.append(writer.write_item(value, is_bare=item.is_bare))
            writer.flush()
        finally:
            writer.close()

    def _is_on_device(self, first: torch.Tensor | memoryview | None) -> bool:
        """Whether tensors are taken to be on a device: where the first one is."""
        return isinstance(first, torch.Tensor) and not first.is_cpu

    def _most_copied(self) -> int:
        """Bytes that are not sent from the tensors' own memory, at most: any tensor may turn out to be copied."""
        return self.size_hint

    def _begin_items(self, *, on_device: bool) -> Claim:
        """Claims memory, and lets the consumer begin."""
        sizes = [item.nbytes for item in self._items]
        self.size_hint = sum(sizes) + sum(_ITEM_OVERHEAD for item in self._items if not item.is_bare)
        lent = 0 if on_device else sum(size for size in sizes if size >= LENT_FROM)
        self._waits_for = ledger = EVERYTHING_ELSE if on_device else CPU_SAVES
        part_size = self._part_size
        if on_device:
            part_size = min(self.plan_size(part_size), ledger.limit // DEVICE_SHARE)
        elif part_size is None and lent < self.size_hint - lent:
            part_size = SMALL_PART
        self.plan = self._plan_for(self.size_hint, part_size)
        return self._begin_with(ledger, self._most_copied())


class _ItemWriter(ChunkWriter):
    """Writes items; what it emits is cut into chunks as in :class:`TorchStream`."""

    def __init__(self, emit: Callable[[Chunk], None], changes: Changes, *, fill: bool, needs_crc32s: bool) -> None:
        super().__init__(Storages(None, are_lent=True), emit, None, changes)
        self._fill = fill
        self._needs_crc32s = needs_crc32s
        self._position = 0
        # What torch writes for a tensor of a dtype and shape, in order, without CRC32s; None for the tensor's bytes.
        self._writes: dict[tuple[torch.dtype, torch.Size], list[bytes | None]] = {}
        if fill:
            torch.serialization.set_crc32_options(compute_crc32=False)  # in this context, which is the thread's own

    def write_item(self, value: torch.Tensor | memoryview, *, is_bare: bool) -> Written:
        if isinstance(value, torch.Tensor) and not is_bare:
            return self._write_tensor(value.detach())
        offset = self._position
        crc32 = None if is_bare and not self._needs_crc32s else _Crc32(None)
        if isinstance(value, torch.Tensor):
            self.put_elements(value.detach().resolve_conj().resolve_neg(), crc32)
        else:
            self.put(memoryview(value).cast("B"), crc32)
        return Written(offset, self._position - offset, None, 0 if crc32 is None else crc32.total)

    def put_elements(self, tensor: torch.Tensor, crc32: _Crc32 | None) -> None:
        """Emits the bytes of a tensor's elements, one after the other."""
        if tensor.is_cpu and tensor.is_contiguous():
            self.put(memory_of(tensor), crc32)
            return
        for piece in pieces_of(tensor, BLOCK_SIZE):
            self.copy(memory_of(piece.cpu().contiguous()), crc32)

    def put(self, view: memoryview, crc32: _Crc32 | None) -> None:
        """Emits bytes that stay as they are until they are sent where they are many; copies them where they are few."""
        self._position += len(view)
        if len(view) >= LENT_FROM:
            self._emit_copies()
            self._emit_lent(view.toreadonly(), crc32)
        else:
            self.copy(view, crc32, counted=True)

    def _emit_lent(self, view: memoryview, crc32: _Crc32 | None) -> None:
        while len(view):
            piece = view[: min(len(view), self._left, PIECE)]
            value = None
            if crc32 is not None:
                value = isal_zlib.crc32(piece)
                crc32.add(piece, value)
            self._send(Chunk(piece, value))
            view = view[len(piece) :]
            self._left -= len(piece)
            if not self._left:
                self._part += 1
                self._left = self._plan.part_at(self._part)

    def copy(self, view: memoryview, crc32: _Crc32 | None, *, counted: bool = False) -> None:
        """Copies bytes, which may change when this returns."""
        if not counted:
            self._position += len(view)
        if crc32 is not None:
            crc32.add(view, isal_zlib.crc32(view))
        self._copy(view)

    def _write_tensor(self, tensor: torch.Tensor) -> Written:
        offset = self._position
        if not is_plain(tensor):
            archive = _Archive(self, tensor, Crc32Filler() if self._fill else None, data=None)
            torch_save(tensor.cpu(), archive)  # type: ignore[arg-type]  # write and flush will do
            return Written(offset, self._position - offset, None, archive.crc32.total)
        tensor = tensor.resolve_conj().resolve_neg()
        lent = tensor.is_cpu and tensor.is_contiguous()
        if not lent and not self._fill:  # torch reads the bytes itself, to compute their CRC32
            tensor, lent = tensor.cpu().contiguous(), True
        kind = (tensor.dtype, tensor.shape)
        writes = self._writes.get(kind)
        filler = Crc32Filler() if self._fill else None
        if writes is not None:
            archive = _Archive(self, tensor, filler, data=None if lent else tensor)
            archive.replay(writes)
        else:
            stand_in = _exact(tensor) if lent else stand_in_for(tensor.shape, tensor.dtype)
            archive = _Archive(self, stand_in, filler, data=None if lent else tensor)
            torch_save(stand_in, archive)  # type: ignore[arg-type]  # the same
            if self._fill and len(self._writes) < _KEPT:
                self._writes[kind] = archive.writes
        crc32 = archive.crc32.total if archive.data_offset is None else archive.data_crc32
        data_offset = None if archive.data_offset is None else archive.data_offset - offset
        return Written(offset, self._position - offset, data_offset, crc32)


class _Archive:
    """The file object that ``torch.save`` writes one tensor into.

    Args:
        out: Where it goes.
        stand_in: What torch saves.
        filler: Fills in the CRC32s; None where torch computes them.
        data: What is stored in place of the memory of ``stand_in``; None for that memory.

    Attributes:
        crc32: Of all that was written, where there is no filler or no data.
        data_offset: Where in the stream the tensor's bytes are.
        data_crc32: Theirs.
    """

    def __init__(
        self, out: _ItemWriter, stand_in: torch.Tensor, filler: Crc32Filler | None, *, data: torch.Tensor | None
    ) -> None:
        self.crc32 = _Crc32(None)
        self.data_offset: int | None = None
        self.data_crc32 = 0
        self._out = out
        self._filler = filler
        self._data = data
        self._plain = is_plain(stand_in)
        self._stand_in = stand_in
        self.writes: list[bytes | None] = []

    def write(self, data: memoryview) -> int:
        size = len(data)
        if self._is_data(data):
            self.writes.append(None)
            self._write_data()
            return size
        self.writes.append(bytes(data) if size < _SHORT else None)
        view = memoryview(data if self._filler is None else self._filler.fill(data))
        self._out.copy(view, self.crc32)
        return size

    def replay(self, writes: Sequence[bytes | None]) -> None:
        """Writes what torch wrote for a tensor of the same dtype and shape, around the bytes of this one."""
        assert self._filler is not None  # noqa: S101 - without, torch computes CRC32s
        filled: list[Buffer] = []
        for data in writes:
            if data is not None:
                filled.append(self._filler.fill(data))
                continue
            self._out.copy(memoryview(b"".join(filled)), self.crc32)
            filled.clear()
            self._write_data()
        self._out.copy(memoryview(b"".join(filled)), self.crc32)

    def _write_data(self) -> None:
        self.data_offset = self._out._position  # noqa: SLF001  # its own writer
        crc32 = _Crc32(self._filler)
        self._out.put_elements(self._stand_in if self._data is None else self._data, crc32)
        self.data_crc32 = crc32.total

    def flush(self) -> None:
        """What is copied goes out with the next items."""

    def _is_data(self, data: memoryview) -> bool:
        stand_in = self._stand_in
        return (
            self._plain
            and self.data_offset is None
            and len(data) == stand_in.nbytes
            and address_of(data) == stand_in.data_ptr()
        )


class _Crc32:
    """The CRC32 of bytes that come in pieces; tells ``filler`` of them, if there is one."""

    def __init__(self, filler: Crc32Filler | None) -> None:
        self.total = 0
        self._filler = filler

    def add(self, data: Any, crc32: int) -> None:
        self.total = isal_zlib.crc32_combine(self.total, crc32, len(data))
        if self._filler is not None:
            self._filler.add(data, crc32)


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is nothing but dtype, shape and bytes in memory."""
    return type(tensor) is torch.Tensor and tensor.layout is torch.strided and not tensor.is_quantized


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor; views of it keep the tensor.

    Raises:
        ValueError: what lies there is not its values: those are conjugated, or negated, when it is read.
    """
    if tensor.is_conj() or tensor.is_neg():
        raise ValueError("the memory of a conjugated or negated view is not its values")
    if not tensor.nbytes:
        return memoryview(b"")
    memory = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    memory.tensor = tensor  # type: ignore[attr-defined]  # every view keeps `memory`
    return memoryview(memory).cast("B")


def stand_in_for(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of that shape in memory that is never touched, and so takes none."""
    nbytes = dtype.itemsize * torch.Size(shape).numel()
    if not nbytes:
        return torch.empty(tuple(shape), dtype=dtype)
    if sys.platform == "win32":
        return torch.empty(tuple(shape), dtype=dtype)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (_MAP_NORESERVE if sys.platform == "linux" else 0)
    return _tensor_at(mmap.mmap(-1, nbytes, flags=flags), shape, dtype)


def pieces_of(tensor: torch.Tensor, longest: int) -> Iterator[torch.Tensor]:
    """Cuts a tensor into views of at most ``longest`` bytes, which one after the other are its elements in order."""
    if tensor.nbytes <= longest or not tensor.dim():
        yield tensor
        return
    row = tensor.nbytes // tensor.shape[0]
    if row > longest:
        for part in tensor.unbind():
            yield from pieces_of(part, longest)
    else:
        rows = longest // row
        for first in range(0, tensor.shape[0], rows):
            yield tensor[first : first + rows]


def _exact(tensor: torch.Tensor) -> torch.Tensor:
    """The same contiguous CPU tensor, as all of a storage."""
    if tensor.untyped_storage().nbytes() == tensor.nbytes and tensor.stride() == _strides(tensor.shape):
        return tensor
    if not tensor.nbytes:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    return _tensor_at(memory_of(tensor), tensor.shape, tensor.dtype)


def _tensor_at(memory: Any, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(tuple(shape))


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(size, 1))
    return tuple(reversed(strides)) if len(shape) else ()
