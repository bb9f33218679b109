"""Copies a checkpoint from one store to another: ranges in, parts out, checked on the way."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio

from torchferry.engine.cancellation import in_thread
from torchferry.engine.loops import own_loop, run_on, synchronous
from torchferry.engine.memory import BLOCK_SIZE, EVERYTHING_ELSE, Claim
from torchferry.engine.reader import RangeReader
from torchferry.engine.tasks import task_group
from torchferry.engine.transfer import Transfer, TransferReport, current
from torchferry.engine.types import Chunk, ObjectStat
from torchferry.errors import CheckpointFormatError, mask
from torchferry.formats.checksum import Checksums
from torchferry.opening import open_reader, read_archive
from torchferry.storage.base import Backend
from torchferry.storage.metadata import require_storable
from torchferry.storage.registry import open_backend

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem
    from fsspec.callbacks import Callback

__all__ = ["copy", "copy_async"]

_READS = 16  # blocks ahead of the target at most, and so many reads under way at once


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

    It appears at ``target`` when all of it is there and every record has matched its CRC32, or not at all. Takes at
    most 208 MiB of memory, together with all copies and verifications of the process.

    Args:
        source: The URL or local path of the checkpoint.
        target: Where to.
        verify: Check every record's CRC32. Without, any object is copied, whatever it is.
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
        CheckpointFormatError: the source is not a checkpoint that ``torch.save`` wrote.
        CheckpointCorruptError: it is damaged. Nothing is at ``target`` that was not there before.
        CheckpointChangedError: it was replaced meanwhile.
        UnsupportedOptionError: an option is not one that these stores, or any, can honour; the message names it.
        StorageError: see :class:`~torchferry.storage.base.Backend`.
    """
    require_storable(os.fspath(target), metadata or {})
    reader, source_path = await in_thread(
        partial(open_backend, source, storage_options=source_storage_options, filesystem=source_filesystem)
    )
    writer, target_path = await in_thread(
        partial(open_backend, target, storage_options=target_storage_options, filesystem=target_filesystem)
    )
    transfer = Transfer("copy", mask(os.fspath(target)), callback=callback, give_up_after=give_up_after)
    with transfer.running(report):
        return await run_on(
            own_loop(writer.loop), _copy, reader, source_path, writer, target_path, verify, part_size, metadata
        )


copy = synchronous(copy_async)


async def _copy(
    reader: Backend,
    source_path: str,
    writer: Backend,
    target_path: str,
    verify: bool,
    part_size: int | None,
    metadata: Mapping[str, str] | None,
) -> ObjectStat:
    transfer = current()
    with transfer.reading_side():
        source = await open_reader(reader, source_path)
        archive = await read_archive(source) if verify else None
    if verify and (archive is None or not archive.has_crc32s):
        reason = "it is not a zip file of torch.save" if archive is None else "it was saved without them"
        raise CheckpointFormatError(f"{source.url} carries no checksums: {reason}. Copy it with verify=False.")
    checksums = await in_thread(Checksums, archive.records if archive else (), source.url)
    size = source.stat.size
    plan = writer.upload_plan(size, part_size)
    # The target holds up to a part back before it sends any of it: with one block more there is always room to go on.
    claim = await EVERYTHING_ELSE.claim_async(min(size, plan.part_size + BLOCK_SIZE) + plan.memory)
    try:
        stream = _CopyStream(source, checksums, claim)
        async with stream.running(), transfer.telling():
            transfer.set_size(size)
            stat = await writer.write(
                target_path, stream, plan=plan, metadata=source.stat.metadata if metadata is None else metadata
            )
            transfer.moved_at_least(size)
            return stat
    finally:
        claim.close()


class _CopyStream(AsyncIterator["Chunk"]):
    """The bytes of a source in order, read ahead into blocks, while :meth:`running`.

    Args:
        source: What is read.
        checksums: Told all bytes, and asked at the end.
        claim: The memory.
    """

    def __init__(self, source: RangeReader, checksums: Checksums, claim: Claim) -> None:
        self._source = source
        self._checksums = checksums
        self._claim = claim
        self._send, self._receive = anyio.create_memory_object_stream[_Piece](_READS)
        self._reading = anyio.CapacityLimiter(_READS)
        self._closed = False
        self._complete = False

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        """Reads ahead.

        Raises:
            TorchferryError: a read failed; the body was cancelled because of it.
        """
        async with task_group() as tasks:
            tasks.start_soon(self._read_ahead)
            try:
                yield
            finally:
                self._closed = True
                self._claim.abandon()
                tasks.cancel_scope.cancel()
                self._receive.close()

    async def __anext__(self) -> Chunk:
        current().tell()
        try:
            piece = await self._receive.receive()
        except anyio.EndOfStream:
            if not self._complete:
                raise InterruptedError("reading the source was interrupted") from None
            self._checksums.finish()
            raise StopAsyncIteration from None
        await piece.filled.wait()
        return Chunk(piece.memory.toreadonly(), piece.crc32)

    async def _read_ahead(self) -> None:
        size = self._source.stat.size
        step = self._claim.block_size
        try:
            with current().reading_side():
                async with task_group() as tasks:
                    for start in range(0, size, step):
                        # Taken in order: a later piece must never have the block that an earlier one waits for.
                        block = await self._claim.take_async()
                        piece = _Piece(start, block[: min(step, size - start)])
                        del block  # nothing but the piece holds it, so that it comes back
                        await self._send.send(piece)
                        tasks.start_soon(self._fill, piece)
                        del piece
            self._complete = True
        except (InterruptedError, anyio.BrokenResourceError):
            if not self._closed:
                raise
        finally:
            self._send.close()

    async def _fill(self, piece: _Piece) -> None:
        async with self._reading:
            await self._source.read_into(piece.start, piece.memory)
            piece.crc32 = await in_thread(self._checksums.add, piece.start, piece.memory)
        piece.filled.set()


@dataclass(slots=True)
class _Piece:
    """Bytes of the source on their way into a block."""

    start: int
    memory: memoryview
    crc32: int = 0
    filled: anyio.Event = field(default_factory=anyio.Event)
