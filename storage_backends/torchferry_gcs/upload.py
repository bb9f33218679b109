"""One object on its way to Google Cloud Storage."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from functools import partial
from typing import Any

from torchferry.engine.cancellation import in_thread
from torchferry.engine.transfer import current
from torchferry.engine.transport import Answer, SignedRequest
from torchferry.engine.types import Chunk, ObjectStat
from torchferry.engine.writer import Body, Upload
from torchferry.storage.body import RequestBody, whole_or_not_at_all
from torchferry_gcs.checksum import crc32c, encoded
from torchferry_gcs.errors import missing_bucket
from torchferry_gcs.multipart import MultipartUpload, Part
from torchferry_gcs.resumable import ResumableUpload
from torchferry_gcs.target import CONTENT_TYPE, Target, Written

__all__ = ["GcsUpload"]

_TRIES = 3  # where a server takes damaged bytes


class GcsUpload(Upload["Part | None"]):
    """One object: a request of the JSON API, or a multipart upload of the XML API.

    A server that does not speak the XML API gets a resumable upload of the JSON API.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._multipart = MultipartUpload(target)
        self._resumable: ResumableUpload | None = None

    @property
    def staged(self) -> str:
        return self._multipart.staged

    async def put_whole(self, body: Body) -> ObjectStat:
        whole = await in_thread(crc32c, body.buffers)
        for left in reversed(range(_TRIES)):
            written = await self._insert(body, whole)
            if not left or written.crc32c in {None, encoded(whole)}:
                break
            current().moved(-body.size)  # a server that does not check what it is sent
        return await self._target.published(body.size, whole, written)

    async def start(self) -> None:
        engine = await self._target.backend.engine()
        if engine.speaks_xml is not False and await self._multipart.start():
            engine.speaks_xml = True
            return
        self._resumable = ResumableUpload(self._target)
        await self._resumable.start()
        engine.speaks_xml = False

    async def put_part(self, index: int, body: Body) -> Part | None:
        if self._resumable is not None:
            await self._resumable.put_part(index, body)
            return None
        return await self._multipart.put_part(index, body)

    async def finish(self, parts: Sequence[Part | None]) -> ObjectStat:
        if self._resumable is not None:
            return await self._resumable.finish()
        return await self._multipart.finish([part for part in parts if part is not None])

    async def abort(self) -> None:
        if self._resumable is not None:
            await self._resumable.abort()
        else:
            await self._multipart.abort()

    async def _insert(self, body: Body, whole: int) -> Written:
        """Uploads the object in one request: its description, and its bytes.

        The description has the CRC32C, so that the store refuses damaged bytes.
        https://cloud.google.com/storage/docs/uploading-objects (JSON API, multipart upload)
        """
        target, client = self._target, self._target.backend.client
        boundary = secrets.token_hex(16)
        description = json.dumps({**target.description, "crc32c": encoded(whole)})
        head = (
            f"--{boundary}\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n{description}\r\n"
            f"--{boundary}\r\nContent-Type: {CONTENT_TYPE}\r\n\r\n"
        )
        content = Body([Chunk(head.encode()), *body.chunks, Chunk(f"\r\n--{boundary}--\r\n".encode())])
        url = client.upload_url(target.bucket, uploadType="multipart", kmsKeyName=target.backend.kms_key_name)
        fields = {"Content-Type": f"multipart/related; boundary={boundary}"}

        async def sign(checked: bool) -> SignedRequest:
            return SignedRequest("POST", url, {**await client.headers(url), **fields})

        async def through_client() -> dict[str, Any]:
            request = RequestBody(content.buffers)
            with missing_bucket():
                call = partial(client.call, "POST", url, headers=fields, body=request)
                return (await whole_or_not_at_all(request, call)).json()

        def accept(answer: Answer) -> dict[str, Any]:
            found: dict[str, Any] = json.loads(answer.body)
            return found

        found = await target.backend.send(
            target.path,
            content,
            sign=sign,
            accept=accept,
            through_client=through_client,
            publishes=True,
            unchanged=lambda: crc32c(body.buffers) == whole,
        )
        current().moved(body.size - content.size)
        return Written.from_resource(found)
