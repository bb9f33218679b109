"""Connections to stores: opened, kept for the next request, and ended from another thread."""

from __future__ import annotations

import http.client
import os
import socket
import ssl
import struct
import sys
import time
import urllib.request
import weakref
from collections import deque
from contextlib import suppress
from functools import cached_property
from urllib.parse import SplitResult

__all__ = ["WAITS_IN_THE_KERNEL", "Connection", "Connections", "UnmovableError"]

WAITS_IN_THE_KERNEL = sys.platform == "linux"
"""Whether calls on plain sockets wait in the kernel, and may move megabytes at once."""

_CONNECT = 10.0  # seconds for each step of a connection
_TICK = 0.25  # seconds that a thread waits at once; in between it looks whether bytes in the system's queue have moved
_IDLE = 10.0  # seconds after which a connection is not used again: stores close them soon, and not all of them say so
_MOST_IDLE = 32  # connections kept for the next request
_RESET = struct.pack("ii", 1, 0)  # for SO_LINGER: closing resets the connection, what was not sent yet is thrown away


class UnmovableError(Exception):
    """The engine cannot move these bytes, and the filesystem's client may: a proxy, a redirect, an odd answer."""


class Connections:
    """Connections that stay open for the next request; they are closed when this goes.

    Args:
        verify: The file with the certificates of the authorities to trust; True for the system's; False to trust
            anyone.
    """

    def __init__(self, verify: str | bool) -> None:
        self._verify = verify
        self._idle: deque[Connection] = deque()
        self._process = os.getpid()
        weakref.finalize(self, _close_all, self._idle)

    def take(self, url: SplitResult) -> Connection:
        """An idle connection, or else a new one."""
        if self._process != os.getpid():  # forked: the parent goes on using these
            self._process = os.getpid()
            _close_all(self._idle)  # here; the parent's stay open
        now = time.monotonic()
        with suppress(IndexError):
            for _ in range(len(self._idle)):
                connection = self._idle.pop()
                if now - connection.rested >= _IDLE:
                    connection.close()
                elif (connection.scheme, connection.host) == (url.scheme, url.netloc):
                    return connection
                else:
                    self._idle.appendleft(connection)
        return Connection(url.scheme, url.netloc, self._tls if url.scheme == "https" else None)

    def give_back(self, connection: Connection) -> None:
        """Keeps a connection for the next request."""
        connection.rested = time.monotonic()
        connection.used = True
        self._idle.append(connection)
        with suppress(IndexError):
            while len(self._idle) > _MOST_IDLE or time.monotonic() - self._idle[0].rested >= _IDLE:
                self._idle.popleft().close()

    def close_idle(self) -> None:
        """Closes those that no request is on; the next one opens another."""
        _close_all(self._idle)

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self._verify if isinstance(self._verify, str) else None)
        if not self._verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context


class Connection:
    """One connection to a store.

    Attributes:
        scheme: "http" or "https".
        host: With the port, where it is not the scheme's own.
        used: Whether a request has succeeded on it.
        rested: Since when it is idle, on the clock ``time.monotonic``.
        sock: The socket; None before :meth:`open`.
        http: What writes heads of requests, and reads those of answers.
    """

    def __init__(self, scheme: str, host: str, tls: ssl.SSLContext | None) -> None:
        if {scheme, "all"} & urllib.request.getproxies().keys() and not urllib.request.proxy_bypass(host):
            raise UnmovableError("there is a proxy")
        self.scheme, self.host = scheme, host
        self.used = False
        self.rested = 0.0
        self.sock: socket.socket | None = None
        self.http = http.client.HTTPSConnection(host, context=tls) if tls else http.client.HTTPConnection(host)
        self._tls = tls
        self._interrupted = False

    def open(self) -> None:
        """Connects; not as http.client does, which keeps its socket to itself until the TLS handshake is done."""
        if self.sock is not None:
            return
        sock = self._connect()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._tls is not None:
            sock = self._shake_hands(self._tls, sock)
        _wait_a_tick_at_most(sock)
        self.http.sock = sock

    def interrupt(self) -> None:
        """Ends what another thread is doing with it; what was not sent yet is thrown away."""
        self._interrupted = True
        if self.sock is not None:
            with suppress(OSError):  # closed already
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            with suppress(OSError):  # not connected yet, or not any more
                socket.socket.shutdown(self.sock, socket.SHUT_RDWR)  # TLS's own would go on in clear text

    def close(self) -> None:
        """Closes it."""
        self.http.close()
        if self.sock is not None:
            self.sock.close()

    def _connect(self) -> socket.socket:
        failure: OSError | None = None
        for family, kind, protocol, _, address in socket.getaddrinfo(
            self.http.host, self.http.port, type=socket.SOCK_STREAM
        ):
            sock = socket.socket(family, kind, protocol)
            self._use(sock)  # before it connects, so that it can be ended
            try:
                sock.settimeout(_CONNECT)
                sock.connect(address)
            except OSError as error:
                sock.close()
                failure = error
            else:
                return sock
        raise failure or ConnectionError(f"{self.host} has no address")

    def _shake_hands(self, tls: ssl.SSLContext, sock: socket.socket) -> socket.socket:
        wrapped = tls.wrap_socket(sock, server_hostname=self.http.host, do_handshake_on_connect=False)
        self._use(wrapped)
        try:
            wrapped.do_handshake()
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError) as error:
            raise ConnectionResetError(f"closed in the TLS handshake: {error}") from error
        except ssl.SSLError as error:
            raise UnmovableError(f"TLS: {error}") from error
        return wrapped

    def _use(self, sock: socket.socket) -> None:
        self.sock = sock
        if self._interrupted:
            sock.close()
            raise InterruptedError


def _wait_a_tick_at_most(sock: socket.socket) -> None:
    """Lets calls return after 0.25 s in which nothing moved.

    Of a plain socket on Linux by the kernel's own limit: then a call moves megabytes, where Python's limit takes a call
    and a look for each piece that fits the system's queue, with the interpreter's lock in between: 0.7 s more a GiB.
    """
    if isinstance(sock, ssl.SSLSocket) or not WAITS_IN_THE_KERNEL:
        sock.settimeout(_TICK)
        return
    limit = struct.pack("ll", int(_TICK), int(_TICK % 1 * 1e6))
    sock.settimeout(None)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)


def _close_all(connections: deque[Connection]) -> None:
    with suppress(IndexError):  # another thread may take the last one
        while True:
            connections.pop().close()
