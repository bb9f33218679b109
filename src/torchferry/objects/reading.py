"""Reads what a load or a verification needs of one object or several, into memory, and checks it on the way."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torchferry.engine.cancellation import in_thread
from torchferry.engine.memory import copy_bytes
from torchferry.engine.tasks import task_group
from torchferry.engine.transfer import current

if TYPE_CHECKING:
    from torchferry.engine.reader import RangeReader
    from torchferry.engine.types import Buffer
    from torchferry.formats.checksum import Checksums
    from torchferry.formats.load_buffer import LoadBuffer

__all__ = ["Job", "fetch", "fetch_checked"]


@dataclass(slots=True)
class Job:
    """What to read of one object.

    Attributes:
        source: The object.
        extents: First and last offsets of what is needed.
        sink: Given every range when it is there; may raise.
        load_buffer: The memory for what lies in it; None to read into blocks, for ``sink`` only.
        direct: Memory elsewhere: by first offset in the object, for the bytes from there on.
    """

    source: RangeReader
    extents: Sequence[tuple[int, int]]
    sink: Callable[[int, Buffer], object] = lambda _start, _buffer: None
    load_buffer: LoadBuffer | None = None
    direct: dict[int, memoryview] = field(default_factory=dict)
    _starts: list[int] = field(default_factory=list, init=False)

    def plan(self) -> list[tuple[int, int]]:
        """The ranges to read."""
        self._starts = sorted(self.direct)
        ranges = self.ranges(self.extents)
        for start in self._starts:  # each by itself: a range lies in one piece of memory
            ranges += self.ranges([(start, start + len(self.direct[start]))])
        ranges.sort()
        if self.load_buffer is not None:
            self.load_buffer.expect(ranges)
        return ranges

    def ranges(self, extents: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """The ranges to read for extents that are in memory together, or are not kept in memory."""
        return self.source.plan_into_memory(extents) if self.has_memory else self.source.plan(extents)

    @property
    def has_memory(self) -> bool:
        """Whether there is memory for what is read."""
        return self.load_buffer is not None or bool(self.direct)

    def memory(self, start: int, stop: int) -> list[memoryview]:
        """The memory for a range."""
        if (found := self._direct_at(start, stop)) is not None:
            return [found]
        if self.load_buffer is None:
            raise ValueError(f"There is no memory for the bytes {start} to {stop}.")
        return [self.load_buffer.view(start, stop)]

    def write_kept(self, start: int, buffer: Buffer) -> None:
        """Puts bytes that are there already where they belong."""
        if self.load_buffer is not None:
            self.load_buffer.write(start, buffer)
        stop = start + len(buffer)
        view = memoryview(buffer)
        for at in self._starts:
            first, last = max(at, start), min(at + len(self.direct[at]), stop)
            if first < last:
                copy_bytes(self.direct[at][first - at : last - at], view[first - start : last - start])
        self.sink(start, buffer)

    def _direct_at(self, start: int, stop: int) -> memoryview | None:
        index = bisect_right(self._starts, start) - 1
        if index < 0:
            return None
        at = self._starts[index]
        memory = self.direct[at]
        return memory[start - at : stop - at] if stop <= at + len(memory) else None


async def fetch(jobs: Sequence[Job]) -> None:
    """Reads what the jobs need, many ranges at once, and what is there already."""
    transfer = current()
    with transfer.stage("reading"):
        planned = [(job, await in_thread(job.plan), job.source.kept) for job in jobs]
        there = sum(len(buffer) for _, _, kept in planned for _, buffer in kept)
        total = there + sum(stop - start for _, ranges, _ in planned for start, stop in ranges)
        transfer.set_size(total)
        transfer.moved_at_least(there)
        async with transfer.telling():
            async with task_group() as group:
                for job, ranges, kept in planned:
                    group.start_soon(_fetch_one, job, ranges, kept)
            transfer.moved_at_least(total)


async def fetch_checked(job: Job, checksums: Checksums) -> None:
    """Reads what a job needs, and checks it.

    A record that does not match its CRC32 is read again, once, where ``checksums`` allow it ``twice``.

    Args:
        job: Its ``sink`` is ``checksums.add``.
        checksums: Of what it reads.

    Raises:
        CheckpointCorruptError: a record does not match its CRC32.
    """
    await fetch([job])
    if damaged := checksums.take_damaged():
        job.source.forget()  # may have been in it
        ranges = [extent for record in damaged for extent in job.ranges([(record.offset, record.end)])]
        with current().stage("reading"):
            await _fetch_one(job, ranges, [])
    checksums.finish()


async def _fetch_one(job: Job, ranges: list[tuple[int, int]], kept: list[tuple[int, Buffer]]) -> None:
    for start, buffer in kept:
        await in_thread(job.write_kept, start, buffer)
    await job.source.stream(ranges, job.sink, memory=job.memory if job.has_memory else None)
