"""Buffers as the body of a request."""

from __future__ import annotations

import io

import pytest

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


def test_a_body_is_sent_whole_or_not_at_all_also_where_the_client_reads_it_as_a_file() -> None:
    """As botocore does over https, where it puts a checksum behind the body."""
    body = RequestBody([b"abc", b"de"])
    assert body.seek(0, io.SEEK_END) == 5
    assert body.seek(0) == 0
    assert bytes(body.read(3)) == b"abc"
    assert body.interrupt()
    with pytest.raises(InterruptedError):
        body.read(3)
    body = RequestBody([b"abc", b"de"])
    body.read()
    assert not body.interrupt()
