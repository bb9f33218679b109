"""Compares two checkpoints, wherever they are: by the CRC32s that they carry, where they do."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from isal import isal_zlib

from torchferry.engine.cancellation import in_thread
from torchferry.engine.loops import own_loop, run_on, synchronous
from torchferry.engine.memory import BLOCK_SIZE, EVERYTHING_ELSE
from torchferry.engine.tasks import task_group
from torchferry.engine.transfer import Transfer, current
from torchferry.errors import CheckpointCorruptError, mask
from torchferry.formats.archive import INDEX_FORMAT, SAFETENSORS_FORMAT, SNIFF_SIZE, Record, sniff
from torchferry.objects.opening import open_reader
from torchferry.objects.safetensors_files import inspect_safetensors
from torchferry.objects.safetensors_opening import open_file, open_files
from torchferry.objects.streaming import Extent, ExtentStream
from torchferry.objects.torch_files import inspect_torch
from torchferry.printable import printable
from torchferry.storage.registry import open_backend_async

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem
    from fsspec.callbacks import Callback

    from torchferry.engine.reader import RangeReader
    from torchferry.formats.graph import TensorInfo
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

    Of files of ``torch.save``, the CRC32s are compared: no tensor is read. Of others, what has the same name, dtype and
    shape in both is read, in bounded memory.

    Args:
        first: The URL or local path of one.
        second: That of the other.
        first_storage_options: Arguments for the fsspec filesystem of ``first``.
        second_storage_options: Arguments for that of ``second``.
        first_filesystem: An fsspec filesystem to use as it is, instead of ``first_storage_options``.
        second_filesystem: The same for ``second``.
        give_up_after: Seconds without progress after which failed requests are not repeated any more; 120 by default.
        callback: Told the bytes to read, and those that have arrived.

    Raises:
        CheckpointFormatError: one is no checkpoint, or one in the legacy format.
        StorageError: see :class:`~torchferry.storage.base.Backend`.
    """
    opened = [
        await open_backend_async(url, storage_options=options, filesystem=filesystem)
        for url, options, filesystem in (
            (first, first_storage_options, first_filesystem),
            (second, second_storage_options, second_filesystem),
        )
    ]
    with Transfer("diff", mask(os.fspath(second)), callback=callback, give_up_after=give_up_after).running(None):
        return await run_on(own_loop(opened[0][0].loop), _diff, opened)


diff = synchronous(diff_async)


@dataclass(frozen=True, slots=True)
class _Side:
    """One of the two."""

    manifest: Manifest
    sources: Mapping[str, RangeReader]  # by record's name
    records: Mapping[str, Record]

    def crc32(self, tensor: TensorInfo) -> int | None:
        """The CRC32 of exactly a tensor's bytes, if the file has it."""
        record = self.records.get(tensor.record or "")
        return record.crc32 if record is not None and record.size == tensor.nbytes else None


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
    source = await open_reader(backend, path)
    looks = sniff(await source.read(0, min(source.stat.size, SNIFF_SIZE)))
    if looks not in {SAFETENSORS_FORMAT, INDEX_FORMAT}:
        manifest = await inspect_torch(source)
        records = {record.name: record for record in manifest.records}
        for tensor in manifest.tensors:
            if tensor.record is not None and tensor.record not in records:
                raise CheckpointCorruptError(f"{source.url} is damaged: record {printable(tensor.record)} is missing.")
        return _Side(manifest, dict.fromkeys(records, source), records)
    files = [await open_file(source, path)] if looks == SAFETENSORS_FORMAT else await open_files(backend, path, source)
    manifest = await in_thread(inspect_safetensors, files, source)
    by_file = {
        (f"{file.name}/" if file.name else "") + entry.name: file.source for file in files for entry in file.entries
    }
    return _Side(manifest, by_file, {record.name: record for record in manifest.records})


async def _changed(first: _Side, second: _Side, pairs: Sequence[tuple[TensorInfo, TensorInfo]]) -> list[str]:
    changed: list[str] = []
    unknown: list[tuple[TensorInfo, TensorInfo]] = []
    for ours, theirs in pairs:
        crc32s = first.crc32(ours), second.crc32(theirs)
        if not ours.nbytes or ours.record is None or theirs.record is None:
            continue
        if None not in crc32s:
            if crc32s[0] != crc32s[1]:
                changed.append(ours.key)
        else:
            unknown.append((ours, theirs))
    if unknown:
        sizes = [
            _read_size(side, tensor) for pair in unknown for side, tensor in zip((first, second), pair, strict=True)
        ]
        current().set_size(sum(sizes))
        async with current().telling():
            read = [
                await _crc32s(side, [pair[number] for pair in unknown]) for number, side in enumerate((first, second))
            ]
            current().moved_at_least(sum(sizes))
        changed += [ours.key for (ours, _), a, b in zip(unknown, *read, strict=True) if a != b]
    order = {ours.key: number for number, (ours, _) in enumerate(pairs)}
    return sorted(changed, key=order.__getitem__)


def _read_size(side: _Side, tensor: TensorInfo) -> int:
    return 0 if side.crc32(tensor) is not None else side.records[tensor.record or ""].size


async def _crc32s(side: _Side, tensors: Sequence[TensorInfo]) -> list[int]:
    """The CRC32 of each tensor's record, as the file has it, or read."""
    known = {tensor.key: crc32 for tensor in tensors if (crc32 := side.crc32(tensor)) is not None}
    wanted = [tensor for tensor in tensors if tensor.key not in known]
    records = [side.records[tensor.record or ""] for tensor in wanted]
    extents = [Extent(side.sources[record.name], record.offset, record.end) for record in records]
    size = sum(record.size for record in records)
    claim = await EVERYTHING_ELSE.claim_async(min(size, 2 * BLOCK_SIZE))
    try:
        stream = ExtentStream(extents, claim)
        async with stream.running():
            for tensor, record in zip(wanted, records, strict=True):
                crc32, left = 0, record.size
                while left:
                    chunk = await anext(stream)
                    crc32 = await in_thread(isal_zlib.crc32, chunk.data, crc32)
                    left -= len(chunk)
                    current().moved(len(chunk))
                    del chunk
                known[tensor.key] = crc32
    finally:
        claim.close()
    return [known[tensor.key] for tensor in tensors]
