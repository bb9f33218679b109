"""Uploads an object in parts: concurrently, in bounded memory, in order, and all or nothing.

A store says how to start an upload, put a part, finish and abort (:class:`MultipartUpload`);
:func:`upload_parts` does the rest for all of them.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Generic, TypeVar

import anyio

from torchferry.engine.tasks import task_group
from torchferry.storage.base import MIB, Chunk
from torchferry.engine.cancellation import to_the_end

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Sequence

__all__ = ["DEFAULT_PART_SIZE", "MultipartUpload", "PartSizes", "part_size_for", "upload_parts"]

PartT = TypeVar("PartT")
ResultT = TypeVar("ResultT")

logger = logging.getLogger("torchferry.storage")

DEFAULT_PART_SIZE = 16 * MIB
"""Bytes in a part where nothing asks for another size."""

_CLEANUP_SECONDS = 30.0
"""How long starting, finishing or aborting may go on after a cancellation."""

_S3_MINIMUM = 5 * MIB
_S3_MAXIMUM = 5 << 30
_S3_MAX_PARTS = 10_000


class MultipartUpload(ABC, Generic[PartT, ResultT]):
    """One upload to one path of a store.

    A method raises the backend's errors, which go on to the caller as they are.
    """

    @abstractmethod
    async def put_whole(self, body: Sequence[Chunk]) -> ResultT:
        """Publishes an object of at most one part in a single request, without :meth:`start`.

        Args:
            body: The object's bytes, in buffers; none for an empty object.
        """

    @abstractmethod
    async def start(self) -> None:
        """Opens the upload."""

    @abstractmethod
    async def put_part(self, index: int, body: Sequence[Chunk]) -> PartT:
        """Uploads a part; several are under way at once, in any order.

        Args:
            index: Its place in the object, from 0.
            body: Its bytes, in buffers.
        """

    @abstractmethod
    async def finish(self, parts: Sequence[PartT]) -> ResultT:
        """Publishes the object: what :meth:`put_part` returned, in the object's order."""

    @abstractmethod
    async def abort(self) -> None:
        """Removes everything staged. Called after a failure or cancel, even one in :meth:`start` or :meth:`finish`."""


class PartSizes:
    """How large each part is: all alike, growing only when a stream turns out far longer than it was said to be.

    Four fifths of the parts have the size chosen for the stream's expected length. The last fifth doubles every
    hundredth of the parts, so that whatever was expected, 10,000 parts of at least 5 MiB hold 5 TiB.

    Args:
        size: Bytes in a part, of most parts.
        maximum: The store's limit for one part, in bytes.
        max_parts: The store's limit for the number of parts.
    """

    def __init__(self, size: int, *, maximum: int = _S3_MAXIMUM, max_parts: int = _S3_MAX_PARTS) -> None:
        self._size = size
        self._maximum = maximum
        self._steady = _steady_parts(max_parts)
        self._step = max(1, max_parts // 100)

    def __getitem__(self, index: int) -> int:
        """Bytes in the part at ``index``, from 0."""
        if index < self._steady:
            return self._size
        # Beyond 40 doublings every size is past every maximum; without a bound the shift could get huge.
        doublings = min(40, (index - self._steady) // self._step + 1)
        return min(self._size << doublings, self._maximum)


def part_size_for(
    size_hint: int,
    wanted: int | None = None,
    *,
    default: int = DEFAULT_PART_SIZE,
    minimum: int = _S3_MINIMUM,
    maximum: int = _S3_MAXIMUM,
    max_parts: int = _S3_MAX_PARTS,
) -> int:
    """How many bytes a part should have.

    Args:
        size_hint: About how many bytes the object will have. They fit four fifths of the parts: hints can be short.
        wanted: What the user chose, if anything. It counts as far as the store's limits allow.
        default: The size where nobody chose one.
        minimum: The least bytes in a part, except the last. The defaults of this and the next two are S3's:
            https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html
        maximum: The most bytes in a part.
        max_parts: The most parts in an object.
    """
    needed = -(-size_hint // _steady_parts(max_parts))
    if needed > MIB:
        needed = -(-needed // MIB) * MIB  # round numbers, for those who read logs
    return min(max(wanted or default, needed, minimum), maximum)


def _steady_parts(max_parts: int) -> int:
    return max(1, max_parts * 4 // 5)


async def upload_parts(
    upload: MultipartUpload[PartT, ResultT], chunks: AsyncIterable[Chunk], sizes: PartSizes, *, in_flight: int
) -> ResultT:
    """Cuts ``chunks`` into parts, uploads them concurrently and publishes the object.

    An object of at most one part goes up in a single request. A part starts as soon as its bytes and one more are
    there; its chunks are held, without a copy, until it is up. At most ``in_flight`` parts are held, the one being
    filled among them.

    When anything raises or the caller is cancelled, parts under way are stopped and the upload is aborted before
    the error goes on. A cancel that comes while the object is being published waits for that, up to a limit.

    Args:
        upload: The store's side of it.
        chunks: The object's bytes; consumed to the end before it is published.
        sizes: How large the parts are.
        in_flight: How many parts may be held at once.
    """
    cutter = _Cutter(chunks)
    first = await cutter.take(sizes[0])
    if cutter.exhausted:
        return await upload.put_whole(first)
    parts: dict[int, PartT] = {}
    slots = anyio.Semaphore(in_flight)

    async def put(index: int, body: list[Chunk]) -> None:
        try:
            parts[index] = await upload.put_part(index, body)
        finally:
            slots.release()

    try:
        await to_the_end(upload.start, patience=_CLEANUP_SECONDS)
        async with task_group() as tasks:
            await slots.acquire()
            tasks.start_soon(put, 0, first)
            del first  # nothing but the task holds a part, so that its memory is free when it is up
            index = 0
            while not cutter.exhausted:
                index += 1
                await slots.acquire()
                tasks.start_soon(put, index, await cutter.take(sizes[index]))
        in_order = [parts[index] for index in range(len(parts))]
        return await to_the_end(upload.finish, in_order, patience=_CLEANUP_SECONDS)
    except BaseException as error:
        await _abort(upload, error)
        raise


async def _abort(upload: MultipartUpload[PartT, ResultT], reason: BaseException) -> None:
    """Aborts the upload; where that fails, says so with the error that is on its way."""
    try:
        await to_the_end(partial(_within, _CLEANUP_SECONDS, upload))
    except Exception as error:  # noqa: BLE001 - the reason for the abort matters more than any failure of it
        message = f"What was staged could not be removed: {type(error).__name__}: {error}"
        reason.add_note(message)
        logger.warning("%s", message)


async def _within(seconds: float, upload: MultipartUpload[PartT, ResultT]) -> None:
    with anyio.fail_after(seconds):
        await upload.abort()


class _Cutter:
    """Cuts a stream of chunks into bodies of given sizes, without copying."""

    def __init__(self, chunks: AsyncIterable[Chunk]) -> None:
        self._chunks = aiter(chunks)
        self._ahead: deque[Chunk] = deque()
        self.exhausted = False

    async def take(self, size: int) -> list[Chunk]:
        """Takes ``size`` bytes, or what is left; knows afterwards whether anything is left."""
        body: list[Chunk] = []
        while size and await self._look_ahead():
            chunk = self._ahead.popleft()
            if len(chunk) > size:
                view = memoryview(chunk)
                self._ahead.appendleft(view[size:])
                chunk = view[:size]
            body.append(chunk)
            size -= len(chunk)
        await self._look_ahead()
        return body

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
