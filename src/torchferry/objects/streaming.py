"""The bytes of objects as a stream of chunks: read ahead into blocks, in the order that is asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import anyio

from torchferry.engine.cancellation import in_thread
from torchferry.engine.tasks import task_group
from torchferry.engine.transfer import current
from torchferry.engine.types import Chunk

if TYPE_CHECKING:
    from torchferry.engine.memory import Claim
    from torchferry.engine.reader import RangeReader

__all__ = ["Extent", "ExtentStream", "Piece", "ReadAhead", "pieces"]

_READS = 16  # blocks ahead of the target at most, and so many reads under way at once
_GAP = 64 << 10  # extents of one object that are this near are read in one: a request costs more


@dataclass(frozen=True, slots=True)
class Extent:
    """Some bytes that the stream gives.

    Attributes:
        source: The object.
        start: Where they start in it.
        stop: Where they end.
    """

    source: RangeReader
    start: int
    stop: int


@dataclass(slots=True)
class Piece:
    """A range on its way into a block, and the parts of it that the stream gives.

    Attributes:
        source: The object.
        start: Where the range starts.
        stop: Where it ends.
        slices: First and last offset in the object of what is given of it, in order.
    """

    source: RangeReader
    start: int
    stop: int
    slices: list[tuple[int, int]]
    memory: memoryview = field(default_factory=lambda: memoryview(b""))
    crc32: int | None = None
    filled: anyio.Event = field(default_factory=anyio.Event)

    @property
    def nbytes(self) -> int:
        """How long it is."""
        return self.stop - self.start


def pieces(extents: Iterable[Extent], longest: int) -> Iterable[Piece]:
    """Cuts extents into pieces of at most ``longest`` bytes, and joins near ones of one object."""
    piece: Piece | None = None
    for extent in extents:
        at = extent.start
        while at < extent.stop:
            fits = (
                piece is not None
                and piece.source is extent.source
                and 0 <= at - piece.stop <= _GAP
                and at - piece.start < longest
            )
            if piece is None or not fits:
                if piece is not None:
                    yield piece
                piece = Piece(extent.source, at, at, [])
            stop = min(extent.stop, piece.start + longest)
            piece.slices.append((at, stop))
            piece.stop = at = stop
    if piece is not None:
        yield piece


class ReadJob(Protocol):
    """What is read into one block.

    Attributes:
        nbytes: How much of the block; of none, nothing is taken.
        memory: So much of it.
        filled: Set when it has been read.
    """

    @property
    def nbytes(self) -> int: ...

    memory: memoryview
    filled: anyio.Event


J = TypeVar("J", bound=ReadJob)


class ReadAhead(AsyncIterator[Chunk], ABC, Generic[J]):
    """A stream whose bytes are read ahead into blocks, and given in order, while :meth:`running`.

    Args:
        claim: The memory.
    """

    def __init__(self, claim: Claim) -> None:
        self._claim = claim
        self._send, self._receive = anyio.create_memory_object_stream[J](_READS)
        self._reading = anyio.CapacityLimiter(_READS)
        self._ready: deque[Chunk] = deque()
        self._closed = False
        self._complete = False

    @abstractmethod
    def _jobs(self, block_size: int) -> Iterable[J]:
        """What to read, in order."""

    @abstractmethod
    async def _read(self, job: J) -> None:
        """Reads it into its memory."""

    @abstractmethod
    async def _chunks(self, job: J) -> Iterable[Chunk]:
        """What the stream gives of it, once it is read."""

    @abstractmethod
    def _finish(self) -> None:
        """Called when all is given, before the stream ends. May raise."""

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
                self._ready.clear()

    async def __anext__(self) -> Chunk:
        current().tell()
        while not self._ready:
            try:
                job = await self._receive.receive()
            except anyio.EndOfStream:
                if not self._complete:
                    raise InterruptedError("reading the source was interrupted") from None
                self._finish()
                raise StopAsyncIteration from None
            await job.filled.wait()
            self._ready += await self._chunks(job)
        return self._ready.popleft()

    async def _read_ahead(self) -> None:
        try:
            with current().reading_side():
                async with task_group() as tasks:
                    for job in self._jobs(self._claim.block_size):
                        if job.nbytes:
                            # Taken in order: a later job must never have the block that an earlier one waits for.
                            block = await self._claim.take_async()
                            job.memory = block[: job.nbytes]
                            del block  # nothing but the job holds it, so that it comes back
                        await self._send.send(job)
                        tasks.start_soon(self._fill, job)
                        del job
            self._complete = True
        except (InterruptedError, anyio.BrokenResourceError):
            if not self._closed:
                raise
        finally:
            self._send.close()

    async def _fill(self, job: J) -> None:
        async with self._reading:
            await self._read(job)
        job.filled.set()


class ExtentStream(ReadAhead[Piece]):
    """The bytes of extents in order.

    Args:
        extents: What is read.
        claim: The memory.
        add: Told all bytes that are read, with their object and offset; returns their CRC32, if it knows it.
        finish: Called when all is read, before the stream ends.
    """

    def __init__(
        self,
        extents: Sequence[Extent],
        claim: Claim,
        *,
        add: Callable[[RangeReader, int, memoryview], int | None] = lambda *_: None,
        finish: Callable[[], object] = lambda: None,
    ) -> None:
        super().__init__(claim)
        self._extents = extents
        self._add = add
        self._at_end = finish

    def _jobs(self, block_size: int) -> Iterable[Piece]:
        return pieces(self._extents, block_size)

    async def _read(self, job: Piece) -> None:
        await job.source.read_into(job.start, job.memory)
        job.crc32 = await in_thread(self._add, job.source, job.start, job.memory)

    async def _chunks(self, job: Piece) -> Iterable[Chunk]:
        memory = job.memory.toreadonly()
        if job.slices == [(job.start, job.stop)]:
            return [Chunk(memory, job.crc32)]
        return [Chunk(memory[start - job.start : stop - job.start]) for start, stop in job.slices]

    def _finish(self) -> None:
        self._at_end()
