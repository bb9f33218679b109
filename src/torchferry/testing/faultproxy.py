"""An HTTP/1.1 proxy that injects faults between a client and an object store, any of them.

It forwards requests as they are, so signatures stay right, and does to chosen ones what networks and
stores do: refuse, cut, damage, lose or never answer them.
"""

from __future__ import annotations

import asyncio
import re
import socket
import struct
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from types import TracebackType

__all__ = ["Fault", "FaultProxy", "Head", "Request"]

HOST = "127.0.0.1"
_LINE_LIMIT = 1 << 20
_PIECE = 1 << 18


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
        reset_upload_after: Action: reset the connection after this many bytes of the request's body.
        reset_download_after: Action: reset the connection after this many bytes of the response's body.
        truncate_after: Action: close the connection, in good order, after this many bytes of the response's
            body, whose Content-Length still promises all.
        corrupt_upload_byte: Action: flip one bit of this byte of the request's body.
        corrupt_download_byte: Action: flip one bit of this byte of the response's body.
        lose_reply: Action: forward the request, and reset the connection instead of answering.
        hang: Action: take the request, do not forward it, and never answer.
    """

    method: str | None = None
    target: str = ""
    skip: int = 0
    times: int | None = 1
    status: int | None = None
    code: str = "SlowDown"
    reset_upload_after: int | None = None
    reset_download_after: int | None = None
    truncate_after: int | None = None
    corrupt_upload_byte: int | None = None
    corrupt_download_byte: int | None = None
    lose_reply: bool = False
    hang: bool = False

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
    """A request that the proxy saw: its method, its target, and what was done to it (None: nothing)."""

    method: str
    target: str
    fault: Fault | None


class FaultProxy:
    """A proxy to a server on this machine, running in a thread of its own while its ``with`` block lasts.

    Args:
        upstream_port: The server's port on 127.0.0.1.
        faults: What to do to which requests.

    Attributes:
        log: Every request so far, in the order they came in.
        port: Its own port on 127.0.0.1.
    """

    def __init__(self, upstream_port: int, *faults: Fault) -> None:
        self.log: list[Request] = []
        self.port = 0
        self._upstream_port = upstream_port
        self._faults = faults
        self._changed = threading.Condition()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="fault proxy", daemon=True)
        self._stop = asyncio.Event()
        self._ready = threading.Event()

    @property
    def endpoint(self) -> str:
        """Its URL."""
        return f"http://{HOST}:{self.port}"

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

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

    def admit(self, head: Head) -> Head | bytes:
        """For subclasses: the request as it is forwarded; or the answer to it, and then it is not forwarded."""
        return head

    def answered(self, head: Head) -> Head:
        """For subclasses: the head of the store's answer as it is passed on."""
        return head

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        connections: set[asyncio.Task[None]] = set()

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.ensure_future(self._connection(reader, writer))
            connections.add(task)
            task.add_done_callback(connections.discard)
            task.add_done_callback(lambda _: writer.close())  # also of one that is cancelled before it begins

        server = await asyncio.start_server(accept, HOST, 0, limit=_LINE_LIMIT)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        await _few_turns()  # what was just accepted becomes a connection: a closed server (3.11) would lose its socket
        server.close()
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)
        await _few_turns()  # what is closed is gone

    async def _connection(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        to_store: asyncio.StreamWriter | None = None
        try:
            store, to_store = await asyncio.open_connection(HOST, self._upstream_port, limit=_LINE_LIMIT)
            while (head := await Head.read(client)) and await self._exchange(head, client, to_client, store, to_store):
                pass
        except (OSError, EOFError, _Cut):
            _reset(to_client)
        finally:
            for writer in (to_store, to_client):
                if writer:
                    writer.close()
                    with suppress(OSError):
                        await writer.wait_closed()

    async def _exchange(
        self,
        head: Head,
        client: asyncio.StreamReader,
        to_client: asyncio.StreamWriter,
        store: asyncio.StreamReader,
        to_store: asyncio.StreamWriter,
    ) -> bool:
        """Handles one request; returns whether the connection can take another one."""
        method, target = head.first_line.split()[:2]
        fault = self._note(method, target)
        if head.fields.get("expect", "").lower() == "100-continue":
            head = head.without("expect")
            to_client.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        admitted = self.admit(head)
        forwards = fault.forwards and isinstance(admitted, Head)
        if isinstance(admitted, Head) and forwards:
            to_store.write(admitted.raw)
        async for raw in _damaged(_body(client, head), fault.reset_upload_after, fault.corrupt_upload_byte):
            if forwards:
                to_store.write(raw)
                await to_store.drain()
        if fault.reset_upload_after is not None:
            raise _Cut
        if fault.hang:
            await client.read(1)  # returns when the client gives up
            raise _Cut
        if fault.status is not None:
            to_client.write(_refusal(fault.status, fault.code, with_body=method != "HEAD"))
            await to_client.drain()
            return True
        if isinstance(admitted, bytes):
            to_client.write(admitted)
            await to_client.drain()
            return True
        return await self._answer(method, fault, to_client, store)

    async def _answer(
        self, method: str, fault: Fault, to_client: asyncio.StreamWriter, store: asyncio.StreamReader
    ) -> bool:
        while True:
            head = await Head.read(store)
            if head is None:
                raise EOFError
            status = int(head.first_line.split()[1])
            if status >= 200:
                break
        if fault.lose_reply:
            raise _Cut
        to_client.write(self.answered(head).raw)
        if method != "HEAD" and status not in {204, 304}:
            cut = fault.truncate_after if fault.truncate_after is not None else fault.reset_download_after
            try:
                async for raw in _damaged(_body(store, head), cut, fault.corrupt_download_byte):
                    to_client.write(raw)
                    await to_client.drain()
            except _Cut:
                await to_client.drain()
                if fault.truncate_after is not None:
                    return False
                raise
        await to_client.drain()
        return head.fields.get("connection", "").lower() != "close"

    def _note(self, method: str, target: str) -> Fault:
        fault = next((f for f in self._faults if f.applies_to(method, target)), None)
        with self._changed:
            self.log.append(Request(method, target, fault))
            self._changed.notify_all()
        return fault or _NO_FAULT


class _Cut(Exception):  # noqa: N818 - not an error: the fault that was asked for
    """The connection ends here."""


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
    async def read(cls, reader: asyncio.StreamReader) -> Head | None:
        first = await reader.readline()
        if not first:
            return None
        lines = []
        while (line := await reader.readline()) not in {b"\r\n", b""}:
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


async def _body(reader: asyncio.StreamReader, head: Head) -> AsyncIterator[tuple[bytes, bytes]]:
    """The body of a message in pieces, each as payload and as it is on the wire."""
    fields = head.fields
    if fields.get("transfer-encoding", "").lower() == "chunked":
        while True:
            line = await reader.readline()
            length = int(line.split(b";")[0], 16)
            if length == 0:
                while (trailer := await reader.readline()) not in {b"\r\n", b""}:
                    line += trailer
                yield b"", line + b"\r\n"
                return
            data = await reader.readexactly(length + 2)
            yield data[:-2], line + data
    left = int(fields.get("content-length", 0))
    while left:
        data = await reader.read(min(left, _PIECE))
        if not data:
            raise EOFError
        left -= len(data)
        yield data, data


async def _damaged(
    pieces: AsyncIterator[tuple[bytes, bytes]], cut_after: int | None, corrupt_byte: int | None
) -> AsyncIterator[bytes]:
    """The pieces as they are on the wire: to be cut, with :class:`_Cut`, or with one bit flipped."""
    position = 0
    async for payload, raw in pieces:
        start, position = position, position + len(payload)
        if cut_after is not None and position > cut_after:
            if payload is raw:
                yield raw[: cut_after - start]
            raise _Cut
        if corrupt_byte is not None and start <= corrupt_byte < position and payload is raw:
            damaged = bytearray(raw)
            damaged[corrupt_byte - start] ^= 1
            yield bytes(damaged)
        else:
            yield raw


async def _few_turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def _reset(writer: asyncio.StreamWriter) -> None:
    """Ends the connection with a reset (RST): without lingering there is no orderly end."""
    sock = writer.get_extra_info("socket")
    if sock is not None and sock.fileno() >= 0:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def _refusal(status: int, code: str, *, with_body: bool) -> bytes:
    body = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>injected</Message></Error>'
    content = body.encode() if with_body else b""
    head = (
        f"HTTP/1.1 {status} Injected\r\nContent-Type: application/xml\r\n"
        f"x-ms-error-code: {code}\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content
