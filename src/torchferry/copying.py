"""Copies a checkpoint from one store to another: ranges in, parts out, checked on the way."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torchferry.engine.cancellation import in_thread, run_shielded
from torchferry.engine.loops import own_loop, run_on, synchronous
from torchferry.engine.memory import BLOCK_SIZE, EVERYTHING_ELSE
from torchferry.engine.reader import RangeReader
from torchferry.engine.transfer import Transfer, TransferReport, current
from torchferry.engine.types import ObjectStat
from torchferry.engine.writer import ABORT_PATIENCE
from torchferry.errors import CheckpointCorruptError, CheckpointFormatError, UnsupportedURLError, mask
from torchferry.formats.archive import INDEX_FORMAT, SAFETENSORS_FORMAT, SNIFF_SIZE, sniff
from torchferry.formats.checksum import Checksums
from torchferry.formats.opcodes import UnusualPickleError
from torchferry.formats.safetensors import SUFFIX
from torchferry.locating import locate, open_object
from torchferry.objects.opening import memory_errors, read_archive, read_legacy_format
from torchferry.objects.safetensors_opening import (
    NamedFile,
    find_files,
    open_file,
    open_files,
    publish_index,
    publish_shards,
)
from torchferry.objects.streaming import Extent, ExtentStream
from torchferry.storage.base import Backend
from torchferry.storage.metadata import require_storable

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem
    from fsspec.callbacks import Callback

    from torchferry.distributed.whole import Contents

__all__ = ["copy", "copy_async"]


async def copy_async(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    verify: bool = True,
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
    """Copies a checkpoint, byte for byte, from any store to any other.

    It appears at ``target`` when all of it is there and every record has matched its CRC32, or not at all. Safetensors
    have no CRC32s: their structure is checked. Of several files the index is copied last; the others are called after
    ``target``, and where that are other names than at the source, the index is written anew with them. Takes at most
    208 MiB of memory, together with all copies and verifications of the process.

    Args:
        source: The URL or local path of the checkpoint.
        target: Where to.
        verify: Check every record's CRC32. Without, any object is copied, whatever it is; with an index of safetensors
            its files, too. Of a checkpoint in the legacy format, which carries no CRC32s, what can be is checked, and a
            warning is logged and in the report.
        source_storage_options: Arguments for the fsspec filesystem of ``source``.
        target_storage_options: Arguments for that of ``target``.
        source_filesystem: An fsspec filesystem to use as it is, instead of ``source_storage_options``.
        target_filesystem: The same for ``target``.
        part_size: Bytes in a part of a multipart upload, instead of 16 MiB (or what the size needs).
        metadata: User metadata to store with the copy, instead of the source's.
        give_up_after: Seconds without progress after which failed requests are not repeated any more; 120 by default.
        callback: Told the size, and of bytes as the target acknowledges them.
        report: Called with the :class:`~torchferry.TransferReport` of a copy that succeeded.

    Returns:
        What is now at ``target``.

    Raises:
        CheckpointFormatError: the source is not a checkpoint.
        CheckpointCorruptError: it is damaged. Nothing is at ``target`` that was not there before.
        CheckpointChangedError: it was replaced meanwhile.
        UnsupportedOptionError: an option is not one that these stores, or any, can honour; the message names it.
        StorageError: see :class:`~torchferry.storage.base.Backend`.
    """
    require_storable(os.fspath(target), metadata)
    reader, source_path = await locate(source, storage_options=source_storage_options, filesystem=source_filesystem)
    writer, target_path = await locate(target, storage_options=target_storage_options, filesystem=target_filesystem)
    transfer = Transfer("copy", mask(os.fspath(target)), callback=callback, give_up_after=give_up_after)
    with transfer.running(report), memory_errors(source):
        return await run_on(
            own_loop(writer.loop), _copy, reader, source_path, verify, _Order(writer, target_path, part_size, metadata)
        )


copy = synchronous(copy_async)


@dataclass(frozen=True, slots=True)
class _Order:
    """Where to copy to, and how."""

    writer: Backend
    path: str
    part_size: int | None
    metadata: Mapping[str, str] | None


async def _copy(reader: Backend, source_path: str, verify: bool, order: _Order) -> ObjectStat:
    transfer = current()
    with transfer.reading_side():
        source = await open_object(reader, source_path, may_be_empty=not verify)
        if isinstance(source, RangeReader) and order.path.endswith("/"):
            target = mask(order.writer.url(order.path))
            raise UnsupportedURLError(f"{target} names a directory: add the name of a file.")
        if isinstance(source, RangeReader):
            looks = sniff(await source.read(0, min(source.stat.size, SNIFF_SIZE)))
            files = await _files(reader, source_path, source, verify) if looks == INDEX_FORMAT else None
            if verify and looks == SAFETENSORS_FORMAT:
                await open_file(source, source_path)  # its structure: it has no checksums
    async with transfer.telling():
        if not isinstance(source, RangeReader):
            return await _copy_sharded(source, verify, order)
        if files is not None:
            return await _copy_files(source, *files, order)
        checksums = None if not verify or looks == SAFETENSORS_FORMAT else await _checksums(source)
        transfer.set_size(source.stat.size)
        return await _copy_object(source, checksums, order.path, order)


async def _checksums(source: RangeReader) -> Checksums | None:
    """What checks a copy of a file of ``torch.save``; None for the legacy format, which carries no checksums."""
    with current().reading_side():
        archive = await read_archive(source)
        is_legacy = archive is None and await _is_whole_legacy(source)
    if is_legacy:
        current().warn(
            f"{source.url} is in torch's legacy format, which carries no checksums: its length was checked, and what "
            "its tensors are. Their values are copied as they are."
        )
        return None
    if archive is None or not archive.has_crc32s:
        reason = "it is neither a zip file of torch.save nor safetensors" if archive is None else "it was saved without"
        raise CheckpointFormatError(f"{source.url} carries no checksums: {reason}. Copy it with verify=False.")
    return await in_thread(partial(Checksums, archive.records, source.url, twice=source.is_remote))


async def _is_whole_legacy(source: RangeReader) -> bool:
    """Whether it is a checkpoint in the legacy format; raises a CheckpointCorruptError for one that is not whole."""
    try:
        return await read_legacy_format(source) is not None
    except UnusualPickleError:
        return True


async def _copy_sharded(found: Contents, verify: bool, order: _Order) -> ObjectStat:
    """Copies a sharded checkpoint: shards under a name of this copy's own, and then its metadata."""
    from torchferry.distributed.whole import ShardedCopy

    with current().reading_side():
        sharded = await ShardedCopy.begin(found, order.writer, order.path, verify=verify)
    current().set_size(sum(file.stat.size for _, _, file, _ in sharded.shards))
    try:
        for number, (_, path, file, checksums) in enumerate(sharded.shards):
            sharded.copied(number, await _copy_object(file, checksums, path, replace(order, metadata={})))
        return await sharded.commit()
    except BaseException:
        await run_shielded(sharded.take_back, patience=ABORT_PATIENCE)
        raise


async def _files(reader: Backend, path: str, source: RangeReader, verify: bool) -> tuple[list[NamedFile], int] | None:
    """The files of an index, in the order of their names, and how many bytes their tensors have.

    Unverified, their headers are not looked at: the bytes are those of the files. None if they are not safetensors.
    """
    if verify:
        opened = await open_files(reader, path, source)
        files = [NamedFile(file.name, file.source, [entry.name for entry in file.entries]) for file in opened]
        total = sum(entry.stop - entry.start for file in opened for entry in file.entries)
    else:
        try:
            files = await find_files(reader, path, source)
        except CheckpointFormatError:  # any object is copied
            return None
        if not all(file.name.endswith(SUFFIX) for file in files):
            return None
        total = sum(file.source.stat.size for file in files)
    return sorted(files, key=lambda file: file.name), total


async def _copy_files(source: RangeReader, files: Sequence[NamedFile], total: int, order: _Order) -> ObjectStat:
    """Copies the files of an index, under names of the target's, and then the index."""
    current().set_size(sum(file.source.stat.size for file in files))

    async def write(number: int, path: str) -> None:
        await _copy_object(files[number].source, None, path, order)

    async def publish_it(names: Sequence[str]) -> ObjectStat:
        if list(names) == [file.name for file in files]:
            return await _copy_object(source, None, order.path, order)
        pairs = [(tensor, name) for file, name in zip(files, names, strict=True) for tensor in file.tensors]
        return await publish_index(order.writer, order.path, pairs, total)

    return await publish_shards(order.writer, order.path, len(files), write, publish_it)


async def _copy_object(source: RangeReader, checksums: Checksums | None, path: str, order: _Order) -> ObjectStat:
    """Copies one object; from its start, once, where a record was damaged on its way here and not in the store."""
    before = current().report().nbytes
    try:
        return await _send(source, checksums, path, order)
    except CheckpointCorruptError:
        damaged = [] if checksums is None else checksums.take_damaged()
        if checksums is None or not damaged:
            raise
    source.forget()
    with current().reading_side():
        in_store = Checksums(damaged, source.url)
        await source.stream(source.plan((record.offset, record.end) for record in damaged), in_store.add)
        in_store.finish()
    current().start_again(before)
    return await _send(source, checksums.again(), path, order)


async def _send(source: RangeReader, checksums: Checksums | None, path: str, order: _Order) -> ObjectStat:
    transfer = current()
    writer = order.writer
    size = source.stat.size
    plan = writer.upload_plan(size, order.part_size)
    # The target holds up to a part back before it sends any of it: with one block more there is always room to go on.
    claim = await EVERYTHING_ELSE.claim_async(min(size, plan.part_size + BLOCK_SIZE), beside=plan.memory)

    def add(_: RangeReader, start: int, memory: memoryview) -> int | None:
        if checksums is None:
            return None
        crc32 = checksums.add(start, memory)
        if checksums.found_damage:
            raise CheckpointCorruptError(f"{source.url} is damaged, or was on its way here.")
        return crc32

    try:
        finish = (lambda: None) if checksums is None else checksums.finish
        stream = ExtentStream([Extent(source, 0, size)], claim, add=add, finish=finish)
        async with stream.running():
            metadata = source.stat.metadata if order.metadata is None else order.metadata
            stat = await writer.write(path, stream, plan=plan, metadata=metadata)
            transfer.moved_at_least(size)
            return stat
    finally:
        claim.close()
