"""A sharded checkpoint as a whole, in one process: its state dict, its contents, a check of all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

from torchferry.distributed.archives import find_tensor, read_directory
from torchferry.distributed.fetch import Files, fetch
from torchferry.distributed.metadata import (
    chunk_of,
    extras_of,
    is_transformed,
    items_by_shard,
    nest,
    read_metadata,
    require_plain,
    shards_of,
    write_metadata,
)
from torchferry.distributed.place import METADATA, Place, new_save_name, shard_path
from torchferry.distributed.reader import StorageReader
from torchferry.distributed.slices import Piece
from torchferry.distributed.writer import remove_before, require_shards, shards_before
from torchferry.engine.cancellation import in_thread
from torchferry.engine.collector import collector_paused
from torchferry.engine.memory import BLOCK_SIZE
from torchferry.engine.reader import RangeReader
from torchferry.engine.transfer import current
from torchferry.engine.types import Buffer, ObjectStat
from torchferry.errors import (
    CheckpointCorruptError,
    NotEnoughMemoryError,
    StorageError,
    UnsupportedOptionError,
    mask,
)
from torchferry.formats.archive import (
    LEGACY_FORMAT,
    SNIFF_SIZE,
    ZIP_FORMAT,
    Record,
    find_directory,
    sniff,
)
from torchferry.formats.checked import load_bytes
from torchferry.formats.checksum import Checksums
from torchferry.formats.filling import Found, IncompatibleKeys, Target
from torchferry.formats.keys import is_asked
from torchferry.formats.load_buffer import LoadBuffer
from torchferry.formats.picking import missing_keys
from torchferry.formats.places import TensorInfo
from torchferry.formats.torch_hooks import torch_errors
from torchferry.manifest import Manifest
from torchferry.objects.requests import LoadRequest
from torchferry.objects.torch_files import fill_with
from torchferry.printable import printable
from torchferry.storage.base import Backend

__all__ = [
    "Contents",
    "ShardedCopy",
    "checksums_of",
    "choose",
    "fill_whole",
    "find",
    "inspect_contents",
    "is_asked_of",
    "load_whole",
    "read_values",
    "verify_contents",
]

_Path: TypeAlias = "tuple[str | int, ...]"
_QUANTIZED = frozenset({torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4})
_ALIGNMENT = 64  # of tensors in the load buffer
_SMALL = 256 << 10  # a stock item up to this size is looked into when it is there


@dataclass(frozen=True, slots=True)
class Contents:
    """A sharded checkpoint that was found.

    Attributes:
        place: Where.
        metadata: Its metadata.
        stat: The version of ``.metadata``.
    """

    place: Place
    metadata: Metadata
    stat: ObjectStat


async def find(backend: Backend, path: str, url: str, *, weights_only: bool = True) -> Contents | None:
    """The sharded checkpoint in a directory; None if there is none.

    Raises:
        UnsafeCheckpointError: its metadata needs classes that DCP itself does not write.
        CheckpointCorruptError: its metadata is damaged.
        StorageError: it cannot be read.
    """
    place = Place(backend, path.rstrip("/"), url)
    try:
        data, stat = await place.get(METADATA)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except StorageError as error:
        if isinstance(error.__cause__, NotADirectoryError):
            return None
        raise
    metadata = await in_thread(partial(read_metadata, weights_only=weights_only), data, place.url_of(METADATA))
    return Contents(place, metadata, stat)


async def load_whole(
    found: Contents,
    request: LoadRequest,
    *,
    names: Sequence[str] | None = None,
    nested: bool = True,
    into: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, Any]:
    """The state dict, nested as it was saved.

    Args:
        found: The checkpoint.
        request: What to load of it. ``map_location`` is a device; the tensors are loaded to the CPU first.
        names: Only these items of it; None for all that are asked for.
        nested: Whether to nest them; else they are by their names.
        into: Tensors that are filled, by name, instead of new ones.
    """
    metadata, url, map_location = found.metadata, found.place.url, request.map_location
    paths = metadata.planner_data if isinstance(metadata.planner_data, dict) else {}
    if names is None:
        names = await in_thread(choose, metadata, request, url)  # it may ask a function of the user's
    filled = into or {}
    device = _device(map_location, url)
    tensors = await in_thread(_allocate, metadata, [name for name in names if name not in filled], device, url)
    requests, targets = _requests(metadata, names, {**tensors, **filled})
    contents: dict[int, bytearray] = {}
    if device.type == "meta":
        chosen = [index for index, target in enumerate(targets) if target is None]
        requests, targets = [requests[index] for index in chosen], [None] * len(chosen)
    if requests:
        reader = StorageReader.at(found.place, verify=request.verify)
        await reader.read_items_within(found.place, metadata, requests, targets, contents)
    with current().stage("unpickling"):
        values: dict[str, Any] = {
            name: tensor if device.type in {"cpu", "meta"} else tensor.to(device) for name, tensor in tensors.items()
        }
        values.update(filled)
        for index, content in contents.items():
            weights_only = request.weights_only
            with torch_errors(url, map_location=map_location, weights_only=weights_only, checked=request.verify):
                loaded = load_bytes(content, url, map_location=map_location, weights_only=weights_only)
            values[requests[index].storage_index.fqn] = loaded
    if not nested:
        return values
    if (tree := extras_of(metadata).tree) is not None:
        return await in_thread(nest, tree, {name: values[name] for name in names}, is_asked_of(request), url)
    state: dict[str, Any] = {}
    for name in names:
        try:
            set_element(state, paths.get(name, (name,)), values[name])
        except (TypeError, IndexError, KeyError, AttributeError) as error:
            raise CheckpointCorruptError(f"{url}: the metadata gives {printable(name)} no place.") from error
    left_out = metadata.state_dict_metadata.keys() - set(names)
    try:
        _use_dicts_for_parts([paths.get(name, ()) for name in names], [paths.get(name, ()) for name in left_out], state)
    except (TypeError, IndexError, KeyError, AttributeError) as error:
        raise CheckpointCorruptError(f"{url}: the metadata gives some of its values no place.") from error
    return state


def _use_dicts_for_parts(taken: Sequence[_Path], left_out: Sequence[_Path], state: Any) -> None:
    """Makes dicts of the lists that were not taken as a whole, by index, as a load of a file does."""
    indices: dict[_Path, dict[int, None]] = {}
    for path in taken:
        for place, index in _lists_of(path):
            indices.setdefault(place, {})[index] = None
    parts = {place for path in left_out for place, _ in _lists_of(path)} & indices.keys()
    for place in sorted(parts, key=len, reverse=True):  # the inner ones first
        *outer, last = place
        holder = state
        for part in outer:
            holder = holder[part]
        holder[last] = {index: holder[last][index] for index in indices[place]}


def _lists_of(path: _Path) -> Iterator[tuple[_Path, int]]:
    """The lists that a path leads through, each with the index there."""
    return ((path[:at], part) for at, part in enumerate(path) if at and type(part) is int)


async def fill_whole(found: Contents, request: LoadRequest, target: Target) -> IncompatibleKeys:
    """Fills tensors that exist with those of the same name: read straight into them, where they are plain tensors.

    Only what the target wants is read, in one go.

    Raises:
        CheckpointMismatchError: it does not fit; before anything is read.
    """
    url, stored = found.place.url, found.metadata.state_dict_metadata
    names = await in_thread(choose, found.metadata, request, url)
    if target.needs_all or not target.extra <= set(names):  # an extra state may be stored as its parts
        return await in_thread(fill_with, await load_whole(found, request), url, request, target)
    there = {
        # Nothing of it is one with another: each has an extent of its own.
        name: Found(entry.properties.dtype, tuple(entry.size), (number, number))
        for number, name in enumerate(names)
        if isinstance(entry := stored[name], TensorStorageMetadata)
    }
    others = {name: "no tensor" for name in names if name not in there}
    target.check(there, others, url, strict=request.strict)
    into = {} if request.leaves_values_out else target.separate(there)
    rest = [name for name in names if name not in into and target.wants(name)]
    values = await load_whole(found, request, names=[*into, *rest], nested=False, into=into)
    loaded = {name: values[name] for name in rest}
    return await in_thread(lambda: target.finish(loaded, into, there, {}, url, strict=request.strict))


async def read_values(found: Contents) -> dict[str, bytearray]:
    """The items that are no tensors, by name, each as ``torch.save`` has written it."""
    metadata = found.metadata
    names = [name for name, entry in metadata.state_dict_metadata.items() if isinstance(entry, BytesStorageMetadata)]
    requests, targets = _requests(metadata, names, {})
    contents: dict[int, bytearray] = {}
    if requests:
        await StorageReader.at(found.place).read_items_within(found.place, metadata, requests, targets, contents)
    return {names[number]: data for number, data in contents.items()}


def choose(metadata: Metadata, request: LoadRequest, url: str) -> list[str]:
    """The items that are asked for: by the names that :func:`inspect_contents` gives them."""
    keys, exclude = request.choice()
    names = [name for name in metadata.state_dict_metadata if is_asked(name, keys, exclude)]
    if keys is not None and keys.unmatched:
        raise missing_keys(url, keys.unmatched, metadata.state_dict_metadata)
    return names


def is_asked_of(request: LoadRequest) -> Callable[[str], bool]:
    """Whether a request takes a name."""
    keys, exclude = request.choice()
    return partial(is_asked, keys=keys, exclude=exclude)


def _device(map_location: Any, url: str) -> torch.device:
    if map_location is None:
        return torch.device("cpu")
    if isinstance(map_location, dict):
        return torch.device(map_location.get("cpu", "cpu"))
    if isinstance(map_location, str | torch.device | int):
        return torch.device(map_location)
    raise UnsupportedOptionError(f"{url} is a sharded checkpoint: map_location= is a device there.")


def _allocate(metadata: Metadata, names: Sequence[str], device: torch.device, url: str) -> dict[str, torch.Tensor]:
    """Tensors to load into, in one piece of memory."""
    stored = {
        name: entry for name in names if isinstance(entry := metadata.state_dict_metadata[name], TensorStorageMetadata)
    }
    for name, entry in stored.items():
        if entry.properties.dtype in _QUANTIZED:
            raise UnsupportedOptionError(
                f"{url}: {printable(name)} is a quantized tensor, whose scale is not stored. Load it into a state dict "
                "that has it: torchferry.distributed.load(state_dict, url)."
            )
    if device.type == "meta":
        return {
            name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta") for name, entry in stored.items()
        }
    size, offsets = 0, {}
    for name, entry in stored.items():
        offsets[name] = size
        nbytes = entry.size.numel() * entry.properties.dtype.itemsize
        size += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
    try:
        memory = LoadBuffer(max(size, 1))
    except (OSError, OverflowError, ValueError) as error:
        raise NotEnoughMemoryError(
            f"{url}: this machine has no memory for its {size} bytes. keys= loads a part of them."
        ) from error
    memory.expect([(0, size)])
    return {name: memory.tensor(offsets[name], entry.size, entry.properties.dtype) for name, entry in stored.items()}


def _requests(
    metadata: Metadata, names: Sequence[str], tensors: dict[str, torch.Tensor]
) -> tuple[list[ReadItem], list[torch.Tensor | None]]:
    requests: list[ReadItem] = []
    targets: list[torch.Tensor | None] = []
    for name in names:
        entry = metadata.state_dict_metadata[name]
        if not isinstance(entry, TensorStorageMetadata):
            requests.append(_request(LoadItemType.BYTE_IO, MetadataIndex(name), (0,), (0,)))
            targets.append(None)
            continue
        for number, chunk in enumerate(entry.chunks):
            target = tensors[name]
            for dim, (offset, length) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
                target = target.narrow(dim, offset, length)
            index = MetadataIndex(name, chunk.offsets, number)
            requests.append(_request(LoadItemType.TENSOR, index, (0,) * len(chunk.sizes), chunk.sizes))
            targets.append(target)
    return requests, targets


def _request(kind: LoadItemType, index: MetadataIndex, offsets: Sequence[int], lengths: Sequence[int]) -> ReadItem:
    return ReadItem(
        type=kind,
        dest_index=index,
        dest_offsets=torch.Size(offsets),
        storage_index=index,
        storage_offsets=torch.Size(offsets),
        lengths=torch.Size(lengths),
    )


# --- what is in it


@collector_paused()
def inspect_contents(found: Contents) -> Manifest:
    """What is in it: the bytes of all shards (as far as the metadata tells), the items as records, and the tensors."""
    metadata = found.metadata
    records = [
        Record(f"{info.relative_path}: {index.fqn}", info.offset, info.length, getattr(info, "crc32", None))
        for index, info in metadata.storage_data.items()
    ]
    known = extras_of(metadata).shards
    size = sum(nbytes for nbytes, _ in known.values()) or sum(record.size for record in records)
    where = {index.fqn: info.relative_path for index, info in metadata.storage_data.items()}
    tensors = tuple(
        TensorInfo(
            name,
            entry.properties.dtype,
            tuple(entry.size),
            entry.size.numel() * entry.properties.dtype.itemsize,
            where.get(name),
        )
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    )
    return Manifest(found.place.url, size, found.stat.etag, records, tensors, format="sharded")


async def verify_contents(found: Contents) -> None:
    """Reads all items, and checks every CRC32; in bounded memory.

    Raises:
        CheckpointCorruptError: one does not match, or a shard is too short.
        CheckpointChangedError: a shard is not the one that was saved.
        CheckpointFormatError: an item was transformed by an extension.
    """
    reader = StorageReader.at(found.place)
    paths = shards_of(found.metadata)
    stats = await reader.versions(found.place, found.metadata, paths)
    transfer = current()
    files = [
        RangeReader(found.place.backend, found.place.at(path), stat) for path, stat in zip(paths, stats, strict=True)
    ]
    transfer.set_size(sum(stat.size for stat in stats))
    items = items_by_shard(found.metadata)
    async with transfer.telling():
        for path, file in zip(paths, files, strict=True):
            checksums = await checksums_of(found, items[path], file, twice=file.is_remote)
            await file.stream(file.plan([(0, file.stat.size)]), checksums.add)
            if damaged := checksums.take_damaged():
                await file.stream(file.plan((record.offset, record.end) for record in damaged), checksums.add)
            checksums.finish()


async def checksums_of(
    found: Contents,
    items: Sequence[tuple[MetadataIndex, Any]],
    file: RangeReader,
    *,
    only_tensors: bool = False,
    twice: bool = False,
) -> Checksums:
    """The CRC32s of the items of a shard: from the metadata, or else from the items themselves.

    Args:
        found: The checkpoint.
        items: Those of the shard: index, and where it is.
        file: The shard.
        only_tensors: Leave out items that are no tensor, or an empty one.
        twice: Whether what does not match may be read again.
    """
    metadata = found.metadata
    records: list[Record] = []
    unknown: list[tuple[MetadataIndex, Any]] = []
    for index, info in items:
        if only_tensors and not _has_bytes(metadata, index):
            continue
        require_plain(index, info, file.url)
        if info.offset < 0 or info.offset + info.length > file.stat.size:
            raise CheckpointCorruptError(
                f"{file.url} has {file.stat.size} bytes: too short for {printable(index.fqn)}, {info.length} bytes at "
                f"{info.offset}."
            )
        crc32 = getattr(info, "crc32", None)
        if crc32 is None:
            unknown.append((index, info))
        elif getattr(info, "data_offset", None) is None:
            records.append(Record(index.fqn, info.offset, info.length, crc32))
        else:
            dtype, chunk = chunk_of(metadata, index)
            nbytes = chunk.sizes.numel() * dtype.itemsize
            records.append(Record(index.fqn, info.offset + info.data_offset, nbytes, crc32))
    if unknown:
        records += await _records_of_archives(found, file, unknown, only_tensors)
    return await in_thread(partial(Checksums, records, file.url, twice=twice))


def _has_bytes(metadata: Metadata, index: MetadataIndex) -> bool:
    """Whether an item is a tensor, and not an empty one."""
    if not isinstance(metadata.state_dict_metadata.get(index.fqn), TensorStorageMetadata):
        return False
    return chunk_of(metadata, index)[1].sizes.numel() > 0


async def _records_of_archives(
    found: Contents, file: RangeReader, items: Sequence[tuple[MetadataIndex, Any]], only_tensors: bool
) -> list[Record]:
    ends: list[tuple[MetadataIndex, Any, bytearray, bytearray]] = []
    parts: list[tuple[int, Piece]] = []
    for index, info in items:
        nbytes = 0
        if isinstance(found.metadata.state_dict_metadata.get(index.fqn), TensorStorageMetadata):
            dtype, chunk = chunk_of(found.metadata, index)
            nbytes = chunk.sizes.numel() * dtype.itemsize
        around = info.length
        if info.length > _SMALL:
            beside = info.length - nbytes  # where that is nothing, the tensor was stored as another dtype
            around = min(beside if beside > 0 else info.length, BLOCK_SIZE // 2)
        head = bytearray(around)
        tail = head if around == info.length else bytearray(around)
        stop = info.offset + info.length
        parts.append((0, Piece(info.offset, info.offset + around, partial(_keep, head))))
        if tail is not head:
            parts.append((0, Piece(stop - around, stop, partial(_keep, tail))))
        ends.append((index, info, head, tail))
    await fetch(Files(found.place.backend, [(found.place.at(items[0][1].relative_path), file.stat)]), parts, [None], "")
    return await in_thread(list, (_storages_in if only_tensors else _records_in)(ends, file.url))


def _records_in(ends: Sequence[tuple[MetadataIndex, Any, bytearray, bytearray]], url: str) -> Iterator[Record]:
    """All records of items."""
    for index, info, head, tail in ends:
        looks = sniff(bytes(head[:SNIFF_SIZE]))
        if looks == LEGACY_FORMAT:
            continue  # no CRC32s
        if looks != ZIP_FORMAT or find_directory(bytes(tail), info.length, url) is None:
            raise CheckpointCorruptError(
                f"{url}: {printable(index.fqn)} is damaged: it is no file of torch's any more."
            )
        archive = read_directory(bytes(head), bytes(tail), info.length, url)
        for record in archive.records if archive is not None else ():
            name = f"{index.fqn}: {record.name}"
            yield Record(name, info.offset + record.offset, record.size, record.crc32)


def _storages_in(ends: Sequence[tuple[MetadataIndex, Any, bytearray, bytearray]], url: str) -> Iterator[Record]:
    """The storages of plain tensors."""
    for index, info, head, tail in ends:
        stored = find_tensor(bytes(head), bytes(tail), info.length, url)
        if stored is not None and stored.crc32 is not None:
            yield Record(index.fqn, info.offset + stored.record_offset, stored.record_size, stored.crc32)


def _keep(memory: bytearray, data: Buffer) -> None:
    memory[:] = data


# --- another one like it


class ShardedCopy:
    """A copy of a sharded checkpoint that is being made.

    Attributes:
        shards: Of each: its relative path, the path of its copy, the shard, and the CRC32s of its items.
    """

    def __init__(
        self, found: Contents, target: Place, save: str, shards: Sequence[tuple[str, str, RangeReader, Checksums]]
    ) -> None:
        self.shards = shards
        self._found = found
        self._target = target
        self._save = save
        self._stats: dict[str, tuple[int, str | None]] = {}
        self._may_be_committed = False

    @classmethod
    async def begin(cls, found: Contents, writer: Backend, target: str, *, verify: bool) -> ShardedCopy:
        """Looks the shards up, and chooses where their copies go.

        Args:
            found: The checkpoint.
            writer: The store of the copy.
            target: The directory of the copy, in that store.
            verify: Whether to check the CRC32s.
        """
        place = Place(writer, target.rstrip("/"), mask(writer.url(target)))
        save = new_save_name()
        paths = shards_of(found.metadata)
        stats = await StorageReader.at(found.place, verify=verify).versions(found.place, found.metadata, paths)
        items = items_by_shard(found.metadata)
        shards = []
        for number, (path, stat) in enumerate(zip(paths, stats, strict=True)):
            file = RangeReader(found.place.backend, found.place.at(path), stat)
            checksums = Checksums((), file.url)
            if verify:
                plain = [(index, info) for index, info in items[path] if not is_transformed(info)]
                if len(plain) < len(items[path]):
                    current().warn(
                        f"{file.url} has items that an extension transformed: their length was checked, and what was "
                        "read was stored."
                    )
                checksums = await checksums_of(found, plain, file, twice=file.is_remote)
            shards.append((path, place.at(shard_path(save, number)), file, checksums))
        return cls(found, place, save, shards)

    def copied(self, number: int, stat: ObjectStat) -> None:
        """Notes that a shard is there."""
        self._stats[shard_path(self._save, number)] = (stat.size, stat.etag)

    async def commit(self) -> ObjectStat:
        """Puts the copy's ``.metadata``; removes the shards of what was there before."""
        new = {path: shard_path(self._save, number) for number, (path, *_) in enumerate(self.shards)}
        infos: dict[MetadataIndex, Any] = {}
        for index, info in self._found.metadata.storage_data.items():
            infos[index] = copy(info)
            infos[index].relative_path = new[info.relative_path]
        metadata = copy(self._found.metadata)
        before = await shards_before(self._target, METADATA)
        tree = extras_of(metadata).tree
        data = write_metadata(metadata, infos, self._target.url, self._save, self._stats, tree)
        await require_shards(self._target, self._stats)
        self._may_be_committed = True
        stat = await self._target.put(METADATA, data)
        await remove_before(self._target, METADATA, stat, before)
        return stat

    async def take_back(self) -> None:
        """Removes the shards of a copy that failed; not if its metadata was sent, which may be there."""
        if not self._may_be_committed:
            with suppress(StorageError):  # the copy's own error goes on
                await self._target.delete(shard_path(self._save, number) for number in range(len(self.shards)))
