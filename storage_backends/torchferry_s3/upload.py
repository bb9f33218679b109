"""One object on its way to S3."""

from __future__ import annotations

import base64
import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import partial
from http import HTTPStatus
from time import monotonic
from typing import TYPE_CHECKING, Any

import anyio
from botocore.exceptions import ClientError, ParamValidationError
from isal import isal_zlib

from torchferry.engine.retry import AnswerError, Transient
from torchferry.engine.transport import Answer, SignedRequest
from torchferry.engine.types import ObjectStat
from torchferry.engine.writer import Body, Upload
from torchferry.errors import CheckpointNotFoundError, StorageError, StorageUnavailableError
from torchferry.storage.body import RequestBody, whole_or_not_at_all
from torchferry_s3.errors import DAMAGED, code_and_status, known_etag

if TYPE_CHECKING:
    from torchferry_s3.backend import S3Backend

__all__ = ["S3Upload"]

logger = logging.getLogger("torchferry.engine")

_LOOKS = (0.0, 0.5, 2.0)  # seconds before each look for an upload whose creation was not answered
_COMPLETE_SECONDS = 600.0  # S3 says that completing can take several minutes, and sends blanks meanwhile
_CHECKSUM_REFUSED = frozenset({HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_IMPLEMENTED})
# Statuses of a request that the store may have carried out all the same; 0 where it gave no answer.
_NO_ANSWER = frozenset({0, HTTPStatus.INTERNAL_SERVER_ERROR, HTTPStatus.BAD_GATEWAY, HTTPStatus.GATEWAY_TIMEOUT})
_ABORTS = 3  # a part that was on its way when the upload was aborted can arrive later: it is aborted again


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
        self._started: float | None = None  # when the creation was first asked for
        self._lost_creations = 0  # creations without an answer: the store may have opened an upload for each
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
        self._started = monotonic()
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
        if self._lost_creations:
            try:
                await self._abort_lost_creations()
            except StorageError as error:  # no reason for this save to fail
                logger.warning("%s: an upload whose creation was not answered may stay. %s", self._url, error)

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
                if code == "NoSuchUpload" and (etag := await self._etag_if_complete(expected)) is not None:
                    return {"ETag": etag}
                raise

        try:
            answer = await self._backend.call("write", self._path, complete, seconds=_COMPLETE_SECONDS)
        except StorageUnavailableError:
            if (etag := await self._etag_if_complete(expected)) is None:
                raise
            answer = {"ETag": etag}
        self._backend.forget(self._path)
        stored = answer.get("ChecksumCRC32") if answer.get("ChecksumType") == "FULL_OBJECT" else None
        if whole is not None and stored not in {None, whole}:
            raise StorageError(
                f"{self._url}: the store says that the object has the CRC32 {stored}, not {whole}: "
                "it is damaged. Save again."
            )
        return await self._stat(self._size, answer)

    async def abort(self) -> None:
        if self._upload_id is None:
            if self._lost_creations:
                await self._abort_lost_creations()
            return
        for _ in range(_ABORTS):
            await self._abort_upload(self._upload_id)
            if not self._parts_cut_off or not await self._has_parts(self._upload_id):
                return

    async def _create(self, **checksums: str) -> str:
        async def create() -> dict[str, Any]:
            try:
                return await self._backend.client.call(
                    "create_multipart_upload", **self._target, **checksums, **self._with_metadata()
                )
            except BaseException as error:
                if code_and_status(error)[1] in _NO_ANSWER:
                    self._lost_creations += 1
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

    async def _abort_lost_creations(self) -> None:
        """Aborts the uploads that were opened for creations without an answer.

        S3 tells the key and the time of an upload, and not who opened it: only as many as creations were lost, opened
        since, without parts, are ours. Where there are more, somebody else is writing to this key: all stay.
        One can appear after its request was given up: where fewer are found, this looks again, twice.
        """
        for seconds in _LOOKS:
            await anyio.sleep(seconds)
            lost = await self._find_lost_creations()
            if len(lost) > self._lost_creations:
                raise StorageError(
                    f"Cannot clean up {self._url}: {len(lost)} uploads could be the {self._lost_creations} whose "
                    "creation was not answered."
                )
            for upload_id in lost:
                await self._abort_upload(upload_id)
            self._lost_creations -= len(lost)
            if not self._lost_creations:
                return

    async def _find_lost_creations(self) -> list[str]:
        key = self._target["Key"]
        answer = await self._backend.call(
            "clean up",
            self._path,
            partial(self._backend.client.call, "list_multipart_uploads", Bucket=self._target["Bucket"], Prefix=key),
        )
        since = _now_of(answer) - timedelta(seconds=monotonic() - (self._started or 0.0) + 1)
        found = [
            str(upload["UploadId"])
            for upload in answer.get("Uploads", [])
            if upload["Key"] == key and upload["UploadId"] != self._upload_id and upload["Initiated"] >= since
        ]
        return [upload_id for upload_id in found if not await self._has_parts(upload_id)]

    async def _etag_if_complete(self, expected: str | None) -> str | None:
        """The ETag of what is there, if that can only be what was uploaded: not what was there before."""
        if expected is None:
            return None
        try:
            etag = (await self._backend.stat(self._path)).etag or ""
        except CheckpointNotFoundError:
            return None
        return etag if etag.strip('"') == expected else None

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
    return isinstance(error, ParamValidationError) or (
        isinstance(error, ClientError) and code_and_status(error)[1] in _CHECKSUM_REFUSED
    )


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
