"""Buffers as the body of a request."""

from __future__ import annotations

from torchferry.storage.body import RequestBody


def test_what_is_read_of_a_request_is_copied_only_where_it_lies_in_two_buffers() -> None:
    first, second = b"abcd", b"efgh"
    body = RequestBody([first, second])
    piece = body.read(3)
    assert isinstance(piece, memoryview)
    assert (piece.obj, bytes(piece)) == (first, b"abc")
    assert body.read(3) == b"def"
    assert body.read() == b"gh"
    assert body.read(1) == b""
