"""A resumable upload of the JSON API, for servers that do not speak the XML API: emulators.

One chunk after the other, through gcsfs's client. https://cloud.google.com/storage/docs/performing-resumable-uploads
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from functools import partial
from urllib.parse import urlsplit

from torchferry.engine.cancellation import in_thread
from torchferry.engine.lending import joined
from torchferry.engine.transfer import current
from torchferry.engine.types import Buffer, ObjectStat
from torchferry.engine.writer import Body
from torchferry.errors import StorageError, StorageUnavailableError
from torchferry_gcs.checksum import crc32c, encoded
from torchferry_gcs.client import Reply
from torchferry_gcs.errors import is_missing, missing_bucket, status_of
from torchferry_gcs.target import CONTENT_TYPE, Target, Written

__all__ = ["ResumableUpload"]

_REASON = "the server does not speak the XML API"
_UNIT = 256 << 10  # chunks are multiples of it, but for the last
_GONE = frozenset({499, 404, 405, 410, 501})  # 499: the session is deleted. Some emulators keep it, which harms nobody
_CALL_SECONDS = 60.0
_SLOWEST = 50_000  # bytes a second


class ResumableUpload:
    """Chunks of a session, in order. The last one, of at most 256 KiB, is kept back until :meth:`finish`."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._backend = target.backend
        self._client = target.backend.client
        self._session: str | None = None
        self._turn = asyncio.Condition()
        self._next = 0  # the part whose turn it is
        self._offset = 0  # bytes that the server has
        self._crc32c = 0  # of those
        self._kept: bytes = b""

    async def start(self) -> None:
        """Opens the session."""
        target = self._target
        url = self._client.upload_url(
            target.bucket, uploadType="resumable", name=target.key, kmsKeyName=self._backend.kms_key_name
        )
        fields = {"Content-Type": "application/json; charset=UTF-8", "X-Upload-Content-Type": CONTENT_TYPE}
        body = json.dumps(target.description).encode()

        async def initiate() -> Reply:
            with missing_bucket():
                return await self._client.call("POST", url, headers=fields, body=body)

        reply = await self._backend.call("write", target.path, initiate)
        session = urlsplit(reply.headers.get("Location", ""))
        if not session.query:
            raise StorageError(
                f"Cannot write {self._backend.url(target.path)}: the server does not take large objects."
            )
        # What the token goes to is the filesystem's endpoint, wherever the server says that it is.
        self._session = urlsplit(url)._replace(path=session.path, query=session.query).geturl()

    async def put_part(self, index: int, body: Body) -> None:
        """Sends what is kept from before and the part, but for their last 1 to 256 KiB."""
        async with self._turn:
            await self._turn.wait_for(lambda: self._next == index)
        whole = len(self._kept) + body.size
        now, rest = _cut([self._kept, *body.buffers], whole - (whole % _UNIT or _UNIT))
        await self._send(now)
        self._kept = joined(rest)
        async with self._turn:
            self._next += 1
            self._turn.notify_all()

    async def finish(self) -> ObjectStat:
        """Sends the last chunk: the object is published with it."""
        size = self._offset + len(self._kept)
        whole = await in_thread(partial(crc32c, [self._kept], self._crc32c))
        fields = {"Content-Range": self._range(len(self._kept), str(size)), "x-goog-hash": f"crc32c={encoded(whole)}"}

        find = partial(self._target.if_there, size, whole)

        async def publish() -> Written:
            try:
                reply = await self._client.call("PUT", self._session or "", headers=fields, body=self._kept)
            except Exception as error:
                # Published, perhaps, and only the reply was lost: then a repeated request finds no such session.
                if is_missing(error) and (there := await find()) is not None:
                    return there
                raise
            return Written.from_resource(reply.json())

        current().through_client(len(self._kept), _REASON)
        written = await self._backend.publish(self._target.path, publish, find)
        current().moved(len(self._kept))
        return await self._target.published(size, whole, written)

    async def abort(self) -> None:
        """Deletes the session."""
        if self._session is None:
            return
        session = self._session

        async def delete() -> None:
            try:
                await self._client.call("DELETE", session)
            except Exception as error:
                if status_of(error) not in _GONE and not is_missing(error):
                    raise

        await self._backend.call("clean up", self._target.path, delete)

    async def _send(self, buffers: Sequence[Buffer]) -> None:
        size = sum(map(len, buffers))
        if not size:
            return
        crc = await in_thread(partial(crc32c, buffers, self._crc32c))
        fields = {"Content-Range": self._range(size, "*")}
        content = joined(buffers)  # aiohttp can send it again: it takes 308 for a redirect
        put = partial(self._client.call, "PUT", self._session or "", headers=fields, body=content)
        current().through_client(size, _REASON)
        reply = await self._backend.call("write", self._target.path, put, seconds=_CALL_SECONDS + size / _SLOWEST)
        if _last_byte(reply) != self._offset + size - 1 or _crc32c_so_far(reply) not in {None, encoded(crc)}:
            # Damaged; or a repeated chunk was added to what the server had of it, where only the reply was lost.
            raise StorageUnavailableError(
                f"Cannot write {self._backend.url(self._target.path)}: the server has other bytes than were sent. "
                "Nothing was stored: save again."
            )
        current().moved(size)
        self._offset += size
        self._crc32c = crc

    def _range(self, size: int, whole: str) -> str:
        return f"bytes {self._offset}-{self._offset + size - 1}/{whole}"


def _cut(buffers: Sequence[Buffer], size: int) -> tuple[list[Buffer], list[Buffer]]:
    """The first ``size`` bytes, and the rest, without copying."""
    head: list[Buffer] = []
    tail: list[Buffer] = []
    for buffer in buffers:
        view = memoryview(buffer)
        if size:
            head.append(view[:size])
        if len(view) > size:
            tail.append(view[size:])
        size = max(0, size - len(view))
    return head, tail


def _last_byte(reply: Reply) -> int:
    """The last byte that the server says it has; -1 for none."""
    return int(reply.headers["Range"].rpartition("-")[2]) if "Range" in reply.headers else -1


def _crc32c_so_far(reply: Reply) -> str | None:
    """The CRC32C of all that the server has, where it tells: fake-gcs-server does, Google does not."""
    try:
        return reply.json().get("crc32c")
    except ValueError:
        return None
