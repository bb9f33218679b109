"""Opens a stored checkpoint: its head and tail, and the directory of its records."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from torchferry.engine.cancellation import in_thread
from torchferry.engine.collector import collector_paused
from torchferry.engine.loops import run_on
from torchferry.engine.memory import BLOCK_SIZE
from torchferry.engine.reader import RangeReader, merge
from torchferry.engine.tasks import task_group
from torchferry.engine.transfer import current
from torchferry.engine.types import MIB, Buffer
from torchferry.errors import CheckpointCorruptError, CheckpointFormatError, NotEnoughMemoryError
from torchferry.formats.archive import (
    LEGACY_FORMAT,
    LOCAL_HEADER_SIZE,
    SNIFF_SIZE,
    ZIP_FORMAT,
    find_directory,
    parse_directory,
    sniff,
)
from torchferry.formats.opcodes import CutOffPickleError

if TYPE_CHECKING:
    from torchferry.formats.archive import Archive, Record
    from torchferry.formats.graph import Graph
    from torchferry.storage.base import Backend

__all__ = ["memory_errors", "open_reader", "read_archive", "read_legacy_format", "read_twice"]

T = TypeVar("T")

_WHOLE = 1 * MIB  # an object up to this size is read at once
_PROBE = (64 << 10, 1 * MIB)  # least and most bytes of the first look at either end
_PROBE_SHARE = 96  # each is this part of the object: looking costs 2% of it at most
_STEP = 1 << 16  # local headers that are looked for at once
_LONGEST_PICKLES = 256 * MIB  # of the legacy format
_END_SIZE = 66 << 10  # the end records, with the longest comment


@contextmanager
def memory_errors(url: str | os.PathLike[str]) -> Iterator[None]:
    """Raises a NotEnoughMemoryError for what an object, or what it claims to be, has no room in memory for."""
    try:
        yield
    except NotEnoughMemoryError:
        raise
    except MemoryError as error:
        raise NotEnoughMemoryError(
            f"{os.fspath(url)}: this machine has no memory for what it holds. {error}"
        ) from error


async def open_reader(backend: Backend, path: str, *, may_be_empty: bool = False) -> RangeReader:
    """Looks an object up and reads its head and its tail, side by side.

    A checkpoint of torch has its pickle at the head and its directory at the tail.

    Raises:
        CheckpointFormatError: the object is empty, and ``may_be_empty`` is not set.
    """
    with current().stage("opening"):
        source = RangeReader(backend, path, await run_on(backend.loop, backend.stat, path))
        size = source.stat.size
        if not size and may_be_empty:
            return source
        if not size:
            raise CheckpointFormatError(f"{source.url} is empty: not a checkpoint.")
        probe = size if size <= _WHOLE else min(max(size // _PROBE_SHARE, _PROBE[0]), _PROBE[1])
        async with task_group() as group:
            group.start_soon(source.read, 0, probe)
            if probe < size:
                group.start_soon(source.read, size - probe, size)
    return source


async def read_twice(source: RangeReader, read: Callable[[], Awaitable[T]]) -> T:
    """What ``read()`` returns; where that finds damage, once more with bytes that the store is asked for again."""
    try:
        return await read()
    except CheckpointCorruptError as error:
        if not source.is_remote:
            raise
        damage = str(error)
    current().warn(f"{damage} Reading it again.")
    await source.renew()
    return await read()


async def read_archive(source: RangeReader) -> Archive | None:
    """Reads an archive's central directory; None if the object is no zip archive.

    Raises:
        CheckpointCorruptError: the object is damaged: truncated, or its directory contradicts itself.
        CheckpointFormatError: it is a zip archive but no checkpoint.
    """
    return await read_twice(source, partial(_read_archive, source))


async def _read_archive(source: RangeReader) -> Archive | None:
    size = source.stat.size
    if sniff(await source.read(0, min(size, SNIFF_SIZE))) != ZIP_FORMAT:
        return None
    directory = find_directory(await source.read(max(size - _END_SIZE, 0), size), size, source.url)
    if directory is None:
        raise CheckpointCorruptError(f"{source.url} is truncated: it starts as a zip archive does, but has no end.")
    buffer = await source.read(directory.start, directory.start + directory.size)
    archive = await in_thread(collector_paused()(parse_directory), buffer, directory, source.url)
    return await _settle(source, archive) if archive.unproven else archive


async def read_legacy_format(source: RangeReader) -> tuple[Graph, list[Record]] | None:
    """Reads what is in a checkpoint of the legacy format; None if the object is none. Its tensors are not read.

    Its pickles are at the beginning, and nothing says how long they are: four times as much is read until they end.

    Raises:
        CheckpointCorruptError: it is damaged, truncated, or would take too much time or memory.
        UnusualPickleError: it is made in a way that is not understood.
    """
    size = source.stat.size
    if sniff(await source.read(0, min(size, SNIFF_SIZE))) != LEGACY_FORMAT:
        return None
    from torchferry.formats.legacy import read_legacy  # needs torch, and nothing else here does

    length = min(size, _WHOLE)
    while True:
        data = bytes(await source.read(0, length))
        try:
            return await in_thread(collector_paused()(read_legacy), data, size, source.url)
        except CutOffPickleError:
            if length == size or length >= _LONGEST_PICKLES:
                raise
        length = min(size, 4 * length)


async def _settle(source: RangeReader, archive: Archive) -> Archive:
    """Reads the local headers that the offsets of the records depend on."""
    headers = _Headers(archive.unproven)
    await source.stream(await in_thread(headers.ranges), headers.add)
    return await in_thread(archive.settle, headers.memory)


class _Headers:
    """Local headers that are read: there may be a million, so they lie in one piece of memory.

    Args:
        offsets: Of each, in order.

    Attributes:
        memory: The headers, one after another.
    """

    def __init__(self, offsets: Sequence[int]) -> None:
        self._offsets = offsets
        self.memory = bytearray(LOCAL_HEADER_SIZE * len(offsets))

    def ranges(self) -> list[tuple[int, int]]:
        """What to read, a step of headers at a time, so that little memory is needed for their ends."""
        ranges: list[tuple[int, int]] = []
        for first in range(0, len(self._offsets), _STEP):
            ranges += merge(((at, at + LOCAL_HEADER_SIZE) for at in self._offsets[first : first + _STEP]), BLOCK_SIZE)
        return ranges

    def add(self, start: int, buffer: Buffer) -> None:
        """Takes the bytes of a range."""
        view = memoryview(buffer)
        first, last = (bisect_left(self._offsets, at) for at in (start, start + len(view)))
        for index in range(first, last):
            at = self._offsets[index] - start
            header = view[at : at + LOCAL_HEADER_SIZE]
            self.memory[LOCAL_HEADER_SIZE * index : LOCAL_HEADER_SIZE * index + len(header)] = header
