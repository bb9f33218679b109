"""Converts checkpoints: ``torch.save``, safetensors, sharded; from any store to any other, in bounded memory."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from torchferry.arguments import require_choice, require_nbytes
from torchferry.engine.cancellation import in_thread
from torchferry.engine.collector import collector_paused
from torchferry.engine.loops import own_loop, run_on, synchronous
from torchferry.engine.memory import BLOCK_SIZE, EVERYTHING_ELSE
from torchferry.engine.reader import RangeReader
from torchferry.engine.transfer import Transfer, TransferReport, current
from torchferry.engine.types import Chunk, ObjectStat
from torchferry.errors import CheckpointFormatError, CheckpointValueError, UnsupportedOptionError, mask
from torchferry.formats.archive import INDEX_FORMAT, SAFETENSORS_FORMAT, SNIFF_SIZE, Record, sniff
from torchferry.formats.checksum import Checksums
from torchferry.formats.graph import read_graph
from torchferry.formats.keys import KeysArgument, as_keys
from torchferry.formats.lazy import LazyTensors
from torchferry.formats.picking import leaves, pick, values_of
from torchferry.formats.places import TensorPlace, place_of
from torchferry.formats.safetensors import INDEX_SUFFIX, SUFFIX, item_size, lay_out
from torchferry.formats.safetensors_dtypes import dtype_name, torch_dtype
from torchferry.formats.safetensors_stream import resolved, view_bytes
from torchferry.formats.stand_ins import is_tensor_leaf
from torchferry.formats.torch_stream import TorchStream, fills_crc32s
from torchferry.locating import locate, open_object
from torchferry.objects.requests import LoadRequest
from torchferry.objects.safetensors_files import choose, load_safetensors
from torchferry.objects.safetensors_opening import File, open_file, open_files, publish
from torchferry.objects.streaming import Extent, ExtentStream
from torchferry.objects.torch_files import load_torch, read_pickle, require_archive
from torchferry.printable import printable
from torchferry.storage.metadata import require_storable
from torchferry.storage.registry import open_backend_async

if TYPE_CHECKING:
    import torch
    from fsspec import AbstractFileSystem
    from fsspec.callbacks import Callback

    from torchferry.distributed.place import Place
    from torchferry.distributed.whole import Contents
    from torchferry.formats.archive import Archive
    from torchferry.storage.base import Backend

__all__ = ["ConvertFormat", "convert", "convert_async"]

ConvertFormat: TypeAlias = Literal["torch", "safetensors", "sharded"]
"""What ``format=`` takes."""

_PYTORCH = {"format": "pt"}
_SHOWN = 5  # names in a message


async def convert_async(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    format: ConvertFormat | None = None,  # noqa: A002 - what it is
    keys: KeysArgument | None = None,
    exclude: KeysArgument | None = None,
    strip_prefix: str = "",
    max_shard_size: int | None = None,
    source_storage_options: Mapping[str, Any] | None = None,
    target_storage_options: Mapping[str, Any] | None = None,
    source_filesystem: AbstractFileSystem | None = None,
    target_filesystem: AbstractFileSystem | None = None,
    part_size: int | None = None,
    metadata: Mapping[str, str] | None = None,
    give_up_after: float | None = None,
    callback: Callback | None = None,
    report: Callable[[TransferReport], object] | None = None,
) -> ObjectStat:
    """Converts a checkpoint: of ``torch.save`` to safetensors or back, a sharded one to either, or one to sharded.

    Tensors go from the source's ranges to the target's parts: at most 208 MiB of memory, however large they are. Those
    that are not contiguous in a checkpoint of ``torch.save`` are loaded whole. What converts sharded checkpoints is
    :func:`torchferry.distributed.consolidate` and :func:`torchferry.distributed.shard`.

    Args:
        source: The URL or local path of the checkpoint; of safetensors in several files, that of their index; of a
            sharded one, that of its directory.
        target: Where to. What ends in "/" is the directory of a sharded checkpoint.
        format: Of the target: "torch", "safetensors" or "sharded"; by default the one of the first two that the source
            does not have. Of a sharded source: "safetensors" where the target is named so, else "torch".
        keys: Which tensors, as in :func:`load`; by default all.
        exclude: What to leave out.
        strip_prefix: What to take from the front of names: "model." makes "weight" of "model.weight".
        max_shard_size: Bytes of a file of safetensors, as in :func:`save`.
        source_storage_options: Arguments for the fsspec filesystem of ``source``.
        target_storage_options: Arguments for that of ``target``.
        source_filesystem: An fsspec filesystem to use as it is, instead of ``source_storage_options``.
        target_filesystem: The same for ``target``.
        part_size: Bytes in a part of a multipart upload, instead of 16 MiB (or what the size needs).
        metadata: User metadata to store with the target; in safetensors' header, too.
        give_up_after: Seconds without progress after which failed requests are not repeated any more; 120 by default.
        callback: Told the size, and of bytes as the target acknowledges them.
        report: Called with the :class:`~torchferry.TransferReport` of what succeeded.

    Returns:
        What is now at ``target``; of several files, their index; of a sharded checkpoint, its ``.metadata``.

    Raises:
        CheckpointValueError: safetensors cannot hold what is asked for; the message says what to do.
        CheckpointFormatError: the source is not a checkpoint, or has the target's format already.
        CheckpointCorruptError: it is damaged. Nothing is at ``target`` that was not there before.
        CheckpointKeyError: a key takes nothing.
        UnsupportedOptionError: an option is not one of this conversion; the message names it.
        StorageError: see :class:`~torchferry.storage.base.Backend`.
    """
    require_choice("format", format, get_args(ConvertFormat))
    require_nbytes("max_shard_size", max_shard_size)
    require_storable(os.fspath(target), metadata)
    reader, source_path = await locate(source, storage_options=source_storage_options, filesystem=source_filesystem)
    transfer = Transfer("convert", mask(os.fspath(target)), callback=callback, give_up_after=give_up_after)
    if format == "sharded" or (format is None and os.fspath(target).endswith("/")):
        _refuse_options(
            target,
            keys=keys,
            exclude=exclude,
            strip_prefix=strip_prefix,
            max_shard_size=max_shard_size,
            metadata=metadata,
        )
        from torchferry.distributed.place import Place

        place = await Place.open_async(target, storage_options=target_storage_options, filesystem=target_filesystem)
        with transfer.running(report):
            return await run_on(own_loop(place.backend.loop), _to_sharded, reader, source_path, place, part_size)
    writer, target_path = await open_backend_async(
        target, storage_options=target_storage_options, filesystem=target_filesystem
    )
    request = LoadRequest(as_keys(keys), as_keys(exclude), None, weights_only=True, verify=True)
    order = _Order(writer, target_path, request, strip_prefix, max_shard_size, part_size, metadata)
    with transfer.running(report):
        return await run_on(own_loop(writer.loop), _convert, reader, source_path, format, order)


convert = synchronous(convert_async)


def _refuse_options(target: str | os.PathLike[str], **given: object) -> None:
    if named := [f"{name}=" for name, value in given.items() if value]:
        raise UnsupportedOptionError(
            f"{mask(os.fspath(target))}: {', '.join(named)} is not for a sharded target, which takes all of the source."
        )


@dataclass(frozen=True, slots=True)
class _Order:
    """What to make, and where."""

    writer: Backend
    path: str
    request: LoadRequest
    strip_prefix: str
    max_shard_size: int | None
    part_size: int | None
    metadata: Mapping[str, str] | None

    def name(self, name: str) -> str:
        """What a tensor is called in the target."""
        return name.removeprefix(self.strip_prefix)


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor of the source.

    Attributes:
        name: What it is to be called.
        dtype: Of its elements.
        shape: Its sizes.
        nbytes: Its bytes.
        extent: Where they are; None for one that is loaded.
        loaded: The tensor, of those.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    extent: Extent | None
    loaded: torch.Tensor | None = None


async def _convert(reader: Backend, path: str, wanted: ConvertFormat | None, order: _Order) -> ObjectStat:
    with current().reading_side():
        source = await open_object(reader, path)
        if not isinstance(source, RangeReader):
            return await _of_sharded(source, wanted, order)
        looks = sniff(await source.read(0, min(source.stat.size, SNIFF_SIZE)))
        is_safetensors = looks in {SAFETENSORS_FORMAT, INDEX_FORMAT}
        made = wanted or ("torch" if is_safetensors else "safetensors")
        if is_safetensors == (made == "safetensors"):
            raise CheckpointFormatError(f"{source.url} is in that format already: copy() copies it.")
        if not is_safetensors:
            archive = await require_archive(source)
            tensors, records = await _of_archive(source, archive, order)
        else:
            files = (
                [await open_file(source, path)]
                if looks == SAFETENSORS_FORMAT
                else await open_files(reader, path, source)
            )
    async with current().telling():
        if is_safetensors:
            return await _to_torch(files, source.url, order)
        checksums = await in_thread(Checksums, records, source.url)
        return await _to_safetensors(tensors, checksums, order)


# --- sharded


async def _of_sharded(found: Contents, wanted: ConvertFormat | None, order: _Order) -> ObjectStat:
    from torchferry.distributed.convert import Order, make_object

    as_safetensors = order.path.endswith((SUFFIX, INDEX_SUFFIX)) if wanted is None else wanted == "safetensors"
    if order.max_shard_size is not None and not as_safetensors:
        raise _no_shards(order)
    return await make_object(
        found,
        Order(
            order.writer,
            order.path,
            order.request,
            as_safetensors,
            order.strip_prefix,
            order.max_shard_size,
            order.part_size,
            order.metadata,
        ),
    )


async def _to_sharded(reader: Backend, path: str, place: Place, part_size: int | None) -> ObjectStat:
    from torchferry.distributed.convert import shard_file

    with current().reading_side():
        source = await open_object(reader, path)
    if not isinstance(source, RangeReader):
        raise CheckpointFormatError(f"{source.place.url} is sharded already: copy() copies it.")
    return (await shard_file(reader, path, source, place, part_size, weights_only=True))[1]


# --- to safetensors


async def _of_archive(source: RangeReader, archive: Archive, order: _Order) -> tuple[list[_Tensor], list[Record]]:
    """The tensors of an archive, and the records that are read for those that lie there as they are needed."""
    pickled = await read_pickle(source, archive, verify=True)
    record = archive.get("byteorder")
    native = record is None or await source.read(record.offset, record.end) == sys.byteorder.encode()
    places = await in_thread(_places, pickled, archive, order.request)
    _refuse_shared(places, source.url)
    extents = {
        name: _extent(place, archive, source) if native and place.is_plain and place.is_contiguous else None
        for name, place in places.items()
    }
    loaded: dict[str, torch.Tensor] = {}
    if strided := {name for name, extent in extents.items() if extent is None and places[name].nbytes}:
        request = LoadRequest(strided.__contains__, None, None, weights_only=True, verify=True)
        loaded, _ = await in_thread(values_of, await load_torch(source, request), source.stat.size, source.url)
    tensors = [
        _Tensor(order.name(name), place.dtype, place.shape, place.nbytes, extents[name], loaded.get(name))
        for name, place in places.items()
    ]
    _refuse_doubles((tensor.name for tensor in tensors), source.url)
    whole = {
        record.name: record
        for name, place in places.items()
        if extents[name] is not None and (record := archive.get(place.storage.record)) and record.size == place.nbytes
    }
    return tensors, list(whole.values())


@collector_paused()
def _places(pickled: bytes, archive: Archive, request: LoadRequest) -> dict[str, TensorPlace]:
    graph = read_graph(pickled, archive.url)
    part = pick(graph, *request.choice()) if request.is_part else graph.root
    found, _ = leaves(graph, part)
    places: dict[str, TensorPlace] = {}
    odd: list[str] = []
    with graph.damage_told():
        known: dict[int, TensorPlace | None] = {}  # by the leaf's id: one tensor may have very many names
        for name, leaf in found.items():
            if id(leaf) not in known:
                known[id(leaf)] = place_of(leaf) if is_tensor_leaf(leaf) else None
            if (place := known[id(leaf)]) is None:
                odd.append(name)
            else:
                places[name] = place
    if odd:
        some = ", ".join(repr(printable(name)) for name in odd[:_SHOWN])
        more = f" and {len(odd) - _SHOWN} more" if len(odd) > _SHOWN else ""
        raise CheckpointValueError(
            f"safetensors holds plain tensors only, and {archive.url} also has {some}{more}: choose with keys=, or "
            "leave them out with exclude=."
        )
    _refuse_doubles((content.name for content in graph.contents(part) if content.aspect == "value"), graph.url)
    for place in {id(place): place for place in places.values()}.values():
        record = archive.get(place.storage.record)
        if record is None or record.size != place.storage.nbytes:
            raise CheckpointFormatError(f"{archive.url} is damaged: a storage's record is missing or of another size.")
    return places


def _extent(place: TensorPlace, archive: Archive, source: RangeReader) -> Extent | None:
    record = archive.get(place.storage.record)
    if record is None or not place.nbytes:
        return None
    start = record.offset + place.offset * place.dtype.itemsize
    return Extent(source, start, start + place.nbytes)


def _refuse_shared(places: Mapping[str, TensorPlace], url: str) -> None:
    spans = []
    for name, place in places.items():
        if place.nbytes:
            length = 1 + sum((size - 1) * stride for size, stride in zip(place.shape, place.stride, strict=True))
            first = place.offset * place.dtype.itemsize
            spans.append((place.storage.key, first, first + length * place.dtype.itemsize, name))
    spans.sort()
    for before, after in pairwise(spans):
        if before[0] == after[0] and after[1] < before[2]:
            raise CheckpointValueError(
                f"{url}: {printable(before[3])!r} and {printable(after[3])!r} share memory, which safetensors does not "
                f"keep. Of tied weights, leave one out: exclude={after[3]!r}."
            )


def _refuse_doubles(names: Iterable[str], url: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise CheckpointValueError(
                f"{url}: two values would be called {printable(name)!r}. load() it, and save() it with other names."
            )
        seen.add(name)


async def _to_safetensors(tensors: Sequence[_Tensor], checksums: Checksums, order: _Order) -> ObjectStat:
    total = sum(tensor.nbytes for tensor in tensors)
    current().set_size(total)
    by_name = {tensor.name: tensor for tensor in tensors}
    left = len(by_name)

    async def write(file: str, members: Sequence[str]) -> ObjectStat:
        nonlocal left
        left -= len(members)
        part = [by_name[member] for member in members]
        return await _write_file(part, file, checksums, order, is_last=not left)

    sizes = {tensor.name: tensor.nbytes for tensor in tensors}
    stat = await publish(order.writer, order.path, sizes, order.max_shard_size, write)
    current().moved_at_least(total)
    return stat


async def _write_file(
    tensors: Sequence[_Tensor], path: str, checksums: Checksums, order: _Order, *, is_last: bool
) -> ObjectStat:
    described = {tensor.name: (dtype_name(tensor.dtype, tensor.name), tensor.shape) for tensor in tensors}
    # In the source's order, which is the fastest to read; within that, wide ones first, so that all are aligned.
    place = {
        name: number for number, name in enumerate(sorted(described, key=lambda name: -item_size(described[name][0])))
    }
    head, header = await in_thread(lay_out, described, {**_PYTORCH, **(order.metadata or {})}, place)
    by_name = {tensor.name: tensor for tensor in tensors}
    in_order = [by_name[entry.name] for entry in header.entries]
    size = len(head) + sum(tensor.nbytes for tensor in tensors)
    plan = order.writer.upload_plan(size, order.part_size)
    claim = await EVERYTHING_ELSE.claim_async(min(size, plan.part_size + BLOCK_SIZE), beside=plan.memory)
    try:
        stream = ExtentStream(
            [tensor.extent for tensor in in_order if tensor.extent is not None],
            claim,
            add=lambda _, start, memory: checksums.add(start, memory),
            finish=checksums.finish if is_last else lambda: None,
        )
        async with stream.running(), aclosing(_file(head, in_order, stream)) as chunks:
            return await order.writer.write(path, chunks, plan=plan, metadata=order.metadata)
    finally:
        claim.close()


async def _file(head: bytes, tensors: Sequence[_Tensor], stream: ExtentStream) -> AsyncGenerator[Chunk]:
    yield Chunk(head)
    for tensor in tensors:
        if tensor.loaded is not None:
            current().tell()
            yield Chunk(view_bytes(await in_thread(_in_order, tensor.loaded)))
            continue
        left = tensor.nbytes
        while left:
            chunk = await anext(stream)
            left -= len(chunk)
            yield chunk
            del chunk
    async for rest in stream:  # to its end, where it is checked
        yield rest


def _in_order(tensor: torch.Tensor) -> torch.Tensor:
    return resolved(tensor).contiguous()


# --- to torch


async def _to_torch(files: Sequence[File], url: str, order: _Order) -> ObjectStat:
    if order.max_shard_size is not None:
        raise _no_shards(order)
    if not await in_thread(fills_crc32s):
        # This torch computes CRC32s from the tensors' memory: they must be in it.
        loaded = await load_safetensors(files, order.request, url)
        _refuse_doubles(map(order.name, loaded), url)
        return await _write_torch({order.name(name): tensor for name, tensor in loaded.items()}, None, order)
    by_file = await in_thread(choose, files, order.request, url)
    chosen = [(file, entry) for file, entries in by_file for entry in entries]
    described = [(order.name(entry.name), torch_dtype(entry.dtype, url), entry.shape) for _, entry in chosen]
    _refuse_doubles((name for name, _, _ in described), url)
    lazy = await in_thread(LazyTensors, described)
    extents = [Extent(file.source, entry.start, entry.stop) for file, entry in chosen if entry.stop > entry.start]
    return await _write_torch(lazy.tensors, (lazy, extents), order)


async def _all_of(stream: TorchStream, lazy: LazyTensors) -> AsyncGenerator[Chunk]:
    async for chunk in stream:
        yield chunk
        del chunk
    if lazy.left:  # before the object is published
        raise RuntimeError(f"torch.save has not written {lazy.left} storages from their memory: please report it.")


def _no_shards(order: _Order) -> UnsupportedOptionError:
    return UnsupportedOptionError(f"{mask(order.path)}: max_shard_size= is for safetensors.")


async def _write_torch(
    obj: dict[str, torch.Tensor], source: tuple[LazyTensors, list[Extent]] | None, order: _Order
) -> ObjectStat:
    writer = order.writer
    transfer = current()
    if source is None:
        stream = TorchStream(obj, plan_for=writer.upload_plan, part_size=order.part_size)
        async with stream.running():
            transfer.set_size(stream.size_hint)
            return await writer.write(order.path, stream, plan=stream.plan, metadata=order.metadata)
    lazy, extents = source
    size = sum(extent.stop - extent.start for extent in extents)
    plan = writer.upload_plan(size, order.part_size)
    claim = await EVERYTHING_ELSE.claim_async(min(size, plan.part_size + BLOCK_SIZE) + BLOCK_SIZE)
    try:
        read = ExtentStream(extents, claim)
        stream = TorchStream(obj, plan_for=writer.upload_plan, part_size=plan.part_size, lazy=lazy.reading(read))
        async with read.running(), stream.running(), aclosing(_all_of(stream, lazy)) as chunks:
            transfer.set_size(stream.size_hint)
            stat = await writer.write(order.path, chunks, plan=stream.plan, metadata=order.metadata)
            transfer.set_size(stat.size)
            transfer.moved_at_least(stat.size)
            return stat
    finally:
        claim.close()
