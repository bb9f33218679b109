"""One object on its way to S3."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from botocore.exceptions import ClientError, ParamValidationError
from isal import isal_zlib

from torchferry.engine.retry import AnswerError, Transient
from torchferry.engine.transport import Answer, SignedRequest
from torchferry.engine.types import ObjectStat
from torchferry.engine.writer import Body, Upload
from torchferry.errors import CheckpointNotFoundError, StorageError, StorageUnavailableError
from torchferry.storage.body import RequestBody, whole_or_not_at_all
from torchferry.storage.creations import LostCreations, OpenUpload
from torchferry.storage.http import NOT_OF_A_CHECKSUM
from torchferry_s3.errors import DAMAGED, code_and_status, known_etag, may_have_arrived

if TYPE_CHECKING:
    from torchferry_s3.backend import S3Backend

__all__ = ["S3Upload"]

_COMPLETE_SECONDS = 600.0  # S3 says that completing can take several minutes, and sends blanks meanwhile
_CHECKSUM_REFUSED = frozenset({HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_IMPLEMENTED})


class S3Upload(Upload["dict[str, Any]"]):
    """One object: a PUT, or a multipart upload."""

    def __init__(self, backend: S3Backend, path: str, metadata: dict[str, str]) -> None:
        self._backend = backend
        self._path = path
        self._metadata = metadata
        address = backend.address(path)
        self._target = {"Bucket": address["Bucket"], "Key": address["Key"]}
        self._url = backend.url(path)
        self._upload_id: str | None = None
        self._lost = LostCreations(self._url, self._list_uploads, self._has_parts, self._abort_upload)
        self._parts_cut_off = False
        self._size = 0

    @property
    def staged(self) -> str:
        return "" if self._upload_id is None else f" (the multipart upload {self._upload_id} of {self._url})"

    async def put_whole(self, body: Body) -> ObjectStat:
        answer = await self._send(body, "put_object", publishes=True, **self._with_metadata())
        self._backend.forget(self._path)
        return await self._stat(body.size, answer)

    async def start(self) -> None:
        self._lost.ask()
        with self._backend.translated("write", self._path):
            engine = await self._backend.engine()
        if engine.checksums and not self._backend.chooses_checksum:
            try:
                self._upload_id = await self._create(ChecksumAlgorithm="CRC32", ChecksumType="FULL_OBJECT")
            except StorageError as error:
                if not _refused(error.__cause__):
                    raise
                self._upload_id = await self._create()
                engine.checksums = False
        else:
            self._upload_id = await self._create()
        await self._lost.abort_beside(self._upload_id)

    async def put_part(self, index: int, body: Body) -> dict[str, Any]:
        number: dict[str, Any] = {"UploadId": self._upload_id, "PartNumber": index + 1}
        try:
            answer = await self._send(body, "upload_part", **number)
        except BaseException:
            self._parts_cut_off = True
            raise
        self._size += body.size
        part = {name: value for name, value in answer.items() if name == "ETag" or name.startswith("Checksum")}
        part.pop("ChecksumType", None)
        return {"PartNumber": index + 1, **part, "_crc32": (body.crc32, body.size) if "ChecksumCRC32" in part else None}

    async def finish(self, parts: Sequence[dict[str, Any]]) -> ObjectStat:
        crc32s = [part.pop("_crc32") for part in parts]
        whole = _combined(crc32s)
        expected = _etag_of(parts)
        checksum = {} if whole is None else {"ChecksumCRC32": whole, "ChecksumType": "FULL_OBJECT"}

        async def complete() -> dict[str, Any]:
            nonlocal checksum
            try:
                return await self._complete(parts, checksum)
            except ClientError as error:
                code, _ = code_and_status(error)
                if code in DAMAGED:  # each part was right: sending the list again does not help
                    raise StorageError(
                        f"{self._url}: what the store made of the parts does not have the CRC32 of the whole. {error}"
                    ) from error
                if checksum and code in {"InvalidRequest", "InvalidArgument", "NotImplemented"}:
                    checksum = {}
                    return await self._complete(parts, checksum)
                # Completed, perhaps, and only the reply was lost: then a repeated request finds no such upload.
                if code == "NoSuchUpload" and (there := await self._find(expected)) is not None:
                    return there
                raise

        find = partial(self._find, expected)
        answer = await self._backend.publish(self._path, complete, find, seconds=_COMPLETE_SECONDS)
        self._backend.forget(self._path)
        stored = answer.get("ChecksumCRC32") if answer.get("ChecksumType") == "FULL_OBJECT" else None
        if whole is not None and stored not in {None, whole}:
            raise StorageError(
                f"{self._url}: the store says that the object has the CRC32 {stored}, not {whole}: "
                "it is damaged. Save again."
            )
        return await self._stat(self._size, answer)

    async def abort(self) -> None:
        await self._lost.abort_all(self._upload_id, parts_were_cut_off=self._parts_cut_off)

    async def _create(self, **checksums: str) -> str:
        async def create() -> dict[str, Any]:
            try:
                return await self._backend.client.call(
                    "create_multipart_upload", **self._target, **checksums, **self._with_metadata()
                )
            except BaseException as error:
                if may_have_arrived(error):
                    self._lost.add()
                raise

        answer = await self._backend.call("write", self._path, create)
        return str(answer["UploadId"])

    async def _complete(self, parts: Sequence[dict[str, Any]], checksum: Mapping[str, str]) -> dict[str, Any]:
        return await self._backend.client.call(
            "complete_multipart_upload",
            **self._target,
            UploadId=self._upload_id,
            MultipartUpload={"Parts": list(parts)},
            **checksum,
        )

    async def _abort_upload(self, upload_id: str) -> None:
        await self._backend.abort_upload(self._path, upload_id)

    async def _has_parts(self, upload_id: str) -> bool:
        try:
            found = await self._backend.call(
                "clean up",
                self._path,
                partial(self._backend.client.call, "list_parts", **self._target, UploadId=upload_id),
            )
        except (CheckpointNotFoundError, StorageUnavailableError):  # there is no such upload
            return False
        return bool(found.get("Parts"))

    async def _list_uploads(self) -> AsyncIterator[OpenUpload]:
        async for page in self._backend.open_uploads(self._target["Bucket"], self._target["Key"]):
            now = _now_of(page)
            for upload in page.get("Uploads", []):
                if upload["Key"] == self._target["Key"]:
                    yield OpenUpload(upload["UploadId"], upload["Initiated"], now)

    async def _find(self, expected: str | None) -> dict[str, Any] | None:
        """What is there, if that can only be what was uploaded, and not what was there before. One attempt."""
        if expected is None:
            return None
        try:
            found = await self._backend.client.call("head_object", **self._target)
        except ClientError as error:
            if code_and_status(error)[1] == HTTPStatus.NOT_FOUND:
                return None
            raise
        return {"ETag": found["ETag"]} if found.get("ETag", "").strip('"') == expected else None

    async def _send(self, body: Body, operation: str, *, publishes: bool = False, **arguments: Any) -> dict[str, Any]:
        checksum = base64.b64encode((await body.checksum()).to_bytes(4, "big")).decode()
        arguments = {**self._target, **arguments}

        async def sign(checked: bool) -> SignedRequest:
            extra = {"ChecksumCRC32": checksum} if checked else {}
            return await self._backend.client.sign(operation, **arguments, **extra)

        def accept(answer: Answer) -> dict[str, Any]:
            result = {"ETag": answer.headers.get("ETag", "")}
            if echoed := answer.headers.get("x-amz-checksum-crc32"):
                if echoed != checksum:
                    raise AnswerError(f"the store got bytes with the CRC32 {echoed}, not {checksum}", Transient())
                result["ChecksumCRC32"] = echoed
            return result

        async def through_client() -> dict[str, Any]:
            request = RequestBody(body.buffers)
            # botocore would compute it on the event loop; over https it sends it behind the body, computed on the way.
            extra = {"ChecksumCRC32": checksum} if await self._backend.wants_checksum_in_head() else {}
            call = partial(self._backend.client.call, operation, **arguments, **extra, Body=request)
            return await (whole_or_not_at_all(request, call) if publishes else call())

        return await self._backend.send(
            self._path, body, sign=sign, accept=accept, through_client=through_client, publishes=publishes
        )

    def _with_metadata(self) -> dict[str, Any]:
        configured = self._backend.configured_metadata
        return {"Metadata": {**configured, **self._metadata}} if self._metadata else {}

    async def _stat(self, size: int, answer: Mapping[str, Any]) -> ObjectStat:
        etag = known_etag(answer) or (await self._backend.stat(self._path)).etag
        return ObjectStat(self._url, size, etag, self._metadata)


def _combined(crc32s: Sequence[tuple[int, int] | None]) -> str | None:
    """The CRC32 of the whole object, as S3 writes it; None where a part has none."""
    total = 0
    for entry in crc32s:
        if entry is None:
            return None
        total = isal_zlib.crc32_combine(total, *entry)
    return base64.b64encode(total.to_bytes(4, "big")).decode()


def _refused(error: BaseException | None) -> bool:
    """Whether a store, or an older botocore, may have refused to open an upload because of the checksum."""
    if not isinstance(error, ClientError):
        return isinstance(error, ParamValidationError)
    code, status = code_and_status(error)
    return status in _CHECKSUM_REFUSED and code not in NOT_OF_A_CHECKSUM


def _etag_of(parts: Sequence[Mapping[str, Any]]) -> str | None:
    """The ETag of what these parts are completed to; None where they do not tell, as with some ways of encryption."""
    etags = [part["ETag"].strip('"') for part in parts]
    if not all(re.fullmatch("[0-9a-f]{32}", etag) for etag in etags):
        return None
    digests = bytes.fromhex("".join(etags))
    return f"{hashlib.md5(digests, usedforsecurity=False).hexdigest()}-{len(parts)}"


def _now_of(answer: Mapping[str, Any]) -> datetime:
    """The store's clock; both of its times may be whole seconds."""
    date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
    return parsedate_to_datetime(date) if date else datetime.now(UTC)
