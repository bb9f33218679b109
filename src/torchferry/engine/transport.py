"""HTTP over sockets, both ways: bodies go from the tensors' memory to the socket, and from the socket into it.

Clients of HTTP hand out memory of their own, which then has to be copied, and hold the interpreter's lock meanwhile.
Python's own ``http.client`` and sockets send from and read into memory that they are given, without the lock.

It knows no store. A backend has the filesystem's client sign each request, and says what to do with an answer.
"""

from __future__ import annotations

import http.client
import io
import selectors
import socket
import ssl
import struct
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

from torchferry.engine.cancellation import in_thread
from torchferry.engine.connections import WAITS_IN_THE_KERNEL, Connection, Connections, UnmovableError
from torchferry.engine.lending import is_lent, reading
from torchferry.engine.retry import AnswerError, transient_answer
from torchferry.engine.transfer import Transfer, current
from torchferry.engine.types import MIB, Buffer

if sys.platform == "linux":
    import fcntl
    import termios

__all__ = ["Answer", "SignedRequest", "Transport", "UnmovableError"]

_SILENCE = 30.0  # seconds in which nothing moves, after which a request has failed, where the user chose no other
_LAST_LOOK = 1.0  # seconds to wait for the answer of a store that takes no bytes over TLS
_SLOWEST = 1_000  # bytes a second: an answer that comes slower than this has failed,
_GRACE = 60.0  # seconds after its first byte
_SLICE = 16 * MIB  # bytes given to the system at once; it takes what it can in 0.25 s
_LOOK = 0.1  # seconds between two looks at what has been acknowledged
_TLS_SLICE = 128 << 10  # over TLS, what is sent of a slice shows only when all of it is
_LAST_SLICE = 64 << 10  # so that a cancel seldom comes when the request may be complete
_ROOM_TICK = 0.25  # seconds to wait at once for room in the system's queue
_DONT_WAIT = getattr(socket, "MSG_DONTWAIT", 0)  # Windows has none; there, Python's own limit does the same
_READ = 4 * MIB  # bytes asked of the system at once; it returns what has come in 0.25 s
_WHOLE_READS = 64 << 10  # a read of so many bytes waits for all of them
_INTERRUPT_PATIENCE = 0.5  # seconds that a cancel waits for the thread: a name look-up cannot be ended
_ANSWER_PATIENCE = 10.0  # seconds that a cancel waits for the answer to a request that publishes and was sent whole
_LARGEST_ANSWER = MIB  # bytes; answers to uploads are short


@dataclass(frozen=True, slots=True)
class SignedRequest:
    """A request that a filesystem's client has signed.

    Attributes:
        method: "GET", "PUT" or "POST".
        url: Where to.
        headers: What to send, without Content-Length, Host and Range.
        version: Of a read: a header of the answer and the value it has where the answer is of the right version; None
            to trust the store.
    """

    method: str
    url: str
    headers: Mapping[str, str] = field(default_factory=dict)
    version: tuple[str, str] | None = None

    @classmethod
    def get(cls, url: str, etag: str | None, headers: Mapping[str, str] | None = None) -> SignedRequest:
        """A read, from a store where the ETag names a version."""
        headers = headers or {}
        if etag is None:
            return cls("GET", url, headers)
        return cls("GET", url, {**headers, "If-Match": etag}, ("ETag", etag))


@dataclass(frozen=True, slots=True)
class Answer:
    """A store's answer to an upload.

    Attributes:
        status: The HTTP status.
        headers: Its headers; their names are looked up without regard to case.
        body: Its body, at most 1 MiB.
    """

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def ok(self) -> bool:
        """Whether the request succeeded."""
        return HTTPStatus.OK <= self.status < HTTPStatus.MULTIPLE_CHOICES

    def __str__(self) -> str:
        detail = " ".join(self.body[:300].decode("utf-8", "replace").split())
        return f"status {self.status}" + (f": {detail}" if detail else "")


class Transport:
    """Connections to stores, which stay open for the next request.

    Args:
        verify: The file with the certificates of the authorities to trust; True for the system's; False to trust
            anyone.
        silence: Seconds in which no byte moves, after which a request has failed.

    Attributes:
        silence: As above.
        connections: Those that are open and idle.
    """

    def __init__(self, *, verify: str | bool = True, silence: float = _SILENCE) -> None:
        self.silence = silence
        self.connections = Connections(verify)

    async def read_into(self, request: SignedRequest, start: int, buffers: Sequence[memoryview], size: int) -> None:
        """Fills ``buffers``, one after the other, with the bytes from ``start`` of an object of ``size`` bytes.

        A cancel closes the connection; nothing is written to ``buffers`` afterwards.

        Raises:
            ConnectionError: the connection failed: trying again may help.
            TimeoutError: nothing moved for :attr:`silence` seconds, or less than 1,000 bytes a second.
            AnswerError: the store is not available.
            UnmovableError: any other answer than the bytes that were asked for; a proxy; TLS failed.
        """
        reading = _Reading(self, request, start, buffers, size, current())
        try:
            await in_thread(reading.run, interrupt=reading.interrupt)
        finally:
            reading.settle()

    async def send(self, request: SignedRequest, body: Sequence[Buffer], *, publishes: bool) -> Answer:
        """Sends a request with a body, from the memory of its buffers.

        Args:
            request: Signed for this body.
            body: Its buffers.
            publishes: Whether the store publishes an object when it has the whole request. A cancel then waits, at most
                10 seconds, for the answer to a request that was sent whole. Before that, and for all other requests,
                it resets the connection: the store gets an incomplete request and drops it.

        Returns:
            The answer, of any status but those that mean "later".

        Raises:
            ConnectionError: as :meth:`read_into`, and so the others.
            UnmovableError: there is a proxy, TLS failed, a redirect was answered, or no HTTP.
        """
        sending = _Sending(self, request, body, publishes, current())
        try:
            return await in_thread(sending.run, interrupt=sending.interrupt)
        finally:
            sending.settle()


class _Exchange:
    """One request and its answer, on a connection of the transport."""

    def __init__(self, transport: Transport, request: SignedRequest, transfer: Transfer) -> None:
        self._transport = transport
        self._request = request
        self._url = urlsplit(request.url)
        self._transfer = transfer
        self._connection: Connection | None = None
        self._using = threading.Lock()  # held to end a connection: not one that is another request's already
        self._interrupted = False
        self._answered = False
        self._moved_at = 0.0  # when bytes last moved, on the clock time.monotonic
        self._began_at: float | None = None  # when the answer's first byte came
        self._received = 0  # bytes of the answer

    @property
    def _target(self) -> str:
        return f"{self._url.path or '/'}?{self._url.query}" if self._url.query else self._url.path or "/"

    def interrupt(self) -> float:
        """Makes :meth:`_run` raise soon; returns how many seconds to wait for that."""
        with self._using:
            self._interrupted = True
            if self._connection is not None:
                self._connection.interrupt()
        return _INTERRUPT_PATIENCE

    def receive(self, sock: socket.socket, buffer: memoryview) -> int:
        """Receives some bytes of the answer.

        Raises:
            TimeoutError: nothing moves any more, or too slowly.
        """
        while True:
            if self._interrupted and not self._awaited:
                raise InterruptedError
            try:
                count = sock.recv_into(buffer, 0, self._flags(sock, buffer))
            except (TimeoutError, BlockingIOError):
                self._waited("no answer")
                continue
            self._moved_at = now = time.monotonic()
            if self._began_at is None:
                self._began_at = now
            self._received += count
            if not self._answered and self._received > _LARGEST_ANSWER:
                raise http.client.HTTPException("the head of the answer has no end")
            if self._received < _SLOWEST * (now - self._began_at - _GRACE):
                raise TimeoutError(f"the answer comes slower than {_SLOWEST} bytes a second")
            return count

    @staticmethod
    def _flags(sock: socket.socket, buffer: memoryview) -> int:
        whole = len(buffer) >= _WHOLE_READS and not isinstance(sock, ssl.SSLSocket) and WAITS_IN_THE_KERNEL
        return socket.MSG_WAITALL if whole else 0

    @property
    def _awaited(self) -> bool:
        """Whether the answer is wanted although the request was cancelled."""
        return False

    def _run(self) -> Answer | None:
        """Blocks the thread. An idle connection that the store has closed meanwhile is replaced by another one."""
        while True:
            connection = self._transport.connections.take(self._url)
            with self._using:
                self._connection = connection
            self._answered = False
            self._began_at = None
            self._received = 0
            reusable = False
            try:
                connection.open()
                if self._interrupted:  # before there was anything to end
                    raise InterruptedError
                connection.http.response_class = partial(_Response, self)  # type: ignore[assignment]
                self._moved_at = time.monotonic()
                answer, reusable = self._exchange(connection)
            except (AnswerError, TimeoutError):
                raise
            except OSError as error:  # TLS's are among them
                if connection.used and not self._answered and not self._interrupted:
                    continue
                if isinstance(error, ConnectionError):
                    raise
                raise ConnectionError(f"{type(error).__name__}: {error}") from error
            except http.client.IncompleteRead as error:
                raise ConnectionResetError(f"the answer was cut off: {error}") from error
            except http.client.HTTPException as error:
                raise UnmovableError(f"no HTTP: {type(error).__name__}: {str(error)[:100]}") from error
            finally:
                with self._using:
                    self._connection = None
                connection.http.response_class = http.client.HTTPResponse  # it keeps nothing of this request
                if reusable and not self._interrupted:
                    self._transport.connections.give_back(connection)
                else:
                    connection.close()
            return answer

    def _exchange(self, connection: Connection) -> tuple[Answer | None, bool]:
        """Returns the answer, and whether the connection can be used again."""
        raise NotImplementedError

    def _waited(self, trouble: str) -> None:
        """Called each 0.25 s in which nothing moved. Raises where that lasts too long."""
        if time.monotonic() - self._moved_at > self._transport.silence:
            raise TimeoutError(f"{trouble} for {self._transport.silence:g} s")


class _Reading(_Exchange):
    """One range on its way into memory."""

    def __init__(
        self,
        transport: Transport,
        request: SignedRequest,
        start: int,
        buffers: Sequence[memoryview],
        size: int,
        transfer: Transfer,
    ) -> None:
        super().__init__(transport, request, transfer)
        self._nbytes = sum(map(len, buffers))
        last = start + self._nbytes - 1
        self._headers = {**request.headers, "Range": f"bytes={start}-{last}"}
        self._expected = f"bytes {start}-{last}/{size}"
        self._buffers = buffers
        self._filled = 0
        self._done = False

    def run(self) -> None:
        self._run()
        self._done = True

    def settle(self) -> None:
        """Takes back what was counted of a range that did not arrive whole."""
        if not self._done:
            self._transfer.moved(-self._filled)

    def _exchange(self, connection: Connection) -> tuple[Answer | None, bool]:
        connection.http.request(self._request.method, self._target, headers=self._headers)
        with connection.http.getresponse() as response:
            self._answered = True
            self._check(response)
            for buffer in self._buffers:
                self._fill(response, buffer)
            return None, response.length == 0 and not response.will_close

    def _fill(self, response: http.client.HTTPResponse, buffer: memoryview) -> None:
        filled = 0
        while filled < len(buffer):
            count = response.readinto(buffer[filled : filled + _READ])
            if not count:
                raise ConnectionResetError(f"the body ended after {self._filled} of {self._nbytes} bytes")
            filled += count
            self._filled += count
            self._transfer.moved(count)

    def _check(self, response: http.client.HTTPResponse) -> None:
        """Raises for an answer with anything but the bytes that were asked for."""
        if (hint := transient_answer(response.status, response.headers)) is not None:
            raise AnswerError(f"status {response.status}", hint)
        if response.status != HTTPStatus.PARTIAL_CONTENT:
            raise UnmovableError(f"status {response.status} for a range")
        if response.headers["Content-Range"] != self._expected:
            raise UnmovableError(f"another range than {self._expected}: {response.headers['Content-Range']}")
        version = self._request.version
        if version is not None and response.headers[version[0]] != version[1]:
            raise UnmovableError("another version")  # some stores ignore what they are asked for


class _Sending(_Exchange):
    """One body on its way to the store."""

    def __init__(
        self, transport: Transport, request: SignedRequest, body: Sequence[Buffer], publishes: bool, transfer: Transfer
    ) -> None:
        super().__init__(transport, request, transfer)
        self._body = [memoryview(buffer).cast("B") for buffer in body if len(buffer)]
        self._size = sum(map(len, self._body))
        self._publishes = publishes
        self._last_slice = threading.Lock()  # held to decide whether the request is sent whole, or never
        self._whole = False
        self._settled = False
        self._sent = 0  # bytes, into the system's queue
        self._arrived = 0  # bytes that the other end's TCP has acknowledged, in this attempt
        self._acknowledged = 0  # bytes that were counted
        self._looked_at = 0.0  # when they were
        self._ok = False
        self._sock: socket.socket | None = None

    def run(self) -> Answer:
        answer = self._run()
        assert answer is not None  # noqa: S101 - for the types
        self._ok = answer.ok
        return answer

    def interrupt(self) -> float:
        """Resets the connection; or lets the answer come, where the store may publish already."""
        with self._last_slice:
            if self._whole and self._publishes:
                self._interrupted = True  # nothing is sent again
                return _ANSWER_PATIENCE
            return super().interrupt()

    def settle(self) -> None:
        """Called when nobody waits any more: counts what is not counted yet of a body that arrived, or takes it back.

        An answer that a cancel has waited for in vain is waited for no more.
        """
        self._settled = True
        super().interrupt()
        arrived = self._size if self._ok else 0
        self._transfer.moved(arrived - self._acknowledged)
        self._acknowledged = arrived

    @property
    def _awaited(self) -> bool:
        return self._whole and self._publishes and not self._settled

    def _exchange(self, connection: Connection) -> tuple[Answer | None, bool]:
        connection.http.putrequest(self._request.method, self._target, skip_accept_encoding=True)
        for name, value in self._request.headers.items():
            if name.lower() not in {"content-length", "host"}:
                connection.http.putheader(name, value)
        connection.http.putheader("Content-Length", str(self._size))
        with self._last_slice:
            if self._interrupted:
                raise InterruptedError
            self._whole = not self._size
        self._sock, self._sent, self._arrived = connection.sock, 0, 0
        connection.http.endheaders()
        sent_whole = self._send_body()
        with connection.http.getresponse() as response:
            self._answered = True
            answer = Answer(response.status, response.headers, response.read(_LARGEST_ANSWER))
            if (hint := transient_answer(answer.status, answer.headers)) is not None:
                raise AnswerError(str(answer), hint)
            if HTTPStatus.MULTIPLE_CHOICES <= answer.status < HTTPStatus.BAD_REQUEST:
                raise UnmovableError(f"a redirect ({answer.status})")
            if answer.ok and not sent_whole:
                raise ConnectionResetError(f"the store answered before it had all: {answer}")
            return answer, sent_whole and response.isclosed() and not response.will_close

    def _send_body(self) -> bool:
        """Returns whether all of it was sent: a store may refuse a request before it has seen its end."""
        longest = _TLS_SLICE if isinstance(self._sock, ssl.SSLSocket) else _SLICE
        try:
            for view in self._body:
                while len(view):
                    left = self._size - self._sent
                    piece = view[: min(longest, left - _LAST_SLICE if left > _LAST_SLICE else left)]
                    view = view[len(piece) :]  # noqa: PLW2901 - what is left of it
                    if self._sent + len(piece) == self._size:
                        with self._last_slice:
                            if self._interrupted:
                                raise InterruptedError
                            self._whole = True
                    if not self._send_piece(piece):
                        return False
        except (BrokenPipeError, ConnectionResetError, ssl.SSLError):
            if self._interrupted:
                raise
            return False  # the answer may be there, and say why
        except TimeoutError:
            if not isinstance(self._sock, ssl.SSLSocket):
                raise
            self._moved_at += _LAST_LOOK
            return False
        return True

    def _send_piece(self, piece: memoryview) -> bool:
        """Returns False where the store answers instead of taking it."""
        sock = self._sock
        assert sock is not None  # noqa: S101 - it is open
        while len(piece):
            if self._settled:
                raise InterruptedError
            try:
                count = _send(sock, piece)
            except (TimeoutError, BlockingIOError):
                # What comes over TLS need not be an answer: there it is looked for when nothing else has helped.
                if not isinstance(sock, ssl.SSLSocket) and _is_ready(sock, selectors.EVENT_READ, 0):
                    return False
                self._waited("the store took no bytes")
                continue
            self._moved_at = time.monotonic()
            piece = piece[count:]
            self._sent += count
            if self._moved_at - self._looked_at >= _LOOK and self._sent - self._acknowledged >= MIB:
                self._looked_at = self._moved_at
                self._count_acknowledged()
        return True

    def _waited(self, trouble: str) -> None:
        if self._count_acknowledged():  # over a slow link, megabytes wait in the system's queue
            self._moved_at = time.monotonic()
        super()._waited(trouble)

    def _count_acknowledged(self) -> bool:
        """Counts what the other end has acknowledged; of the last MiB only with the answer.

        Only Linux tells how much it has; elsewhere, whole bodies are counted.

        Returns:
            Whether that is more than before.
        """
        if sys.platform != "linux" or self._sock is None:
            return False
        (queued,) = struct.unpack("i", fcntl.ioctl(self._sock, termios.TIOCOUTQ, b"\0\0\0\0"))
        arrived = self._sent - queued
        if arrived <= self._arrived:
            return False
        self._arrived = arrived
        news = min(arrived, self._size - MIB) - self._acknowledged
        if news > 0:
            self._acknowledged += news
            self._transfer.moved(news)
        return True


class _Response(http.client.HTTPResponse):
    """An answer whose bytes come through :meth:`_Exchange.receive`."""

    def __init__(self, exchange: _Exchange, sock: socket.socket, **options: Any) -> None:
        super().__init__(_Incoming(exchange, sock), **options)  # type: ignore[arg-type]  # makefile is what it uses


class _Incoming(io.RawIOBase):
    """The bytes that come over a connection, for one answer."""

    def __init__(self, exchange: _Exchange, sock: socket.socket) -> None:
        self._exchange = exchange
        self._sock = sock
        self._open = sock.makefile("rb", buffering=0)  # http.client may close the socket before the answer is read

    def close(self) -> None:
        self._open.close()
        super().close()

    def makefile(self, _mode: str) -> io.BufferedReader:
        """What http.client asks a socket for."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._exchange.receive(self._sock, memoryview(buffer))


def _send(sock: socket.socket, piece: memoryview) -> int:
    """Sends some of a piece, as ``sock.send``; who has lent its memory never waits for the store to take bytes."""
    if not is_lent(piece):
        return sock.send(piece)
    if isinstance(sock, ssl.SSLSocket):
        with reading(piece) as memory:
            return sock.send(memory)
    if not _is_ready(sock, selectors.EVENT_WRITE, _ROOM_TICK):
        raise BlockingIOError
    with reading(piece) as memory:
        return sock.send(memory, _DONT_WAIT)


def _is_ready(sock: socket.socket, event: int, seconds: float) -> bool:
    """Whether there is something to receive, or room to send, or the connection has ended."""
    with selectors.DefaultSelector() as selector:
        selector.register(sock, event)
        return bool(selector.select(seconds))
