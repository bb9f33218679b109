"""Reading ranges straight from the socket into memory, and what happens where that does not work."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import logging
import time
import warnings
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest
from s3fs import S3FileSystem

import torchferry_s3
from torchferry.engine import transport as direct
from torchferry.engine.loops import run_on
from torchferry.engine.transport import DirectReader, SignedGet
from torchferry.errors import CheckpointChangedError
from torchferry.storage.base import ObjectStat
from torchferry.storage.registry import open_backend
from torchferry.testing.faultproxy import Fault

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import FaultyS3

    from torchferry.storage.base import Backend, Plane
    from torchferry.testing.faultproxy import FaultProxy

DATA = bytes(range(256)) * 4096  # 1 MiB
SIGNED = "X-Amz-Signature="  # in the URL


class Stored:
    """An object in S3, seen through a proxy."""

    def __init__(self, backend: Backend, path: str, proxy: FaultProxy) -> None:
        self.backend, self.path, self.proxy = backend, path, proxy

    async def stat(self) -> ObjectStat:
        return await run_on(self.backend.loop, self.backend.stat, self.path)

    async def read(self, start: int, stop: int, stat: ObjectStat) -> bytes:
        buffer = bytearray(stop - start)
        await run_on(self.backend.loop, self.backend.read_into, self.path, start, memoryview(buffer), stat)
        return bytes(buffer)

    def gets(self) -> list[bool]:
        """For each GET so far, whether it had a signed URL."""
        return [SIGNED in request.target for request in self.proxy.requests("GET")]


Through: TypeAlias = "Callable[..., Stored]"


@pytest.fixture
def through(s3_client: Any, s3_url: str, faulty_s3: Callable[..., FaultyS3]) -> Through:
    bucket, _, prefix = s3_url.removeprefix("s3://").partition("/")
    s3_client.put_object(Bucket=bucket, Key=f"{prefix}/checkpoint.pt", Body=DATA)

    def make(*faults: Fault, plane: Plane = "obstore") -> Stored:
        faulty = faulty_s3(*faults)
        backend, path = open_backend(f"{s3_url}/checkpoint.pt", storage_options=faulty.storage_options, plane=plane)
        return Stored(backend, path, faulty.proxy)

    return make


@pytest.mark.parametrize("plane", ["fsspec", "obstore"])
async def test_ranges_come_by_signed_urls_on_one_connection_after_another(through: Through, plane: Plane) -> None:
    stored = through(plane=plane)
    stat = await stored.stat()
    for start, stop in ((0, 1), (5, 100_000), (0, len(DATA)), (len(DATA) - 1, len(DATA)), (7, 7)):
        assert await stored.read(start, stop, stat) == DATA[start:stop]
    assert stored.gets() == [True] * 4
    assert len(stored.backend.direct._idle) == 1


@pytest.mark.parametrize("plane", ["fsspec", "obstore"])
async def test_urls_are_signed_with_version_4_where_botocore_would_take_version_2(
    through: Through, plane: Plane
) -> None:
    stored = through(plane=plane)
    assert await stored.read(0, 5, await stored.stat()) == DATA[:5]
    (read,) = stored.proxy.requests("GET")
    assert "X-Amz-Algorithm=AWS4-HMAC-SHA256" in read.target
    if plane == "fsspec":
        fs = stored.backend._fs  # type: ignore[attr-defined]
        url = await run_on(fs.loop, fs._url, stored.path)  # the URLs of the client's other users stay as they are
        assert "AWSAccessKeyId=" in url


@pytest.mark.parametrize("plane", ["fsspec", "obstore"])
@pytest.mark.parametrize(
    "fault",
    [
        Fault(target=SIGNED, status=403, code="AccessDenied"),
        Fault(target=SIGNED, status=503),
        Fault(target=SIGNED, truncate_after=1000),
        Fault(target=SIGNED, reset_download_after=1000),
        Fault(target=SIGNED, lose_reply=True),
    ],
    ids=["denied", "busy", "truncated", "reset", "reply lost"],
)
async def test_what_cannot_be_read_directly_is_read_by_the_planes_client(
    through: Through, plane: Plane, fault: Fault
) -> None:
    fault.times = None
    stored = through(fault, plane=plane)
    stat = await stored.stat()
    for _ in range(5):
        assert await stored.read(3, 1_000_003, stat) == DATA[3:1_000_003]
    assert stored.gets() == [True, False] * 3 + [False] * 2  # after three failures it is not tried again


async def test_after_a_pause_it_is_tried_again(through: Through, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = through(Fault(target=SIGNED, status=503, times=3))
    stat = await stored.stat()
    for _ in range(4):
        assert await stored.read(0, 10, stat) == DATA[:10]
    monkeypatch.setattr(stored.backend.direct, "_resumes", time.monotonic())
    assert await stored.read(0, 10, stat) == DATA[:10]
    assert stored.gets() == [True, False] * 3 + [False] + [True]


async def test_a_success_between_failures_keeps_it_going(through: Through) -> None:
    stored = through(*(Fault(target=SIGNED, status=503, skip=skip) for skip in (0, 1, 2)))
    stat = await stored.stat()
    for _ in range(8):
        assert await stored.read(0, 10, stat) == DATA[:10]
    assert stored.gets()[-1]


async def test_a_connection_that_was_closed_while_idle_is_replaced(through: Through) -> None:
    stored = through(Fault(target=SIGNED, skip=1, lose_reply=True))
    stat = await stored.stat()
    for _ in range(2):
        assert await stored.read(0, 10, stat) == DATA[:10]
    assert stored.gets() == [True, True, True]


async def test_a_silent_connection_is_given_up(through: Through, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "_SILENCE", 0.5)
    stored = through(Fault(target=SIGNED, hang=True))
    assert await stored.read(0, 10, await stored.stat()) == DATA[:10]
    assert stored.gets() == [True, False]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("plane", ["fsspec", "obstore"])
async def test_a_cancelled_read_ends_soon_and_writes_nothing_afterwards(through: Through, plane: Plane) -> None:
    stored = through(Fault(target=SIGNED, hang=True), plane=plane)
    stat = await stored.stat()
    buffer = bytearray(10)
    reading = asyncio.ensure_future(
        run_on(stored.backend.loop, stored.backend.read_into, stored.path, 0, memoryview(buffer), stat)
    )
    await asyncio.to_thread(stored.proxy.wait_for, "GET", SIGNED)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert buffer == bytes(10)


@pytest.mark.skipif(
    "local_expiry_check" not in inspect.signature(S3FileSystem.__init__).parameters,
    reason="this s3fs has no such option",
)
async def test_the_version_is_looked_at_where_the_store_is_not_asked_for_it(
    through: Through, s3_client: Any, faulty_s3: Callable[..., FaultyS3]
) -> None:
    stored = through()
    options = faulty_s3().storage_options | {"local_expiry_check": True}
    backend, _ = open_backend(f"s3://{stored.path}", storage_options=options, plane="fsspec")
    stored = Stored(backend, stored.path, stored.proxy)
    stat = await stored.stat()
    assert await stored.read(0, 10, stat) == DATA[:10]
    bucket, _, key = stored.path.partition("/")
    s3_client.put_object(Bucket=bucket, Key=key, Body=DATA[::-1])
    with pytest.raises(CheckpointChangedError):
        await stored.read(0, 10, stat)


async def test_no_signature_is_logged(through: Through, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "torchferry")
    stored = through(Fault(target=SIGNED, status=403))
    await stored.read(0, 10, await stored.stat())
    assert "is not read directly: status 403" in caplog.text
    assert SIGNED not in caplog.text


@pytest.mark.parametrize("variable", ["http_proxy", "ALL_PROXY"])
async def test_a_proxy_is_left_to_the_planes_client(
    through: Through, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = through()
    stat = await stored.stat()
    sign = stored.backend._sign  # type: ignore[attr-defined]
    await sign(stored.path, stat)  # the backend asks for the bucket's address once
    monkeypatch.setenv(variable, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert not await DirectReader(sign).read_into(stored.path, 0, memoryview(bytearray(10)), stat)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert await DirectReader(sign).read_into(stored.path, 0, memoryview(bytearray(10)), stat)


async def test_a_request_is_signed_anew_after_a_while(through: Through, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = through()
    stat = await stored.stat()
    calls = 0

    class Counting:
        async def sign(self, path: str, stat: ObjectStat) -> SignedGet:
            nonlocal calls
            calls += 1
            get: SignedGet = await stored.backend._sign(path, stat)  # type: ignore[attr-defined]
            return get

    counting = Counting()
    reader = DirectReader(counting.sign)
    for expected, seconds in ((1, 0), (1, 50), (2, 61)):
        now = time.monotonic() + seconds
        monkeypatch.setattr(time, "monotonic", lambda now=now: now)
        assert await reader.read_into(stored.path, 0, memoryview(bytearray(10)), stat)
        monkeypatch.undo()
        assert calls == expected


async def test_connections_are_closed_with_their_reader(through: Through) -> None:
    stored = through()
    reader = DirectReader(stored.backend._sign)  # type: ignore[attr-defined]
    assert await reader.read_into(stored.path, 0, memoryview(bytearray(10)), await stored.stat())
    sockets = [connection._http.sock for connection in reader._idle]
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        del reader
        gc.collect()
    assert [sock.fileno() for sock in sockets] == [-1]


async def test_a_reader_goes_with_its_backend_and_not_when_the_collector_comes(through: Through) -> None:
    stored = through(plane="fsspec")
    assert await stored.read(0, 10, await stored.stat()) == DATA[:10]
    reader = weakref.ref(stored.backend.direct)
    gc.disable()
    try:
        del stored
        assert reader() is None
    finally:
        gc.enable()


class Stalling:
    """A store that accepts a connection, perhaps begins to answer, and then falls silent."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self.heard = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            await reader.read(1)
            writer.write(self._answer)
            await writer.drain()
            self.heard.set()
            with contextlib.suppress(ConnectionError):
                await reader.read()

    async def sign(self, path: str, _: ObjectStat) -> SignedGet:
        return SignedGet(path, {}, None)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("scheme", "answer"),
    [
        ("http", b"HTTP/1.1 206 OK\r\nContent-Range: bytes 0-9/10\r\nContent-Length: 10\r\n\r\n123"),
        ("http", b"HTTP/1.0 206 OK\r\nContent-Range: bytes 0-9/10\r\nContent-Length: 10\r\n\r\n123"),
        ("https", b""),
    ],
    ids=["body", "body of a connection that will close", "TLS handshake"],
)
async def test_a_cancel_ends_every_stage_of_a_read_soon(scheme: str, answer: bytes) -> None:
    store = Stalling(answer)
    server = await asyncio.start_server(store.serve, "127.0.0.1", 0)
    url = f"{scheme}://127.0.0.1:{server.sockets[0].getsockname()[1]}/x"
    reader = DirectReader(store.sign)
    reading = asyncio.ensure_future(reader.read_into(url, 0, memoryview(bytearray(10)), ObjectStat(url, 10)))
    await store.heard.wait()
    await asyncio.sleep(0.2)  # the answer is being read
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    server.close()


@pytest.mark.parametrize(
    "head",
    [b"Transfer-Encoding: chunked\r\n\r\na\r\n0123456789\r\n0\r\n\r\n", b"Content-Length: 12\r\n\r\n0123456789xx"],
    ids=["chunked", "longer than asked for"],
)
async def test_a_connection_with_something_left_in_it_is_not_used_again(head: bytes) -> None:
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        with contextlib.closing(writer), contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(b"HTTP/1.1 206 OK\r\nContent-Range: bytes 0-9/10\r\n" + head)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/x"
    store = Stalling(b"")
    reader = DirectReader(store.sign)
    for _ in range(3):
        assert await reader.read_into(url, 0, memoryview(buffer := bytearray(10)), ObjectStat(url, 10))
        assert buffer == b"0123456789"
    assert connections == 3
    server.close()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, True),
        ({"client_kwargs": {"verify": False}}, False),
        ({"client_kwargs": {"verify": "CERTIFICATES"}}, "CERTIFICATES"),
        ({"client_kwargs": {"verify": "/no/such/directory"}}, None),
        ({"anon": True}, None),
        ({"requester_pays": True}, None),
        ({"s3_additional_kwargs": {"SSECustomerAlgorithm": "AES256", "SSECustomerKey": b"k" * 32}}, None),
        ({"config_kwargs": {"proxies": {"https": "http://127.0.0.1:9"}}}, None),
        ({"config_kwargs": {"client_cert": "CERTIFICATES"}}, None),
    ],
    ids=str,
)
def test_only_what_a_url_says_in_full_is_read_directly(
    options: dict[str, Any], expected: str | bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "CERTIFICATES").touch()
    path = str(tmp_path / "CERTIFICATES")
    for settings in (options.get("client_kwargs", {}), options.get("config_kwargs", {})):
        settings.update({name: path for name, value in settings.items() if value == "CERTIFICATES"})
    fs = S3FileSystem(key="key", secret="secret", skip_instance_cache=True, **options)
    fs.connect()
    trust = torchferry_s3._direct_trust(fs)
    assert trust == (path if expected == "CERTIFICATES" else expected)


def test_a_subclass_is_not_read_directly() -> None:
    class Own(S3FileSystem):
        pass

    fs = Own(key="key", secret="secret", skip_instance_cache=True)
    fs.connect()
    assert torchferry_s3._direct_trust(fs) is None
