"""Copies a checkpoint from one store to another: ranges in, parts out, checked on the way."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
from anyio import to_thread

from torchferry.engine.memory import BLOCK_SIZE, PROCESS_BUDGET, Blocks
from torchferry.engine.loops import own_loop, run_on, synchronous
from torchferry.engine.tasks import task_group
from torchferry.formats.checksum import Checksums
from torchferry.errors import CheckpointFormatError
from torchferry.engine.reader import Source
from torchferry.storage.base import Backend, Chunk, ObjectStat
from torchferry.engine.cancellation import in_thread, run_shielded, stops_as_errors
from torchferry.storage.metadata import require_storable
from torchferry.engine.writer import part_size_for
from torchferry.storage.registry import open_backend

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem
    from fsspec.callbacks import Callback

__all__ = ["copy", "copy_async"]

_READS = 16  # ranges ahead of the target at most, of a block each, and so many under way at once

T = TypeVar("T")


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
    callback: Callback | None = None,
) -> ObjectStat:
    """Copies a checkpoint, byte for byte, from any store to any other.

    It appears at ``target`` when all of it is there and every record has matched its CRC32, or not at all. Takes at
    most 320 MiB of memory, together with all saves and copies of the process.

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
        callback: Told the size, and of bytes as they are handed to the target.

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
    return await run_on(
        own_loop(writer.loop), _copy, reader, source_path, writer, target_path, verify, part_size, metadata, callback
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
    callback: Callback | None,
) -> ObjectStat:
    source = await Source.open(reader, source_path)
    archive = await source.read_archive() if verify else None
    if verify and (archive is None or not archive.has_crc32s):
        reason = "it is not a zip file of torch.save" if archive is None else "it was saved without them"
        raise CheckpointFormatError(f"{source.url} carries no checksums: {reason}. Copy it with verify=False.")
    checksums = await in_thread(Checksums, archive.records if archive else (), source.url)
    size = source.stat.size
    stream = _CopyStream(source, checksums, min(size, 2 * part_size_for(size, part_size)), callback)
    async with stream.running(cost=writer.write_cost(size, part_size)):
        return await writer.write(
            target_path,
            stream,
            size_hint=size,
            part_size=part_size,
            metadata=source.stat.metadata if metadata is None else metadata,
        )


class _CopyStream(AsyncIterator["Chunk"]):
    """The bytes of a source in order, read ahead in blocks, while :meth:`running`.

    Args:
        source: What is read.
        checksums: Told all bytes, and asked at the end.
        window: How many bytes may be held; more than the consumer may hold back.
        callback: Told the size, and of bytes as they are taken.
    """

    def __init__(self, source: Source, checksums: Checksums, window: int, callback: Callback | None) -> None:
        self._source = source
        self._checksums = checksums
        self._window = max(window, BLOCK_SIZE)
        self._callback = callback
        self._blocks = Blocks()
        self._blocks.allow(self._window, borrows=True)
        self._send, self._receive = anyio.create_memory_object_stream[_Piece](_READS)
        self._reading = anyio.CapacityLimiter(_READS)
        self._begun = anyio.Event()
        self._reserved = 0
        self._closed = False
        self._complete = False

    @asynccontextmanager
    async def running(self, *, cost: int) -> AsyncGenerator[None]:
        """Reads ahead, once the process's memory budget has room for it and for ``cost`` bytes of the consumer's.

        Raises:
            TorchferryError: a read failed; the body was cancelled because of it.
        """
        try:
            async with task_group() as tasks:
                tasks.start_soon(self._read_ahead, self._window + _READS * BLOCK_SIZE + cost)
                try:
                    await self._begun.wait()
                    yield
                finally:
                    self._closed = True
                    self._blocks.abandon()
                    PROCESS_BUDGET.wake()
                    tasks.cancel_scope.cancel()
                    self._receive.close()
        finally:
            self._blocks.clear()
            PROCESS_BUDGET.give(self._reserved)

    async def __anext__(self) -> Chunk:
        try:
            piece = await self._receive.receive()
        except anyio.EndOfStream:
            if not self._complete:
                raise InterruptedError("reading the source was interrupted") from None
            self._checksums.finish()
            raise StopAsyncIteration from None
        await piece.filled.wait()
        size = piece.stop - piece.start
        if self._callback is not None:
            stops_as_errors(self._callback.relative_update, size)  # its StopAsyncIteration would be the end
        return piece.block[:size].toreadonly()

    async def _read_ahead(self, cost: int) -> None:
        size = self._source.stat.size
        try:
            self._reserved = await _wait_in_thread(PROCESS_BUDGET.take, cost, abandoned=lambda: self._closed)
            self._begun.set()
            if self._callback is not None:
                self._callback.set_size(size)
            async with task_group() as tasks:
                for start in range(0, size, BLOCK_SIZE):
                    # Taken in order: a later piece must never have the block that an earlier one waits for.
                    # When another piece fails, the wait must end: the blocks may be held by the pieces behind that one.
                    block = await run_shielded(_wait_in_thread, self._blocks.take, patience=self._blocks.abandon)
                    piece = _Piece(start, min(start + BLOCK_SIZE, size), block)
                    await self._send.send(piece)
                    tasks.start_soon(self._fill, piece)
            self._complete = True
        except (InterruptedError, anyio.BrokenResourceError):
            if not self._closed:
                raise
        finally:
            self._send.close()

    async def _fill(self, piece: _Piece) -> None:
        async with self._reading:
            buffer = await self._source.fetch(piece.start, piece.stop)
            await in_thread(self._check_and_copy, piece, buffer)
        piece.filled.set()

    def _check_and_copy(self, piece: _Piece, buffer: Chunk) -> None:
        self._checksums.add(piece.start, buffer)
        piece.block[: len(buffer)] = buffer


@dataclass(frozen=True, slots=True)
class _Piece:
    """Bytes of the source on their way into a block."""

    start: int
    stop: int
    block: memoryview
    filled: anyio.Event = field(default_factory=anyio.Event)


async def _wait_in_thread(func: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Calls what may block for long, in a thread that nobody else waits for."""
    return await to_thread.run_sync(partial(func, *args, **kwargs), limiter=anyio.CapacityLimiter(1))
