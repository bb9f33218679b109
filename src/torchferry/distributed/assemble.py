"""An object whose bytes are known but for tensors that lie in other objects: read, put together and checked, in order.

What is written around the tensors comes from torch itself, which saves stand-ins: tensors of the right dtype and shape
in memory that is never touched (:class:`Script`). Their bytes are read when their turn comes, a few blocks ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio
import torch
from isal import isal_zlib

from torchferry.distributed.fetch import Files, fetch
from torchferry.distributed.slices import Direct, Piece
from torchferry.engine.cancellation import in_thread
from torchferry.engine.memory import BLOCK_SIZE, Claim, address_of
from torchferry.engine.types import Buffer, Chunk
from torchferry.formats.checksum import Checksums, Crc32Filler
from torchferry.formats.load_buffer import LoadBuffer
from torchferry.formats.torch_hooks import torch_save
from torchferry.formats.torch_stream import fills_crc32s
from torchferry.objects.streaming import ReadAhead

__all__ = ["Archive", "Assembly", "Data", "Parts", "Script", "StandIns"]

_ALIGNMENT = 64  # of tensors in a block
_JOINED = 64 << 10  # bytes of a chunk that is put together from shorter ones

Parts = Callable[[str, Sequence[int], torch.Tensor], Iterable[tuple[int, Direct | Piece]]]
"""Where the bytes of a part of a tensor are: by its key, the part's offsets, and the memory for it."""


@dataclass(slots=True)
class Data:
    """A tensor's bytes within a script.

    Attributes:
        key: Of the tensor.
        dtype: Of its elements.
        shape: Its sizes.
        offset: Where in the object they begin.
        crc32: Theirs; known when they have been written.
    """

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    crc32: int = 0

    @property
    def nbytes(self) -> int:
        """How many there are."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Archive:
    """In a script: from here on, bytes are of another archive of torch's.

    Attributes:
        fill: Whether its CRC32s are missing; else the bytes stay as they are.
    """

    fill: bool = True


@dataclass(slots=True)
class Script:
    """What an object is made of, in order.

    Attributes:
        entries: Bytes, tensors' data, and marks between archives.
        size: Bytes of all.
    """

    entries: list[bytes | Data | Archive] = field(default_factory=list)
    size: int = 0

    def add(self, data: bytes) -> None:
        """Adds bytes that are known."""
        self.entries.append(data)
        self.size += len(data)

    def add_data(self, key: str, tensor: torch.Tensor) -> Data:
        """Adds the bytes of a tensor, contiguous."""
        data = Data(key, tensor.dtype, tuple(tensor.shape), self.size)
        self.entries.append(data)
        self.size += data.nbytes
        return data

    def add_archive(self, obj: Any, stand_ins: StandIns) -> list[Data]:
        """Adds what ``torch.save`` writes of ``obj``; the tensors of ``stand_ins`` in it are data."""
        self.entries.append(Archive())
        found: list[Data] = []
        script = self

        class File:
            def write(self, data: memoryview) -> int:
                held = stand_ins.find(data)
                if held is None:
                    script.add(bytes(data))
                else:
                    found.append(script.add_data(*held))
                return len(data)

            def flush(self) -> None:
                pass

        computes = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(compute_crc32=False)
        try:
            torch_save(obj, File())  # type: ignore[arg-type]  # write and flush will do
        finally:
            torch.serialization.set_crc32_options(computes)
        return found


class StandIns:
    """Tensors in memory that is never touched.

    Args:
        wanted: Dtype and shape of each, by its key.
    """

    def __init__(self, wanted: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> None:
        self._places: dict[tuple[int, int], str] = {}
        self.tensors: dict[str, torch.Tensor] = {}
        offsets, size = {}, 0
        for key, (dtype, shape) in wanted.items():
            offsets[key] = size
            size += -(-max(torch.Size(shape).numel() * dtype.itemsize, 1) // _ALIGNMENT) * _ALIGNMENT
        memory = LoadBuffer(max(size, 1), sparse=True)
        for key, (dtype, shape) in wanted.items():
            tensor = self.tensors[key] = memory.tensor(offsets[key], shape, dtype)
            if tensor.nbytes:
                self._places[tensor.data_ptr(), tensor.nbytes] = key

    def find(self, data: memoryview) -> tuple[str, torch.Tensor] | None:
        """The tensor whose memory ``data`` is."""
        if not data:
            return None
        key = self._places.get((address_of(data), len(data)))
        return None if key is None else (key, self.tensors[key])


@dataclass(slots=True)
class _Job:
    """Entries whose tensors fit one block.

    Attributes:
        entries: Bytes, marks, and parts of tensors: the data, offsets and sizes of the part, where it is in the block.
        memory: The memory.
        nbytes: What is used of it.
    """

    entries: list[bytes | Archive | tuple[Data, tuple[int, ...], tuple[int, ...], int]] = field(default_factory=list)
    nbytes: int = 0
    memory: memoryview = field(default_factory=lambda: memoryview(b""))
    crc32s: list[int] = field(default_factory=list)
    filled: anyio.Event = field(default_factory=anyio.Event)


class Assembly(ReadAhead[_Job]):
    """The chunks of a script, while :meth:`running`.

    Args:
        script: What to write.
        parts: Where the bytes of tensors are.
        files: What they are read from.
        checksums: Of each file; told of all bytes that are read.
        claim: The memory.
    """

    def __init__(
        self, script: Script, parts: Parts, files: Files, checksums: Sequence[Checksums | None], claim: Claim
    ) -> None:
        super().__init__(claim)
        self._script = script
        self._parts = parts
        self._files = files
        self._checksums = checksums
        self._filler: Crc32Filler | None = None
        self._fills = torch.serialization.get_crc32_options() and fills_crc32s()

    def _jobs(self, block_size: int) -> Iterable[_Job]:
        return _jobs(self._script, block_size)

    async def _read(self, job: _Job) -> None:
        if job.nbytes:
            wanted = await in_thread(self._wanted_by, job)
            await fetch(self._files, wanted, self._checksums, "", finish=False)
            await in_thread(_compute, job)

    async def _chunks(self, job: _Job) -> Iterable[Chunk]:
        return await in_thread(self._chunks_of, job)

    def _finish(self) -> None:
        for checksum in self._checksums:
            if checksum is not None:
                checksum.finish()

    def _chunks_of(self, job: _Job) -> list[Chunk]:
        """The job's chunks, with CRC32s filled in: archives come in order."""
        chunks: list[Chunk] = []
        crc32s = iter(job.crc32s)
        for entry in job.entries:
            if isinstance(entry, Archive):
                self._filler = Crc32Filler() if self._fills and entry.fill else None
            elif isinstance(entry, bytes):
                chunks.append(Chunk(entry if self._filler is None else self._filler.fill(entry)))
            else:
                data, _, lengths, at = entry
                nbytes = torch.Size(lengths).numel() * data.dtype.itemsize
                view, crc32 = job.memory[at : at + nbytes].toreadonly(), next(crc32s)
                if self._filler is not None:
                    self._filler.add(view, crc32)
                data.crc32 = isal_zlib.crc32_combine(data.crc32, crc32, nbytes)
                chunks.append(Chunk(view, crc32))
        job.memory = memoryview(b"")  # the chunks hold it now
        return list(_joined(chunks))

    def _wanted_by(self, job: _Job) -> list[tuple[int, Direct | Piece]]:
        wanted: list[tuple[int, Direct | Piece]] = []
        for entry in job.entries:
            if isinstance(entry, tuple):
                data, offsets, lengths, at = entry
                wanted += self._parts(data.key, offsets, _target(job.memory, at, lengths, data.dtype))
        return wanted


def _target(block: memoryview, at: int, lengths: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    nbytes = torch.Size(lengths).numel() * dtype.itemsize
    return torch.frombuffer(block[at : at + nbytes], dtype=torch.uint8).view(dtype).view(tuple(lengths))


def _compute(job: _Job) -> None:
    for entry in job.entries:
        if isinstance(entry, tuple):
            data, _, lengths, at = entry
            nbytes = torch.Size(lengths).numel() * data.dtype.itemsize
            job.crc32s.append(isal_zlib.crc32(job.memory[at : at + nbytes]))


def _joined(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    """The same bytes in fewer chunks: torch writes an archive in dozens of pieces, and a store takes each by itself."""
    short: list[Buffer] = []
    size = 0
    for chunk in chunks:
        if short and size + len(chunk) > _JOINED:
            yield Chunk(b"".join(short))
            short, size = [], 0
        if len(chunk) > _JOINED:
            yield chunk
        else:
            short.append(chunk.data)
            size += len(chunk)
    if short:
        yield Chunk(b"".join(short))


def _jobs(script: Script, block_size: int) -> Iterator[_Job]:
    job = _Job()
    for entry in script.entries:
        if not isinstance(entry, Data):
            job.entries.append(entry)
            continue
        for offsets, lengths in _boxes(entry.shape, entry.dtype.itemsize, min(block_size, BLOCK_SIZE)):
            nbytes = torch.Size(lengths).numel() * entry.dtype.itemsize
            at = -(-job.nbytes // _ALIGNMENT) * _ALIGNMENT
            if at + nbytes > block_size:
                yield job
                job, at = _Job(), 0
            job.entries.append((entry, offsets, lengths, at))
            job.nbytes = at + nbytes
    yield job


def _boxes(shape: tuple[int, ...], itemsize: int, longest: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Offsets and sizes of parts of at most ``longest`` bytes that one after the other are all elements in order."""
    nbytes = torch.Size(shape).numel() * itemsize
    if not nbytes:
        return
    if nbytes <= longest or not shape:
        yield (0,) * len(shape), shape
        return
    row = nbytes // shape[0]
    if row > longest:
        for first in range(shape[0]):
            for offsets, lengths in _boxes(shape[1:], itemsize, longest):
                yield (first, *offsets), (1, *lengths)
    else:
        rows = longest // row
        for first in range(0, shape[0], rows):
            yield (first, *(0,) * (len(shape) - 1)), (min(rows, shape[0] - first), *shape[1:])
