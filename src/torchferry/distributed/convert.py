"""One object from many shards, and back: from any store to any store, in bounded memory."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from isal import isal_zlib
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItemType

from torchferry.distributed.assemble import Archive, Assembly, Data, Parts, Script, StandIns
from torchferry.distributed.fetch import Files
from torchferry.distributed.metadata import extras_of, nest, storage_info, tree_of, write_metadata
from torchferry.distributed.place import METADATA, Place, new_save_name, shard_path
from torchferry.distributed.shards import Shards
from torchferry.distributed.slices import Direct, Piece, cut
from torchferry.distributed.whole import Contents, choose, find, is_asked_of, load_whole
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
from torchferry.formats.archive import Record
from torchferry.formats.checksum import Checksums
from torchferry.formats.graph import read_graph
from torchferry.formats.item_stream import Written, is_plain
from torchferry.formats.load_buffer import LoadBuffer
from torchferry.formats.safetensors import SUFFIX, lay_out
from torchferry.formats.safetensors_dtypes import dtype_name
from torchferry.formats.selection import check_graph
from torchferry.formats.stand_ins import name_of
from torchferry.formats.torch_hooks import torch_errors, torch_save
from torchferry.objects.opening import open_reader, read_archive
from torchferry.objects.reading import Job, fetch_checked
from torchferry.objects.requests import LoadRequest
from torchferry.objects.safetensors_opening import publish
from torchferry.objects.torch_files import read_pickle
from torchferry.printable import printable
from torchferry.storage.base import Backend
from torchferry.storage.registry import open_backend_async

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem
    from fsspec.callbacks import Callback

__all__ = [
    "Order",
    "consolidate",
    "consolidate_async",
    "make_object",
    "shard",
    "shard_async",
    "shard_file",
]


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
    request = LoadRequest(None, None, None, weights_only, verify=True)
    order = Order(writer, path, request, os.fspath(target).endswith(SUFFIX), part_size=part_size)
    with transfer.running(report):
        return await run_on(own_loop(writer.loop), _consolidate, place, order)


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

    It has one shard: ranks read the ranges that they need. Memory and checks are as in :func:`consolidate`; tensors
    that are not in dicts and lists alone, but in a tuple or another object, are held in memory beside.

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


@dataclass(frozen=True, slots=True)
class Order:
    """What to make of a sharded checkpoint, and where; see :func:`torchferry.convert`."""

    writer: Backend
    path: str
    request: LoadRequest
    as_safetensors: bool
    strip_prefix: str = ""
    max_shard_size: int | None = None
    part_size: int | None = None
    metadata: Mapping[str, str] | None = None


async def _consolidate(place: Place, order: Order) -> ObjectStat:
    with current().reading_side():
        found = await find(place.backend, place.path, place.url, weights_only=order.request.weights_only)
        if found is None:
            raise CheckpointNotFoundError(f"There is no sharded checkpoint at {place.url}: no {METADATA}.")
    return await make_object(found, order)


async def make_object(found: Contents, order: Order) -> ObjectStat:
    """Writes a sharded checkpoint as one object; or as several files of safetensors with an index.

    Returns:
        What is now at the path; of several files, their index.

    Raises:
        CheckpointValueError: safetensors cannot hold it, or two tensors would have one name.
    """
    with current().reading_side():
        names = await in_thread(choose, found.metadata, order.request, found.place.url)
        shards = await Shards.open(found, names)
    async with current().telling():
        if order.as_safetensors:
            return await _make_safetensors(shards, names, order)
        with current().reading_side():
            script = await _torch_script(found, names, order)
        current().set_size(script.size)
        stat = await _write_part(shards, names, script, order.path, order)
        current().moved_at_least(script.size)
        return stat


async def _write_part(shards: Shards, names: Collection[str], script: Script, path: str, order: Order) -> ObjectStat:
    with current().reading_side():
        checksums = await shards.checksums(names)
    return await _write(
        script, shards.parts, shards.files, checksums, order.writer, path, order.part_size, order.metadata
    )


async def _write(
    script: Script,
    parts: Parts,
    files: Files,
    checksums: Sequence[Checksums | None],
    writer: Backend,
    path: str,
    part_size: int | None,
    metadata: Mapping[str, str] | None = None,
) -> ObjectStat:
    plan = writer.upload_plan(script.size, part_size)
    # A store holds up to a part back before it sends any of it: with two blocks more there is always room to go on.
    claim = await EVERYTHING_ELSE.claim_async(plan.part_size + 2 * BLOCK_SIZE, piece=BLOCK_SIZE, beside=plan.memory)
    try:
        assembly = Assembly(script, parts, files, checksums, claim)
        async with assembly.running():
            return await writer.write(path, assembly, plan=plan, metadata=metadata)
    finally:
        claim.close()


async def _torch_script(found: Contents, names: Sequence[str], order: Order) -> Script:
    metadata = found.metadata
    tensors = _tensors(metadata, names)
    others = [name for name in names if name not in tensors]
    paths = metadata.planner_data if isinstance(metadata.planner_data, dict) else {}
    tree = extras_of(metadata).tree
    plain = await load_whole(found, order.request, names=others, nested=False)

    def make() -> Script:
        stand_ins = StandIns(tensors)
        values = {name: stand_ins.tensors.get(name, plain.get(name)) for name in names}
        state: dict[Any, Any] = {}
        taken: set[tuple[Any, ...]] = set()
        if tree is not None:
            state = nest(tree, values, is_asked_of(order.request), found.place.url)
            moved = _take_prefixed(state, order.strip_prefix) if order.strip_prefix else {}
            if doubled := moved.keys() & state.keys():
                raise _doubled(found, str(min(doubled, key=str)))
            state.update(moved)
        for name in names if tree is None else ():
            path = _stripped(paths.get(name, (name,)), order.strip_prefix)
            if path in taken:
                raise _doubled(found, ".".join(map(str, path)))
            taken.add(path)
            set_element(state, path, values[name])
        script = Script()
        script.add_archive(state, stand_ins)
        return script

    return await in_thread(make)


def _tensors(metadata: Metadata, names: Sequence[str]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {
        name: (entry.properties.dtype, entry.size)
        for name in names
        if isinstance(entry := metadata.state_dict_metadata[name], TensorStorageMetadata)
    }


def _stripped(path: Sequence[Any], prefix: str) -> tuple[Any, ...]:
    """A path in a state dict without what its name begins with."""
    rest, left = list(path), prefix
    while left:
        first = str(rest[0])
        if first.startswith(left) and first != left:
            return (first.removeprefix(left), *rest[1:])
        if len(rest) == 1 or not left.startswith(f"{first}."):
            return tuple(path)
        left = left.removeprefix(f"{first}.")
        del rest[0]
    return tuple(rest)


def _take_prefixed(state: dict[Any, Any], prefix: str) -> dict[Any, Any]:
    """Takes what has a name with the prefix out of nested dicts; returns it without the prefix."""
    if not prefix:
        moved = dict(state)
        state.clear()
        return moved
    moved = {}
    for key, item in [*state.items()]:
        text = name_of(key)
        if text.startswith(prefix) and text != prefix:
            moved[text.removeprefix(prefix)] = state.pop(key)
        elif isinstance(item, dict) and prefix.startswith(f"{text}."):
            moved |= _take_prefixed(item, prefix.removeprefix(f"{text}."))
            if not item:
                del state[key]
    return moved


async def _make_safetensors(shards: Shards, names: Sequence[str], order: Order) -> ObjectStat:
    found = shards.found
    tensors = _tensors(found.metadata, names)
    if others := [repr(printable(name)) for name in names if name not in tensors]:
        raise CheckpointValueError(
            f"{found.place.url} has values that are no tensors, which a safetensors file cannot hold: "
            f"{', '.join(others[:10])}. convert() leaves out what exclude= names."
        )
    stored: dict[str, str] = {}
    for name in tensors:
        if (called := name.removeprefix(order.strip_prefix)) in stored:
            raise _doubled(found, called)
        stored[called] = name
    sizes = {called: tensors[name][1].numel() * tensors[name][0].itemsize for called, name in stored.items()}
    total = sum(sizes.values())
    current().set_size(total)

    async def write(path: str, members: Sequence[str]) -> ObjectStat:
        described = {called: tensors[stored[called]] for called in members}
        script = await in_thread(_safetensors_script, described, stored, order.metadata)
        return await _write_part(shards, [stored[called] for called in members], script, path, order)

    stat = await publish(order.writer, order.path, sizes, order.max_shard_size, write)
    current().moved_at_least(total)
    return stat


def _safetensors_script(
    described: Mapping[str, tuple[torch.dtype, torch.Size]],
    stored: Mapping[str, str],
    metadata: Mapping[str, str] | None,
) -> Script:
    named = {called: (dtype_name(dtype, called), tuple(shape)) for called, (dtype, shape) in described.items()}
    head, header = lay_out(named, {"format": "pt", **(metadata or {})})
    script = Script()
    script.add(head)
    for entry in header.entries:
        script.entries.append(Data(stored[entry.name], described[entry.name][0], entry.shape, script.size))
        script.size += entry.stop - entry.start
    return script


def _doubled(found: Contents, name: str) -> CheckpointValueError:
    return CheckpointValueError(f"{found.place.url}: two tensors would be called {printable(name)!r}.")


# --- the other way


async def _shard(reader: Backend, source: str, place: Place, part_size: int | None, weights_only: bool) -> Metadata:
    with current().reading_side():
        file = await open_reader(reader, source)
    return (await shard_file(reader, source, file, place, part_size, weights_only=weights_only))[0]


async def shard_file(
    reader: Backend, source: str, file: RangeReader, place: Place, part_size: int | None, *, weights_only: bool
) -> tuple[Metadata, ObjectStat]:
    """Makes a sharded checkpoint of an object that ``torch.save`` wrote.

    Args:
        reader: The object's store.
        source: Its path there.
        file: The object, opened.
        place: Where to.
        part_size: Of a multipart upload.
        weights_only: As in ``torch.load``.

    Returns:
        The metadata, and what is now at ``.metadata``.
    """
    with current().reading_side():
        archive = await read_archive(file)
        if archive is None or archive.is_torchscript:
            raise CheckpointFormatError(f"{file.url} is not a zip file of torch.save: load it, and save it sharded.")
        order = archive.get("byteorder")
        if order is not None and await file.read(order.offset, order.end) not in {b"", sys.byteorder.encode()}:
            raise CheckpointFormatError(f"{file.url} was saved in another byte order: load it, and save it sharded.")
        data = await read_pickle(file, archive, verify=True)
        buffer = await in_thread(partial(LoadBuffer, archive.whole(file.stat.size), sparse=True))

        def divide() -> tuple[list[Record], list[Record]]:
            graph = read_graph(data, file.url)
            check_graph(graph, archive, weights_only=weights_only)
            beside = {storage.record for storage in graph.storages_beside_tensors().values()}
            needed, later = [], []
            for record in archive.records:
                if not record.name.startswith("data/") or record.name in beside:
                    needed.append(record)
                elif record.size:
                    later.append(record)
            return needed, later

        # Tensors are read when their turn comes. All else that torch looks into has to be there before.
        needed, records = await in_thread(divide)
        read = await in_thread(partial(Checksums, needed, file.url, twice=file.is_remote))
        await fetch_checked(Job(file, [(record.offset, record.end) for record in needed], read.add, buffer), read)

        def unpickle() -> Any:
            buffer.finish()
            with torch_errors(file.url, map_location=None, weights_only=weights_only, checked=True):
                return buffer.load(map_location="cpu", weights_only=weights_only)

        state = await in_thread(unpickle)
        if not isinstance(state, dict):
            raise CheckpointFormatError(f"{file.url} is a {type(state).__name__}: only a dict can be sharded.")
        base = buffer.address
        checksums = await in_thread(Checksums, records, file.url)
        save = new_save_name()
        relative_path = shard_path(save, 0)
        made = await in_thread(_Sharding, state, range(base, base + file.stat.size), file.url)
        files = Files(reader, [(source, file.stat)])
    # Storages that tensors share are read more than once: then their CRC32s cannot be checked as they pass.
    checked = checksums if made.each_once(records) else None
    if checked is None and archive.has_crc32s:
        with current().reading_side():
            again = RangeReader(reader, source, file.stat)  # which keeps nothing
            await again.stream(again.plan([(0, archive.start)]), checksums.add)
            checksums.finish()
    async with current().telling():
        current().set_size(made.script.size)
        stat = await _write(
            made.script, made.parts, files, [checked], place.backend, place.at(relative_path), part_size
        )
        current().moved_at_least(made.script.size)
    metadata = made.metadata
    infos = {index: storage_info(relative_path, made.written(index)) for index in made.items}
    before = await shards_before(place, METADATA)
    content = write_metadata(metadata, infos, place.url, save, {relative_path: (stat.size, stat.etag)}, made.tree)
    committed = await place.put(METADATA, content)
    await remove_before(place, METADATA, committed, before)
    return metadata, committed


class _Sharding:
    """The script of a shard that has all items of a state dict.

    Attributes:
        script: What is written.
        metadata: The checkpoint's.
        items: Offset, length and data of each, by its index.
        tree: How they are nested.

    Raises:
        CheckpointFormatError: two values would have one name, or one is not stored as plain bytes.
    """

    def __init__(self, state: dict[str, Any], memory: range, url: str) -> None:
        planner = DefaultSavePlanner()
        try:
            planner.set_up_planner(state, None, is_coordinator=True)
        except ValueError as error:  # from whoever flattens it: two values of one name
            raise CheckpointFormatError(
                f"{url}: {printable(str(error))}: a sharded checkpoint has one value of a name. Load it, and "
                "save it with other names."
            ) from error
        self.tree = tree_of(state, {path: name for name, path in planner.mappings.items()}, url)
        (plan,), self.metadata = planner.create_global_plan([planner.create_local_plan()])
        self.script = Script()
        self.items: dict[MetadataIndex, tuple[int, int, Data | None, bytes]] = {}
        self._sources: dict[str, tuple[int, tuple[int, ...], torch.dtype]] = {}
        self._extents: list[tuple[int, int]] = []
        for item in sorted(plan.items, key=lambda item: item.type != WriteItemType.BYTE_IO):
            value = planner.resolve_data(item)
            start = self.script.size
            if isinstance(value, io.BytesIO):
                self._add_known(item.index, value.getvalue())
                continue
            tensor = value.detach()
            # One that lies elsewhere was computed as it was unpickled: the file does not hold its bytes.
            is_stored = not tensor.nbytes or tensor.data_ptr() in memory
            if not is_plain(tensor) or tensor.is_conj() or tensor.is_neg() or not is_stored:
                raise CheckpointFormatError(
                    f"{url}: {item.index.fqn} is not stored as plain bytes: load it, and save it."
                )
            if not tensor.nbytes:
                file = io.BytesIO()
                torch_save(torch.empty(tensor.shape, dtype=tensor.dtype), file)
                self._add_known(item.index, file.getvalue())
                continue
            key = f"{item.index.fqn}"
            stand_ins = StandIns({key: (tensor.dtype, tensor.shape)})
            found = self.script.add_archive(stand_ins.tensors[key], stand_ins)
            first = tensor.data_ptr() - memory.start
            self._sources[key] = (first, tensor.stride(), tensor.dtype)
            self._extents.append((first, first + tensor.nbytes if tensor.is_contiguous() else -1))
            self.items[item.index] = (start, self.script.size - start, found[0], b"")

    def _add_known(self, index: MetadataIndex, content: bytes) -> None:
        """Adds an item whose bytes are all known: the CRC32 of such a one is that of all of them."""
        self.items[index] = (self.script.size, len(content), None, content)
        self.script.entries.append(Archive(fill=False))
        self.script.add(content)

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
            return Written(offset, length, None, isal_zlib.crc32(content))
        return Written(offset, length, data.offset - offset, data.crc32)
