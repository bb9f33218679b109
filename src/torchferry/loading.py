"""Loads, inspects and verifies checkpoints.

A load looks at both ends of the object first (the directory is at the end, the pickle at the start), decides which
records it needs, fetches those in parallel ranges into a :class:`~torchferry.formats.load_buffer.LoadBuffer`, and
checks each record's CRC32 as it arrives. Then torch unpickles the buffer.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torchferry.engine import loops
from torchferry.engine.cancellation import in_thread
from torchferry.engine.collector import collector_paused
from torchferry.engine.reader import RangeReader
from torchferry.engine.transfer import Transfer, current
from torchferry.engine.types import Buffer
from torchferry.errors import (
    CheckpointFormatError,
    NotEnoughMemoryError,
    mask,
)
from torchferry.formats.archive import (
    LEGACY_FORMAT,
    SNIFF_SIZE,
    sniff,
)
from torchferry.formats.checksum import Checksums
from torchferry.formats.graph import read_graph
from torchferry.formats.load_buffer import LoadBuffer
from torchferry.formats.opcodes import UnusualPickleError, scan_pickle
from torchferry.formats.selection import Selection, check_graph, check_keys, everything, select
from torchferry.formats.torch_hooks import torch_errors
from torchferry.opening import open_reader, read_archive
from torchferry.storage.registry import open_backend

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from fsspec import AbstractFileSystem
    from fsspec.callbacks import Callback

    from torchferry.engine.transfer import TransferReport
    from torchferry.formats.archive import Archive, Record
    from torchferry.formats.graph import TensorInfo
    from torchferry.storage.base import Backend

__all__ = [
    "Manifest",
    "inspect",
    "inspect_async",
    "load",
    "load_async",
    "verify",
    "verify_async",
]


@dataclass(frozen=True, slots=True)
class Manifest:
    """What is in a checkpoint.

    Attributes:
        url: Where it is, without the secrets of a URL.
        size: Bytes of the object.
        etag: Names the version of the object, where the store has such names.
        records: The records of the archive, in the order of the file.
        tensors: The tensors of the saved object, in its order. Several may share a storage, and so a record.
    """

    url: str
    size: int
    etag: str | None
    records: Sequence[Record]
    tensors: tuple[TensorInfo, ...]

    @property
    def storage_nbytes(self) -> int:
        """Bytes of all storages, each counted once."""
        return sum(record.size for record in self.records if record.name.startswith("data/"))


async def load_async(
    url: str | os.PathLike[str],
    *,
    keys: Sequence[str] | None = None,
    map_location: Any = None,
    weights_only: bool = True,
    verify: bool = True,
    storage_options: Mapping[str, Any] | None = None,
    filesystem: AbstractFileSystem | None = None,
    give_up_after: float | None = None,
    callback: Callback | None = None,
    report: Callable[[TransferReport], object] | None = None,
) -> Any:
    """Loads a checkpoint from a store; any file that ``torch.save`` wrote.

    Takes memory for the object, or for the part that ``keys`` name, and at most 200 MiB beside. The tensors lie in
    one piece of memory, which is freed when all of them are gone. A checkpoint in the legacy format (before torch 1.6)
    is read whole and copied once more.

    Args:
        url: Any fsspec URL, or a local path.
        keys: Load only these keys of a checkpoint that is a dict, and return a dict of them. Only the storages that
            they need are read, as long as the checkpoint is made of tensors and plain Python values.
        map_location: As in ``torch.load``.
        weights_only: As in ``torch.load``; its variable ``TORCH_FORCE_WEIGHTS_ONLY_LOAD`` is obeyed, too. With False,
            a checkpoint can run any code: only for those whose author you trust.
        verify: Check the CRC32 of each record that is read.
        storage_options: Arguments for the fsspec filesystem.
        filesystem: An fsspec filesystem to use as it is, instead of ``storage_options``.
        give_up_after: Seconds without progress after which failed requests are not repeated any more; 120 by default.
        callback: Told the number of bytes to read (``set_size``) and those that have arrived (``relative_update``).
        report: Called with the :class:`~torchferry.TransferReport` of what succeeded.

    Returns:
        What was saved; a dict of the asked keys if there are ``keys``.

    Raises:
        CheckpointFormatError: it is not a checkpoint that ``torch.save`` wrote; or no dict, where there are ``keys``.
        CheckpointCorruptError: it is damaged.
        CheckpointKeyError: a key is not in it.
        UnsafeCheckpointError: it needs globals that ``weights_only=True`` does not allow.
        CheckpointChangedError: it was replaced meanwhile.
        StorageError: see :class:`~torchferry.storage.base.Backend`.
    """
    if isinstance(keys, str):
        raise TypeError(f"keys is a sequence of keys: ({keys!r},) for one.")
    backend, path = await _open(url, storage_options, filesystem)
    forced = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0").lower() in {"1", "y", "yes", "true"}  # as torch.load
    request = _Request(None if keys is None else tuple(keys), map_location, weights_only or forced, verify)
    with Transfer("load", mask(os.fspath(url)), callback=callback, give_up_after=give_up_after).running(report):
        return await loops.run_on(backend.loop, _load, backend, path, request)


async def inspect_async(
    url: str | os.PathLike[str],
    *,
    storage_options: Mapping[str, Any] | None = None,
    filesystem: AbstractFileSystem | None = None,
    give_up_after: float | None = None,
) -> Manifest:
    """Says what is in a checkpoint without reading its tensors.

    Of a usual checkpoint it reads 2%, and 2 MiB at most, in two requests side by side.

    Nothing of what the checkpoint contains is run, whatever it is.

    Args:
        url: Any fsspec URL, or a local path.
        storage_options: Arguments for the fsspec filesystem.
        filesystem: An fsspec filesystem to use as it is, instead of ``storage_options``.
        give_up_after: Seconds without progress after which failed requests are not repeated any more; 120 by default.

    Raises:
        CheckpointFormatError: it is not a checkpoint, or one in the legacy format, which has no directory.
        CheckpointCorruptError: its directory or its pickle is damaged.
        StorageError: see :class:`~torchferry.storage.base.Backend`.
    """
    backend, path = await _open(url, storage_options, filesystem)
    with Transfer("inspect", mask(os.fspath(url)), give_up_after=give_up_after).running(None):
        return await loops.run_on(backend.loop, _inspect, backend, path)


async def verify_async(
    url: str | os.PathLike[str],
    *,
    storage_options: Mapping[str, Any] | None = None,
    filesystem: AbstractFileSystem | None = None,
    give_up_after: float | None = None,
    callback: Callback | None = None,
    report: Callable[[TransferReport], object] | None = None,
) -> Manifest:
    """Reads a whole checkpoint and checks the CRC32 of every record; takes at most 200 MiB of memory.

    Args:
        url: Any fsspec URL, or a local path.
        storage_options: Arguments for the fsspec filesystem.
        filesystem: An fsspec filesystem to use as it is, instead of ``storage_options``.
        give_up_after: Seconds without progress after which failed requests are not repeated any more; 120 by default.
        callback: Told the number of bytes to read (``set_size``) and those that have arrived (``relative_update``).
        report: Called with the :class:`~torchferry.TransferReport` of what succeeded.

    Returns:
        What :func:`inspect_async` returns.

    Raises:
        CheckpointCorruptError: a record does not match its CRC32, or the file is damaged otherwise.
        CheckpointFormatError: it is not a checkpoint, or one that carries no CRC32s.
        StorageError: see :class:`~torchferry.storage.base.Backend`.
    """
    backend, path = await _open(url, storage_options, filesystem)
    with Transfer("verify", mask(os.fspath(url)), callback=callback, give_up_after=give_up_after).running(report):
        return await loops.run_on(backend.loop, _verify, backend, path)


load = loops.synchronous(load_async)
inspect = loops.synchronous(inspect_async)
verify = loops.synchronous(verify_async)


async def _open(
    url: str | os.PathLike[str], storage_options: Mapping[str, Any] | None, filesystem: AbstractFileSystem | None
) -> tuple[Backend, str]:
    return await in_thread(partial(open_backend, url, storage_options=storage_options, filesystem=filesystem))


@dataclass(frozen=True, slots=True)
class _Request:
    keys: tuple[str, ...] | None
    map_location: Any
    weights_only: bool
    verify: bool


async def _inspect(backend: Backend, path: str) -> Manifest:
    source = await open_reader(backend, path)
    archive = await _require_archive(source)
    pickled = await _read_pickle(source, archive, verify=True)
    return await in_thread(_manifest, source, archive, pickled)


async def _verify(backend: Backend, path: str) -> Manifest:
    source = await open_reader(backend, path)
    archive = await _require_archive(source)
    pickled = await _read_pickle(source, archive, verify=True)
    if not archive.has_crc32s:
        raise CheckpointFormatError(
            f"{source.url} carries no checksums to verify: it was saved under "
            "torch.serialization.set_crc32_options(False)."
        )
    checksums = await in_thread(Checksums, archive.records, source.url)
    await _fetch(source, [(0, archive.start)], checksums.add)
    checksums.finish()
    return await in_thread(_manifest, source, archive, pickled)


@collector_paused()
def _manifest(source: RangeReader, archive: Archive, pickled: bytes) -> Manifest:
    graph = read_graph(pickled, source.url)
    return Manifest(mask(source.url), source.stat.size, source.stat.etag, archive.records, tuple(graph.tensors()))


async def _require_archive(source: RangeReader) -> Archive:
    archive = await read_archive(source)
    if archive is None:
        raise await _format_error(source)
    return archive


async def _format_error(source: RangeReader) -> CheckpointFormatError:
    head = await source.read(0, min(source.stat.size, SNIFF_SIZE))
    looks = sniff(head)
    if looks == LEGACY_FORMAT:
        return CheckpointFormatError(
            f"{source.url} is {looks}, which has neither a directory nor checksums: it can only be loaded. "
            "Save it again."
        )
    return CheckpointFormatError(
        f"{source.url} is not a checkpoint that torch.save wrote: "
        + (f"it looks like {looks}." if looks else f"it starts with {head[:16]!r}.")
    )


async def _read_record(source: RangeReader, archive: Archive, name: str) -> bytes:
    record = archive.get(name)
    return b"" if record is None else await source.read(record.offset, record.end)


async def _read_pickle(source: RangeReader, archive: Archive, *, verify: bool) -> bytes:
    pickled = await _read_record(source, archive, "data.pkl")
    if verify and (record := archive.get("data.pkl")):
        await in_thread(Checksums([record], archive.url).add, record.offset, pickled)
    return pickled


async def _fetch(
    source: RangeReader,
    extents: Sequence[tuple[int, int]],
    sink: Callable[[int, Buffer], object],
    load_buffer: LoadBuffer | None = None,
) -> None:
    """Hands the bytes of the extents, and all that is there already, to ``load_buffer`` and then to ``sink``."""
    transfer = current()
    plan = source.plan if load_buffer is None else source.plan_into_memory
    ranges = await in_thread(plan, extents)
    kept = source.kept
    with transfer.stage("reading"):
        there = sum(len(buffer) for _, buffer in kept)
        total = there + sum(stop - start for start, stop in ranges)
        transfer.set_size(total)
        transfer.moved_at_least(there)
        async with transfer.telling():
            for start, buffer in kept:
                if load_buffer is not None:
                    load_buffer.write(start, buffer)
                await in_thread(sink, start, buffer)
            if load_buffer is not None:
                await in_thread(load_buffer.expect, ranges)
            await source.stream(ranges, sink, memory=None if load_buffer is None else load_buffer.view)
            transfer.moved_at_least(total)


async def _load(backend: Backend, path: str, request: _Request) -> Any:
    source = await open_reader(backend, path)
    archive = await read_archive(source)
    selection = await (_select_legacy(source, request) if archive is None else _select(source, archive, request))
    loaded = await _load_into_buffer(source, archive, selection, request)
    if request.keys is None:
        return loaded
    check_keys(loaded, request.keys, source.url)
    return {key: loaded[key] for key in request.keys}


async def _select(source: RangeReader, archive: Archive, request: _Request) -> Selection:
    if archive.is_torchscript:
        if request.weights_only or request.keys is not None:
            raise CheckpointFormatError(
                f"{source.url} is a TorchScript archive (torch.jit.save): it has no keys, and loads with "
                "weights_only=False only. It can run any code, so only if you trust whoever wrote it."
            )
        for name in ("data.pkl", "constants.pkl"):
            await in_thread(scan_pickle, await _read_record(source, archive, name), source.url)
        return everything(archive, request.map_location)
    pickled = await _read_pickle(source, archive, verify=request.verify)
    return await in_thread(_select_records, pickled, archive, request)


@collector_paused()
def _select_records(pickled: bytes, archive: Archive, request: _Request) -> Selection:
    try:
        graph = read_graph(pickled, archive.url)
    except UnusualPickleError:
        if request.weights_only or not request.verify:
            raise
        return everything(
            archive, request.map_location
        )  # it is what was saved, by somebody whom the caller trusts: torch may understand it
    check_graph(graph, archive, weights_only=request.weights_only)
    return select(graph, archive, request.keys, request.map_location)


async def _select_legacy(source: RangeReader, request: _Request) -> Selection:
    head = await source.read(0, min(source.stat.size, SNIFF_SIZE))
    if sniff(head) != LEGACY_FORMAT:
        raise await _format_error(source)
    return Selection([(0, source.stat.size)], (), request.map_location)


async def _load_into_buffer(
    source: RangeReader, archive: Archive | None, selection: Selection, request: _Request
) -> Any:
    checksums = await in_thread(Checksums, selection.records if request.verify else (), source.url)
    try:
        load_buffer = LoadBuffer(source.stat.size, sparse=request.keys is not None)
    except OSError as error:
        raise NotEnoughMemoryError(
            f"{source.url}: this machine has no memory for its {source.stat.size} bytes. keys= loads a part of them."
        ) from error

    def load() -> Any:
        if archive is None:
            load_buffer.check_legacy(source.url, weights_only=request.weights_only)
        if archive is None or archive.is_torchscript:
            return load_buffer.load_copy(map_location=selection.map_location, weights_only=request.weights_only)
        load_buffer.write_headers(archive)
        return load_buffer.load(map_location=selection.map_location, weights_only=request.weights_only)

    await _fetch(source, selection.extents, checksums.add, load_buffer)
    checksums.finish()
    with current().stage("unpickling"):
        return await in_thread(_torch_load, load, source.url, request, archive is not None and request.verify)


@collector_paused()
def _torch_load(load: Callable[[], Any], url: str, request: _Request, checked: bool) -> Any:
    with torch_errors(url, map_location=request.map_location, weights_only=request.weights_only, checked=checked):
        return load()
