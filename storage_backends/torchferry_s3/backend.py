"""The S3 backend."""

from __future__ import annotations

import os
from collections.abc import AsyncIterable, AsyncIterator, Collection, Mapping
from dataclasses import replace
from datetime import datetime
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from botocore.httpsession import get_cert_path
from s3fs import S3FileSystem

from torchferry.engine.retry import Transient
from torchferry.engine.transport import SignedRequest, Transport
from torchferry.engine.types import Chunk, ObjectStat
from torchferry.engine.writer import Limits, UploadPlan, upload
from torchferry.errors import CheckpointChangedError, CheckpointNotFoundError, StorageError, TorchferryError
from torchferry.storage.base import Leftover, ListedObject
from torchferry.storage.http import Engine, HttpBackend
from torchferry.storage.translate import require_key
from torchferry_s3 import errors
from torchferry_s3.client import S3Client
from torchferry_s3.upload import S3Upload

if TYPE_CHECKING:
    import asyncio

    from fsspec import AbstractFileSystem

__all__ = ["S3Backend"]

_READ_PIECE = 256 << 10
_LIMITS = Limits()
_COPIED = 1 << 30  # bytes in one CopyObject at most


class _UploadGoneError(TorchferryError):
    """There is no such upload any more."""


class S3Backend(HttpBackend):
    """S3, configured by an s3fs filesystem: every setting of it is honoured, because its client signs every request.

    A version is the object's ETag.
    """

    keeps_metadata = True
    damaged_codes: ClassVar[frozenset[str]] = errors.DAMAGED
    further_options: ClassVar[Collection[str] | None] = (
        "session_vars",
        "event_hooks",
        "include_builtin_handlers",
        "profile",
    )
    options_elsewhere: ClassVar[Mapping[str, str]] = {
        "access_key": "key",
        "access_key_id": "key",
        "addressing_style": "config_kwargs={'s3': {'addressing_style': ...}}",
        "anonymous": "anon",
        "aws_access_key_id": "key",
        "aws_secret_access_key": "secret",
        "aws_session_token": "token",
        "endpoint": "endpoint_url",
        "region": "client_kwargs={'region_name': ...}",
        "region_name": "client_kwargs={'region_name': ...}",
        "secret_access_key": "secret",
        "secret_key": "secret",
        "session_token": "token",
        "skip_signature": "anon",
        "verify": "client_kwargs={'verify': ...}",
        "verify_ssl": "client_kwargs={'verify': ...}",
    }

    def __init__(self, fs: S3FileSystem) -> None:
        super().__init__()
        self._fs = fs
        self.client = S3Client(fs)

    @classmethod
    def filesystem_class(cls) -> type[AbstractFileSystem]:
        """s3fs's."""
        kind: type[AbstractFileSystem] = S3FileSystem
        return kind

    @classmethod
    def from_filesystem(cls, fs: AbstractFileSystem) -> S3Backend:
        """A backend for an s3fs filesystem, or a subclass of it."""
        return cls(fs)

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The filesystem's event loop; None where its user drives it from a loop of their own."""
        return None if self._fs.asynchronous else self._fs.loop

    def url(self, path: str) -> str:
        """``s3://`` and the path."""
        return f"s3://{path}"

    def upload_plan(self, size: int, part_size: int | None = None) -> UploadPlan:
        """Parts of 16 MiB, or what the size needs; S3 takes 10,000 of 5 MiB to 5 GiB.

        32 are under way at once, or the filesystem's ``max_concurrency``, where its user chose one.
        """
        plan = UploadPlan.for_size(size, part_size, limits=_LIMITS)
        chosen = self._fs.storage_options.get("max_concurrency")
        return plan if chosen is None else replace(plan, in_flight=min(plan.in_flight, chosen))

    async def engine(self) -> Engine:
        """The engine, unless a class or a session of the user's, a proxy or a client certificate asks for the client.

        Connects s3fs: credentials, profiles and configuration files are botocore's to find.
        """
        await self._fs.set_session()
        return Engine.of(self._fs, self._make_engine)

    async def stat(self, path: str) -> ObjectStat:
        """Looks an object up with a HEAD request: s3fs's listings cache is not asked."""
        address = self.address(path)

        async def head() -> dict[str, Any]:
            try:
                return await self.client.call("head_object", **address)
            except Exception as error:
                status = errors.code_and_status(error)[1]
                if status == HTTPStatus.NOT_FOUND:
                    await self._require_bucket(path)
                elif status == HTTPStatus.BAD_REQUEST:
                    await self._raise_reason(address)
                raise

        found = await self.call("look up", path, head)
        return ObjectStat(self.url(path), found["ContentLength"], errors.known_etag(found), found.get("Metadata", {}))

    async def sign_read(self, path: str, stat: ObjectStat) -> SignedRequest:
        request = await self.client.sign("get_object", **self.address(path))
        pinned = SignedRequest.get(request.url, stat.etag, request.headers)
        return pinned if self._pins else SignedRequest("GET", request.url, request.headers, pinned.version)

    async def read_through_client(self, path: str, start: int, buffer: memoryview, stat: ObjectStat) -> None:
        stop = start + len(buffer)
        address = self.address(path)
        if stat.etag is not None and self._pins:
            address["IfMatch"] = stat.etag
        response = await self.client.call("get_object", Range=f"bytes={start}-{stop - 1}", **address)
        body = response["Body"]
        try:
            # Some stores ignore If-Match, and some ranges.
            if stat.etag not in {None, errors.known_etag(response)}:
                raise CheckpointChangedError(f"{self.url(path)} was replaced while it was being read.")
            whole = f"bytes 0-{stat.size - 1}"
            offered = response.get("ContentRange", whole).partition("/")[0]
            length = response.get("ContentLength", len(buffer))
            if offered != f"bytes {start}-{stop - 1}" or length != len(buffer):
                raise StorageError(
                    f"Cannot read the bytes {start} to {stop} of {self.url(path)}: "
                    f"the store offered {length} bytes ({offered})."
                )
            filled = 0
            while piece := await body.read(_READ_PIECE):
                if filled + len(piece) > len(buffer):
                    raise StorageError(f"Cannot read {self.url(path)}: the store sent more than it was asked for.")
                buffer[filled : filled + len(piece)] = piece
                filled += len(piece)
        finally:
            body.close()
        if filled != len(buffer):
            raise ConnectionResetError(f"the body ended after {filled} of {len(buffer)} bytes")

    async def write(
        self,
        path: str,
        chunks: AsyncIterable[Chunk],
        *,
        plan: UploadPlan,
        metadata: Mapping[str, str] | None = None,
    ) -> ObjectStat:
        """Uploads with a single PUT or a multipart upload."""
        return await upload(S3Upload(self, path, dict(metadata or {})), chunks, plan)

    async def delete(self, path: str) -> None:
        """Deletes an object."""
        try:
            await self.call("delete", path, partial(self.client.call, "delete_object", **self.address(path)))
        except CheckpointNotFoundError:
            return
        self.forget(path)

    async def copy(self, source: str, target: str, size: int) -> bool:
        """With CopyObject, up to 1 GiB: more takes S3 longer than s3fs's client waits for an answer."""
        if size > _COPIED:
            return False
        request = partial(self.client.call, "copy_object", CopySource=self.address(source), **self.address(target))
        await self.call_shielded("copy", target, request)
        self.forget(target)
        return True

    async def list(self, prefix: str) -> AsyncIterator[ListedObject]:
        bucket, _, key = prefix.partition("/")
        async for page in self._pages("list_objects_v2", prefix, "ContinuationToken", Bucket=bucket, Prefix=key):
            for found in page.get("Contents", []):
                path = f"{bucket}/{found['Key']}"
                yield ListedObject(
                    path, self.url(path), found["Size"], errors.known_etag(found), found.get("LastModified")
                )

    async def leftovers(self, prefix: str) -> AsyncIterator[Leftover]:
        """Multipart uploads; each was last changed when its last part came, which takes one more request to know."""
        bucket, _, key = prefix.partition("/")
        async for page in self.open_uploads(bucket, key):
            for found in page.get("Uploads", []):
                upload = {"Bucket": bucket, "Key": found["Key"], "UploadId": found["UploadId"]}
                try:
                    times = [found.get("Initiated"), *[time async for time in self._times_of_parts(upload)]]
                except _UploadGoneError:  # completed or aborted meanwhile
                    continue
                path, modified = f"{bucket}/{found['Key']}", max(filter(None, times), default=None)
                yield Leftover(path, self.url(path), "multipart upload", found["UploadId"], modified)

    def open_uploads(self, bucket: str, prefix: str) -> AsyncIterator[dict[str, Any]]:
        """The multipart uploads under way, in the pages in which S3 lists them."""
        path = f"{bucket}/{prefix}"
        return self._pages("list_multipart_uploads", path, "KeyMarker", Bucket=bucket, Prefix=prefix)

    async def discard(self, leftover: Leftover) -> bool:
        await self.abort_upload(leftover.path, leftover.id)
        return True

    async def abort_upload(self, path: str, upload_id: str) -> None:
        """Aborts a multipart upload; one that is not there (any more) is no error."""
        bucket, _, key = path.partition("/")
        request = partial(self.client.call, "abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload_id)

        async def abort() -> None:
            try:
                await request()
            except Exception as error:
                if errors.code_and_status(error)[1] != HTTPStatus.NOT_FOUND:
                    raise

        await self.call("clean up", path, abort)

    def address(self, path: str) -> dict[str, Any]:
        """Bucket and Key, and VersionId where the path names one."""
        bucket, key, version = self._fs.split_path(path)
        require_key(self.url(path), path)
        return {"Bucket": bucket, "Key": key} | ({"VersionId": version} if version else {})

    def forget(self, path: str) -> None:
        """Lets s3fs's listings find what is there now."""
        self._fs.invalidate_cache(path)

    @property
    def chooses_checksum(self) -> bool:
        """Whether the filesystem's own settings name a checksum."""
        return any(name.startswith("Checksum") for name in self._fs.s3_additional_kwargs)

    @property
    def configured_metadata(self) -> dict[str, str]:
        """What the filesystem's settings store with every object."""
        return dict(self._fs.s3_additional_kwargs.get("Metadata", {}))

    async def wants_checksum_in_head(self) -> bool:
        """Whether botocore would put a CRC32 into the head of a request with a body."""
        engine = await self.engine()
        config = self._fs.s3.meta.config
        default = getattr(config, "request_checksum_calculation", None) == "when_supported"
        https = self._fs.s3.meta.endpoint_url.startswith("https:")
        return default and engine.checksums and not https and not self.chooses_checksum

    def is_damage(self, error: Exception) -> bool:
        return errors.code_and_status(error)[0] in errors.DAMAGED

    def transient(self, error: Exception) -> Transient | None:
        return errors.transient(error)

    def translate(self, what: str, error: Exception) -> StorageError:
        return errors.translate(what, error)

    def _make_engine(self) -> Engine:
        fs, config = self._fs, self._fs.s3.meta.config
        verify = _verify(fs)
        reasons = {
            f"{type(fs).__name__} is a subclass of S3FileSystem": type(fs) is not S3FileSystem,
            "the filesystem has a session of the user's": fs.storage_options.get("session") is not None,
            "there is a proxy": bool(config.proxies),
            "there is a client certificate": bool(config.client_cert),
            "s3_additional_kwargs choose a checksum": self.chooses_checksum,
            f"the certificates {verify!r} are not one file": isinstance(verify, str) and not Path(verify).is_file(),
        }
        for reason, holds in reasons.items():
            if holds:
                return Engine(None, reason)
        silence = fs.config_kwargs.get("read_timeout")
        engine = Engine(Transport(verify=verify) if silence is None else Transport(verify=verify, silence=silence))
        engine.checksums = getattr(config, "request_checksum_calculation", None) != "when_required"
        return engine

    async def _pages(self, operation: str, prefix: str, marker: str, **arguments: Any) -> AsyncIterator[dict[str, Any]]:
        bucket = f"{arguments['Bucket']}/"
        while True:
            page = await self.call("list", prefix or bucket, partial(self.client.call, operation, **arguments))
            yield page
            if not page.get("IsTruncated"):
                return
            if not page.get(f"Next{marker}"):
                raise StorageError(
                    f"Cannot list {self.url(prefix or bucket)}: the store says that there is more, and not where it is."
                )
            arguments[marker] = page[f"Next{marker}"]
            if "NextUploadIdMarker" in page:
                arguments["UploadIdMarker"] = page["NextUploadIdMarker"]

    async def _times_of_parts(self, upload: dict[str, str]) -> AsyncIterator[datetime]:
        async def request() -> dict[str, Any]:
            try:
                return await self.client.call("list_parts", **upload, **marker)
            except Exception as error:
                if errors.code_and_status(error)[1] == HTTPStatus.NOT_FOUND:
                    raise _UploadGoneError from error
                raise

        marker: dict[str, Any] = {}
        while True:
            page = await self.call("list", f"{upload['Bucket']}/{upload['Key']}", request)
            for part in page.get("Parts", []):
                yield part["LastModified"]
            if not page.get("IsTruncated"):
                return
            marker = {"PartNumberMarker": page["NextPartNumberMarker"]}

    async def _require_bucket(self, path: str) -> None:
        """Raises NoSuchBucketError where that is why nothing was found: a HEAD's 404 does not tell."""
        try:
            await self.client.call("head_bucket", Bucket=self.address(path)["Bucket"])
        except Exception as error:
            if errors.code_and_status(error)[1] == HTTPStatus.NOT_FOUND:
                raise errors.NoSuchBucketError from error

    async def _raise_reason(self, address: dict[str, Any]) -> None:
        """Raises what is wrong with requests for an object: the answer to a HEAD has no body that could say it."""
        response = await self.client.call("get_object", Range="bytes=0-0", **address)
        response["Body"].close()

    @property
    def _pins(self) -> bool:
        """Whether the store is asked for one version only; the answer's version is looked at either way."""
        return not getattr(self._fs, "local_expiry_check", False)  # which s3fs 2024.10 does not have


def _verify(fs: S3FileSystem) -> str | bool:
    """The file with the certificates of the authorities that the client trusts; False for anyone."""
    verify = fs.client_kwargs.get("verify")
    if verify is None:
        verify = fs.session.get_config_variable("ca_bundle") or os.environ.get("REQUESTS_CA_BUNDLE")
    if verify is False:
        return False
    return os.fspath(verify) if isinstance(verify, str | os.PathLike) else str(get_cert_path(True))
