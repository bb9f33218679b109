"""Compares two checkpoints, wherever they are: by the CRC32s that they carry, where they do."""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from itertools import takewhile, zip_longest
from typing import TYPE_CHECKING, Any, Protocol

import torch
from isal import isal_zlib

from torchferry.engine.cancellation import in_thread
from torchferry.engine.collector import collector_paused
from torchferry.engine.loops import own_loop, run_on, synchronous
from torchferry.engine.memory import BLOCK_SIZE, EVERYTHING_ELSE
from torchferry.engine.reader import RangeReader
from torchferry.engine.tasks import task_group
from torchferry.engine.transfer import Transfer, current
from torchferry.errors import CheckpointCorruptError, CheckpointFormatError, mask
from torchferry.formats.archive import (
    INDEX_FORMAT,
    SAFETENSORS_FORMAT,
    SNIFF_SIZE,
    Record,
    Records,
    read_archive,
    sniff,
)
from torchferry.formats.graph import Aspect, Content, Graph, Kind, read_graph
from torchferry.formats.picking import values_of
from torchferry.formats.places import TensorInfo, TensorPlace, place_of, tensor_info
from torchferry.formats.safetensors_stream import view_bytes
from torchferry.formats.stand_ins import StorageRef, is_tensor
from torchferry.formats.torch_hooks import torch_save
from torchferry.locating import locate, open_object
from torchferry.objects.requests import LoadRequest
from torchferry.objects.safetensors_files import inspect_safetensors
from torchferry.objects.safetensors_opening import open_file, open_files
from torchferry.objects.streaming import Extent, ExtentStream
from torchferry.objects.torch_files import load_torch, read_graph_and_records
from torchferry.printable import printable

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem
    from fsspec.callbacks import Callback

    from torchferry.distributed.shards import Shards
    from torchferry.distributed.whole import Contents
    from torchferry.formats.archive import Archive
    from torchferry.manifest import PlainValue
    from torchferry.storage.base import Backend

__all__ = ["Diff", "diff", "diff_async"]

_ROOM = (16 << 20, 6)  # bytes that lists for a comparison may take, and so many for each that was read
_COST = 300  # bytes of a line of them
_LONGEST = 200  # characters of a value that is shown
_BEFORE = 20  # of them, before the first that differs
_LONGEST_INT = 4096  # bits
_ALL: frozenset[Aspect] = frozenset({"value", "kind", "attribute"})


@dataclass(frozen=True, slots=True)
class Diff:
    """How a checkpoint differs from another.

    Attributes:
        added: Names of tensors that only the second one has.
        removed: Names of tensors that only the first one has.
        reshaped: Tensors of another shape or dtype, or of which one is a meta tensor: the first one's and the second's.
        changed: Names of tensors of other content.
        values: Other values that differ: the first one's and the second one's, None where there is none. Long ones are
            cut. Where a list is a tuple on the other side, or a key of a dict of another type, words tell that. Of very
            many, the first.
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
    """Compares two checkpoints by their tensors and all other values: by type and value, NaN being equal to NaN.

    What is there under several names, as tied weights are, has to be there under each of them. Of several values of one
    name, as {"a.b": 1, "a": {"b": 2}} has, the second is called "a.b [2]". What containers and keys are, and the
    ``_metadata`` of state dicts, is compared where both formats keep it: not with safetensors, and of sharded
    checkpoints where :func:`convert` made them. Whether a tensor is a parameter does not matter.

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
        CheckpointFormatError: one is no checkpoint; or a tensor has to be loaded, and lies in an object, or is not the
            only one of its name; or containers hold each other so often that not all of it can be looked at.
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
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Its tensors, by name."""

    @property
    def aspects(self) -> AbstractSet[Aspect]:
        """What it keeps of an object."""

    @property
    def nbytes(self) -> int:
        """Bytes of what its contents were read from."""

    def contents(self) -> Iterator[Content]:
        """All that is no tensor."""

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
        tensors: Its tensors, by name.
        source: Where it is; of several files, their index.
        record: The record of a name, if there is one.
        places: How tensors lie in their storages, by name, where that can be told; None where each is its record.
        files: Of several, by the names of the records that are in them.
        graph: Its object; of safetensors, None.
        doubled: Names that several tensors have.
    """

    tensors: Mapping[str, TensorInfo]
    source: RangeReader
    record: Callable[[str], Record | None]
    places: Mapping[str, TensorPlace] | None
    files: Mapping[str, RangeReader] = field(default_factory=dict)
    graph: Graph | None = None
    doubled: AbstractSet[str] = frozenset()

    @property
    def aspects(self) -> AbstractSet[Aspect]:
        return {"value"} if self.graph is None else _ALL

    @property
    def nbytes(self) -> int:
        return 0 if self.graph is None else self.graph.nbytes

    def contents(self) -> Iterator[Content]:
        if self.graph is not None:
            yield from (content for content in self.graph.contents(self.graph.root) if not _is_tensor(content))

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
                if whole is None or name in self.doubled:
                    raise CheckpointFormatError(
                        f"{self.source.url}: {printable(name)} cannot be compared: it is in an object that has to be "
                        "loaded whole, or is not the only value of its name."
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
    """A sharded checkpoint.

    Attributes:
        tensors: Its tensors, by name.
        shards: Where they are.
        rows: All that is in it, with the names of items for their values.
        graphs: Of the items that are no tensors, by their names.
        nbytes: Bytes of those.
        names: What tensors are called there, by their names here.
        crc32s: Of the elements of tensors in other values, such as tuples.
        aspects: What is known of it.
    """

    tensors: Mapping[str, TensorInfo]
    shards: Shards
    rows: Callable[[], Iterator[Content]]
    graphs: Mapping[str, Graph]
    nbytes: int
    names: Mapping[str, str]
    crc32s: Mapping[str, int]
    aspects: AbstractSet[Aspect]

    def contents(self) -> Iterator[Content]:
        for row in self.rows():
            if not _is_item(row):
                yield row
            elif row.value in self.graphs:
                yield from (content for content in _below(row.name, self.graphs[row.value]) if not _is_tensor(content))

    def stored(self, tensor: TensorInfo) -> tuple[Hashable, int] | None:
        del tensor  # it may be in many parts
        return None

    def crc32(self, tensor: TensorInfo) -> int | None:
        return (
            self.crc32s.get(tensor.key) if tensor.key not in self.names else self.shards.crc32(self.names[tensor.key])
        )

    def read_size(self, tensor: TensorInfo) -> int:
        return tensor.nbytes

    async def read_crc32s(self, tensors: Sequence[TensorInfo]) -> Mapping[str, int]:
        read = await self.shards.read_crc32s([self.names[tensor.key] for tensor in tensors])
        return {tensor.key: read[self.names[tensor.key]] for tensor in tensors}


async def _diff(opened: Sequence[tuple[Backend, str]]) -> Diff:
    sides: dict[int, _Side] = {}

    async def open_side(number: int, backend: Backend, path: str) -> None:
        sides[number] = await _open(backend, path)

    async with task_group() as group:
        for number, (backend, path) in enumerate(opened):
            group.start_soon(open_side, number, backend, path)
    first, second = sides[0], sides[1]
    ours, theirs = first.tensors, second.tensors
    both = [name for name in ours if name in theirs]
    reshaped = {name: (ours[name], theirs[name]) for name in both if _looks(ours[name]) != _looks(theirs[name])}
    same_shape = [name for name in both if name not in reshaped]
    changed = await _changed(first, second, [(ours[name], theirs[name]) for name in same_shape])
    values = await in_thread(_values, first, second)
    return Diff(
        tuple(name for name in theirs if name not in ours),
        tuple(name for name in ours if name not in theirs),
        reshaped,
        tuple(changed),
        values,
        len(same_shape) - len(changed),
    )


def _looks(tensor: TensorInfo) -> tuple[torch.dtype, tuple[int, ...], bool]:
    return tensor.dtype, tensor.shape, tensor.record is None


def _is_tensor(content: Content) -> bool:
    return isinstance(content.value, StorageRef) or is_tensor(content.value)


@collector_paused()
def _values(first: _Side, second: _Side) -> dict[str, tuple[PlainValue, PlainValue]]:
    """What differs of all that is no tensor."""
    aspects = first.aspects & second.aspects
    compared = _Comparison(sum(_ROOM[0] + _ROOM[1] * side.nbytes for side in (first, second)))
    streams = ((content for content in side.contents() if content.aspect in aspects) for side in (first, second))
    for pair in zip_longest(*streams):
        for number, content in enumerate(pair):
            if content is not None:
                compared.add(number, content)
        if compared.room < 0:
            if not compared.found:
                raise CheckpointFormatError(
                    "Cannot compare: too many values have other names, or are in another order."
                )
            return compared.found  # no more than this fits
    return compared.finish()


class _Comparison:
    """Compares the values of two sides as they come: what is in the same order takes no memory.

    Attributes:
        room: Bytes that it may still take.
        found: What differs, by name.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self.found: dict[str, tuple[PlainValue, PlainValue]] = {}
        self._doubled: dict[str, int] = {}
        # Of each side, what the other has not come to: by name, and whether it is a kind, the first of a name first.
        self._waiting: tuple[dict[tuple[bool, str], deque[Any]], ...] = ({}, {})

    def add(self, number: int, content: Content) -> None:
        """Takes a value of the first side (0) or the second one (1)."""
        key = (isinstance(content.value, Kind), content.name)
        there = self._waiting[1 - number].get(key)
        cost = _COST + len(content.name)
        if there is None:
            self._waiting[number].setdefault(key, deque()).append(content.value)
            self.room -= cost
            return
        other = there.popleft()
        self.room += cost
        if not there:
            del self._waiting[1 - number][key]
        if not _is_same(other, content.value):
            self._note(content.name, _shown(other, content.value) if number else _shown(content.value, other))

    def finish(self) -> dict[str, tuple[PlainValue, PlainValue]]:
        """What differs, with what is left on one side."""
        for number, there in enumerate(self._waiting):
            for (_, name), values in there.items():
                for value in values:
                    shown, _ = _shown(value, value)
                    self._note(name, (None, shown) if number else (shown, None))
        return self.found

    def _note(self, name: str, values: tuple[PlainValue, PlainValue]) -> None:
        self.found[_numbered(name, self.found, self._doubled)] = values
        self.room -= 2 * _COST + len(name)


def _numbered(name: str, taken: Mapping[str, object], doubled: dict[str, int]) -> str:
    """A name that is not taken: of several of one name, the second is "name [2]"."""
    unique = name
    while unique in taken:
        doubled[name] = doubled.get(name, 1) + 1
        unique = f"{name} [{doubled[name]}]"
    return unique


def _is_same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and (one == other or (one != one and other != other))  # noqa: PLR0124 - NaN


def _shown(one: Any, other: Any) -> tuple[PlainValue, PlainValue]:
    """Both, as far as they are worth showing: long ones from where they differ."""
    start = 0
    if type(one) is type(other) and isinstance(one, str | bytes):
        same = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
        start = max(sum(1 for _ in same) - _BEFORE, 0)
    return _cut(one, start), _cut(other, start)


def _cut(value: Any, start: int) -> PlainValue:
    if isinstance(value, Kind):
        return printable(value.name[:_LONGEST])
    if isinstance(value, int) and value.bit_length() > _LONGEST_INT:
        return f"an int of {value.bit_length()} bits"
    if value is None or isinstance(value, int | float):
        return value
    if not isinstance(value, str | bytes):
        return f"a {type(value).__name__}"
    start = min(start, max(len(value) - _LONGEST, 0))
    part = value[start : start + _LONGEST]
    text = part if isinstance(part, str) else repr(part)
    return text if len(part) == len(value) else f"...{text}... ({len(value)} long)"


def _tensors_in(
    named: Iterable[tuple[str, Any]], nbytes: int, url: str
) -> tuple[dict[str, TensorInfo], dict[str, TensorPlace], set[str]]:
    """The tensors among contents, how they lie in their storages where that is all, and which names are doubled."""
    tensors: dict[str, TensorInfo] = {}
    places: dict[str, TensorPlace] = {}
    doubled: dict[str, int] = {}
    names: set[str] = set()
    room = _ROOM[0] + _ROOM[1] * nbytes
    for base, value in named:
        name = _numbered(base, tensors, doubled)
        if name != base:
            names |= {base, name}
        room -= _COST + len(name)
        if room < 0:
            raise CheckpointFormatError(f"{url}: it has more names of tensors than its length allows.")
        tensors[name] = tensor_info(name, value)
        if (place := place_of(value)) is not None and place.is_plain:
            places[name] = place
    return tensors, places, names


@collector_paused()
def _read(graph: Graph) -> tuple[dict[str, TensorInfo], dict[str, TensorPlace], set[str]]:
    with graph.damage_told():
        named = ((content.name, content.value) for content in graph.contents(graph.root) if _is_tensor(content))
        return _tensors_in(named, graph.nbytes, graph.url)


async def _open(backend: Backend, path: str) -> _Side:
    source = await open_object(backend, path)
    if not isinstance(source, RangeReader):
        return await _open_sharded(source)
    looks = sniff(await source.read(0, min(source.stat.size, SNIFF_SIZE)))
    if looks not in {SAFETENSORS_FORMAT, INDEX_FORMAT}:
        graph, records = await read_graph_and_records(source)
        tensors, places, doubled = await in_thread(_read, graph)
        record = _by_name(records)
        for tensor in tensors.values():
            if tensor.record is not None and record(tensor.record) is None:
                raise CheckpointCorruptError(f"{source.url} is damaged: record {printable(tensor.record)} is missing.")
        return _Object(tensors, source, record, places, graph=graph, doubled=doubled)
    files = [await open_file(source, path)] if looks == SAFETENSORS_FORMAT else await open_files(backend, path, source)
    manifest = await in_thread(inspect_safetensors, files, source)
    by_file = {
        (f"{file.name}/" if file.name else "") + entry.name: file.source for file in files for entry in file.entries
    }
    named = {tensor.key: tensor for tensor in manifest.tensors}
    return _Object(named, source, _by_name(manifest.records), None, by_file)


def _by_name(records: Sequence[Record]) -> Callable[[str], Record | None]:
    return records.get if isinstance(records, Records) else {record.name: record for record in records}.get


async def _open_sharded(found: Contents) -> _Side:
    from torchferry.distributed.metadata import extras_of
    from torchferry.distributed.shards import Shards
    from torchferry.distributed.whole import inspect_contents, read_values

    manifest = await in_thread(inspect_contents, found)
    shards = await Shards.open(found, [tensor.key for tensor in manifest.tensors])
    values = await read_values(found)
    tree = extras_of(found.metadata).tree

    def rows() -> Iterator[Content]:
        if tree is None:
            yield from _rows_of_paths(found)
        else:
            nesting = Graph(found.place.url, tree, {}, frozenset(), found.stat.size)
            yield from nesting.contents(tree)

    @collector_paused()
    def read() -> _Sharded:
        infos = {tensor.key: tensor for tensor in manifest.tensors}
        archives = {name: _archive_of(name, content, found.place.url) for name, content in values.items()}
        graphs = {name: graph for name, (graph, _) in archives.items()}
        tensors: dict[str, TensorInfo] = {}
        names: dict[str, str] = {}
        crc32s: dict[str, int] = {}
        doubled: dict[str, int] = {}
        for row in rows():
            if not _is_item(row):
                continue
            if row.value in infos:
                name = _numbered(row.name, tensors, doubled)
                tensors[name], names[name] = replace(infos[row.value], key=name), row.value
            elif row.value in graphs:
                graph, archive = archives[row.value]
                for content in filter(_is_tensor, _below(row.name, graph)):
                    name = _numbered(content.name, tensors, doubled)
                    with graph.damage_told():
                        tensors[name] = tensor_info(name, content.value)
                        if tensors[name].record is not None:
                            crc32s[name] = _crc32_in(values[row.value], archive, content, graph.url)
            else:
                raise CheckpointCorruptError(f"{found.place.url} is damaged: it has no {printable(row.value)}.")
        aspects: frozenset[Aspect] = frozenset({"value", "kind"}) if tree is None else _ALL
        nbytes = sum(map(len, values.values()))
        return _Sharded(tensors, shards, rows, graphs, nbytes, names, crc32s, aspects)

    return await in_thread(read)


def _rows_of_paths(found: Contents) -> Iterator[Content]:
    """The items of a sharded checkpoint, and which of what they are in are lists."""
    paths = found.metadata.planner_data if isinstance(found.metadata.planner_data, dict) else {}
    lists: set[str] = set()
    for name in found.metadata.state_dict_metadata:
        path = paths.get(name, ())
        for length, part in enumerate(path):
            before = ".".join(map(str, path[:length]))
            if isinstance(part, int) and before not in lists:
                lists.add(before)
                yield Content(before, Kind("list"), "kind")
        yield Content(name, name, "value")


def _is_item(row: Content) -> bool:
    return row.aspect == "value" and isinstance(row.value, str)


def _below(name: str, graph: Graph) -> Iterator[Content]:
    """What is in an item, with whole names."""
    for content in graph.contents(graph.root):
        yield content._replace(name=f"{name}.{content.name}" if name and content.name else name or content.name)


def _archive_of(name: str, content: bytearray, url: str) -> tuple[Graph, Archive]:
    archive = read_archive(content, url)
    pickled = None if archive is None else archive.get("data.pkl")
    if archive is None or pickled is None:
        raise CheckpointFormatError(f"{url}: {printable(name)} cannot be compared: it is in torch's legacy format.")
    return read_graph(bytes(content[pickled.offset : pickled.end]), url), archive


def _crc32_in(content: bytearray, archive: Archive, tensor: Content, url: str) -> int:
    """The CRC32 of a tensor's elements, in an archive that is in memory."""
    place = place_of(tensor.value)
    record = None if place is None else archive.get(place.storage.record)
    if place is None or record is None or not place.is_plain or place.nbytes > len(content):
        raise CheckpointFormatError(f"{url}: {printable(tensor.name)} cannot be compared: it is no plain tensor.")
    if not place.nbytes:
        return 0
    there = torch.frombuffer(content[record.offset : record.end], dtype=place.dtype)
    return _crc32_of(there.as_strided(place.shape, place.stride, place.offset))


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
