"""Compares two checkpoints, wherever they are: by the CRC32s that they carry, where they do."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from isal import isal_zlib

from torchferry.engine.cancellation import in_thread
from torchferry.engine.loops import own_loop, run_on, synchronous
from torchferry.engine.memory import BLOCK_SIZE, EVERYTHING_ELSE
from torchferry.engine.reader import RangeReader
from torchferry.engine.tasks import task_group
from torchferry.engine.transfer import Transfer, current
from torchferry.errors import CheckpointCorruptError, CheckpointFormatError, mask
from torchferry.formats.archive import INDEX_FORMAT, SAFETENSORS_FORMAT, SNIFF_SIZE, Record, Records, sniff
from torchferry.formats.picking import values_of
from torchferry.formats.safetensors_stream import view_bytes
from torchferry.formats.torch_hooks import torch_save
from torchferry.locating import locate, open_object
from torchferry.objects.requests import LoadRequest
from torchferry.objects.safetensors_files import inspect_safetensors
from torchferry.objects.safetensors_opening import open_file, open_files
from torchferry.objects.streaming import Extent, ExtentStream
from torchferry.objects.torch_files import inspect_with_places, load_torch
from torchferry.printable import printable

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem
    from fsspec.callbacks import Callback

    from torchferry.distributed.shards import Shards
    from torchferry.distributed.whole import Contents
    from torchferry.formats.places import TensorInfo, TensorPlace
    from torchferry.manifest import Manifest, PlainValue
    from torchferry.storage.base import Backend

__all__ = ["Diff", "diff", "diff_async"]


@dataclass(frozen=True, slots=True)
class Diff:
    """How a checkpoint differs from another.

    Attributes:
        added: Names of tensors that only the second one has.
        removed: Names of tensors that only the first one has.
        reshaped: Tensors of another shape or dtype: the first one's and the second one's.
        changed: Names of tensors of other content.
        values: Plain values that differ: the first one's and the second one's, None where there is none.
        equal: How many tensors are the same.
    """

    added: tuple[str, ...]
    removed: tuple[str, ...]
    reshaped: Mapping[str, tuple[TensorInfo, TensorInfo]]
    changed: tuple[str, ...]
    values: Mapping[str, tuple[PlainValue, PlainValue]]
    equal: int

    def __bool__(self) -> bool:
        """Whether there is any difference."""
        return bool(self.added or self.removed or self.reshaped or self.changed or self.values)


async def diff_async(
    first: str | os.PathLike[str],
    second: str | os.PathLike[str],
    *,
    first_storage_options: Mapping[str, Any] | None = None,
    second_storage_options: Mapping[str, Any] | None = None,
    first_filesystem: AbstractFileSystem | None = None,
    second_filesystem: AbstractFileSystem | None = None,
    give_up_after: float | None = None,
    callback: Callback | None = None,
) -> Diff:
    """Compares two checkpoints by their tensors and plain values.

    Where both carry CRC32s of a tensor, those are compared, and it is not read: in files of ``torch.save``, and in
    sharded checkpoints, where the tensor is one item, or was split by rows. Else it is read, in bounded memory, from
    what carries none; and one that is transposed, quantized, conjugated or of a subclass is loaded. Tensors of sharded
    checkpoints have the names that they have in one object.

    Args:
        first: The URL or local path of one; of a sharded checkpoint, that of its directory.
        second: That of the other.
        first_storage_options: Arguments for the fsspec filesystem of ``first``.
        second_storage_options: Arguments for that of ``second``.
        first_filesystem: An fsspec filesystem to use as it is, instead of ``first_storage_options``.
        second_filesystem: The same for ``second``.
        give_up_after: Seconds without progress after which failed requests are not repeated any more; 120 by default.
        callback: Told the bytes to read, and those that have arrived.

    Raises:
        CheckpointFormatError: one is no checkpoint; or a tensor has to be loaded, and lies in an object.
        UnsafeCheckpointError: a tensor has to be loaded (of a subclass), and ``weights_only`` refuses it.
        StorageError: see :class:`~torchferry.storage.base.Backend`.
    """
    opened = [
        await locate(url, storage_options=options, filesystem=filesystem)
        for url, options, filesystem in (
            (first, first_storage_options, first_filesystem),
            (second, second_storage_options, second_filesystem),
        )
    ]
    with Transfer("diff", mask(os.fspath(second)), callback=callback, give_up_after=give_up_after).running(None):
        return await run_on(own_loop(opened[0][0].loop), _diff, opened)


diff = synchronous(diff_async)


class _Side(Protocol):
    """One of the two."""

    @property
    def manifest(self) -> Manifest:
        """What is in it."""

    def stored(self, tensor: TensorInfo) -> tuple[Hashable, int] | None:
        """How a tensor lies in what is stored with it, and the CRC32 of that; None where it is not known."""

    def crc32(self, tensor: TensorInfo) -> int | None:
        """The CRC32 of exactly a tensor's elements, in their order, if it carries that."""

    def read_size(self, tensor: TensorInfo) -> int:
        """How many bytes are read of a tensor whose CRC32 is not known."""

    async def read_crc32s(self, tensors: Sequence[TensorInfo]) -> Mapping[str, int]:
        """Reads tensors; returns the CRC32s of their elements, by name."""


@dataclass(frozen=True, slots=True)
class _Object:
    """A file of ``torch.save``, or safetensors.

    Attributes:
        manifest: What is in it.
        source: Where it is; of several files, their index.
        record: The record of a name, if there is one.
        places: How tensors lie in their storages, by name, where that can be told; None where each is its record.
        files: Of several, by the names of the records that are in them.
    """

    manifest: Manifest
    source: RangeReader
    record: Callable[[str], Record | None]
    places: Mapping[str, TensorPlace] | None
    files: Mapping[str, RangeReader] = field(default_factory=dict)

    def stored(self, tensor: TensorInfo) -> tuple[Hashable, int] | None:
        record = self.record(tensor.record or "")
        if record is None or record.crc32 is None or record.size != tensor.nbytes:
            return None  # what else lies there does not matter
        place = self._place_of(tensor)
        return None if place is None else ((place.offset, place.stride), record.crc32)

    def crc32(self, tensor: TensorInfo) -> int | None:
        record = self.record(tensor.record or "")
        if record is None or record.size != tensor.nbytes or not self._is_in_order(tensor):
            return None
        return record.crc32

    def read_size(self, tensor: TensorInfo) -> int:
        return tensor.nbytes if self._is_in_order(tensor) else self._record_of(tensor).size

    async def read_crc32s(self, tensors: Sequence[TensorInfo]) -> Mapping[str, int]:
        in_order = [tensor for tensor in tensors if self._is_in_order(tensor)]
        read = await self._read_in_order(in_order) if in_order else {}
        if others := {tensor.key for tensor in tensors} - {*read}:
            # Elements in another order than they are stored in, or that are more than what lies there: loaded whole,
            # with the value that they are a part of ("w.0" of a tensor "w" that has attributes).
            wholes = {name: _beginnings(name) for name in others}
            wanted = {beginning for beginnings in wholes.values() for beginning in beginnings}
            request = LoadRequest(wanted.__contains__, None, None, weights_only=True, verify=True)
            loaded = await load_torch(self.source, request)
            values, _ = values_of(loaded, self.source.stat.size, self.source.url)
            whole_of: dict[str, str] = {}
            for name in sorted(others):
                whole = next((each for each in wholes[name] if each in values), None)
                if whole is None:
                    raise CheckpointFormatError(
                        f"{self.source.url}: {printable(name)} cannot be compared: it is in an object that has to be "
                        "loaded whole."
                    )
                whole_of[name] = whole
            crc32s = await in_thread(_crc32s_of, {whole: values[whole] for whole in whole_of.values()})
            read |= {name: crc32s[whole] for name, whole in whole_of.items()}
        return read

    def _record_of(self, tensor: TensorInfo) -> Record:
        record = self.record(tensor.record or "")
        assert record is not None  # noqa: S101 - _open has looked
        return record

    def _place_of(self, tensor: TensorInfo) -> TensorPlace | None:
        return None if self.places is None else self.places.get(tensor.key)

    def _is_in_order(self, tensor: TensorInfo) -> bool:
        """Whether the elements, and nothing else that matters, lie in a row."""
        if self.places is None:
            return True
        place = self._place_of(tensor)
        return place is not None and place.is_contiguous

    def _extent(self, tensor: TensorInfo) -> Extent:
        record, place = self._record_of(tensor), self._place_of(tensor)
        source = self.files.get(record.name, self.source)
        if place is None:
            return Extent(source, record.offset, record.end)
        start = record.offset + place.offset * place.dtype.itemsize
        return Extent(source, start, start + tensor.nbytes)

    async def _read_in_order(self, tensors: Sequence[TensorInfo]) -> dict[str, int]:
        read: dict[str, int] = {}
        extents = [self._extent(tensor) for tensor in tensors]
        sizes = [extent.stop - extent.start for extent in extents]
        claim = await EVERYTHING_ELSE.claim_async(min(sum(sizes), 2 * BLOCK_SIZE))
        try:
            stream = ExtentStream(extents, claim)
            async with stream.running():
                for tensor, size in zip(tensors, sizes, strict=True):
                    crc32, left = 0, size
                    while left:
                        chunk = await anext(stream)
                        crc32 = await in_thread(isal_zlib.crc32, chunk.data, crc32)
                        left -= len(chunk)
                        current().moved(len(chunk))
                        del chunk
                    read[tensor.key] = crc32
        finally:
            claim.close()
        return read


def _beginnings(name: str) -> list[str]:
    """A name, and those of all that it is in, the longest first: "a.b.c", "a.b", "a"."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), 0, -1)]


def _crc32s_of(values: Mapping[str, Any]) -> dict[str, int]:
    return {name: _crc32_of(value) for name, value in values.items()}


def _crc32_of(value: Any) -> int:
    """The CRC32 of a tensor's elements; of what is no plain tensor, of all that torch.save writes of it."""
    if type(value) not in {torch.Tensor, torch.nn.Parameter} or value.layout != torch.strided or vars(value):
        written = io.BytesIO()
        torch_save(value, written)
        return isal_zlib.crc32(written.getbuffer())
    tensor = value.detach()
    tensor = tensor.dequantize() if tensor.is_quantized else tensor.resolve_conj().resolve_neg()
    return isal_zlib.crc32(view_bytes(tensor.contiguous()))


@dataclass(frozen=True, slots=True)
class _Sharded:
    """A sharded checkpoint."""

    manifest: Manifest
    shards: Shards

    def stored(self, tensor: TensorInfo) -> tuple[Hashable, int] | None:
        del tensor  # it may be in many parts
        return None

    def crc32(self, tensor: TensorInfo) -> int | None:
        return self.shards.crc32(tensor.key)

    def read_size(self, tensor: TensorInfo) -> int:
        return tensor.nbytes

    async def read_crc32s(self, tensors: Sequence[TensorInfo]) -> Mapping[str, int]:
        return await self.shards.read_crc32s([tensor.key for tensor in tensors])


async def _diff(opened: Sequence[tuple[Backend, str]]) -> Diff:
    sides: dict[int, _Side] = {}

    async def open_side(number: int, backend: Backend, path: str) -> None:
        sides[number] = await _open(backend, path)

    async with task_group() as group:
        for number, (backend, path) in enumerate(opened):
            group.start_soon(open_side, number, backend, path)
    first, second = sides[0], sides[1]
    ours = {tensor.key: tensor for tensor in first.manifest.tensors}
    theirs = {tensor.key: tensor for tensor in second.manifest.tensors}
    both = [name for name in ours if name in theirs]
    reshaped = {
        name: (ours[name], theirs[name])
        for name in both
        if (ours[name].dtype, ours[name].shape) != (theirs[name].dtype, theirs[name].shape)
    }
    same_shape = [name for name in both if name not in reshaped]
    changed = await _changed(first, second, [(ours[name], theirs[name]) for name in same_shape])
    before, after = first.manifest.values, second.manifest.values
    values = {
        name: (before.get(name), after.get(name))
        for name in {**before, **after}
        if (name in before, before.get(name)) != (name in after, after.get(name))
    }
    return Diff(
        tuple(name for name in theirs if name not in ours),
        tuple(name for name in ours if name not in theirs),
        reshaped,
        tuple(changed),
        values,
        len(same_shape) - len(changed),
    )


async def _open(backend: Backend, path: str) -> _Side:
    source = await open_object(backend, path)
    if not isinstance(source, RangeReader):
        return await _open_sharded(source)
    looks = sniff(await source.read(0, min(source.stat.size, SNIFF_SIZE)))
    if looks not in {SAFETENSORS_FORMAT, INDEX_FORMAT}:
        manifest, places = await inspect_with_places(source)
        record = _by_name(manifest.records)
        for tensor in manifest.tensors:
            if tensor.record is not None and record(tensor.record) is None:
                raise CheckpointCorruptError(f"{source.url} is damaged: record {printable(tensor.record)} is missing.")
        return _Object(manifest, source, record, places)
    files = [await open_file(source, path)] if looks == SAFETENSORS_FORMAT else await open_files(backend, path, source)
    manifest = await in_thread(inspect_safetensors, files, source)
    by_file = {
        (f"{file.name}/" if file.name else "") + entry.name: file.source for file in files for entry in file.entries
    }
    return _Object(manifest, source, _by_name(manifest.records), None, by_file)


def _by_name(records: Sequence[Record]) -> Callable[[str], Record | None]:
    return records.get if isinstance(records, Records) else {record.name: record for record in records}.get


async def _open_sharded(found: Contents) -> _Side:
    from torchferry.distributed.shards import Shards
    from torchferry.distributed.whole import inspect_contents, plain_values

    manifest = await in_thread(inspect_contents, found)
    shards = await Shards.open(found, [tensor.key for tensor in manifest.tensors])
    return _Sharded(replace(manifest, values=await plain_values(found)), shards)


def _known(
    first: _Side, second: _Side, pairs: Sequence[tuple[TensorInfo, TensorInfo]]
) -> list[tuple[int | None, int | None]]:
    """The CRC32s of each pair: of what they lie in, where both lie there alike; else of their elements."""
    found: list[tuple[int | None, int | None]] = []
    for ours, theirs in pairs:
        a, b = first.stored(ours), second.stored(theirs)
        if a is not None and b is not None and a[0] == b[0]:
            found.append((a[1], b[1]))
        else:
            found.append((first.crc32(ours), second.crc32(theirs)))
    return found


async def _changed(first: _Side, second: _Side, pairs: Sequence[tuple[TensorInfo, TensorInfo]]) -> list[str]:
    """The names of tensors of other content."""
    pairs = [pair for pair in pairs if pair[0].nbytes and all(tensor.record is not None for tensor in pair)]
    known = await in_thread(_known, first, second, pairs)  # may be very many
    unknown = [pair for pair, crc32s in zip(pairs, known, strict=True) if None in crc32s]
    changed = {ours.key for (ours, _), (a, b) in zip(pairs, known, strict=True) if None not in (a, b) and a != b}
    if unknown:
        crc32s: list[dict[str, int]] = []
        wanted: list[list[TensorInfo]] = []
        for number, side in enumerate((first, second)):
            here = {pair[number].key: side.crc32(pair[number]) for pair in unknown}
            crc32s.append({key: crc32 for key, crc32 in here.items() if crc32 is not None})
            wanted.append([pair[number] for pair in unknown if here[pair[number].key] is None])
        size = sum(
            side.read_size(tensor) for side, some in zip((first, second), wanted, strict=True) for tensor in some
        )
        current().set_size(size)
        async with current().telling():
            for side, there, some in zip((first, second), crc32s, wanted, strict=True):
                there.update(await side.read_crc32s(some) if some else {})
            current().moved_at_least(size)
        changed |= {ours.key for ours, _ in unknown if crc32s[0][ours.key] != crc32s[1][ours.key]}
    return [ours.key for ours, _ in pairs if ours.key in changed]
