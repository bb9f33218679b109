"""One blob on its way to Azure."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
from azure.core.exceptions import HttpResponseError
from azure.storage.blob import BlobBlock
from isal import isal_zlib

from torchferry.engine.cancellation import in_thread, run_shielded
from torchferry.engine.lending import joined, reading
from torchferry.engine.loops import keep_running
from torchferry.engine.transport import Answer, SignedRequest
from torchferry.engine.types import MIB, ObjectStat
from torchferry.engine.writer import Body, Upload, abort
from torchferry.errors import ChangedWhileSavingError, StorageError
from torchferry.storage.body import RequestBody
from torchferry_azure.blocks import UncommittedBlocks, new_block_id
from torchferry_azure.errors import INVALID_BLOCK_LIST, code_and_status

if TYPE_CHECKING:
    from torchferry_azure.backend import AzureBackend

__all__ = ["AzureUpload"]

logger = logging.getLogger("torchferry.storage")

_SLICE = 256 << 10  # bytes that are hashed at a time: they are in the processor's cache for the second checksum
_LARGEST_COPY = MIB  # bytes of a blob that the client sends in one request: it takes nothing but a copy
_PUBLISH_PATIENCE = 10.0  # seconds that a cancel waits for the answer to a request that publishes
_LATE_BLOCK = 0.1  # seconds after which a block that was sent whole, but not answered yet, is there, mostly
_LATER_BLOCKS = (0.4, 1.5)  # seconds between the next looks, for which nobody waits


class AzureUpload(Upload[str]):
    """One blob: a Put Blob; or blocks under random ids, which are committed at once."""

    def __init__(self, backend: AzureBackend, path: str, metadata: dict[str, str]) -> None:
        self._backend = backend
        self._client = backend.client
        self._path = path
        self._metadata = metadata
        self._blob = backend.client.blob(path)
        self._size = 0
        self._staged: set[str] = set()  # ids of blocks that Azure has, or may have
        self._cut_off = False  # whether a block was sent, and not answered

    async def put_whole(self, body: Body) -> ObjectStat:
        described = {f"x-ms-meta-{name}": value for name, value in self._metadata.items()}
        headers = {"x-ms-blob-type": "BlockBlob", **described}
        try:
            etag = await self._send(body, {}, headers, partial(self._put_by_client, body), publishes=True)
        except BaseException as error:
            await abort(self, error)  # the client may have staged it as a block
            raise
        self._size = body.size
        return await self._published(etag)

    async def start(self) -> None:
        """Nothing: the first block opens the upload."""

    async def put_part(self, index: int, body: Body) -> str:
        block_id = new_block_id()
        query = {"comp": "block", "blockid": base64.b64encode(block_id.encode()).decode()}
        self._staged.add(block_id)
        try:
            await self._send(body, query, {}, partial(self._stage_by_client, block_id, body))
        except BaseException:
            self._cut_off = True
            raise
        self._size += body.size
        return block_id

    async def finish(self, parts: Sequence[str]) -> ObjectStat:
        attempts = 0
        find = partial(self._etag_if_committed, parts)

        async def commit() -> str:
            nonlocal attempts
            attempts += 1
            # Committed already, perhaps, and the reply was lost: once more would make another version of the blob.
            etag = await find() if attempts > 1 else None
            return etag or await self._commit(parts)

        return await self._published(await self._backend.publish(self._path, commit, find))

    async def abort(self) -> None:
        if not self._staged:
            return
        blocks = UncommittedBlocks(self._backend, self._path)
        await self._discard(blocks)
        if self._cut_off:
            await anyio.sleep(_LATE_BLOCK)
            await self._discard(blocks)
            keep_running(asyncio.ensure_future(self._discard_later(blocks)))

    async def _discard(self, blocks: UncommittedBlocks) -> None:
        if stay := await blocks.discard(self._all_mine):
            raise StorageError(f"Uncommitted blocks of {self._backend.url(self._path)} stay: {stay}.")

    async def _discard_later(self, blocks: UncommittedBlocks) -> None:
        for seconds in _LATER_BLOCKS:
            await anyio.sleep(seconds)
            if await blocks.seen():
                try:
                    await self._discard(blocks)
                except StorageError as error:
                    logger.warning("%s", error)

    def _all_mine(self, blocks: Sequence[BlobBlock]) -> bool:
        return all(block.id in self._staged for block in blocks)

    async def _commit(self, parts: Sequence[str]) -> str:
        """Commits blocks, with one attempt; returns the blob's ETag."""
        blocks = [BlobBlock(part) for part in parts]
        try:
            answer = await self._client.call(self._blob.commit_block_list, blocks, metadata=self._metadata)
        except HttpResponseError as error:
            # aiohttp repeats a request on a connection that was closed: the first may have been answered.
            if code_and_status(error)[0] == INVALID_BLOCK_LIST and (etag := await self._etag_if_committed(parts)):
                return etag
            raise
        return str(answer["etag"])

    async def _etag_if_committed(self, parts: Sequence[str]) -> str | None:
        """The blob's ETag, if it consists of these blocks: their ids are random."""
        etags: list[str] = []

        def note(response: Any) -> None:
            etags.append(response.http_response.headers.get("ETag", ""))

        try:
            committed, _ = await self._client.call(self._blob.get_block_list, "committed", raw_response_hook=note)
        except HttpResponseError as error:
            if code_and_status(error)[1] == 404:  # noqa: PLR2004 - HTTP's
                return None
            raise
        return etags[-1] if [block.id for block in committed] == list(parts) else None

    async def _send(
        self,
        body: Body,
        query: Mapping[str, str],
        headers: Mapping[str, str],
        through_client: Callable[[Mapping[str, str]], Awaitable[str]],
        *,
        publishes: bool = False,
    ) -> str:
        engine = await self._backend.engine()
        md5 = await self._md5(body) if engine.checksums else ""

        def unchanged() -> bool:
            return _md5_of_unchanged(body) == md5

        async def sign(checked: bool) -> SignedRequest:
            checksum = {"Content-MD5": md5} if checked else {}
            return await self._client.sign_write(self._path, query, {**headers, **checksum})

        def accept(answer: Answer) -> str:
            return str(answer.headers.get("ETag", ""))

        async def by_client() -> str:
            return await through_client({"Content-MD5": md5} if md5 and engine.checksums else {})

        return await self._backend.send(
            self._path,
            body,
            sign=sign,
            accept=accept,
            through_client=by_client,
            publishes=publishes,
            unchanged=unchanged,
        )

    async def _put_by_client(self, body: Body, headers: Mapping[str, str]) -> str:
        if body.size > _LARGEST_COPY:
            return await self._put_as_block(body, headers)
        put = partial(
            self._client.call,
            self._blob.upload_blob,
            joined(body.buffers),
            overwrite=True,
            metadata=self._metadata,
            headers=dict(headers),
        )
        answer: dict[str, Any] = await run_shielded(put, patience=_PUBLISH_PATIENCE)
        return str(answer["etag"])

    async def _put_as_block(self, body: Body, headers: Mapping[str, str]) -> str:
        block_id = new_block_id()
        self._staged.add(block_id)
        self._cut_off = True
        await self._stage_by_client(block_id, body, headers)
        return await run_shielded(self._commit, [block_id], patience=_PUBLISH_PATIENCE)

    async def _stage_by_client(self, block_id: str, body: Body, headers: Mapping[str, str]) -> str:
        """One attempt. A cancel closes its connection; a block that was sent whole may still arrive."""
        data: Any = RequestBody(
            body.buffers
        )  # the library's types do not know that it takes asynchronous iterables too
        stage = self._blob.stage_block
        await self._client.call(stage, block_id, data, length=body.size, headers=dict(headers))
        return ""

    async def _md5(self, body: Body) -> str:
        """The MD5 of a body, in base64, computed in a thread: it takes 1.6 s a GiB.

        Raises:
            ChangedWhileSavingError: the CRC32 of a chunk is not what it was when its producer computed it.
        """
        ended = threading.Event()
        md5 = await in_thread(_md5_of_unchanged, body, ended, interrupt=ended.set)
        if md5 is None:
            raise ChangedWhileSavingError.at(self._backend.url(self._path))
        return md5

    async def _published(self, etag: str) -> ObjectStat:
        self._backend.forget(self._path)
        if not etag:
            etag = (await self._backend.stat(self._path)).etag or ""
        return ObjectStat(self._backend.url(self._path), self._size, etag or None, self._metadata)


def _md5_of_unchanged(body: Body, ended: threading.Event | None = None) -> str | None:
    """The MD5 of a body, in base64; None where it is not what its chunks' CRC32s say.

    Raises:
        InterruptedError: ``ended`` was set.
    """
    md5 = hashlib.md5(usedforsecurity=False)
    for chunk in body.chunks:
        crc32 = 0
        view = memoryview(chunk.data)
        for start in range(0, len(view), _SLICE):
            if ended is not None and ended.is_set():
                raise InterruptedError
            with reading(view[start : start + _SLICE]) as piece:
                md5.update(piece)
                if chunk.crc32 is not None:
                    crc32 = isal_zlib.crc32(piece, crc32)
        if chunk.crc32 not in {None, crc32}:
            return None
    return base64.b64encode(md5.digest()).decode()
