"""How many ranges are read at once."""

from __future__ import annotations

import random

import pytest

from torchferry import source
from torchferry.source import _Pace

MB = 1_000_000
RANGE = 8 * MB


def limits(
    monkeypatch: pytest.MonkeyPatch, *, connection: float, link: float, ranges: int, jitter: float = 0
) -> list[int]:
    """The limit after each range, over connections and a link of so many bytes a second."""
    now = 0.0
    monkeypatch.setattr(source, "monotonic", lambda: now)
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
