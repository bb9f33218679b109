"""The queue from a thread to an event loop."""

from __future__ import annotations

import asyncio
import threading

import pytest

from torchferry.engine.cancellation import in_thread
from torchferry.engine.channel import Channel, ChannelClosedError


async def test_items_come_in_order_and_then_the_end() -> None:
    channel: Channel[int] = Channel(2)

    def put_all() -> None:
        for item in range(100):
            channel.put(item)
        channel.end()

    putting = asyncio.ensure_future(in_thread(put_all))
    taken = []
    with pytest.raises(ChannelClosedError):
        while True:
            taken.append(await channel.take())
    await putting
    assert taken == list(range(100))


async def test_closing_ends_a_thread_that_waits_for_room() -> None:
    channel: Channel[int] = Channel(1)
    full = threading.Event()

    def put_two() -> None:
        channel.put(0)
        full.set()
        channel.put(1)

    putting = asyncio.ensure_future(in_thread(put_two))
    await in_thread(full.wait)
    channel.close()
    with pytest.raises(ChannelClosedError):
        await putting
    with pytest.raises(ChannelClosedError):
        await channel.take()


async def test_a_cancelled_taker_loses_no_item() -> None:
    channel: Channel[int] = Channel(1)
    taking = asyncio.ensure_future(channel.take())
    await asyncio.sleep(0)
    taking.cancel()
    channel.put(7)
    await asyncio.wait([taking])
    assert taking.cancelled()
    assert await channel.take() == 7
