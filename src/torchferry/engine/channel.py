"""A bounded queue from a thread to an event loop."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from typing import Generic, TypeVar

__all__ = ["Channel", "ChannelClosedError"]

T = TypeVar("T")


class ChannelClosedError(Exception):
    """The channel was closed on the other side."""


class Channel(Generic[T]):
    """Items put by one thread, taken in order by one task of an event loop.

    anyio's streams do the same through a task of the loop for each item: 0.15 ms of processor time each, and the thread
    waits for the loop. Here the loop is called only where it waits, and the thread waits only where the queue is full.

    Args:
        room: The most items that wait to be taken.
    """

    def __init__(self, room: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._changed = threading.Condition()
        self._items: deque[T] = deque()
        self._room = room
        self._taker: asyncio.Future[None] | None = None  # the task that waits for an item
        self._ended = False
        self._closed = False

    def put(self, item: T) -> None:
        """Puts an item; waits while the queue is full. Called in the thread.

        Raises:
            ChannelClosedError: nobody takes any more.
        """
        with self._changed:
            while len(self._items) >= self._room and not self._closed:
                self._changed.wait()
            if self._closed:
                raise ChannelClosedError
            self._items.append(item)
            self._wake()

    def end(self) -> None:
        """Says that no more items come. Called anywhere."""
        with self._changed:
            self._ended = True
            self._wake()

    async def take(self) -> T:
        """Takes an item; waits while there is none. Called on the loop that made the channel.

        Raises:
            ChannelClosedError: all items are taken, and no more come.
        """
        while True:
            with self._changed:
                if self._items:
                    self._changed.notify()
                    return self._items.popleft()
                if self._ended or self._closed:
                    raise ChannelClosedError
                self._taker = taker = self._loop.create_future()
            await taker  # self._taker may be None by now

    def close(self) -> None:
        """Throws away what waits; :meth:`put` raises from now on. Called on the loop."""
        with self._changed:
            self._closed = True
            self._items.clear()
            self._changed.notify()
            self._wake()

    def _wake(self) -> None:
        """Called with the lock held."""
        if self._taker is not None:
            taker, self._taker = self._taker, None
            self._loop.call_soon_threadsafe(_set, taker)


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():  # cancelled meanwhile
        future.set_result(None)
