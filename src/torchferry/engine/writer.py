"""Uploads a stream of chunks as one object: in parts, many at once, in bounded memory, all or nothing.

A store says how to start an upload, put a part, finish and abort (:class:`Upload`), and what its limits are
(:class:`UploadPlan`); :func:`upload` does the rest for all of them.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar

import anyio
from isal import isal_zlib

from torchferry.arguments import require_nbytes
from torchferry.engine.cancellation import in_thread, run_shielded, wait_shielded
from torchferry.engine.lending import reading
from torchferry.engine.loops import keep_running
from torchferry.engine.tasks import task_group
from torchferry.engine.transfer import current
from torchferry.engine.types import MIB, Buffer, Chunk, ObjectStat
from torchferry.errors import mask

__all__ = ["ABORT_PATIENCE", "Body", "Limits", "Upload", "UploadPlan", "abort", "upload"]

PartT = TypeVar("PartT")

logger = logging.getLogger("torchferry.engine")

ABORT_PATIENCE = 0.7
"""Seconds that a cancelled save waits until what it has staged is removed, before that goes on by itself."""

_PART_SIZE = 16 * MIB  # where nobody chose another,
_LARGE_PART_SIZE = 32 * MIB  # or where that still fills all connections: each request takes 3 ms of processor time
_IN_FLIGHT = 32  # parts under way at once: at 90 MB/s a connection, as S3 gives, 2.9 GB/s
_START_PATIENCE = 0.3  # seconds that a cancel waits to learn the id of an upload that is being created
_ABORT_SECONDS = 30.0  # the longest that an abort may take


class Body:
    """The bytes of one request: chunks, in order.

    Attributes:
        chunks: The chunks.
        size: Their bytes together.
    """

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        self.chunks = chunks
        self.size = sum(map(len, chunks))

    @property
    def buffers(self) -> list[Buffer]:
        """The chunks' memory."""
        return [chunk.data for chunk in self.chunks]

    @cached_property
    def crc32(self) -> int:
        """The CRC32 of all bytes: combined from those of the chunks, or computed where a chunk has none."""
        total = 0
        for chunk in self.chunks:
            if (crc32 := chunk.crc32) is None:
                with reading(chunk.data) as memory:
                    crc32 = isal_zlib.crc32(memory)
            total = isal_zlib.crc32_combine(total, crc32, len(chunk))
        return total

    async def checksum(self) -> int:
        """The CRC32, computed in a thread where that takes time."""
        if all(chunk.crc32 is not None for chunk in self.chunks):
            return self.crc32
        return await in_thread(lambda: self.crc32)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a store allows. The defaults are S3's: https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html.

    Attributes:
        smallest_part: The least bytes in a part, but for the last.
        largest_part: The most bytes in a part.
        most_parts: The most parts in an object.
    """

    smallest_part: int = 5 * MIB
    largest_part: int = 5 << 30
    most_parts: int = 10_000


@dataclass(frozen=True, slots=True)
class UploadPlan:
    """How a stream is cut into parts, and how many go up at once.

    Four fifths of the parts have ``part_size`` bytes. The last fifth doubles every hundredth of the parts, so that
    whatever length was expected, 10,000 parts of at least 5 MiB hold 5 TiB.

    Attributes:
        part_size: Bytes in a part.
        in_flight: The most parts under way at once, the one being filled among them.
        limits: The store's.
        memory: Bytes that writing takes beside the chunks, at its peak.
    """

    part_size: int = _PART_SIZE
    in_flight: int = _IN_FLIGHT
    limits: Limits = Limits()
    memory: int = 0

    @classmethod
    def for_size(
        cls,
        size: int,
        part_size: int | None = None,
        *,
        limits: Limits = Limits(),
        in_flight: int = _IN_FLIGHT,
        memory: int = 0,
    ) -> UploadPlan:
        """The plan for an object of about ``size`` bytes.

        Args:
            size: It fits four fifths of the parts: expectations can be too low.
            part_size: What the user chose, if anything. It counts as far as the store's limits allow.
            limits: The store's.
            in_flight: The most parts under way at once.
            memory: Bytes that writing takes beside the chunks.

        Raises:
            UnsupportedOptionError: ``part_size`` is no number of bytes.
        """
        require_nbytes("part_size", part_size)
        needed = -(-size // _steady(limits.most_parts))
        if needed > MIB:
            needed = -(-needed // MIB) * MIB  # round numbers, for those who read logs
        wanted = part_size or (_PART_SIZE if size < in_flight * _LARGE_PART_SIZE else _LARGE_PART_SIZE)
        return cls(min(max(wanted, needed, limits.smallest_part), limits.largest_part), in_flight, limits, memory)

    def part_at(self, index: int) -> int:
        """Bytes in the part at ``index``, from 0."""
        steady = _steady(self.limits.most_parts)
        if index < steady:
            return self.part_size
        # Beyond 40 doublings every size is past every limit; without a bound the shift could get huge.
        doublings = min(40, (index - steady) // max(1, self.limits.most_parts // 100) + 1)
        return min(self.part_size << doublings, self.limits.largest_part)


def _steady(most_parts: int) -> int:
    return max(1, most_parts * 4 // 5)


class Upload(ABC, Generic[PartT]):
    """One upload to one path of a store. Its errors are the backend's; they go on to the caller as they are.

    Called in this order: :meth:`put_whole` alone; or :meth:`start`, :meth:`put_part` many times, :meth:`finish`. After
    a failure or a cancel anywhere but in :meth:`put_whole`: :meth:`abort`.
    """

    @property
    def staged(self) -> str:
        """What :meth:`abort` removes, in parentheses, for messages: " (the multipart upload 2~abc)"; "" by default."""
        return ""

    @abstractmethod
    async def put_whole(self, body: Body) -> ObjectStat:
        """Publishes an object of at most one part with a single request."""

    @abstractmethod
    async def start(self) -> None:
        """Opens the upload."""

    @abstractmethod
    async def put_part(self, index: int, body: Body) -> PartT:
        """Uploads a part; several are under way at once, in any order.

        Args:
            index: Its place in the object, from 0.
            body: Its bytes.
        """

    @abstractmethod
    async def finish(self, parts: Sequence[PartT]) -> ObjectStat:
        """Publishes the object: what :meth:`put_part` returned, in the object's order.

        A cancel must not cut the request that publishes: see :meth:`torchferry.storage.http.HttpBackend.publish`.
        """

    @abstractmethod
    async def abort(self) -> None:
        """Removes everything staged; also where :meth:`start` or :meth:`finish` was cut off without an answer."""


async def upload(target: Upload[PartT], chunks: AsyncIterable[Chunk], plan: UploadPlan) -> ObjectStat:
    """Cuts ``chunks`` into parts, uploads them concurrently and publishes the object.

    An object of at most one part goes up in a single request. A part starts as soon as its bytes and one more are
    there; its chunks are held, without a copy, until it is up.

    When anything raises or the caller is cancelled, parts under way are stopped and the upload is aborted before
    the error goes on. A cancel that comes while the object is being published waits as long as :meth:`Upload.finish`
    has it wait.

    Args:
        target: The store's side of it.
        chunks: The object's bytes; consumed to the end before it is published.
        plan: How large the parts are, and how many go up at once.
    """
    transfer = current()
    cutter = _Cutter(chunks)
    first = await cutter.take(plan.part_at(0))
    if cutter.exhausted:
        with transfer.stage("sending"):
            return await target.put_whole(first)
    parts: dict[int, PartT] = {}
    slots = anyio.Semaphore(plan.in_flight)

    async def put(index: int, body: Body) -> None:
        try:
            parts[index] = await target.put_part(index, body)
        finally:
            slots.release()
        transfer.count("parts")

    try:
        with transfer.stage("sending"):
            await run_shielded(target.start, patience=_START_PATIENCE)
            async with task_group() as tasks:
                await slots.acquire()
                tasks.start_soon(put, 0, first)
                del first  # nothing but the task holds a part, so that its memory is free when it is up
                index = 0
                while not cutter.exhausted:
                    index += 1
                    await slots.acquire()
                    tasks.start_soon(put, index, await cutter.take(plan.part_at(index)))
        transfer.tell()  # what the callback raises still keeps the object from being published
        in_order = [parts[index] for index in range(len(parts))]
        with transfer.stage("publishing"):
            return await target.finish(in_order)
    except BaseException as error:
        await abort(target, error)
        raise


async def abort(target: Upload[PartT], reason: BaseException) -> None:
    """Aborts an upload; where that fails, a note and the log say so. After a cancel, a slow abort goes on by itself."""
    aborting = asyncio.ensure_future(_abort_and_say(target, reason))
    keep_running(aborting)
    patience = _ABORT_SECONDS if isinstance(reason, Exception) else ABORT_PATIENCE
    await wait_shielded(asyncio.ensure_future(asyncio.wait([aborting], timeout=patience)))


async def _abort_and_say(target: Upload[PartT], reason: BaseException) -> None:
    try:
        with anyio.fail_after(_ABORT_SECONDS):
            await target.abort()
    except Exception as error:  # noqa: BLE001 - the reason for the abort matters more than any failure of it
        detail = str(error) or f"no answer for {_ABORT_SECONDS:.0f} s"
        notes = getattr(error, "__notes__", [])
        failed = f"What was staged{target.staged} could not be removed: {type(error).__name__}: {detail}"
        message = mask(" ".join([failed, *notes]))
        reason.add_note(message)
        logger.warning("%s", message)


class _Cutter:
    """Cuts a stream of chunks into bodies of given sizes, without copying."""

    def __init__(self, chunks: AsyncIterable[Chunk]) -> None:
        self._chunks = aiter(chunks)
        self._ahead: deque[Chunk] = deque()
        self.exhausted = False

    async def take(self, size: int) -> Body:
        """Takes ``size`` bytes, or what is left; knows afterwards whether anything is left."""
        taken: list[Chunk] = []
        while size and await self._look_ahead():
            chunk = self._ahead.popleft()
            if len(chunk) > size:
                view = memoryview(chunk.data)
                self._ahead.appendleft(Chunk(view[size:]))
                chunk = Chunk(view[:size])
            taken.append(chunk)
            size -= len(chunk)
        await self._look_ahead()
        return Body(taken)

    async def _look_ahead(self) -> bool:
        """Whether there are more bytes; reads on to find out."""
        while not self._ahead and not self.exhausted:
            try:
                chunk = await anext(self._chunks)
            except StopAsyncIteration:
                self.exhausted = True
            else:
                if len(chunk):
                    self._ahead.append(chunk)
        return bool(self._ahead)
