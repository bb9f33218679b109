"""An HTTP/1.1 proxy that injects faults between a client and an object store, any of them.

It forwards requests as they are, so signatures stay right, and does to chosen ones what networks and stores do: refuse,
cut, damage, lose or never answer them. It can also be a slow link that all connections share, and have an outage.
"""

from __future__ import annotations

import re
import select
import selectors
import socket
import struct
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, BinaryIO, Literal, Self, TypeAlias
from urllib.parse import parse_qsl, urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import TracebackType

__all__ = ["Fault", "FaultProxy", "Head", "Outage", "Request"]

HOST = "127.0.0.1"

Outage: TypeAlias = Literal["refuse", "silence"] | int
"""What an outage is: see :meth:`FaultProxy.outage`."""

_PIECE = 1 << 20
_PIECE_OF_A_SLOW_LINK = 1 << 16
_RECEIVE_BUFFER_OF_A_SLOW_LINK = 1 << 17
_BACKLOG = 512
_GONE = getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR

_SECRET_HEADERS = frozenset(
    {
        "authorization",
        "cookie",
        "x-amz-security-token",
        "x-amz-server-side-encryption-customer-key",
        "x-goog-encryption-key",
        "x-ms-encryption-key",
    }
)
_SECRET_PARAMETERS = frozenset({"x-amz-signature", "x-amz-security-token", "x-goog-signature", "signature", "sig"})


@dataclass(slots=True, kw_only=True)
class Fault:
    """What happens to which requests. Give one of the actions; the first fault that matches is used.

    Attributes:
        method: Only requests with this method; None for all.
        target: Only requests whose target (path and query) this regular expression finds something in.
        skip: How many matching requests pass first.
        times: How many matching requests it happens to; None for all.
        status: Action: answer with this status and do not forward the request.
        code: The error code in that answer's XML body.
        headers: Header fields of that answer: ``Retry-After``, ``Location``.
        reset_upload_after: Action: reset the connection after this many bytes of the request's body.
        reset_download_after: Action: reset the connection after this many bytes of the response's body.
        truncate_after: Action: close the connection, in good order, after this many bytes of the response's
            body, whose Content-Length still promises all.
        corrupt_upload_byte: Action: flip one bit of this byte of the request's body.
        corrupt_download_byte: Action: flip one bit of this byte of the response's body.
        lose_reply: Action: forward the request, and reset the connection instead of answering.
        hang: Action: take the request, do not forward it, and never answer.
        call: With ``hang``, called when the request has been taken; with ``lose_reply``, when the store has answered.
    """

    method: str | None = None
    target: str = ""
    skip: int = 0
    times: int | None = 1
    status: int | None = None
    code: str = "SlowDown"
    headers: Mapping[str, str] = field(default_factory=dict)
    reset_upload_after: int | None = None
    reset_download_after: int | None = None
    truncate_after: int | None = None
    corrupt_upload_byte: int | None = None
    corrupt_download_byte: int | None = None
    lose_reply: bool = False
    hang: bool = False
    call: Callable[[], object] | None = None

    @property
    def forwards(self) -> bool:
        """Whether the store sees the request."""
        return self.status is None and self.reset_upload_after is None and not self.hang

    def applies_to(self, method: str, target: str) -> bool:
        """Whether this happens to the request; counts it when it does."""
        if self.method not in {None, method} or not re.search(self.target, target):
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        if self.times is None:
            return True
        self.times -= 1
        return self.times >= 0


_NO_FAULT = Fault()


@dataclass(frozen=True, slots=True)
class Request:
    """A request that the proxy saw.

    Attributes:
        method: Its method.
        target: Its path and query.
        fault: What was done to it; None: nothing.
        headers: Its header fields, the names in lower case.
        at: When its head had come in, on the clock ``time.monotonic``.
    """

    method: str
    target: str
    fault: Fault | None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    at: float = field(default_factory=time.monotonic, repr=False, compare=False)

    @property
    def secrets(self) -> frozenset[str]:
        """What in it nobody else may see: names of headers and query parameters, in lower case.

        Tokens, signatures and customers' encryption keys. Empty where a request carries no credentials.
        """
        query = parse_qsl(urlsplit(self.target).query, keep_blank_values=True)
        return (_SECRET_HEADERS & self.headers.keys()) | (_SECRET_PARAMETERS & {name.lower() for name, _ in query})


class FaultProxy:
    """A proxy to a server on this machine, with a thread for each connection while its ``with`` block lasts.

    Args:
        upstream_port: The server's port on 127.0.0.1.
        faults: What to do to which requests.
        bandwidth: Bytes a second that bodies have, each way, all connections together; None: no limit.

    Attributes:
        log: Every request so far, in the order they came in.
        port: Its own port on 127.0.0.1.
    """

    def __init__(self, upstream_port: int, *faults: Fault, bandwidth: float | None = None) -> None:
        self.log: list[Request] = []
        self.port = 0
        self._upstream_port = upstream_port
        self._faults = faults
        self._changed = threading.Condition()
        self._open = threading.Event()  # cleared while there is an outage of silence
        self._open.set()
        self._ended = threading.Event()
        self._outage: Fault | None = None
        self._bandwidth = bandwidth
        self._up, self._down = _Link(bandwidth), _Link(bandwidth)
        self._connections: dict[_Connection, threading.Thread] = {}
        self._listening: _Listening | None = None

    @property
    def endpoint(self) -> str:
        """Its URL."""
        return f"http://{HOST}:{self.port}"

    def __enter__(self) -> Self:
        self._listen()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._open.set()
        self._stop_listening()
        for connection, thread in self._under_way():
            connection.wake()
            thread.join()

    def requests(self, method: str | None = None, target: str = "") -> list[Request]:
        """The requests so far with this method (None: any) whose target matches this regular expression."""
        return [r for r in list(self.log) if method in {None, r.method} and re.search(target, r.target)]

    def wait_for(self, method: str | None = None, target: str = "", *, count: int = 1, timeout: float = 30.0) -> None:
        """Blocks until ``count`` such requests have come in.

        Raises:
            TimeoutError: they did not within ``timeout`` seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: len(self.requests(method, target)) >= count, timeout):
                raise TimeoutError(f"{count} requests {method} {target!r} did not come in; there were {self.log}")

    @contextmanager
    def outage(self, kind: Outage, *, retry_after: float | None = None) -> Iterator[None]:
        """The store cannot be reached while the block lasts.

        Args:
            kind: "refuse": connections are reset, and new ones refused, as by a server that is not running. "silence":
                connections are taken, and nothing moves on them, bodies under way included, as on a dead network;
                afterwards they go on, except those that the client has closed: what came on them is dropped. A status:
                each new request is answered with it, whatever other faults there are; those under way go on.
            retry_after: Seconds in the ``Retry-After`` header of those answers.
        """
        if kind == "refuse":
            self._stop_listening()
            held = _bound(self.port)  # so that nobody else gets the port: it does not listen
            for connection, _ in self._under_way():
                connection.cut()
            try:
                yield
            finally:
                self._listen()
                held.close()
        elif kind == "silence":
            self._open.clear()
            try:
                yield
            finally:
                self._open.set()
        else:
            headers = {} if retry_after is None else {"Retry-After": f"{retry_after:g}"}
            self._outage = Fault(status=kind, times=None, headers=headers)
            try:
                yield
            finally:
                self._outage = None

    def admit(self, head: Head) -> Head | bytes:
        """For subclasses: the request as it is forwarded; or the answer to it, and then it is not forwarded."""
        return head

    def answered(self, head: Head) -> Head:
        """For subclasses: the head of the store's answer as it is passed on."""
        return head

    def _listen(self) -> None:
        listener = _bound(self.port)
        if self._bandwidth:  # or the kernel takes megabytes that the link has not carried yet
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER_OF_A_SLOW_LINK)
        listener.listen(_BACKLOG)
        self.port = listener.getsockname()[1]
        self._listening = _Listening(listener, self._accept)

    def _stop_listening(self) -> None:
        if self._listening:
            self._listening.stop()
            self._listening = None

    def _accept(self, client: socket.socket) -> None:
        connection = _Connection(client, self._upstream_port, self._bandwidth is not None)
        thread = threading.Thread(target=self._serve, args=(connection,), name="fault proxy", daemon=True)
        with self._changed:
            self._connections[connection] = thread
        thread.start()

    def _under_way(self) -> list[tuple[_Connection, threading.Thread]]:
        with self._changed:
            return list(self._connections.items())

    def _serve(self, connection: _Connection) -> None:
        try:
            while (head := Head.read(connection.from_client)) and self._exchange(head, connection):
                pass
        except (OSError, EOFError, _Cut):
            connection.reset_client()
        finally:
            connection.close()
            with self._changed:
                del self._connections[connection]

    def _exchange(self, head: Head, connection: _Connection) -> bool:
        """Handles one request; returns whether the connection can take another one."""
        method, target = head.first_line.split()[:2]
        fault = self._note(method, target, head)
        self._carry(connection)
        if head.fields.get("expect", "").lower() == "100-continue":
            head = head.without("expect")
            connection.client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        admitted = self.admit(head)
        forwards = fault.forwards and isinstance(admitted, Head)
        if isinstance(admitted, Head) and forwards:
            connection.store.sendall(admitted.raw)
        body = connection.pieces(connection.from_client, head)
        for raw in _damaged(body, fault.reset_upload_after, fault.corrupt_upload_byte):
            self._carry(connection, self._up, len(raw))
            if forwards:
                connection.store.sendall(raw)
        if fault.reset_upload_after is not None:
            raise _Cut
        if fault.hang:
            if fault.call:
                fault.call()
            connection.from_client.read(1)  # returns when the client gives up
            raise _Cut
        if fault.status is not None:
            connection.client.sendall(_refusal(fault, with_body=method != "HEAD"))
            return True
        if isinstance(admitted, bytes):
            connection.client.sendall(admitted)
            return True
        return self._answer(method, fault, connection)

    def _answer(self, method: str, fault: Fault, connection: _Connection) -> bool:
        while True:
            head = Head.read(connection.from_store)
            if head is None:
                raise EOFError
            status = int(head.first_line.split()[1])
            if status >= 200:
                break
        if fault.lose_reply:
            if fault.call:
                fault.call()
            raise _Cut
        self._carry(connection)
        connection.client.sendall(self.answered(head).raw)
        if method != "HEAD" and status not in {204, 304}:
            cut = fault.truncate_after if fault.truncate_after is not None else fault.reset_download_after
            body = connection.pieces(connection.from_store, head)
            try:
                for raw in _damaged(body, cut, fault.corrupt_download_byte):
                    self._carry(connection, self._down, len(raw))
                    connection.client.sendall(raw)
            except _Cut:
                if fault.truncate_after is not None:
                    return False
                raise
        return head.fields.get("connection", "").lower() != "close"

    def _carry(self, connection: _Connection, link: _Link | None = None, nbytes: int = 0) -> None:
        """Blocks until the bytes may go on; raises :class:`_Cut` where there is nobody for them any more."""
        if not self._open.is_set():
            self._open.wait()
            if connection.client_is_gone():
                raise _Cut
        if link and self._ended.wait(link.take(nbytes)):
            raise _Cut
        if connection.is_cut or self._ended.is_set():
            raise _Cut

    def _note(self, method: str, target: str, head: Head) -> Fault:
        with self._changed:
            faults = (self._outage,) if self._outage else self._faults
            fault = next((f for f in faults if f.applies_to(method, target)), None)
            self.log.append(Request(method, target, fault, head.fields))
            self._changed.notify_all()
        return fault or _NO_FAULT


class _Cut(Exception):  # noqa: N818 - not an error: the fault that was asked for
    """The connection ends here."""


class _Link:
    """One way of a link of so many bytes a second, which is first come, first served."""

    def __init__(self, bandwidth: float | None) -> None:
        self._bandwidth = bandwidth
        self._lock = threading.Lock()
        self._free_at = 0.0

    def take(self, nbytes: int) -> float:
        """Takes the link for these bytes; returns in how many seconds it has carried them."""
        if not self._bandwidth:
            return 0.0
        with self._lock:
            now = time.monotonic()
            self._free_at = max(now, self._free_at) + nbytes / self._bandwidth
            return self._free_at - now


class _Listening:
    """Accepts connections in a thread of its own until it is stopped."""

    def __init__(self, listener: socket.socket, accept: Callable[[socket.socket], None]) -> None:
        self._wake, woken = socket.socketpair()
        self._thread = threading.Thread(target=self._run, args=(listener, woken, accept), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._wake.shutdown(socket.SHUT_RDWR)  # a forked child may hold it open
        self._wake.close()
        self._thread.join()

    @staticmethod
    def _run(listener: socket.socket, woken: socket.socket, accept: Callable[[socket.socket], None]) -> None:
        listener.setblocking(False)  # a client may be gone before it is accepted
        with listener, woken, selectors.DefaultSelector() as selector:
            selector.register(listener, selectors.EVENT_READ)
            selector.register(woken, selectors.EVENT_READ)
            while not any(key.fileobj is woken for key, _ in selector.select()):
                with suppress(BlockingIOError, ConnectionError):
                    accept(listener.accept()[0])


class _Connection:
    """A client's connection, and the one to the store that its requests are forwarded on, made when it is needed."""

    def __init__(self, client: socket.socket, upstream_port: int, slow: bool) -> None:
        client.setblocking(True)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.client = client
        self.from_client: BinaryIO = client.makefile("rb")
        self.is_cut = False
        self._upstream_port = upstream_port
        self._slow = slow
        self._store: socket.socket | None = None
        self._from_store: BinaryIO | None = None
        self._buffer = memoryview(bytearray(_PIECE_OF_A_SLOW_LINK if slow else _PIECE))

    @property
    def store(self) -> socket.socket:
        if self._store is None:
            store = socket.socket()
            if self._slow:
                store.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER_OF_A_SLOW_LINK)
            store.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._store, self._from_store = store, store.makefile("rb")
            store.connect((HOST, self._upstream_port))
        return self._store

    @property
    def from_store(self) -> BinaryIO:
        assert self._from_store is not None
        return self._from_store

    def pieces(self, source: BinaryIO, head: Head) -> Iterator[tuple[memoryview, memoryview]]:
        """The body of a message in pieces, each as payload and as it is on the wire; valid until the next one."""
        fields = head.fields
        if fields.get("transfer-encoding", "").lower() == "chunked":
            yield from _chunks(source)
            return
        promised = fields.get("content-length")
        run_shielded = promised is None and source is self._from_store
        left = len(self._buffer) if run_shielded else int(promised or 0)
        while left:
            count = source.readinto1(self._buffer[: min(left, len(self._buffer))])  # type: ignore[attr-defined]
            if not count:
                if run_shielded:
                    return
                raise EOFError
            if not run_shielded:
                left -= count
            piece = self._buffer[:count]
            yield piece, piece

    def cut(self) -> None:
        """Has the connection reset, from another thread, as soon as its own thread notices."""
        self.is_cut = True
        self.wake(socket.SHUT_RD)

    def wake(self, how: int = socket.SHUT_RDWR) -> None:
        """Ends what its thread waits for, from another thread."""
        for sock, direction in ((self.client, how), (self._store, socket.SHUT_RDWR)):
            with suppress(OSError):
                if sock:
                    sock.shutdown(direction)

    def client_is_gone(self) -> bool:
        """Whether the client has closed its end."""
        poll = select.poll()
        poll.register(self.client, _GONE)
        return bool(poll.poll(0))

    def reset_client(self) -> None:
        """Has :meth:`close` end the client's connection with a reset (RST): without lingering there is no other end."""
        with suppress(OSError):
            self.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def close(self) -> None:
        for part in (self._from_store, self._store, self.from_client, self.client):
            with suppress(OSError):
                if part:
                    part.close()


@dataclass(frozen=True, slots=True)
class Head:
    """The first line and the header fields of a request or a response.

    Attributes:
        first_line: With its line end.
        lines: The header lines, each with its line end.
    """

    first_line: str
    lines: tuple[bytes, ...]

    @classmethod
    def read(cls, source: BinaryIO) -> Head | None:
        first = source.readline()
        if not first:
            return None
        lines = []
        while (line := source.readline()) != b"\r\n":
            if not line:
                raise EOFError
            lines.append(line)
        return cls(first.decode("latin-1"), tuple(lines))

    @property
    def raw(self) -> bytes:
        return self.first_line.encode("latin-1") + b"".join(self.lines) + b"\r\n"

    @property
    def fields(self) -> dict[str, str]:
        pairs = (line.decode("latin-1").split(":", 1) for line in self.lines)
        return {name.strip().lower(): value.strip() for name, value in pairs}

    def without(self, field: str) -> Head:
        kept = tuple(line for line in self.lines if line.split(b":", 1)[0].strip().lower() != field.encode())
        return Head(self.first_line, kept)


def _chunks(source: BinaryIO) -> Iterator[tuple[memoryview, memoryview]]:
    """The body of a message in the chunked coding."""
    while line := source.readline():
        length = int(line.split(b";")[0], 16)
        if length == 0:
            while (trailer := source.readline()) != b"\r\n":
                if not trailer:
                    raise EOFError
                line += trailer
            yield memoryview(b""), memoryview(line + b"\r\n")
            return
        data = source.read(length + 2)
        if len(data) < length + 2:
            raise EOFError
        yield memoryview(data)[:-2], memoryview(line + data)
    raise EOFError


def _damaged(
    pieces: Iterator[tuple[memoryview, memoryview]], cut_after: int | None, corrupt_byte: int | None
) -> Iterator[memoryview]:
    """The pieces as they are on the wire: to be cut, with :class:`_Cut`, or with one bit flipped."""
    position = 0
    for payload, raw in pieces:
        start, position = position, position + len(payload)
        if cut_after is not None and position > cut_after:
            if payload is raw:
                yield raw[: cut_after - start]
            raise _Cut
        if corrupt_byte is not None and start <= corrupt_byte < position and payload is raw:
            raw[corrupt_byte - start] ^= 1
        yield raw


def _bound(port: int) -> socket.socket:
    """A socket with this port (0: any), which others may have too while nobody listens on it."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((HOST, port))
    return sock


def _refusal(fault: Fault, *, with_body: bool) -> bytes:
    body = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{fault.code}</Code><Message>injected</Message></Error>'
    content = body.encode() if with_body else b""
    fields = {
        "Content-Type": "application/xml",
        "x-ms-error-code": fault.code,
        "Content-Length": str(len(content)),
        **fault.headers,
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"HTTP/1.1 {fault.status} Injected\r\n{lines}\r\n".encode() + content
