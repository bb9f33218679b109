"""One object from many shards, and back: from any store to any store, in bounded memory."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from isal import isal_zlib
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItemType

from torchferry.distributed.assemble import Archive, Assembly, Data, Script, StandIns
from torchferry.distributed.fetch import Files
from torchferry.distributed.metadata import shards_of, storage_info, write_metadata
from torchferry.distributed.place import METADATA, Place, new_save_name
from torchferry.distributed.reader import StorageReader, where_stored
from torchferry.distributed.slices import Direct, Piece, cut
from torchferry.distributed.whole import Contents, checksums_of, find, load_whole
from torchferry.distributed.writer import remove_before, shards_before
from torchferry.engine.cancellation import in_thread
from torchferry.engine.loops import own_loop, run_on, synchronous
from torchferry.engine.memory import BLOCK_SIZE, EVERYTHING_ELSE
from torchferry.engine.reader import RangeReader
from torchferry.engine.transfer import Transfer, TransferReport, current
from torchferry.engine.types import ObjectStat
from torchferry.errors import (
    CheckpointFormatError,
    CheckpointNotFoundError,
    CheckpointValueError,
    mask,
)
from torchferry.formats.checksum import Checksums
from torchferry.formats.graph import read_graph
from torchferry.formats.item_stream import Written, is_plain
from torchferry.formats.load_buffer import LoadBuffer
from torchferry.formats.selection import check_graph
from torchferry.formats.torch_hooks import torch_errors
from torchferry.objects.opening import open_reader, read_archive
from torchferry.objects.requests import LoadRequest
from torchferry.storage.base import Backend
from torchferry.storage.registry import open_backend_async

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem
    from fsspec.callbacks import Callback

__all__ = ["consolidate", "consolidate_async", "shard", "shard_async"]

_SAFETENSORS = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.uint16: "U16",
    torch.int32: "I32", torch.uint32: "U32", torch.int64: "I64", torch.uint64: "U64", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


async def consolidate_async(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    weights_only: bool = True,
    source_storage_options: Mapping[str, Any] | None = None,
    target_storage_options: Mapping[str, Any] | None = None,
    source_filesystem: AbstractFileSystem | None = None,
    target_filesystem: AbstractFileSystem | None = None,
    part_size: int | None = None,
    give_up_after: float | None = None,
    callback: Callback | None = None,
    report: Callable[[TransferReport], object] | None = None,
) -> ObjectStat:
    """Makes one object of a sharded checkpoint: what ``torch.save`` writes of its state dict, or a safetensors file.

    Tensors go from store to store in blocks: at most 208 MiB of memory, whatever their size. Every CRC32 is checked.

    Args:
        source: The directory of the sharded checkpoint.
        target: Where to. A name that ends in ``.safetensors`` makes a safetensors file, of tensors alone.
        weights_only: As in ``torch.load``, for what is no tensor.
        source_storage_options: Arguments for the fsspec filesystem of ``source``.
        target_storage_options: Arguments for that of ``target``.
        source_filesystem: An fsspec filesystem to use as it is, instead of ``source_storage_options``.
        target_filesystem: The same for ``target``.
        part_size: Bytes in a part of a multipart upload, instead of 16 MiB (or what the size needs).
        give_up_after: Seconds without progress after which failed requests are not repeated any more; 120 by default.
        callback: Told the size, and of bytes as the target acknowledges them.
        report: Called with the :class:`~torchferry.TransferReport`.

    Returns:
        What is now at ``target``.

    Raises:
        CheckpointNotFoundError: there is no sharded checkpoint at ``source``.
        CheckpointCorruptError: it is damaged. Nothing is at ``target`` that was not there before.
        CheckpointValueError: it has more than tensors, and ``target`` is a safetensors file.
        StorageError: see :class:`~torchferry.storage.base.Backend`.
    """
    place = await Place.open_async(source, storage_options=source_storage_options, filesystem=source_filesystem)
    writer, path = await open_backend_async(
        target, storage_options=target_storage_options, filesystem=target_filesystem
    )
    transfer = Transfer("consolidate", mask(os.fspath(target)), callback=callback, give_up_after=give_up_after)
    as_safetensors = os.fspath(target).endswith(".safetensors")
    with transfer.running(report):
        return await run_on(
            own_loop(writer.loop), _consolidate, place, writer, path, part_size, weights_only, as_safetensors
        )


async def shard_async(
    source: str | os.PathLike[str],
    url: str | os.PathLike[str],
    *,
    weights_only: bool = True,
    source_storage_options: Mapping[str, Any] | None = None,
    target_storage_options: Mapping[str, Any] | None = None,
    source_filesystem: AbstractFileSystem | None = None,
    target_filesystem: AbstractFileSystem | None = None,
    part_size: int | None = None,
    give_up_after: float | None = None,
    callback: Callback | None = None,
    report: Callable[[TransferReport], object] | None = None,
) -> Metadata:
    """Makes a sharded checkpoint of an object that ``torch.save`` wrote, for any number of ranks to load.

    It has one shard: ranks read the ranges that they need. Memory and checks are as in :func:`consolidate`.

    Args:
        source: The URL or path of a checkpoint that ``torch.save`` wrote: a dict.
        url: The directory of the sharded checkpoint. One that is there is replaced when the new one is complete.
        weights_only: As in ``torch.load``.
        source_storage_options: Arguments for the fsspec filesystem of ``source``.
        target_storage_options: Arguments for that of ``url``.
        source_filesystem: An fsspec filesystem to use as it is, instead of ``source_storage_options``.
        target_filesystem: The same for ``url``.
        part_size: Bytes in a part of a multipart upload, instead of 16 MiB (or what the size needs).
        give_up_after: Seconds without progress after which failed requests are not repeated any more; 120 by default.
        callback: Told the size, and of bytes as the target acknowledges them.
        report: Called with the :class:`~torchferry.TransferReport`.

    Returns:
        The metadata of the sharded checkpoint.

    Raises:
        CheckpointFormatError: ``source`` is no dict that ``torch.save`` wrote.
        CheckpointCorruptError: it is damaged. What was at ``url`` is still there.
        StorageError: see :class:`~torchferry.storage.base.Backend`.
    """
    place = await Place.open_async(url, storage_options=target_storage_options, filesystem=target_filesystem)
    reader, path = await open_backend_async(
        source, storage_options=source_storage_options, filesystem=source_filesystem
    )
    transfer = Transfer("shard", mask(os.fspath(url)), callback=callback, give_up_after=give_up_after)
    with transfer.running(report):
        return await run_on(own_loop(place.backend.loop), _shard, reader, path, place, part_size, weights_only)


consolidate = synchronous(consolidate_async)
shard = synchronous(shard_async)


async def _consolidate(
    place: Place, writer: Backend, target: str, part_size: int | None, weights_only: bool, as_safetensors: bool
) -> ObjectStat:
    with current().reading_side():
        found = await find(place.backend, place.path, place.url, weights_only=weights_only)
        if found is None:
            raise CheckpointNotFoundError(f"There is no sharded checkpoint at {place.url}: no {METADATA}.")
        metadata = found.metadata
        paths = shards_of(metadata)
        reader = StorageReader.at(place)
        stats = await reader.versions(place, metadata, paths)
        files = Files(place.backend, [(place.at(path), stat) for path, stat in zip(paths, stats, strict=True)])
        stored = await reader.look_into_archives(files, stats, metadata, _tensor_items(metadata, paths))
        checksums = []
        for path, stat in zip(paths, stats, strict=True):
            file = RangeReader(place.backend, place.at(path), stat)
            checksums.append(await checksums_of(found, path, file, only_tensors=True))
        script = await _script_of(found, weights_only=weights_only, as_safetensors=as_safetensors)
    numbers = {path: number for number, path in enumerate(paths)}
    parts = partial(_parts_of_shards, metadata, numbers, stored)
    return await _write(script, partial(_listed, parts), files, checksums, writer, target, part_size)


def _tensor_items(metadata: Metadata, paths: Sequence[str]) -> list[tuple[int, Any, MetadataIndex]]:
    """File and place of each item that is a tensor."""
    numbers = {path: number for number, path in enumerate(paths)}
    return [
        (numbers[info.relative_path], info, index)
        for index, info in metadata.storage_data.items()
        if isinstance(metadata.state_dict_metadata.get(index.fqn), TensorStorageMetadata)
    ]


async def _write(
    script: Script,
    parts: Any,
    files: Files,
    checksums: Sequence[Checksums | None],
    writer: Backend,
    path: str,
    part_size: int | None,
) -> ObjectStat:
    plan = writer.upload_plan(script.size, part_size)
    # A store holds up to a part back before it sends any of it: with two blocks more there is always room to go on.
    claim = await EVERYTHING_ELSE.claim_async(plan.part_size + 2 * BLOCK_SIZE, piece=BLOCK_SIZE, beside=plan.memory)
    transfer = current()
    try:
        assembly = Assembly(script, parts, files, checksums, claim)
        async with assembly.running(), transfer.telling():
            transfer.set_size(script.size)
            stat = await writer.write(path, assembly, plan=plan)
            transfer.moved_at_least(script.size)
            return stat
    finally:
        claim.close()


async def _script_of(found: Contents, *, weights_only: bool, as_safetensors: bool) -> Script:
    metadata = found.metadata
    tensors = {
        name: (entry.properties.dtype, entry.size)
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    others = [name for name in metadata.state_dict_metadata if name not in tensors]
    if as_safetensors:
        if others:
            raise CheckpointValueError(
                f"{found.place.url} has values that are no tensors, which a safetensors file cannot hold: "
                f"{', '.join(others[:10])}."
            )
        return await in_thread(_safetensors, tensors, found.place.url)
    paths = metadata.planner_data if isinstance(metadata.planner_data, dict) else {}
    request = LoadRequest(None, None, None, weights_only, verify=True)
    plain = await load_whole(found, request, names=others, nested=False)

    def make() -> Script:
        stand_ins = StandIns(tensors)
        state: dict[str, Any] = {}
        for name in metadata.state_dict_metadata:
            set_element(state, paths.get(name, (name,)), stand_ins.tensors.get(name, plain.get(name)))
        script = Script()
        script.add_archive(state, stand_ins)
        return script

    return await in_thread(make)


def _safetensors(tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]], url: str) -> Script:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    # Larger elements first, as safetensors itself writes them: each tensor is aligned.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1][0].itemsize, item[0]))
    for name, (dtype, shape) in ordered:
        if dtype not in _SAFETENSORS:
            raise CheckpointValueError(f"{url}: {name} is of {dtype}, which a safetensors file cannot hold.")
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _SAFETENSORS[dtype], "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    script = Script()
    script.add(len(text).to_bytes(8, "little") + text)
    for name, (dtype, shape) in ordered:
        data = Data(name, dtype, tuple(shape), script.size)
        script.entries.append(data)
        script.size += data.nbytes
    return script


def _parts_of_shards(
    metadata: Metadata,
    numbers: Mapping[str, int],
    stored: Mapping[tuple[int, int], Any],
    key: str,
    offsets: Sequence[int],
    target: torch.Tensor,
) -> Iterator[tuple[int, Direct | Piece]]:
    """Where a part of a tensor is: each chunk that was saved has some of it."""
    entry = metadata.state_dict_metadata[key]
    assert isinstance(entry, TensorStorageMetadata)  # noqa: S101 - only tensors are asked for
    for index, chunk in enumerate(entry.chunks):
        firsts = [max(a, b) for a, b in zip(offsets, chunk.offsets, strict=True)]
        lasts = [
            min(a + n, b + m) for a, n, b, m in zip(offsets, target.shape, chunk.offsets, chunk.sizes, strict=True)
        ]
        if any(first >= last for first, last in zip(firsts, lasts, strict=True)):
            continue
        part = target
        for dim, (first, last) in enumerate(zip(firsts, lasts, strict=True)):
            part = part.narrow(dim, first - offsets[dim], last - first)
        info = metadata.storage_data[MetadataIndex(key, chunk.offsets, index)]
        number = numbers[info.relative_path]
        where = where_stored(info, entry.properties.dtype, chunk, stored.get((number, info.offset)))
        if where is None:
            raise CheckpointFormatError(
                f"{key} in {info.relative_path} is not stored as plain bytes: load and save it."
            )
        start = (
            where.start
            + sum((first - at) * stride for first, at, stride in zip(firsts, chunk.offsets, where.strides, strict=True))
            * where.dtype.itemsize
        )
        yield from ((number, piece) for piece in cut(part, start, where.strides, where.dtype))


def _listed(parts: Any, key: str, offsets: Sequence[int], target: torch.Tensor) -> list[tuple[int, Direct | Piece]]:
    return list(parts(key, offsets, target))


# --- the other way


async def _shard(reader: Backend, source: str, place: Place, part_size: int | None, weights_only: bool) -> Metadata:
    with current().reading_side():
        file = await open_reader(reader, source)
        archive = await read_archive(file)
        pickled = None if archive is None else archive.get("data.pkl")
        if archive is None or pickled is None or archive.is_torchscript:
            raise CheckpointFormatError(f"{file.url} is not a zip file of torch.save: load it, and save it sharded.")
        data = await file.read(pickled.offset, pickled.end)
        buffer = await in_thread(partial(LoadBuffer, archive.whole(file.stat.size), sparse=True))

        def unpickle() -> Any:
            check_graph(read_graph(data, file.url), archive, weights_only=weights_only)
            for start, kept in file.kept:
                buffer.write(start, kept)
            buffer.finish()
            with torch_errors(file.url, map_location=None, weights_only=weights_only, checked=True):
                return buffer.load(map_location="cpu", weights_only=weights_only)

        state = await in_thread(unpickle)
        if not isinstance(state, dict):
            raise CheckpointFormatError(f"{file.url} is a {type(state).__name__}: only a dict can be sharded.")
        base = buffer.address
        records = [record for record in archive.records if record.name.startswith("data/") and record.size]
        checksums = await in_thread(Checksums, [] if not archive.has_crc32s else records, file.url)
        save = new_save_name()
        relative_path = f"{save}/__0_0.distcp"
        made = await in_thread(_Sharding, state, base, file.url)
        files = Files(reader, [(source, file.stat)])
    # Storages that tensors share are read more than once: then their CRC32s cannot be checked as they pass.
    checked = checksums if made.each_once(records) else None
    if checked is None and archive.has_crc32s:
        with current().reading_side():
            again = RangeReader(reader, source, file.stat)  # which keeps nothing
            await again.stream(again.plan([(0, archive.start)]), checksums.add)
            checksums.finish()
    stat = await _write(made.script, made.parts, files, [checked], place.backend, place.at(relative_path), part_size)
    metadata = made.metadata
    infos = {index: storage_info(relative_path, made.written(index)) for index in made.items}
    before = await shards_before(place, METADATA)
    content = write_metadata(metadata, infos, place.url, save, {relative_path: (stat.size, stat.etag)})
    committed = await place.put(METADATA, content)
    await remove_before(place, METADATA, committed, before)
    return metadata


class _Sharding:
    """The script of a shard that has all items of a state dict.

    Attributes:
        script: What is written.
        metadata: The checkpoint's.
        items: Offset, length and data of each, by its index.
    """

    def __init__(self, state: dict[str, Any], base: int, url: str) -> None:
        planner = DefaultSavePlanner()
        planner.set_up_planner(state, None, is_coordinator=True)
        (plan,), self.metadata = planner.create_global_plan([planner.create_local_plan()])
        self.script = Script()
        self.items: dict[MetadataIndex, tuple[int, int, Data | None, bytes]] = {}
        self._sources: dict[str, tuple[int, tuple[int, ...], torch.dtype]] = {}
        self._extents: list[tuple[int, int]] = []
        for item in sorted(plan.items, key=lambda item: item.type != WriteItemType.BYTE_IO):
            value = planner.resolve_data(item)
            start = self.script.size
            if isinstance(value, io.BytesIO):
                content = value.getvalue()
                self.script.entries.append(Archive(fill=False))
                self.script.add(content)
                self.items[item.index] = (start, len(content), None, content)
                continue
            tensor = value.detach()
            if not is_plain(tensor) or tensor.is_conj() or tensor.is_neg():
                raise CheckpointFormatError(
                    f"{url}: {item.index.fqn} is not stored as plain bytes: load it, and save it."
                )
            key = f"{item.index.fqn}"
            stand_ins = StandIns({key: (tensor.dtype, tensor.shape)})
            found = self.script.add_archive(stand_ins.tensors[key], stand_ins)
            self._sources[key] = (tensor.data_ptr() - base, tensor.stride(), tensor.dtype)
            if tensor.nbytes:
                first = tensor.data_ptr() - base
                self._extents.append((first, first + tensor.nbytes if tensor.is_contiguous() else -1))
            self.items[item.index] = (start, self.script.size - start, found[0] if found else None, b"")

    def parts(self, key: str, offsets: Sequence[int], target: torch.Tensor) -> list[tuple[int, Direct | Piece]]:
        """Where a part of a tensor is in the source."""
        start, strides, dtype = self._sources[key]
        start += sum(at * stride for at, stride in zip(offsets, strides, strict=True)) * dtype.itemsize
        return [(0, part) for part in cut(target, start, strides, dtype)]

    def each_once(self, records: Sequence[Any]) -> bool:
        """Whether every byte of every record is read once, and in order."""
        return sorted(self._extents) == sorted((record.offset, record.end) for record in records)

    def written(self, index: MetadataIndex) -> Written:
        """Where an item is, when it has been written."""
        offset, length, data, content = self.items[index]
        if data is None:
            return Written(offset, length, None, isal_zlib.crc32(content) if content else 0)
        return Written(offset, length, data.offset - offset, data.crc32)
