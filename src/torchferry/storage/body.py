"""Buffers as the body of an HTTP request, and requests that are sent whole or not at all."""

from __future__ import annotations

import asyncio
import io
from time import monotonic
from typing import TYPE_CHECKING, TypeVar

from torchferry.engine.cancellation import run_shielded, wait_shielded
from torchferry.engine.lending import is_lent, joined
from torchferry.engine.types import Buffer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

__all__ = ["SEND_PIECE", "RequestBody", "whole_or_not_at_all"]

T = TypeVar("T")

SEND_PIECE = 512 << 10
"""Bytes handed to a connection at once; about as many wait in its buffer."""

_CANCELLED = "The request was cancelled."
_PATIENCE = 10.0  # seconds that a cancel waits for the answer to a request that was sent whole
_SILENCE = 60.0  # seconds without a byte taken and without an answer, after which a client's request has failed


class RequestBody:
    """Buffers as the body of a request, without copying them together; but lent ones are copied piece by piece.

    To aiohttp it is an asynchronous iterable, which it sends; to the clouds' libraries a seekable file, which they ask
    for its length and position. Sent again, it starts from its beginning.

    Attributes:
        last_taken: When the client last took bytes, on the clock ``time.monotonic``.
    """

    def __init__(self, buffers: Sequence[Buffer]) -> None:
        self._views = [memoryview(buffer) for buffer in buffers if len(buffer)]
        self._size = sum(map(len, self._views))
        self._position = 0
        self.last_taken = monotonic()
        self._taken = False  # the last piece, by the connection: from then on, the store may act on the request
        self._interrupted = False

    def __len__(self) -> int:
        return self._size

    def tell(self) -> int:
        """Where :meth:`read` reads on."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Sets where :meth:`read` reads on, as for any file."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = base + offset
        self._taken = self._position >= self._size
        return self._position

    def read(self, size: int | None = -1) -> Buffer:
        """``size`` bytes, or all that are left; copied only where they lie in more than one buffer."""
        if self._interrupted:
            raise InterruptedError(_CANCELLED)
        stop = self._size if size is None or size < 0 else min(self._size, self._position + size)
        pieces = []
        start = 0
        self.last_taken = monotonic()
        for view in self._views:
            if start < stop and start + len(view) > self._position:
                pieces.append(view[max(0, self._position - start) : stop - start])
            start += len(view)
        self._position = max(stop, self._position)
        self._taken = self._position >= self._size
        return pieces[0] if len(pieces) == 1 and not is_lent(pieces[0]) else joined(pieces)

    def interrupt(self) -> bool:
        """Keeps the last piece from being sent; returns whether that was still possible."""
        self._interrupted = not self._taken
        return self._interrupted

    async def __aiter__(self) -> AsyncIterator[memoryview]:
        left = self._size
        self._taken = not left
        for view in self._views:
            for start in range(0, len(view), SEND_PIECE):
                if self._interrupted:
                    raise InterruptedError(_CANCELLED)
                piece = view[start : start + SEND_PIECE]
                left -= len(piece)
                self._taken = not left
                self.last_taken = monotonic()
                yield memoryview(joined([piece])) if is_lent(piece) else piece


async def whole_or_not_at_all(body: RequestBody, request: Callable[[], Awaitable[T]]) -> T:
    """Awaits ``request()``, which sends ``body``; a cancelled one is either cut short, or waited for.

    Cutting it short after the last byte would not stop the store: what it was asked for could appear after the caller
    has cleaned up. Such a request is waited for, up to 10 seconds.

    Raises:
        TimeoutError: the client took no bytes, and returned no answer, for 60 seconds.
    """
    return await run_shielded(_watched, body, request, patience=lambda: 0 if body.interrupt() else _PATIENCE)


async def _watched(body: RequestBody, request: Callable[[], Awaitable[T]]) -> T:
    body.last_taken = monotonic()
    task = asyncio.ensure_future(request())
    try:
        while not task.done():
            left = body.last_taken + _SILENCE - monotonic()
            if left <= 0:
                raise TimeoutError(f"no answer for {_SILENCE:.0f} s")
            await asyncio.wait([task], timeout=left)
        return task.result()
    finally:
        await wait_shielded(task, 0.0)
