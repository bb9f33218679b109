"""Checkpoints on a Shelf: ``shelf://any/key`` with ``storage_options={"endpoint": "http://...", "token": "..."}``.

A worked example of a backend that torchferry knows nothing of. docs/writing-a-backend.md goes through it.
"""

from __future__ import annotations

import json
import secrets
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import quote, urlencode

import aiohttp
from fsspec.asyn import AsyncFileSystem
from yarl import URL

from torchferry.engine.retry import Transient, transient_answer
from torchferry.engine.transport import Answer, SignedRequest, Transport
from torchferry.engine.writer import Body, Upload, upload
from torchferry.errors import CheckpointNotFoundError, StorageError
from torchferry.storage import MIB, Chunk, Leftover, Limits, ListedObject, ObjectStat, UploadPlan
from torchferry.storage.body import RequestBody, whole_or_not_at_all
from torchferry.storage.http import Engine, HttpBackend
from torchferry.storage.translate import by_status

if TYPE_CHECKING:
    import asyncio
    from collections.abc import AsyncIterable, AsyncIterator, Mapping, Sequence

    from fsspec import AbstractFileSystem

__all__ = ["ShelfBackend", "ShelfFileSystem"]

LIMITS = Limits(smallest_part=MIB, largest_part=1 << 30, most_parts=10_000)


class ShelfError(Exception):
    """An answer with an error."""

    def __init__(self, status: int, code: str, headers: Mapping[str, str]) -> None:
        super().__init__(f"status {status} {code}".rstrip())
        self.status, self.code, self.headers = status, code, headers


class ShelfFileSystem(AsyncFileSystem):  # type: ignore[misc] # fsspec has no types
    """How users name a store and their token. It has the store's client, and no more: torchferry needs no more of it.

    Args:
        endpoint: The server's URL.
        token: What it wants to see.
    """

    protocol = "shelf"

    def __init__(self, endpoint: str, token: str = "", **options: Any) -> None:
        super().__init__(**options)
        self.endpoint = endpoint
        self.headers = {"Authorization": f"Token {token}"}

    def address(self, kind: str, name: str = "", **query: str) -> str:
        """The URL of something on the server."""
        return f"{self.endpoint}/{kind}/{quote(name)}?{urlencode(query)}".rstrip("/?")

    async def request(
        self, method: str, address: str, headers: Mapping[str, str] | None = None, data: Any = None
    ) -> tuple[Mapping[str, str], bytes]:
        """One request: the headers and the body of its answer."""
        url = URL(address, encoded=True)
        async with (
            aiohttp.ClientSession(headers=self.headers) as session,
            session.request(method, url, headers=headers, data=data) as response,
        ):
            body = await response.read()
            if not response.ok:
                code = json.loads(body)["code"] if body else ""
                raise ShelfError(response.status, code, response.headers)
            return response.headers, body


class ShelfBackend(HttpBackend):
    """Objects on a Shelf. A version is an ETag, which is new with every write."""

    keeps_metadata = True
    checksum_refused: ClassVar[frozenset[int]] = frozenset()  # a Shelf never refuses one

    def __init__(self, fs: ShelfFileSystem) -> None:
        super().__init__()
        self.fs = fs

    @classmethod
    def from_filesystem(cls, fs: AbstractFileSystem) -> ShelfBackend:
        return cls(fs)

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        return None if self.fs.asynchronous else self.fs.loop

    async def engine(self) -> Engine:
        return Engine.of(self.fs, lambda: Engine(Transport()))

    def url(self, path: str) -> str:
        return f"shelf://{path}"

    def upload_plan(self, size: int, part_size: int | None = None) -> UploadPlan:
        return UploadPlan.for_size(size, part_size, limits=LIMITS)

    # --- looking up and reading

    async def stat(self, path: str) -> ObjectStat:
        request = partial(self.fs.request, "HEAD", self.fs.address("objects", path))
        headers, _ = await self.call("look up", path, request)
        metadata = json.loads(headers["X-Shelf-Metadata"])
        return ObjectStat(self.url(path), int(headers["Content-Length"]), headers["ETag"], metadata)

    async def sign_read(self, path: str, stat: ObjectStat) -> SignedRequest:
        return SignedRequest.get(self.fs.address("objects", path), stat.etag, self.fs.headers)

    async def read_through_client(self, path: str, start: int, buffer: memoryview, stat: ObjectStat) -> None:
        headers = {"Range": f"bytes={start}-{start + len(buffer) - 1}"}
        if stat.etag is not None:
            headers["If-Match"] = stat.etag
        _, body = await self.fs.request("GET", self.fs.address("objects", path), headers)
        if len(body) != len(buffer):
            raise StorageError(f"Cannot read {self.url(path)}: it ends {len(buffer) - len(body)} bytes too early.")
        buffer[:] = body

    # --- writing and deleting

    async def write(
        self,
        path: str,
        chunks: AsyncIterable[Chunk],
        *,
        plan: UploadPlan,
        metadata: Mapping[str, str] | None = None,
    ) -> ObjectStat:
        return await upload(ShelfUpload(self, path, dict(metadata or {})), chunks, plan)

    async def delete(self, path: str) -> None:
        await self.call("delete", path, partial(self._delete, self.fs.address("objects", path)))

    # --- what is there

    async def list(self, prefix: str) -> AsyncIterator[ListedObject]:
        after = ""
        while page := await self._page("objects", prefix, after=after):
            for found in page:
                path, modified = found["name"], datetime.fromisoformat(found["modified"])
                yield ListedObject(path, self.url(path), found["size"], found["etag"], modified)
            after = page[-1]["name"]

    async def leftovers(self, prefix: str) -> AsyncIterator[Leftover]:
        for found in await self._page("uploads", prefix):
            path, modified = found["name"], datetime.fromisoformat(found["modified"])
            yield Leftover(path, self.url(path), "multipart upload", found["id"], modified)

    async def discard(self, leftover: Leftover) -> bool:
        address = self.fs.address("uploads", leftover.path, id=leftover.id)
        await self.call("clean up", leftover.path, partial(self._delete, address))
        return True

    async def _page(self, kind: str, prefix: str, **query: str) -> Any:
        address = self.fs.address(kind, prefix=prefix, **query)
        _, body = await self.call("list", prefix, partial(self.fs.request, "GET", address))
        return json.loads(body)

    async def _delete(self, address: str) -> None:
        try:
            await self.fs.request("DELETE", address)
        except ShelfError as error:
            if error.status != 404:
                raise

    # --- errors

    def is_damaged(self, answer: Answer) -> bool:
        return b"BadChecksum" in answer.body

    def transient(self, error: Exception) -> Transient | None:
        if isinstance(error, ShelfError):
            return transient_answer(error.status, error.headers)
        return Transient() if isinstance(error, aiohttp.ClientConnectionError) else None

    def translate(self, what: str, error: Exception) -> StorageError:
        if not isinstance(error, ShelfError):
            return by_status(what, str(error), 0, unanswered=isinstance(error, aiohttp.ClientConnectionError))
        if error.code == "NoSuchObject" or (error.status == 404 and not error.code):  # a HEAD's answer has no code
            return CheckpointNotFoundError(f"{what}: there is no such object.")
        return by_status(what, str(error), error.status, error.code)


class ShelfUpload(Upload[None]):
    """One object on its way to the store: a PUT, or an upload in parts."""

    def __init__(self, backend: ShelfBackend, path: str, metadata: dict[str, str]) -> None:
        self._backend, self._fs = backend, backend.fs
        self._path = path
        self._metadata = metadata
        self._headers = {"X-Shelf-Metadata": json.dumps(metadata)}
        self._id = secrets.token_hex(8)  # ours to choose: an upload whose creation got no answer can be aborted
        self._size = 0

    async def put_whole(self, body: Body) -> ObjectStat:
        self._size = body.size
        return self._stat(await self._send(self._fs.address("objects", self._path), body, publishes=True))

    async def start(self) -> None:
        address = self._fs.address("uploads", self._path, id=self._id)
        await self._backend.call("write", self._path, partial(self._fs.request, "PUT", address, self._headers))

    async def put_part(self, index: int, body: Body) -> None:
        await self._send(self._fs.address("uploads", self._path, id=self._id, part=str(index)), body)
        self._size += body.size

    async def finish(self, parts: Sequence[None]) -> ObjectStat:
        # May be repeated: a Shelf gives the same answer again. With others, look whether the object is there.
        address = self._fs.address("uploads", self._path, id=self._id, parts=str(len(parts)))
        _, body = await self._backend.publish(self._path, partial(self._fs.request, "POST", address))
        return self._stat(body)

    async def abort(self) -> None:
        await self._backend.discard(Leftover(self._path, self._backend.url(self._path), "multipart upload", self._id))

    async def _send(self, address: str, body: Body, *, publishes: bool = False) -> bytes:
        """Sends a body by the engine, or where that does not work, by the filesystem's client."""
        checksum = {"X-Shelf-Crc32": f"{await body.checksum():08x}"}

        async def sign(checked: bool) -> SignedRequest:
            headers = {**self._fs.headers, **self._headers, **(checksum if checked else {})}
            return SignedRequest("PUT", address, headers)

        async def through_client() -> bytes:
            data = RequestBody(body.buffers)
            headers = {**self._headers, **checksum, "Content-Length": str(body.size)}
            request = partial(self._fs.request, "PUT", address, headers, data)
            return (await whole_or_not_at_all(data, request))[1]

        return await self._backend.send(
            self._path,
            body,
            sign=sign,
            accept=lambda answer: answer.body,
            through_client=through_client,
            publishes=publishes,
        )

    def _stat(self, answer: bytes) -> ObjectStat:
        return ObjectStat(self._backend.url(self._path), self._size, json.loads(answer)["etag"], self._metadata)
