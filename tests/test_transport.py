"""The transport, both ways, against servers that do what networks and stores do."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import socket
import ssl
import struct
import threading
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import anyio
import pytest
import trustme

from torchferry.engine import connections
from torchferry.engine import transport as module
from torchferry.engine.retry import AnswerError
from torchferry.engine.transfer import Transfer
from torchferry.engine.transport import SignedRequest, Transport, UnmovableError
from torchferry.engine.types import MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

DATA = bytes(range(256)) * 4096  # 1 MiB
LARGE = random.Random(1).randbytes(24 * MIB)  # more than a loopback connection's buffers hold
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
LINGER_NOT = struct.pack("ii", 1, 0)


class Client:
    """A connection, as the server sees it."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.file = sock.makefile("rb")

    def head(self) -> dict[str, str]:
        """Reads the head of a request: its fields, and "method" and "target". Empty at the end."""
        line = self.file.readline()
        if not line:
            return {}
        method, target, _ = line.decode().split()
        fields = {"method": method, "target": target}
        while (line := self.file.readline()) not in {b"\r\n", b""}:
            name, _, value = line.decode().partition(":")
            fields[name.lower()] = value.strip()
        return fields

    def body(self, head: dict[str, str]) -> bytes:
        return self.file.read(int(head.get("content-length", 0)))

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_NOT)
        self.close()

    def close(self) -> None:
        self.file.close()
        self.sock.close()


class Server:
    """Calls ``serve(client)`` for each connection, in a thread of its own, while its ``with`` block lasts."""

    def __init__(self, serve: Callable[[Client], object], tls: ssl.SSLContext | None = None) -> None:
        self._serve = serve
        self._tls = tls
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self.errors: list[BaseException] = []
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self._listener.getsockname()[1]}"

    @property
    def connections(self) -> int:
        return len(self._sockets)

    def __enter__(self) -> Self:
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        self._listener.close()
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()

    def get(self, target: str = "/x", **headers: str) -> SignedRequest:
        return SignedRequest("GET", self.url + target, headers)

    def put(self, target: str = "/x", **headers: str) -> SignedRequest:
        return SignedRequest("PUT", self.url + target, headers)

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self._sockets.append(sock)
            thread = threading.Thread(target=self._run, args=(sock,))
            self._threads.append(thread)
            thread.start()

    def _run(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError), contextlib.ExitStack() as stack:
            stack.callback(sock.close)
            if self._tls is not None:
                sock = self._tls.wrap_socket(sock, server_side=True)
                self._sockets[self._sockets.index(next(s for s in self._sockets if s.fileno() == -1))] = sock
            client = Client(sock)
            stack.callback(client.close)
            self._serve(client)


def serving_ranges(data: bytes = DATA) -> Callable[[Client], None]:
    def serve(client: Client) -> None:
        while head := client.head():
            client.send(the_range(head, data))

    return serve


def the_range(head: dict[str, str], data: bytes = DATA, fields: str = "") -> bytes:
    start, _, last = head["range"].removeprefix("bytes=").partition("-")
    body = data[int(start) : int(last) + 1]
    return (
        f"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {start}-{last}/{len(data)}\r\n"
        f"Content-Length: {len(body)}\r\n{fields}\r\n".encode()
        + body
    )


class Reads:
    """Reads of DATA through one transport, counted as one transfer."""

    def __init__(self, transport: Transport | None = None) -> None:
        self.transport = transport or Transport()
        self.transfer = Transfer("load", "x")

    async def __call__(self, request: SignedRequest, start: int = 0, stop: int = 10, size: int = len(DATA)) -> bytes:
        buffer = bytearray(stop - start)
        with self.transfer.running(None):
            await self.transport.read_into(request, start, [memoryview(buffer)], size)
        return bytes(buffer)

    @property
    def moved(self) -> int:
        return self.transfer.report().nbytes


class Sends:
    """Sends through one transport, counted as one transfer."""

    def __init__(self, transport: Transport | None = None) -> None:
        self.transport = transport or Transport()
        self.transfer = Transfer("save", "x")

    async def __call__(self, request: SignedRequest, body: Sequence[Any] = (LARGE,), *, publishes: bool = False) -> int:
        with self.transfer.running(None):
            return (await self.transport.send(request, body, publishes=publishes)).status

    @property
    def moved(self) -> int:
        return self.transfer.report().nbytes


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks ten times as often for what has moved."""
    monkeypatch.setattr(connections, "_TICK", 0.02)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA(key_type=trustme.KeyType.ECDSA)


@pytest.fixture(scope="module")
def authority_file(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("authority") / "ca.pem"
    authority.cert_pem.write_to_path(path)
    return str(path)


@pytest.fixture(scope="module")
def tls(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1", key_type=trustme.KeyType.ECDSA).configure_cert(context)
    return context


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


# --- connections


async def test_ranges_come_on_one_connection_after_another() -> None:
    read = Reads()
    with Server(serving_ranges()) as server:
        for start, stop in ((0, 1), (5, 100_000), (0, len(DATA)), (len(DATA) - 1, len(DATA))):
            assert await read(server.get(), start, stop) == DATA[start:stop]
        assert server.connections == 1


async def test_one_range_comes_into_several_pieces_of_memory_with_one_request() -> None:
    asked = []

    def serve(client: Client) -> None:
        head = client.head()
        asked.append(head["range"])
        client.send(the_range(head))

    sizes = (1, 0, 70_000, 3, 200_000)
    buffers = [bytearray(size) for size in sizes]
    transfer = Transfer("load", "x")
    with Server(serve) as server, transfer.running(None):
        await Transport().read_into(server.get(), 5, [memoryview(buffer) for buffer in buffers], len(DATA))
    assert b"".join(buffers) == DATA[5 : 5 + sum(sizes)]
    assert asked == [f"bytes=5-{5 + sum(sizes) - 1}"]
    assert transfer.report().nbytes == sum(sizes)


async def test_a_connection_that_was_closed_while_idle_is_replaced() -> None:
    def serve(client: Client) -> None:
        client.send(the_range(client.head()))

    read = Reads()
    with Server(serve) as server:
        for _ in range(3):
            assert await read(server.get()) == DATA[:10]
        assert server.connections == 3


async def test_a_connection_that_was_closed_while_idle_is_replaced_to_send_too() -> None:
    received = []

    def serve(client: Client) -> None:
        received.append(client.body(client.head()))
        client.send(OK)

    send = Sends()
    with Server(serve) as server:
        for _ in range(3):
            assert await send(server.put()) == 200
    assert received == [LARGE] * 3
    assert send.moved == 3 * len(LARGE)


async def test_a_tls_connection_that_was_closed_while_idle_is_replaced(
    tls: ssl.SSLContext, authority_file: str
) -> None:
    def serve(client: Client) -> None:
        head = client.head()
        client.send(OK if head["method"] == "PUT" and client.body(head) else the_range(head))

    transport = Transport(verify=authority_file)
    with Server(serve, tls) as server:
        for _ in range(2):
            assert await Reads(transport)(server.get()) == DATA[:10]
            assert await Sends(transport)(server.put()) == 200
        assert server.connections == 4


async def test_a_connection_that_was_idle_for_long_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_IDLE", 0.0)
    read = Reads()
    with Server(serving_ranges()) as server:
        for _ in range(3):
            await read(server.get())
        assert server.connections == 3
    assert len(read.transport.connections._idle) <= 1


async def test_connections_are_closed_with_their_transport() -> None:
    read = Reads()
    with Server(serving_ranges()) as server:
        await read(server.get())
        sockets = [connection.sock for connection in read.transport.connections._idle]
        with warnings.catch_warnings():
            warnings.simplefilter("error", ResourceWarning)
            del read
            gc.collect()
        assert [sock.fileno() for sock in sockets if sock is not None] == [-1]


async def test_a_forked_child_uses_connections_of_its_own() -> None:
    read = Reads()
    with Server(serving_ranges()) as server:
        await read(server.get())
        assert server.connections == 1
        if not (child := os.fork()):
            try:
                taken = read.transport.connections.take(module.urlsplit(server.url))
                os._exit(0 if taken.sock is None and not read.transport.connections._idle else 1)
            finally:
                os._exit(2)
        _, status = await asyncio.to_thread(os.waitpid, child, 0)
        assert status == 0
        await read(server.get())
        assert server.connections == 1


async def test_no_failure_leaves_a_descriptor_open() -> None:
    answers = [
        b"HTTP/1.1 206 OK\r\nContent-Range: bytes 0-9/10\r\nContent-Length: 10\r\n\r\n123",
        b"garbage\r\n\r\n",
        b"",
    ]

    def serve(client: Client) -> None:
        client.head()
        client.send(random.choice(answers))

    read, send = Reads(), Sends(Transport(silence=0.1))
    with Server(serve) as server:
        before = open_descriptors() - server.connections
        for _ in range(30):
            with pytest.raises((OSError, UnmovableError)):
                await read(server.get(), size=10)
            with pytest.raises((OSError, UnmovableError)):
                await send(server.put(), publishes=True)
            with pytest.raises((OSError, UnmovableError)):
                await send(SignedRequest("PUT", "http://127.0.0.1:1/x"))
    gc.collect()
    assert open_descriptors() <= before + 2


# --- answers to reads


CHUNKED = b"HTTP/1.1 206 OK\r\nContent-Range: bytes 0-9/10\r\nTransfer-Encoding: chunked\r\n\r\n"
PLAIN = b"HTTP/1.1 206 OK\r\nContent-Range: bytes 0-9/10\r\nContent-Length: 10\r\n\r\n0123456789"


@pytest.mark.parametrize(
    ("answer", "again"),
    [
        (b"HTTP/1.1 100 Continue\r\n\r\n" + PLAIN, True),
        (PLAIN.replace(b"HTTP/1.1", b"HTTP/1.0"), False),
        (PLAIN.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"), False),
        (CHUNKED + b"4\r\n0123\r\n6\r\n456789\r\n0\r\n\r\n", False),
        (PLAIN.replace(b"Length: 10", b"Length: 12") + b"xx", False),
        (PLAIN.replace(b"\r\n", b"\n"), True),
    ],
    ids=["100-continue", "HTTP/1.0", "Connection: close", "chunked", "longer than asked for", "bare line feeds"],
)
async def test_odd_answers_give_the_right_bytes(answer: bytes, again: bool) -> None:
    def serve(client: Client) -> None:
        while client.head():
            client.send(answer)
            if not again:
                client.head()  # the other end closes it
                return

    read = Reads()
    with Server(serve) as server:
        for _ in range(3):
            assert await read(server.get(), size=10) == b"0123456789"
        assert server.connections == (1 if again else 3)


async def test_an_answer_until_the_connection_closes_gives_the_right_bytes() -> None:
    def serve(client: Client) -> None:
        client.head()
        client.send(PLAIN.replace(b"Content-Length: 10\r\n", b""))

    with Server(serve) as server:
        assert await Reads()(server.get(), size=10) == b"0123456789"


@pytest.mark.parametrize(
    "answer",
    [
        PLAIN.replace(b"bytes 0-9/10", b"bytes 1-10/10"),
        PLAIN.replace(b"bytes 0-9/10", b"bytes 0-9/*"),
        PLAIN.replace(b"Content-Range: bytes 0-9/10\r\n", b""),
        PLAIN.replace(b"206", b"200"),
        PLAIN.replace(b"206 OK", b'206 OK\r\nETag: "other"'),
        b"HTTP/1.1 412 Precondition Failed\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 307 Moved\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + PLAIN,
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        b"\x00\xff" * 1000 + b"\r\n\r\n",
        b"HTTP/1.1 abc OK\r\n\r\n",
        b"HTTP/1.1 206 OK\r\n" + b"X: y\r\n" * 1000 + b"\r\n",
        b"HTTP/1.1 206 OK\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
    ],
    ids=[
        *("another range", "unknown size", "no range", "whole", "another version", "replaced", "forbidden", "redirect"),
        *("early hints", "another protocol", "binary", "no status", "thousand fields", "long field"),
    ],
)
async def test_what_is_not_the_range_is_left_to_the_client(answer: bytes) -> None:
    def serve(client: Client) -> None:
        client.head()
        client.send(answer)

    with Server(serve) as server:
        request = SignedRequest.get(server.url, '"version"') if b"other" in answer else server.get()
        read = Reads()
        with pytest.raises(UnmovableError):
            await read(request, size=10)
        assert read.moved == 0


async def test_an_answer_whose_head_has_no_end_is_left_to_the_client() -> None:
    def serve(client: Client) -> None:
        client.head()
        while True:
            client.send(b"HTTP/1.1 100 Continue\r\n\r\n" * 1000)

    with Server(serve) as server:
        with pytest.raises(UnmovableError, match="no end"):
            await Reads()(server.get())
        with pytest.raises(UnmovableError, match="no end"):
            await Sends()(server.put(), [b"x"])


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504, 599])
async def test_an_answer_that_may_change_says_when(status: int) -> None:
    def serve(client: Client) -> None:
        while head := client.head():
            client.body(head)
            client.send(f"HTTP/1.1 {status} Busy\r\nRetry-After: 7\r\nContent-Length: 0\r\n\r\n".encode())

    with Server(serve) as server:
        with pytest.raises(AnswerError, match=str(status)) as caught:
            await Reads()(server.get())
        assert caught.value.transient.after == 7
        with pytest.raises(AnswerError, match=str(status)) as caught:
            await Sends()(server.put())
        assert caught.value.transient.after == 7


@pytest.mark.parametrize("ending", ["close", "reset"])
@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
async def test_a_body_that_is_cut_is_a_connection_error_and_counts_nothing(ending: str, chunked: bool) -> None:
    def serve(client: Client) -> None:
        head = client.head()
        if chunked:
            answer = the_range(head).replace(b"Content-Length: 1048576", b"Transfer-Encoding: chunked")
            answer = answer.replace(b"\r\n\r\n", b"\r\n\r\n100000\r\n", 1)
        else:
            answer = the_range(head)
        client.send(answer[:600_000])
        getattr(client, ending)()

    read = Reads()
    with Server(serve) as server, pytest.raises(ConnectionError):
        await read(server.get(), 0, len(DATA))
    assert read.moved == 0


# --- silence and slowness


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 206 OK\r\nContent-", PLAIN[:-3]], ids=["none", "head", "body"])
async def test_a_store_that_falls_silent_is_a_timeout(answer: bytes) -> None:
    def serve(client: Client) -> None:
        client.head()
        client.send(answer)
        client.head()

    with Server(serve) as server, pytest.raises(TimeoutError, match=r"no answer for 0\.3 s"):
        await Reads(Transport(silence=0.3))(server.get(), size=10)


@pytest.mark.parametrize("where", ["head", "body"])
async def test_an_answer_that_drips_is_a_timeout(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_GRACE", 0.2)
    ended = threading.Event()

    def serve(client: Client) -> None:
        client.head()
        if where == "body":
            client.send(PLAIN[:-10].replace(b"-9/10", b"-999/1000").replace(b"Length: 10", b"Length: 1000"))
        while not ended.wait(0.02):
            client.send(b"H")

    with Server(serve) as server:
        with pytest.raises(TimeoutError, match="slower than 1000 bytes"):
            await Reads()(server.get(), 0, 1000, size=1000)
        ended.set()


async def test_a_store_that_takes_no_bytes_is_a_timeout() -> None:
    ended = threading.Event()

    def serve(client: Client) -> None:
        client.head()
        ended.wait()

    send = Sends(Transport(silence=0.3))
    with Server(serve) as server:
        with pytest.raises(TimeoutError, match=r"took no bytes for 0\.3 s"):
            await send(server.put())
        ended.set()
    assert send.moved == 0


async def test_a_store_that_never_answers_what_it_took_is_a_timeout() -> None:
    def serve(client: Client) -> None:
        client.body(client.head())
        client.head()

    send = Sends(Transport(silence=0.3))
    with Server(serve) as server, pytest.raises(TimeoutError, match=r"no answer for 0\.3 s"):
        await send(server.put())
    assert send.moved == 0


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_slow_store_is_no_silent_one(scheme: str, tls: ssl.SSLContext, authority_file: str) -> None:
    """It takes longer for all that waits in the system's queue than the silence that is allowed."""
    received = []

    def serve(client: Client) -> None:
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        head = client.head()
        body = bytearray()
        pause = threading.Event()
        while len(body) < len(LARGE):
            body += client.file.read(min(512 << 10, len(LARGE) - len(body)))
            pause.wait(0.05)
        received.append(bytes(body))
        assert head
        client.send(OK)

    send = Sends(Transport(silence=0.5, verify=authority_file))
    with Server(serve, tls if scheme == "https" else None) as server:
        assert await send(server.put()) == 200
    assert received == [LARGE]


async def test_bytes_count_when_the_store_has_them_and_the_last_mib_with_its_answer() -> None:
    answer = threading.Event()

    def serve(client: Client) -> None:
        client.body(client.head())
        answer.wait()
        client.send(OK)

    send = Sends()
    with Server(serve) as server:
        sending = asyncio.create_task(send(server.put()))
        with anyio.fail_after(30):
            while send.moved < len(LARGE) - MIB:  # noqa: ASYNC110 - a thread counts
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        assert send.moved == len(LARGE) - MIB
        answer.set()
        assert await sending == 200
    assert send.moved == len(LARGE)


async def test_bytes_that_were_refused_are_taken_back() -> None:
    def serve(client: Client) -> None:
        client.body(client.head())
        client.send(b"HTTP/1.1 400 Bad\r\nContent-Length: 0\r\n\r\n")

    send = Sends()
    with Server(serve) as server:
        assert await send(server.put()) == 400
    assert send.moved == 0


# --- what is sent


async def test_all_kinds_of_buffers_arrive_in_order() -> None:
    received: list[Any] = []

    def serve(client: Client) -> None:
        while head := client.head():
            received.append((head, client.body(head)))
            client.send(OK)

    send = Sends()
    with Server(serve) as server:
        buffers = [b"", b"abc", bytearray(b"def"), memoryview(b"ghij")[1:3], memoryview(LARGE), memoryview(b"")]
        assert await send(server.put("/a%20b?c=d", **{"x-one": "1", "Content-Length": "7"}), buffers) == 200
        assert await send(server.put(), []) == 200
        assert server.connections == 1
    (head, body), (_, nothing) = received
    assert body == b"abcdefhi" + LARGE
    assert nothing == b""
    assert (head["method"], head["target"], head["x-one"]) == ("PUT", "/a%20b?c=d", "1")
    assert head["content-length"] == str(len(body))
    assert head["host"] == server.url.removeprefix("http://")


REFUSED = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 4\r\n\r\nnope"


def refuse_and_reset(client: Client) -> None:
    client.head()
    client.send(REFUSED)
    client.sock.shutdown(socket.SHUT_WR)  # then there is something unread: closing resets it


def refuse_and_wait(client: Client) -> None:
    client.head()
    client.send(REFUSED)
    ended.wait()


def refuse_and_take_all(client: Client) -> None:
    while head := client.head():
        client.send(REFUSED)
        client.body(head)


ended = threading.Event()


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("serve", [refuse_and_reset, refuse_and_wait, refuse_and_take_all])
async def test_an_answer_that_comes_before_the_store_has_all_is_heard(
    serve: Callable[[Client], None], scheme: str, tls: ssl.SSLContext, authority_file: str
) -> None:
    ended.clear()
    send = Sends(Transport(verify=authority_file, silence=1.0))
    with Server(serve, tls if scheme == "https" else None) as server:
        for _ in range(3):
            assert await send(server.put()) == 403
        ended.set()
    assert send.moved == 0


async def test_a_store_that_has_not_taken_all_cannot_have_stored_it() -> None:
    ended.clear()

    def serve(client: Client) -> None:
        client.head()
        client.send(OK)
        ended.wait()

    send = Sends()
    with Server(serve) as server:
        with pytest.raises(ConnectionError, match="before it had all"):
            await send(server.put())
        ended.set()
    assert send.moved == 0


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_not_followed(status: int) -> None:
    """No token, no key and no signature goes to another host."""
    asked: list[dict[str, str]] = []
    with Server(lambda client: asked.append(client.head())) as other:

        def serve(client: Client) -> None:
            client.body(client.head())
            redirect = f"HTTP/1.1 {status} Moved\r\nLocation: {other.url}/x\r\nContent-Length: 0\r\n\r\n"
            client.send(redirect.encode())

        with Server(serve) as server:
            with pytest.raises(UnmovableError, match="redirect"):
                await Sends()(server.put(Authorization="secret"))
            with pytest.raises(UnmovableError, match=str(status)):
                await Reads()(server.get(Authorization="secret"))
    assert asked == []


# --- proxies, names, TLS


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "ALL_PROXY"])
async def test_a_proxy_is_left_to_the_client(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "http://127.0.0.1:1")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Server(serving_ranges()) as server:
        with pytest.raises(UnmovableError, match="proxy"):
            await Reads()(server.get())
        with pytest.raises(UnmovableError, match="proxy"):
            await Sends()(server.put())
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert await Reads()(server.get()) == DATA[:10]


async def test_a_server_that_is_not_there_is_a_connection_error() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # and not listened on, so that nobody else gets it
        url = f"http://127.0.0.1:{held.getsockname()[1]}/x"
        with pytest.raises(ConnectionError):
            await Reads()(SignedRequest("GET", url))
        with pytest.raises(ConnectionError):
            await Sends()(SignedRequest("PUT", url))


async def test_an_address_without_a_way_to_it_is_a_connection_error() -> None:
    with pytest.raises(ConnectionError):
        await Reads()(SignedRequest("GET", "http://255.255.255.255:80/x"))  # a plain OSError in Python


@pytest.mark.parametrize("verify", ["the authority", False])
async def test_tls_works_with_the_authority_or_without_any(
    verify: str | bool, tls: ssl.SSLContext, authority_file: str
) -> None:
    def serve(client: Client) -> None:
        while head := client.head():
            client.send(OK if client.body(head) == LARGE else the_range(head))

    transport = Transport(verify=authority_file if verify else False)
    with Server(serve, tls) as server:
        assert await Reads(transport)(server.get(), 0, len(DATA)) == DATA
        assert await Sends(transport)(server.put()) == 200
        assert server.connections == 1


async def test_a_certificate_of_nobody_known_is_left_to_the_client_to_refuse(tls: ssl.SSLContext) -> None:
    asked: list[dict[str, str]] = []
    with Server(lambda client: asked.append(client.head()), tls) as server:
        with pytest.raises(UnmovableError, match=r"TLS: .*certificate"):
            await Reads()(server.get())
        with pytest.raises(UnmovableError, match=r"TLS: .*certificate"):
            await Sends()(server.put())
    assert asked == []


async def test_a_certificate_of_another_host_is_left_to_the_client_to_refuse(
    authority: trustme.CA, authority_file: str
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("store.example", key_type=trustme.KeyType.ECDSA).configure_cert(context)
    with Server(serving_ranges(), context) as server, pytest.raises(UnmovableError, match=r"TLS: .*certificate"):
        await Reads(Transport(verify=authority_file))(server.get())


async def test_a_server_without_tls_is_left_to_the_client() -> None:
    def serve(client: Client) -> None:
        client.sock.recv(1)
        client.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with Server(serve) as server, pytest.raises(UnmovableError, match="TLS"):
        await Reads()(SignedRequest("GET", server.url.replace("http:", "https:")))


@pytest.mark.parametrize("ending", ["close", "reset"])
async def test_a_tls_handshake_that_is_cut_is_a_connection_error(ending: str) -> None:
    def serve(client: Client) -> None:
        client.sock.recv(1)
        getattr(client, ending)()

    with Server(serve) as server, pytest.raises(ConnectionError):
        await Reads()(SignedRequest("GET", server.url.replace("http:", "https:")))


# --- cancels


async def cancel(task: asyncio.Task[Any]) -> None:
    """Cancels a task, which must be over soon."""
    task.cancel()
    with anyio.fail_after(5):
        await asyncio.wait([task])
    assert task.cancelled()


@contextlib.contextmanager
def full_backlog() -> Iterator[str]:
    """The URL of a server that answers no SYN: its queue of connections is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/x"


async def test_a_cancel_ends_connecting_soon() -> None:
    with full_backlog() as url:
        for work in (Reads()(SignedRequest("GET", url)), Sends()(SignedRequest("PUT", url), publishes=True)):
            task = asyncio.create_task(work)
            await asyncio.sleep(0.1)
            await cancel(task)


class Stage:
    """A server that tells when it has come to a point, and then falls silent."""

    def __init__(self, answer: bytes = b"", read_body: int | None = None) -> None:
        self.heard = threading.Event()
        self.body = b""
        self.ended = threading.Event()
        self._answer = answer
        self._read_body = read_body

    def serve(self, client: Client) -> None:
        head = client.head()
        if self._read_body is not None:
            self.body = client.file.read(self._read_body)
        if head and self._answer:
            client.send(self._answer)
        self.heard.set()
        with contextlib.suppress(OSError):
            while piece := client.file.read1(1 << 16):
                self.body += piece
        self.ended.set()


@pytest.mark.parametrize(
    "answer",
    [b"", b"HTTP/1.1 206 OK\r\nConte", PLAIN[:-3], PLAIN[:-3].replace(b"HTTP/1.1", b"HTTP/1.0")],
    ids=["answer", "head", "body", "body of a connection that will close"],
)
@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_cancel_ends_every_stage_of_a_read_soon_and_nothing_is_written_afterwards(
    scheme: str, answer: bytes, tls: ssl.SSLContext, authority_file: str
) -> None:
    stage = Stage(answer)
    buffer = bytearray(10)
    transport = Transport(verify=authority_file)
    with Server(stage.serve, tls if scheme == "https" else None) as server:
        task = asyncio.create_task(transport.read_into(server.get(), 0, [memoryview(buffer)], 10))
        await asyncio.to_thread(stage.heard.wait)
        await cancel(task)
        written = bytes(buffer)
        assert await asyncio.to_thread(stage.ended.wait, 5)
        assert buffer == written
    assert not transport.connections._idle


async def test_a_cancel_ends_a_tls_handshake_soon() -> None:
    heard = threading.Event()

    def serve(client: Client) -> None:
        client.sock.recv(1)
        heard.set()
        while client.sock.recv(1000):
            pass

    with Server(serve) as server:
        request = SignedRequest("PUT", server.url.replace("http:", "https:"))
        task = asyncio.create_task(Sends()(request, publishes=True))
        await asyncio.to_thread(heard.wait)
        await cancel(task)


@pytest.mark.parametrize("publishes", [False, True])
@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_cancel_while_sending_resets_the_connection_and_the_store_never_has_all(
    scheme: str, publishes: bool, tls: ssl.SSLContext, authority_file: str
) -> None:
    stage = Stage(read_body=MIB)
    resume = threading.Event()

    def serve(client: Client) -> None:
        head = client.head()
        stage.body = client.file.read(MIB)
        stage.heard.set()
        assert head
        resume.wait()
        with contextlib.suppress(OSError):
            while piece := client.file.read1(1 << 16):
                stage.body += piece
        stage.ended.set()

    send = Sends(Transport(verify=authority_file))
    with Server(serve, tls if scheme == "https" else None) as server:
        task = asyncio.create_task(send(server.put(), publishes=publishes))
        await asyncio.to_thread(stage.heard.wait)
        await cancel(task)
        resume.set()
        assert await asyncio.to_thread(stage.ended.wait, 5)
    assert len(stage.body) < len(LARGE)
    assert send.moved == 0


async def test_a_cancel_while_waiting_for_the_answer_of_a_part_ends_soon() -> None:
    stage = Stage(read_body=len(LARGE))
    send = Sends()
    with Server(stage.serve) as server:
        task = asyncio.create_task(send(server.put()))
        await asyncio.to_thread(stage.heard.wait)
        await cancel(task)
        assert await asyncio.to_thread(stage.ended.wait, 5)
    assert send.moved == 0


@pytest.mark.parametrize("status", [200, 503])
async def test_a_cancel_waits_for_the_answer_of_a_request_that_publishes(status: int) -> None:
    heard, answer = threading.Event(), threading.Event()
    served = []

    def serve(client: Client) -> None:
        client.body(client.head())
        heard.set()
        answer.wait()
        client.send(OK.replace(b"200", str(status).encode()))
        served.append(status)

    with Server(serve) as server:
        task = asyncio.create_task(Sends()(server.put(), publishes=True))
        await asyncio.to_thread(heard.wait)
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0.05)
        assert not task.done()
        answer.set()
        await asyncio.wait([task])
        assert task.cancelled()
    assert served == [status]


async def test_a_cancel_waits_no_longer_than_ten_seconds_for_the_answer_of_a_request_that_publishes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert module._ANSWER_PATIENCE == 10.0
    monkeypatch.setattr(module, "_ANSWER_PATIENCE", 0.3)
    stage = Stage(read_body=len(LARGE))
    with Server(stage.serve) as server:
        task = asyncio.create_task(Sends()(server.put(), publishes=True))
        await asyncio.to_thread(stage.heard.wait)
        await cancel(task)
        assert await asyncio.to_thread(stage.ended.wait, 5)  # it is closed then


async def test_a_cancel_of_one_request_leaves_the_connections_of_others_alone() -> None:
    hang = threading.Event()

    def serve(client: Client) -> None:
        while head := client.head():
            if head["target"] == "/hang":
                hang.set()
                client.head()
                return
            client.send(the_range(head))

    read = Reads()
    with Server(serve) as server:
        task = asyncio.create_task(read(server.get("/hang")))
        await asyncio.to_thread(hang.wait)
        assert await read(server.get()) == DATA[:10]
        await cancel(task)
        assert await read(server.get()) == DATA[:10]
        assert server.connections == 2


@pytest.mark.parametrize("seed", range(20))
async def test_a_cancel_at_any_moment_leaves_the_transport_usable(seed: int) -> None:
    def serve(client: Client) -> None:
        while head := client.head():
            client.send(the_range(head) if head["method"] == "GET" else client.body(head) and OK)

    transport, moment = Transport(), random.Random(seed)
    with Server(serve) as server:
        for _ in range(10):
            tasks = [
                asyncio.create_task(Reads(transport)(server.get(), 0, len(DATA))),
                asyncio.create_task(Sends(transport)(server.put(), [LARGE[: 2 * MIB]], publishes=True)),
            ]
            await asyncio.sleep(moment.random() * 0.01)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        assert await Reads(transport)(server.get(), 0, len(DATA)) == DATA
        assert await Sends(transport)(server.put()) == 200
