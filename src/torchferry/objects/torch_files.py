"""Loads, inspects and verifies what ``torch.save`` wrote.

Both ends of the object are looked at first (the directory is at the end, the pickle at the start). They tell which
records are needed; those are fetched in parallel ranges into a :class:`~torchferry.formats.load_buffer.LoadBuffer`, and
each record's CRC32 is checked as it arrives. Then torch unpickles the buffer.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from torchferry.engine.cancellation import in_thread
from torchferry.engine.collector import collector_paused
from torchferry.engine.transfer import current
from torchferry.errors import CheckpointCorruptError, CheckpointFormatError, NotEnoughMemoryError, mask
from torchferry.formats.archive import LEGACY_FORMAT, SNIFF_SIZE, sniff
from torchferry.formats.checksum import Checksums
from torchferry.formats.filling import (
    DENSE_TENSOR,
    META_TENSOR,
    QUANTIZED_TENSOR,
    SPARSE_TENSOR,
    Found,
    IncompatibleKeys,
    Target,
    what_it_is,
)
from torchferry.formats.graph import read_graph
from torchferry.formats.load_buffer import LoadBuffer
from torchferry.formats.opcodes import UnusualPickleError, scan_pickle
from torchferry.formats.picking import leaves, pick, take, values_of
from torchferry.formats.places import place_of, tensor_info
from torchferry.formats.repickle import NotPlainError
from torchferry.formats.selection import (
    Selection,
    check_allowed,
    everything,
    legacy,
    of_part,
    select,
)
from torchferry.formats.stand_ins import META, SPARSE, SUBCLASSES, TENSORS, StandIn, is_tensor, is_tensor_leaf
from torchferry.formats.torch_hooks import NO_MODES, torch_errors
from torchferry.manifest import Manifest
from torchferry.objects.opening import read_archive, read_legacy_format, read_twice
from torchferry.objects.reading import Job, fetch_checked

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torchferry.engine.reader import RangeReader
    from torchferry.formats.archive import Archive, Record
    from torchferry.formats.graph import Graph
    from torchferry.objects.requests import LoadRequest

__all__ = [
    "fill_torch",
    "fill_with",
    "format_error",
    "inspect_torch",
    "load_torch",
    "read_graph_and_records",
    "read_pickle",
    "require_archive",
    "verify_torch",
]


async def inspect_torch(source: RangeReader) -> Manifest:
    """What is in a checkpoint."""
    archive = await read_archive(source)
    if archive is None:
        graph, records = await _read_legacy(source)
        return await in_thread(_manifest, source, records, graph)
    pickled = await read_pickle(source, archive, verify=True)
    return await in_thread(_manifest_of_archive, source, archive, pickled)


async def read_graph_and_records(source: RangeReader) -> tuple[Graph, Sequence[Record]]:
    """What a checkpoint's pickle refers to, and the records that it has."""
    archive = await read_archive(source)
    if archive is None:
        return await _read_legacy(source)
    pickled = await read_pickle(source, archive, verify=True)
    return await in_thread(collector_paused()(read_graph), pickled, source.url), archive.records


async def _read_legacy(source: RangeReader) -> tuple[Graph, list[Record]]:
    found = await read_legacy_format(source)
    if found is None:
        raise await format_error(source)
    return found


async def verify_torch(source: RangeReader) -> Manifest:
    """Reads everything, and checks the CRC32 of every record."""
    archive = await require_archive(source)
    pickled = await read_pickle(source, archive, verify=True)
    if not archive.has_crc32s:
        raise CheckpointFormatError(
            f"{source.url} carries no checksums to verify: it was saved under "
            "torch.serialization.set_crc32_options(False)."
        )
    checksums = await in_thread(partial(Checksums, archive.records, source.url, twice=source.is_remote))
    await fetch_checked(Job(source, [(0, archive.start)], checksums.add), checksums)
    return await in_thread(_manifest_of_archive, source, archive, pickled)


async def load_torch(source: RangeReader, request: LoadRequest) -> Any:
    """What was saved, or the part of it that is asked for."""
    archive = await read_archive(source)
    selection = await (_select_legacy(source, request) if archive is None else _select(source, archive, request))
    loaded = await _load_into_buffer(source, archive, selection, request, {})
    if selection.is_final:
        return loaded
    return await in_thread(take, loaded, *request.choice(), source.stat.size, source.url)


async def fill_torch(source: RangeReader, request: LoadRequest, target: Target) -> IncompatibleKeys:
    """Fills tensors that exist with those of the same name."""
    request = replace(request, modes=NO_MODES)  # they are given values, whatever new tensors would be
    archive = await read_archive(source)
    if archive is None or archive.is_torchscript:
        return await _fill_from_whole(source, request, target)
    pickled = await read_pickle(source, archive, verify=request.verify)
    order = await _read_record(source, archive, "byteorder")
    is_native = order in {b"", sys.byteorder.encode()}
    try:
        plan = await in_thread(_plan_filling, pickled, archive, request, target, is_native)
    except (NotPlainError, UnusualPickleError):
        return await _fill_from_whole(source, request, target)
    loaded = await _load_into_buffer(source, archive, plan.selection, request, plan.memory)
    return await in_thread(
        lambda: target.finish(
            {**loaded["tensors"], **loaded["others"]},
            plan.filled,
            plan.found,
            loaded["metadata"],
            source.url,
            strict=request.strict,
        )
    )


class _Filling:
    """How tensors that exist are filled.

    Attributes:
        selection: What is loaded beside.
        memory: What is read straight into tensors, by first offset in the object.
        filled: Their names.
        found: The tensors of the checkpoint.
    """

    def __init__(
        self, selection: Selection, memory: dict[int, memoryview], filled: list[str], found: dict[str, Found]
    ) -> None:
        self.selection = selection
        self.memory = memory
        self.filled = filled
        self.found = found


@collector_paused()
def _plan_filling(pickled: bytes, archive: Archive, request: LoadRequest, target: Target, is_native: bool) -> _Filling:
    graph = read_graph(pickled, archive.url)
    part = pick(graph, *request.choice()) if request.is_part else graph.root
    there, metadata = leaves(graph, part, target.extra)
    with graph.damage_told():
        tensors = {name: leaf for name, leaf in there.items() if is_tensor_leaf(leaf)}
        leaves_by_id = {id(leaf): leaf for leaf in tensors.values()}  # one tensor may have very many names
        known = {identity: _found(leaf, archive, is_native) for identity, leaf in leaves_by_id.items()}
        found = {name: known[id(leaf)] for name, leaf in tensors.items()}
        others = {name: _kind(leaf) for name, leaf in there.items() if name not in found}
    target.check(found, others, archive.url, strict=request.strict, metadata=metadata)
    direct = target.direct(found)
    wanted = {name: leaf for name, leaf in there.items() if target.wants(name)}

    def select_rest() -> Selection:
        filled = {*direct, *target.same_as(direct, found)}
        beside = {
            "tensors": {name: leaf for name, leaf in wanted.items() if name in found and name not in filled},
            "others": {name: leaf for name, leaf in wanted.items() if name not in found},
            "metadata": metadata,
        }
        return of_part(graph, beside, archive, meta=False, weights_only=request.weights_only)

    selection = select_rest()
    offsets = {record.offset for record in selection.records}
    if twice := [name for name, (offset, _) in direct.items() if offset in offsets]:
        for name in twice:  # another tensor is a part of it: it is read once
            del direct[name]
        selection = select_rest()
    records = list(selection.records)
    for name in direct:
        place = place_of(there[name])
        record = archive.get(place.storage.record) if place else None
        if record is None or place is None or record.size != place.storage.nbytes:
            raise CheckpointCorruptError(f"{archive.url} is damaged: a storage's record is missing or of another size.")
        records.append(record)
    records.sort(key=lambda record: record.offset)
    whole = Selection(selection.extents, records, selection.layout)
    return _Filling(whole, dict(direct.values()), list(direct), found)


def _found(leaf: Any, archive: Archive, is_native: bool) -> Found:
    place = place_of(leaf)
    if place is None:
        return _found_by_torch(leaf)
    record = archive.get(place.storage.record)
    # A record's CRC32 is that of all of it.
    is_direct = (
        is_native and place.is_plain and record is not None and place.nbytes == record.size and place.is_contiguous
    )
    extent = (record.offset, record.end) if is_direct and record is not None else None
    return Found(place.dtype, place.shape, extent)


def _found_by_torch(leaf: Any) -> Found:
    """A tensor that torch alone can make, and what is known of it before."""
    if isinstance(leaf, StandIn) and leaf.path in SUBCLASSES and len(leaf.args) > 2:  # noqa: PLR2004 - function, class, arguments
        function, made, arguments = leaf.args[:3]
        is_plain = all(isinstance(each, type) for each in (function, made)) and made.path == "torch.Tensor"
        if is_plain and function.path in TENSORS:  # a tensor with attributes
            leaf = function(*arguments)
    if not is_tensor(leaf):
        return Found(None, None, None, kind=None)
    info = tensor_info("", leaf)
    kind = META_TENSOR if leaf.path == META else QUANTIZED_TENSOR if leaf.path.endswith("_qtensor") else DENSE_TENSOR
    return Found(info.dtype, info.shape, None, kind=kind)


def _kind(leaf: Any) -> str | None:
    if isinstance(leaf, StandIn):
        return SPARSE_TENSOR if leaf.path == SPARSE else None
    return what_it_is(leaf)


async def _fill_from_whole(source: RangeReader, request: LoadRequest, target: Target) -> IncompatibleKeys:
    loaded = await load_torch(source, request)
    return await in_thread(fill_with, loaded, source.url, request, target, source.stat.size)


def fill_with(loaded: Any, url: str, request: LoadRequest, target: Target, nbytes: int = 1 << 24) -> IncompatibleKeys:
    """Fills tensors that exist with those of the same name in what was loaded, from so many bytes."""
    values, metadata = values_of(loaded, nbytes, url, target.extra)
    found = {
        name: Found(value.dtype, tuple(value.shape), None, kind=what_it_is(value))
        for name, value in values.items()
        if isinstance(value, torch.Tensor)
    }
    others = {name: what_it_is(value) for name, value in values.items() if name not in found}
    target.check(found, others, url, strict=request.strict, metadata=metadata)
    return target.finish(values, (), found, metadata, url, strict=request.strict)


@collector_paused()
def _manifest_of_archive(source: RangeReader, archive: Archive, pickled: bytes) -> Manifest:
    return _manifest(source, archive.records, read_graph(pickled, source.url))


def _manifest(source: RangeReader, records: Sequence[Record], graph: Graph) -> Manifest:
    tensors = tuple(graph.tensors())
    return Manifest(mask(source.url), source.stat.size, source.stat.etag, records, tensors, values=graph.plain_values())


async def require_archive(source: RangeReader) -> Archive:
    """The archive of a checkpoint.

    Raises:
        CheckpointFormatError: it is none.
    """
    archive = await read_archive(source)
    if archive is None:
        raise await format_error(source)
    return archive


async def format_error(source: RangeReader) -> CheckpointFormatError:
    """The error for an object that is no archive: it says what it looks like."""
    head = await source.read(0, min(source.stat.size, SNIFF_SIZE))
    looks = sniff(head)
    if looks == LEGACY_FORMAT:
        return CheckpointFormatError(
            f"{source.url} is {looks}, which has no checksums to verify: it can be loaded, inspected and "
            "copied. Save it again."
        )
    return CheckpointFormatError(
        f"{source.url} is not a checkpoint that torch.save wrote: "
        + (f"it looks like {looks}." if looks else f"it starts with {head[:16]!r}.")
    )


async def _read_record(source: RangeReader, archive: Archive, name: str) -> bytes:
    record = archive.get(name)
    return b"" if record is None else await source.read(record.offset, record.end)


async def read_pickle(source: RangeReader, archive: Archive, *, verify: bool) -> bytes:
    """An archive's pickle, checked against its CRC32 if that is wanted."""

    async def read() -> bytes:
        pickled = await _read_record(source, archive, "data.pkl")
        if verify and (record := archive.get("data.pkl")):
            await in_thread(Checksums([record], archive.url).add, record.offset, pickled)
        return pickled

    return await read_twice(source, read)


async def _select(source: RangeReader, archive: Archive, request: LoadRequest) -> Selection:
    size = source.stat.size
    if archive.is_torchscript:
        if request.weights_only or request.is_part:
            raise CheckpointFormatError(
                f"{source.url} is a TorchScript archive (torch.jit.save): it has no keys, and loads with "
                "weights_only=False only. It can run any code, so only if you trust whoever wrote it."
            )
        for name in ("data.pkl", "constants.pkl"):
            await in_thread(scan_pickle, await _read_record(source, archive, name), source.url)
        return everything(archive, size)
    pickled = await read_pickle(source, archive, verify=request.verify)
    return await in_thread(_select_records, pickled, archive, size, request)


@collector_paused()
def _select_records(pickled: bytes, archive: Archive, size: int, request: LoadRequest) -> Selection:
    try:
        graph = read_graph(pickled, archive.url)
    except UnusualPickleError:
        if request.weights_only or not request.verify:
            raise
        # It is what was saved, by somebody whom the caller trusts: torch may understand it.
        return everything(archive, size, is_final=not request.is_part)
    meta = request.leaves_values_out
    return select(graph, archive, size, *request.choice(), meta=meta, weights_only=request.weights_only)


async def _select_legacy(source: RangeReader, request: LoadRequest) -> Selection:
    head = await source.read(0, min(source.stat.size, SNIFF_SIZE))
    if sniff(head) != LEGACY_FORMAT:
        raise await format_error(source)
    return legacy(source.stat.size, is_final=not request.is_part)


async def _load_into_buffer(
    source: RangeReader,
    archive: Archive | None,
    selection: Selection,
    request: LoadRequest,
    direct: dict[int, memoryview],
) -> Any:
    records = selection.records if request.verify else ()
    checksums = await in_thread(partial(Checksums, records, source.url, twice=source.is_remote))
    try:
        load_buffer = LoadBuffer(selection.layout, sparse=request.leaves_values_out)
    except OSError as error:
        raise NotEnoughMemoryError(
            f"{source.url}: this machine has no memory for its {selection.layout.size} bytes. keys= loads a part of "
            "them, into= fills tensors that exist."
        ) from error

    def load() -> Any:
        if archive is None:
            graph = load_buffer.check_legacy(source.url, weights_only=request.weights_only)
            if graph is not None:
                check_allowed(graph)
        as_copy = archive is None or archive.is_torchscript
        if not as_copy:
            load_buffer.finish()
        return (load_buffer.load_copy if as_copy else load_buffer.load)(
            map_location=request.map_location, weights_only=request.weights_only, modes=request.modes
        )

    await fetch_checked(Job(source, selection.extents, checksums.add, load_buffer, direct), checksums)
    with current().stage("unpickling"):
        return await in_thread(_torch_load, load, source.url, request, archive is not None and request.verify)


@collector_paused()
def _torch_load(load: Callable[[], Any], url: str, request: LoadRequest, checked: bool) -> Any:
    with torch_errors(url, map_location=request.map_location, weights_only=request.weights_only, checked=checked):
        return load()
