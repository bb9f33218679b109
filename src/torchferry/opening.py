"""Opens a stored checkpoint: its head and tail, and the directory of its records."""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING

from torchferry.engine.cancellation import in_thread
from torchferry.engine.collector import collector_paused
from torchferry.engine.loops import run_on
from torchferry.engine.memory import BLOCK_SIZE
from torchferry.engine.reader import RangeReader, merge
from torchferry.engine.tasks import task_group
from torchferry.engine.transfer import current
from torchferry.engine.types import MIB, Buffer
from torchferry.errors import CheckpointCorruptError, CheckpointFormatError
from torchferry.formats.archive import (
    LOCAL_HEADER_SIZE,
    SNIFF_SIZE,
    ZIP_FORMAT,
    find_directory,
    parse_directory,
    sniff,
)

if TYPE_CHECKING:
    from torchferry.formats.archive import Archive
    from torchferry.storage.base import Backend

__all__ = ["open_reader", "read_archive"]

_WHOLE = 1 * MIB  # an object up to this size is read at once
_PROBE = (64 << 10, 1 * MIB)  # least and most bytes of the first look at either end
_PROBE_SHARE = 96  # each is this part of the object: looking costs 2% of it at most
_END_SIZE = 66 << 10  # the end records, with the longest comment


async def open_reader(backend: Backend, path: str) -> RangeReader:
    """Looks an object up and reads its head and its tail, side by side.

    A checkpoint of torch has its pickle at the head and its directory at the tail.

    Raises:
        CheckpointFormatError: the object is empty.
    """
    with current().stage("opening"):
        source = RangeReader(backend, path, await run_on(backend.loop, backend.stat, path))
        size = source.stat.size
        if not size:
            raise CheckpointFormatError(f"{source.url} is empty: not a checkpoint.")
        probe = size if size <= _WHOLE else min(max(size // _PROBE_SHARE, _PROBE[0]), _PROBE[1])
        async with task_group() as group:
            group.start_soon(source.read, 0, probe)
            if probe < size:
                group.start_soon(source.read, size - probe, size)
    return source


async def read_archive(source: RangeReader) -> Archive | None:
    """Reads an archive's central directory; None if the object is no zip archive.

    Raises:
        CheckpointCorruptError: the object is damaged: truncated, or its directory contradicts itself.
        CheckpointFormatError: it is a zip archive but no checkpoint.
    """
    size = source.stat.size
    if sniff(await source.read(0, min(size, SNIFF_SIZE))) != ZIP_FORMAT:
        return None
    directory = find_directory(await source.read(max(size - _END_SIZE, 0), size), size, source.url)
    if directory is None:
        raise CheckpointCorruptError(f"{source.url} is truncated: it starts as a zip archive does, but has no end.")
    buffer = await source.read(directory.start, directory.start + directory.size)
    archive = await in_thread(collector_paused()(parse_directory), buffer, directory, source.url)
    return await _settle(source, archive) if archive.unproven else archive


async def _settle(source: RangeReader, archive: Archive) -> Archive:
    """Reads the local headers that the offsets of some records depend on."""
    offsets = archive.unproven_headers
    headers: dict[int, bytes] = {}

    def collect(start: int, buffer: Buffer) -> None:
        view = memoryview(buffer)
        for at in offsets[bisect_left(offsets, start) : bisect_left(offsets, start + len(view))]:
            headers[at] = bytes(view[at - start : at - start + LOCAL_HEADER_SIZE])

    extents = [(at, at + LOCAL_HEADER_SIZE) for at in offsets]
    await source.stream(merge(extents, BLOCK_SIZE), collect)
    return await in_thread(archive.settle, headers)
