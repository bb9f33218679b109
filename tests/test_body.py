"""Buffers as the body of a request."""

from __future__ import annotations

import asyncio

import pytest

from torchferry.storage.body import RequestBody, whole_or_not_at_all


def test_what_is_read_of_a_request_is_copied_only_where_it_lies_in_two_buffers() -> None:
    first, second = b"abcd", b"efgh"
    body = RequestBody([first, second])
    piece = body.read(3)
    assert isinstance(piece, memoryview)
    assert (piece.obj, bytes(piece)) == (first, b"abc")
    assert body.read(3) == b"def"
    assert body.read() == b"gh"
    assert body.read(1) == b""


async def test_request_that_is_not_answered_fails_however_large_its_body_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchferry.storage.body._SILENCE", 0.1)
    ended = asyncio.Event()

    async def request() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    with pytest.raises(TimeoutError, match="no answer"):
        await whole_or_not_at_all(RequestBody([bytes(100)]), request)
    assert ended.is_set()
