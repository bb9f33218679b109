"""Reads ranges of an object straight from the socket into the memory they are for.

The clients of both planes hand out memory of their own, which then has to be copied. Python's own HTTP client reads
into memory that it is given, and does not hold the interpreter's lock meanwhile. That takes half the CPU time.

It knows nothing of stores. A plane's client signs the request, and stays in charge: whatever is not exactly the answer
that was asked for (an error, a redirect, a connection that breaks or falls silent), that client is asked for again,
with its retries and its words for what is wrong.
"""

from __future__ import annotations

import http.client
import logging
import socket
import ssl
import time
import urllib.request
import weakref
from collections import OrderedDict, deque
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from torchferry.engine.cancellation import in_thread

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from torchferry.storage.base import ObjectStat

__all__ = ["DirectReader", "SignedGet"]

_SILENCE = 30.0  # seconds without a byte, after which the plane's client is asked
_IDLE = 10.0  # seconds after which a connection is not used again: stores close them soon, and not all of them say so
_CONNECT = 5.0  # seconds for each step of a connection
_SIGNED = 8  # requests that are kept: several objects may be read side by side
_FRESH = 60.0  # seconds for which a signed request is used: no client hands out one that expires sooner
_FAILURES = 3  # in a row, after which it is not tried for a while
_PAUSE = 60.0  # seconds: the store may be out of breath; or it never takes what is signed like this

_logger = logging.getLogger("torchferry.storage")


class SignedGet(NamedTuple):
    """What it takes to read one version of one object, in any range.

    Attributes:
        url: Where it is.
        headers: What to send.
        version: A header of the answer, and what it says where the answer is of that version; None to trust the store.
    """

    url: str
    headers: dict[str, str]
    version: tuple[str, str] | None

    @classmethod
    def if_match(cls, url: str, etag: str | None, headers: dict[str, str] | None = None) -> SignedGet:
        """Of a store where the ETag names a version."""
        if etag is None:
            return cls(url, headers or {}, None)
        return cls(url, {**(headers or {}), "If-Match": etag}, ("ETag", etag))


class DirectReader:
    """Connections to one store, which stay open for the next range.

    Args:
        sign: Signs the request for a version of an object; a method of the backend that the reader belongs to.
        verify: The file with the certificates of the authorities to trust; True for the system's; False to trust
            anyone.
    """

    def __init__(self, sign: Callable[[str, ObjectStat], Awaitable[SignedGet]], *, verify: str | bool = True) -> None:
        self._sign = weakref.WeakMethod(sign)  # a backend has a reader: they are to go, and their sockets, without gc
        self._verify = verify
        self._signed: OrderedDict[tuple[str, str | None], tuple[SignedGet, float]] = OrderedDict()
        self._failures = 0
        self._resumes = 0.0
        self._idle: deque[_Connection] = deque()
        weakref.finalize(self, _close_all, self._idle)

    async def read_into(self, path: str, start: int, buffer: memoryview, stat: ObjectStat) -> bool:
        """Fills ``buffer`` with the bytes from ``start`` of the version that ``stat`` names.

        Returns:
            False where that did not work, for whatever reason. ``buffer`` may have been written to then.
        """
        if not buffer:
            return True
        if time.monotonic() < self._resumes:
            return False
        try:
            request = _Request(self, await self._get(path, stat), start, buffer, stat.size)
            await in_thread(request.run, interrupt=request.interrupt)
        except Exception as error:  # noqa: BLE001 - a signer raises anything; what is wrong the plane's client will say
            self._failures += 1
            if self._failures >= _FAILURES:
                self._resumes = time.monotonic() + _PAUSE
            self._signed.clear()
            _logger.debug("%s is not read directly: %s", stat.url, error)
            return False
        self._failures = 0
        return True

    async def _get(self, path: str, stat: ObjectStat) -> SignedGet:
        version = path, stat.etag
        now = time.monotonic()
        get, since = self._signed.get(version, (None, 0.0))
        if get is None or now - since >= _FRESH:
            sign = self._sign()
            assert sign is not None  # noqa: S101 - it is the backend's that is reading
            get = await sign(path, stat)
            self._signed[version] = get, now
            while len(self._signed) > _SIGNED:
                with suppress(KeyError):  # another loop's task was faster
                    self._signed.popitem(last=False)
        return get

    def take(self, scheme: str, host: str) -> _Connection:
        """An idle connection, or else a new one."""
        with suppress(IndexError):
            while True:
                connection = self._idle.pop()
                if (connection.scheme, connection.host) == (scheme, host) and connection.idle < _IDLE:
                    return connection
                connection.close()
        return _Connection(scheme, host, self._tls if scheme == "https" else None)

    def give_back(self, connection: _Connection) -> None:
        self._idle.append(connection)
        with suppress(IndexError):
            while self._idle[0].idle >= _IDLE:
                self._idle.popleft().close()

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self._verify if isinstance(self._verify, str) else None)
        if not self._verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context


class _Connection:
    """One connection to a store."""

    def __init__(self, scheme: str, host: str, tls: ssl.SSLContext | None) -> None:
        if {scheme, "all"} & urllib.request.getproxies().keys() and not urllib.request.proxy_bypass(host):
            raise ConnectionError("there is a proxy")
        self.scheme, self.host = scheme, host
        self.used = False
        self._since = 0.0
        self._tls = tls
        self._sock: socket.socket | None = None
        self._http = http.client.HTTPSConnection(host, context=tls) if tls else http.client.HTTPConnection(host)

    @property
    def idle(self) -> float:
        """Seconds since its last use."""
        return time.monotonic() - self._since

    def open(self) -> None:
        """Connects; not as http.client does, which keeps its socket to itself until the TLS handshake is done."""
        if self._http.sock is not None:
            return
        self._sock = socket.create_connection((self._http.host, self._http.port), _CONNECT)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._tls is not None:
            tls = self._tls.wrap_socket(self._sock, server_hostname=self._http.host, do_handshake_on_connect=False)
            self._sock = tls
            tls.do_handshake()
        self._sock.settimeout(_SILENCE)
        self._http.sock = self._sock

    def get(self, target: str, headers: dict[str, str]) -> http.client.HTTPResponse:
        self._http.request("GET", target, headers=headers)
        return self._http.getresponse()

    def rest(self) -> None:
        self.used = True
        self._since = time.monotonic()

    def interrupt(self) -> None:
        """Ends what another thread is doing with it."""
        if self._sock is not None:
            with suppress(OSError):  # not connected any more
                socket.socket.shutdown(self._sock, socket.SHUT_RDWR)  # TLS's own would go on in clear text

    def close(self) -> None:
        self._http.close()
        if self._sock is not None:
            self._sock.close()


class _Request:
    """One range on its way into memory."""

    def __init__(self, reader: DirectReader, get: SignedGet, start: int, buffer: memoryview, size: int) -> None:
        self._reader = reader
        self._url = urlsplit(get.url)
        self._headers = {**get.headers, "Range": f"bytes={start}-{start + len(buffer) - 1}"}
        self._version = get.version
        self._expected = f"bytes {start}-{start + len(buffer) - 1}/{size}"
        self._buffer = buffer
        self._connection: _Connection | None = None
        self._interrupted = False

    def run(self) -> None:
        """Reads; blocks the thread. Raises whatever may happen."""
        while True:
            self._connection = connection = self._reader.take(self._url.scheme, self._url.netloc)
            try:
                reusable = self._read(connection)
            except ConnectionError:
                connection.close()
                if connection.used and not self._interrupted:  # the store closed it while it was idle
                    continue
                raise
            except BaseException:
                connection.close()
                raise
            if reusable:
                connection.rest()
                self._reader.give_back(connection)
            else:
                connection.close()
            return

    def interrupt(self) -> None:
        """Makes :meth:`run` raise soon."""
        self._interrupted = True
        if self._connection is not None:
            self._connection.interrupt()

    def _read(self, connection: _Connection) -> bool:
        """Returns whether the connection can be used again: whether the answer is read to its end."""
        url = self._url
        connection.open()
        if self._interrupted:  # before there was anything to end
            raise InterruptedError
        with connection.get(f"{url.path}?{url.query}" if url.query else url.path, self._headers) as response:
            self._check(response)
            filled = 0
            while filled < len(self._buffer):
                if not (count := response.readinto(self._buffer[filled:])):
                    raise ConnectionResetError(f"the body ended after {filled} of {len(self._buffer)} bytes")
                filled += count
            return response.length == 0 and not response.will_close

    def _check(self, response: http.client.HTTPResponse) -> None:
        """Raises OSError for an answer with anything but the bytes that were asked for."""
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:
            raise OSError(f"status {response.status}")
        if response.headers["Content-Range"] != self._expected:
            raise OSError(f"another range: {response.headers['Content-Range']}")
        if self._version is not None and response.headers[self._version[0]] != self._version[1]:
            raise OSError("another version")  # some stores ignore what they are asked for


def _close_all(connections: deque[_Connection]) -> None:
    while connections:
        connections.pop().close()
