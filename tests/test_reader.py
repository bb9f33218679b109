"""How many ranges are read at once."""

from __future__ import annotations

import random
from typing import Any

import anyio
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from torchferry.engine import reader
from torchferry.engine.reader import RangeReader, _Pace
from torchferry.engine.types import Buffer
from torchferry.storage.generic import GenericBackend
from torchferry.testing.conformance import stream

MB = 1_000_000
RANGE = 8 * MB


def limits(
    monkeypatch: pytest.MonkeyPatch, *, connection: float, link: float, ranges: int, jitter: float = 0
) -> list[int]:
    """The limit after each range, over connections and a link of so many bytes a second."""
    now = 0.0
    monkeypatch.setattr(reader, "monotonic", lambda: now)
    generator = random.Random(0)
    pace = _Pace(24)
    under_way = pace.limit
    after = []
    for _ in range(ranges):
        now += RANGE / min(link, connection * under_way) * (1 + jitter * generator.uniform(-1, 1))
        under_way += pace.note(RANGE)
        assert 0 < under_way <= 24
        after.append(pace.limit)
    assert under_way == pace.limit
    return after


def test_a_slow_connection_gets_all_the_others_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    after = limits(monkeypatch, connection=90 * MB, link=100_000 * MB, ranges=128)
    assert after[60:] == [24] * 68


def test_a_link_that_few_connections_fill_keeps_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    after = limits(monkeypatch, connection=500 * MB, link=2_000 * MB, ranges=1000)
    assert after[-1] == 8


def test_a_wrong_start_is_made_good(monkeypatch: pytest.MonkeyPatch) -> None:
    for connection in (30, 60, 90):
        after = limits(monkeypatch, connection=connection * MB, link=100_000 * MB, ranges=600, jitter=0.9)
        assert after[-1] == 24


class Counting(GenericBackend):
    """Tells how many reads were under way at once."""

    range_size = 1 << 14
    under_way = most = 0

    async def read(self, *arguments: Any) -> Buffer:
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        await anyio.sleep(0.001)
        data = await super().read(*arguments)
        self.under_way -= 1
        return data


async def test_what_is_kept_is_read_in_no_more_requests_at_once_than_what_is_streamed() -> None:
    """A pickle of 1 GiB, say, that holds large bytes."""
    backend, data = Counting(MemoryFileSystem()), random.Random(0).randbytes(4 << 20)
    stat = await backend.write("/many.pt", stream(data, 1 << 20), plan=backend.upload_plan(len(data)))
    opened = RangeReader(backend, "/many.pt", stat)
    assert await opened.read(0, len(data)) == data
    assert 8 < backend.most <= backend.range_concurrency
