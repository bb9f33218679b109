"""A multipart upload of the XML API: https://cloud.google.com/storage/docs/multipart-uploads."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from functools import partial
from http import HTTPStatus
from xml.sax.saxutils import escape

from torchferry.engine.cancellation import in_thread
from torchferry.engine.transport import Answer, SignedRequest
from torchferry.engine.types import ObjectStat
from torchferry.engine.writer import Body
from torchferry.errors import CheckpointNotFoundError, StorageError, StorageUnavailableError
from torchferry.storage.body import RequestBody
from torchferry.storage.creations import LostCreations, OpenUpload
from torchferry_gcs.checksum import combine, crc32c, encoded
from torchferry_gcs.client import Reply, text_of
from torchferry_gcs.errors import GcsAnswerError, is_missing, is_not_xml, may_have_arrived
from torchferry_gcs.target import Target, Written

__all__ = ["MultipartUpload", "Part"]

_XML = {"Content-Type": "application/xml"}


@dataclass(frozen=True, slots=True)
class Part:
    """A part that is up.

    Attributes:
        number: Its number, from 1.
        etag: What the store calls it.
        size: In bytes.
        crc32c: The checksum of its bytes.
    """

    number: int
    etag: str
    size: int
    crc32c: int


class MultipartUpload:
    """Parts that become one object; each is checked by the store, and the whole at the end."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._backend = target.backend
        self._client = target.backend.client
        self._upload_id: str | None = None
        url = self._backend.url(target.path)
        self._lost = LostCreations(url, self._list_uploads, self._has_parts, self._abort_upload)
        self._parts_cut_off = False

    @property
    def staged(self) -> str:
        """What :meth:`abort` removes, for messages: see :attr:`torchferry.engine.writer.Upload.staged`."""
        url = self._backend.url(self._target.path)
        return "" if self._upload_id is None else f" (the multipart upload {self._upload_id} of {url})"

    async def start(self) -> bool:
        """Opens the upload. Returns False where the server does not speak the XML API."""
        self._lost.ask()
        try:
            reply = await self._backend.call("write", self._target.path, self._initiate)
        except StorageError as error:
            if is_not_xml(error.__cause__):
                return False
            raise
        result = reply.xml("InitiateMultipartUploadResult")
        if result is None:
            return False
        self._upload_id = text_of(result, "UploadId")
        await self._lost.abort_beside(self._upload_id)
        return True

    async def put_part(self, index: int, body: Body) -> Part:
        """Uploads a part."""
        checksum = await in_thread(crc32c, body.buffers)
        url = self._url(partNumber=str(index + 1), uploadId=self._upload_id or "")
        fields = {"x-goog-hash": f"crc32c={encoded(checksum)}"}

        async def sign(checked: bool) -> SignedRequest:
            return SignedRequest("PUT", url, {**await self._client.headers(url), **fields})

        async def through_client() -> str:
            request = RequestBody(body.buffers)
            reply = await self._client.call("PUT", url, headers=fields, body=request)  # publishes nothing
            return reply.headers.get("ETag", "")

        def accept(answer: Answer) -> str:
            return answer.headers.get("ETag", "")

        try:
            etag = await self._backend.send(
                self._target.path,
                body,
                sign=sign,
                accept=accept,
                through_client=through_client,
                unchanged=lambda: crc32c(body.buffers) == checksum,
            )
        except BaseException:
            self._parts_cut_off = True
            raise
        return Part(index + 1, etag, body.size, checksum)

    async def finish(self, parts: Sequence[Part]) -> ObjectStat:
        """Publishes the object."""
        size = sum(part.size for part in parts)
        whole = 0
        for part in parts:
            whole = combine(whole, part.crc32c, part.size)
        document = "".join(
            f"<Part><PartNumber>{part.number}</PartNumber><ETag>{escape(part.etag)}</ETag></Part>" for part in parts
        )
        body = f"<CompleteMultipartUpload>{document}</CompleteMultipartUpload>".encode()

        find = partial(self._target.if_there, size, whole)

        async def complete() -> Written:
            try:
                reply = await self._client.call(
                    "POST", self._url(uploadId=self._upload_id or ""), headers=_XML, body=body
                )
            except Exception as error:
                # Completed, perhaps, and only the reply was lost: then a repeated request finds no such upload.
                if is_missing(error) and (there := await find()) is not None:
                    return there
                raise
            if reply.xml("CompleteMultipartUploadResult") is None:
                raise GcsAnswerError(HTTPStatus.INTERNAL_SERVER_ERROR, reply.headers, reply.body)
            return Written.from_headers(reply.headers)

        written = await self._backend.publish(self._target.path, complete, find)
        return await self._target.published(size, whole, written)

    async def abort(self) -> None:
        """Removes the parts; finds the upload where its creation was cut off without an answer."""
        await self._lost.abort_all(self._upload_id, parts_were_cut_off=self._parts_cut_off)

    async def _initiate(self) -> Reply:
        try:
            return await self._client.call("POST", self._url(uploads=""), headers=self._target.fields)
        except BaseException as error:
            if may_have_arrived(error):
                self._lost.add()
            raise

    async def _abort_upload(self, upload_id: str) -> None:
        await self._backend.abort_upload(f"{self._target.bucket}/{self._target.key}", upload_id)

    async def _has_parts(self, upload_id: str) -> bool:
        request = partial(self._client.call, "GET", self._url(uploadId=upload_id))
        try:
            reply = await self._backend.call("clean up", self._target.path, request)
        except (CheckpointNotFoundError, StorageUnavailableError):  # there is no such upload
            return False
        found = reply.xml("ListPartsResult")
        return found is not None and found.find("{*}Part") is not None

    async def _list_uploads(self) -> AsyncIterator[OpenUpload]:
        target = self._target
        async for date, upload in self._backend.uploads(target.path, target.bucket, target.key):
            if text_of(upload, "Key") == target.key:
                begun = datetime.fromisoformat(text_of(upload, "Initiated"))
                yield OpenUpload(text_of(upload, "UploadId"), begun, parsedate_to_datetime(date))

    def _url(self, **parameters: str) -> str:
        return self._client.xml_url(self._target.bucket, self._target.key, **parameters)
