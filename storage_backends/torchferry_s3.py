"""S3 and what speaks its protocol, for torchferry: ``s3://`` and ``s3a://``.

Two planes, both configured by an s3fs filesystem: :class:`S3Backend` sends everything through s3fs itself;
where every setting translates, obstore moves the bytes with s3fs's credentials.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import re
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote, urlsplit

import botocore.exceptions as boto_errors
import s3fs.core
from botocore import UNSIGNED
from isal import isal_zlib
from obstore.store import S3Store
from s3fs import S3FileSystem

from torchferry.engine.loops import run_on
from torchferry.errors import (
    CheckpointChangedError,
    CheckpointNotFoundError,
    StorageError,
    StoragePermissionError,
)
from torchferry.storage.base import Backend, Chunk, ObjectStat, Plane
from torchferry.engine.body import SEND_PIECE, RequestBody, whole_or_not_at_all
from torchferry.storage.bridge import (
    UPLOAD_PATIENCE,
    UntranslatableError,
    choose_plane,
    credentials_from,
    names,
    once_a_process,
    require_known,
)
from torchferry.engine.cancellation import in_thread
from torchferry.engine.transport import DirectReader, SignedGet
from torchferry.engine.writer import MultipartUpload, PartSizes, part_size_for, upload_parts
from torchferry.storage.obstore import ObstoreBackend
from torchferry.storage.translation import by_status, require_key, translated, upload_gone

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Mapping, Sequence

    from fsspec import AbstractFileSystem
    from obstore.store import ClientConfig

__all__ = ["S3Backend"]

_READ_PIECE = 256 << 10


class S3Backend(Backend):
    """S3 through s3fs: every setting of the filesystem is honoured, because s3fs makes every request.

    A version is the object's ETag. Reads go on after a broken connection, as often as s3fs retries (5 times).
    """

    plane = "fsspec"

    def __init__(self, fs: S3FileSystem) -> None:
        self._fs = fs
        self._connected = False

    @classmethod
    def from_filesystem(cls, fs: AbstractFileSystem, plane: Plane) -> Backend:
        """The obstore plane where all settings of ``fs`` translate, or where ``plane`` says so; else this one.

        Connects s3fs, so that environment, profile and configuration files are taken from botocore, which
        resolved them. May take a second, and must not be called on the filesystem's event loop.

        Raises:
            UnsupportedOptionError: ``plane`` is "obstore", and a setting does not translate.
            StoragePermissionError: the credentials' profile does not exist.
        """
        obstore = partial(once_a_process, fs, partial(_obstore_backend, fs))
        return choose_plane(plane, "S3", "s3fs", fsspec=partial(cls, fs), obstore=obstore)

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The filesystem's event loop; None where its user drives it from a loop of their own."""
        return None if self._fs.asynchronous else self._fs.loop

    def url(self, path: str) -> str:
        """``s3://`` and the path."""
        return f"s3://{path}"

    def write_cost(self, size: int, part_size: int | None) -> int:
        """What the connections buffer; parts are sent from the chunks' own memory."""
        del size, part_size
        return int(self._fs.max_concurrency) * 2 * SEND_PIECE

    async def stat(self, path: str) -> ObjectStat:
        """Looks an object up with a HEAD request: s3fs's listings cache is not asked."""
        with _translated(self.url(path), "look up"):
            try:
                head = await self._call("head_object", **self._address(path))
            except FileNotFoundError as error:
                if _is_answer(error):
                    await self._require_bucket(path)
                raise
        return ObjectStat(self.url(path), head["ContentLength"], head.get("ETag"), head.get("Metadata", {}))

    async def read(self, path: str, start: int, stop: int, stat: ObjectStat) -> Chunk:
        """Reads a range with one GET request, and with another one where its body breaks off."""
        data = bytearray(stop - start)
        await self._read(path, start, memoryview(data), stat)
        return data

    async def read_into(self, path: str, start: int, buffer: memoryview, stat: ObjectStat) -> None:
        """Reads a range directly, with a URL that s3fs's client signs, where that says all; else like ``read``."""
        with _translated(self.url(path), "read"):
            await self._fs.set_session()
        if not self._connected:
            self._connected = True
            verify = _direct_trust(self._fs)
            self.direct = None if verify is None else DirectReader(self._sign, verify=verify)
        if self.direct is None or not await self.direct.read_into(path, start, buffer, stat):
            await self._read(path, start, buffer, stat)

    async def write(
        self,
        path: str,
        chunks: AsyncIterable[Chunk],
        *,
        size_hint: int,
        part_size: int | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> ObjectStat:
        """Uploads with a single PUT or a multipart upload; as many parts at once as s3fs's ``max_concurrency``."""
        upload = _S3Upload(self, path, dict(metadata or {}))
        sizes = PartSizes(part_size_for(size_hint, part_size))
        return await upload_parts(upload, chunks, sizes, in_flight=self._fs.max_concurrency)

    async def delete(self, path: str) -> None:
        """Deletes an object."""
        with _translated(self.url(path), "delete"):
            try:
                await self._call("delete_object", **self._address(path))
            except FileNotFoundError as error:
                if _is_answer(error):
                    return
                raise
        self._forget(path)

    async def abort_upload(self, path: str, age: float) -> None:
        """Aborts the upload to ``path`` that was opened in the last ``age`` seconds.

        Raises:
            StorageError: it failed, or there is not exactly one.
        """
        address = self._address(path)
        key = address["Key"]
        with _translated(self.url(path), "abort the upload to"):
            found = await self._call("list_multipart_uploads", Bucket=address["Bucket"], Prefix=key)
            # By the store's clock, and both of its times may be whole seconds.
            now = parsedate_to_datetime(found["ResponseMetadata"]["HTTPHeaders"]["date"])
            since = now - timedelta(seconds=age + 1)
            ids = [
                upload["UploadId"]
                for upload in found.get("Uploads", [])
                if upload["Key"] == key and upload["Initiated"] >= since
            ]
            if len(ids) != 1:
                raise StorageError(f"Cannot abort the upload to {self.url(path)}: {len(ids)} could be the one.")
            await self._call("abort_multipart_upload", Bucket=address["Bucket"], Key=key, UploadId=ids[0])

    async def _sign(self, path: str, stat: ObjectStat) -> SignedGet:
        address = self._address(path)
        client = await self._fs.get_s3(address["Bucket"])
        client.meta.events.register_first("choose-signer.s3.GetObject", _version_4, unique_id="torchferry")
        signing = _signing.set(True)
        try:
            url = await client.generate_presigned_url("get_object", Params=address)  # for an hour
        finally:
            _signing.reset(signing)
        get = SignedGet.if_match(url, stat.etag)
        return get if self._pins else get._replace(headers={})

    async def _read(self, path: str, start: int, buffer: memoryview, stat: ObjectStat) -> None:
        if not buffer:
            return
        with _translated(self.url(path), "read"):
            for attempt in range(self._fs.retries):
                try:
                    await self._read_once(path, start, buffer, stat)
                    break
                except _connection_errors():
                    if attempt + 1 == self._fs.retries:
                        raise
                    await asyncio.sleep(min(1.7**attempt * 0.1, 15))  # s3fs's own pace

    async def _read_once(self, path: str, start: int, buffer: memoryview, stat: ObjectStat) -> None:
        stop = start + len(buffer)
        address = self._address(path)
        if stat.etag is not None and self._pins:
            address["IfMatch"] = stat.etag
        response = await self._call("get_object", Range=f"bytes={start}-{stop - 1}", **address)
        body = response["Body"]
        try:
            # Some stores ignore If-Match, and some ranges.
            if stat.etag not in {None, response.get("ETag")}:
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

    @property
    def _pins(self) -> bool:
        """Whether the store is asked for one version only; the answer's version is looked at either way."""
        return not getattr(self._fs, "local_expiry_check", False)  # which s3fs 2024.10 does not have

    def _address(self, path: str) -> dict[str, Any]:
        bucket, key, version = self._fs.split_path(path)
        require_key(self.url(path), key)
        return {"Bucket": bucket, "Key": key} | ({"VersionId": version} if version else {})

    async def _call(self, operation: str, **arguments: Any) -> dict[str, Any]:
        """One S3 operation, with the filesystem's additional arguments, encryption, requester pays and retries."""
        response: dict[str, Any] = await self._fs._call_s3(operation, **arguments)
        return response

    async def _require_bucket(self, path: str) -> None:
        """Raises NoSuchBucket where that is why nothing was found: a HEAD's 404 does not tell."""
        try:
            await self._call("head_bucket", Bucket=self._address(path)["Bucket"])
        except FileNotFoundError as error:
            if _is_answer(error):
                raise _NoSuchBucketError from error
        except Exception:  # noqa: BLE001 - not allowed to know: then what the first request said stands
            return

    def _forget(self, path: str) -> None:
        self._fs.invalidate_cache(path)


class _S3Upload(MultipartUpload["dict[str, Any]", ObjectStat]):
    """One object on its way through s3fs."""

    def __init__(self, backend: S3Backend, path: str, metadata: dict[str, str]) -> None:
        self._backend = backend
        self._path = path
        self._url = backend.url(path)
        self._metadata = metadata
        self._target = {"Bucket": backend._address(path)["Bucket"], "Key": backend._address(path)["Key"]}
        self._upload_id: str | None = None
        self._size = 0

    async def put_whole(self, body: Sequence[Chunk]) -> ObjectStat:
        with self._translated():
            response = await self._send("put_object", body, **self._with_metadata())
        self._backend._forget(self._path)
        return self._stat(sum(map(len, body)), response.get("ETag"))

    async def start(self) -> None:
        with self._translated():
            response = await self._call("create_multipart_upload", **self._with_metadata())
        self._upload_id = response["UploadId"]

    async def put_part(self, index: int, body: Sequence[Chunk]) -> dict[str, Any]:
        with self._translated():
            response = await self._send("upload_part", body, UploadId=self._upload_id, PartNumber=index + 1)
        self._size += sum(map(len, body))
        part = {name: value for name, value in response.items() if name == "ETag" or name.startswith("Checksum")}
        part.pop("ChecksumType", None)
        return {"PartNumber": index + 1, **part}

    async def finish(self, parts: Sequence[dict[str, Any]]) -> ObjectStat:
        with self._translated():
            try:
                response = await self._call(
                    "complete_multipart_upload", UploadId=self._upload_id, MultipartUpload={"Parts": list(parts)}
                )
                etag = response.get("ETag")
            except _perhaps_complete():
                # Completed, perhaps, and only the reply was lost: then a repeated request finds no such upload.
                if (etag := await self._etag_if_complete(_etag_of(parts))) is None:
                    raise
        self._backend._forget(self._path)
        return self._stat(self._size, etag)

    async def abort(self) -> None:
        if self._upload_id is None:
            return
        with self._translated():
            try:
                await self._call("abort_multipart_upload", UploadId=self._upload_id)
            except FileNotFoundError:  # completed or aborted already
                return

    async def _etag_if_complete(self, expected: str | None) -> str | None:
        """The ETag of what is there, if that can only be what was uploaded: not what was there before."""
        if expected is None:
            return None
        try:
            head = await self._call("head_object")
        except FileNotFoundError:
            return None
        etag = str(head.get("ETag"))
        return etag if etag.strip('"') == expected else None

    async def _send(self, operation: str, buffers: Sequence[Chunk], **arguments: Any) -> dict[str, Any]:
        """An operation with a body; once the store has all of it, a cancel waits for its answer."""
        body = RequestBody(buffers)
        arguments |= await self._checksum(buffers)
        return await whole_or_not_at_all(body, partial(self._call, operation, Body=body, **arguments))

    async def _checksum(self, buffers: Sequence[Chunk]) -> dict[str, str]:
        """The CRC32 that botocore would put into the request's head, computed in a thread instead of the event loop's.

        Over https botocore sends it behind the body, computed on the way; and another one where the user wants that.
        """
        fs = self._backend._fs
        await fs.set_session()
        client = await fs.get_s3(self._target["Bucket"])
        default = getattr(client.meta.config, "request_checksum_calculation", None) == "when_supported"
        chosen = any(name.startswith("Checksum") for name in fs.s3_additional_kwargs)
        if client.meta.endpoint_url.startswith("https:") or chosen or not default:
            return {}
        return {"ChecksumCRC32": await in_thread(_crc32, buffers)}

    async def _call(self, operation: str, **arguments: Any) -> dict[str, Any]:
        return await self._backend._call(operation, **self._target, **arguments)

    def _with_metadata(self) -> dict[str, Any]:
        configured = self._backend._fs.s3_additional_kwargs.get("Metadata", {})
        return {"Metadata": {**configured, **self._metadata}} if self._metadata else {}

    def _stat(self, size: int, etag: str | None) -> ObjectStat:
        return ObjectStat(self._url, size, etag, self._metadata)

    def _translated(self) -> Any:
        return _translated(self._url, "write")


_signing: ContextVar[bool] = ContextVar("_signing", default=False)


def _version_4(signature_version: Any, **_: object) -> str | None:
    """Has botocore sign our URLs with signature version 4, unless its user chose another.

    By itself it takes version 2 in the older regions, which newer buckets refuse there, too, as does what is encrypted
    with KMS: https://docs.aws.amazon.com/AmazonS3/latest/API/Appendix-Sigv2.html
    """
    return "s3v4-query" if _signing.get() and signature_version in {"v4-query", "s3v4-query"} else None


def _etag_of(parts: Sequence[Mapping[str, Any]]) -> str | None:
    """The ETag of what these parts are completed to; None where they do not tell, as with some ways of encryption."""
    etags = [part["ETag"].strip('"') for part in parts]
    if not all(re.fullmatch("[0-9a-f]{32}", etag) for etag in etags):
        return None
    digests = bytes.fromhex("".join(etags))
    return f"{hashlib.md5(digests, usedforsecurity=False).hexdigest()}-{len(parts)}"


def _crc32(buffers: Sequence[Chunk]) -> str:
    """The CRC32 of buffers, as S3 writes it: big-endian, in base64."""
    value = 0
    for buffer in buffers:
        value = isal_zlib.crc32(buffer, value)
    return base64.b64encode(value.to_bytes(4, "big")).decode()


# --- errors ---------------------------------------------------------------------------------------------------------


_PERMISSION_CODES = names(
    "AccessDenied AccountProblem AllAccessDisabled AuthorizationHeaderMalformed CredentialsNotSupported ExpiredToken "
    "InvalidAccessKeyId InvalidPayer InvalidSecurity InvalidToken NotSignedUp RequestTimeTooSkewed "
    "SignatureDoesNotMatch TokenRefreshRequired"
)
_UNAVAILABLE_CODES = names("InternalError RequestTimeout ServiceUnavailable SlowDown Throttling")
_CREDENTIAL_ERRORS = (
    boto_errors.NoCredentialsError,
    boto_errors.PartialCredentialsError,
    boto_errors.CredentialRetrievalError,
    boto_errors.ProfileNotFound,
    boto_errors.SSOError,
    boto_errors.TokenRetrievalError,
)


class _NoSuchBucketError(FileNotFoundError):
    """The bucket is what is missing."""


def _connection_errors() -> tuple[type[Exception], ...]:
    """What a broken or silent connection raises; looked up each time, because users can add to s3fs's list."""
    return (*s3fs.core.S3_RETRYABLE_ERRORS, boto_errors.ConnectionError, ConnectionError, TimeoutError)


def _perhaps_complete() -> tuple[type[Exception], ...]:
    return (FileNotFoundError, *_connection_errors())


def _translate(what: str, error: Exception) -> StorageError:
    code, status = _code_and_status(error)
    reason = str(error) or type(error).__name__
    if isinstance(error, _NoSuchBucketError) or code == "NoSuchBucket":
        return CheckpointNotFoundError(f"{what}: the bucket does not exist.")
    if code == "NoSuchUpload":
        return upload_gone(what, reason)
    if status == HTTPStatus.NOT_FOUND:
        return CheckpointNotFoundError(f"{what}: there is no such object.")
    # A FileNotFoundError that S3 did not answer: a token's file, or the program of a credential_process.
    if isinstance(error, (FileNotFoundError, *_CREDENTIAL_ERRORS)):
        return StoragePermissionError(f"{what}: no usable credentials. {reason}")
    if code in _PERMISSION_CODES:
        status = HTTPStatus.FORBIDDEN
    unanswered = code in _UNAVAILABLE_CODES or isinstance(error, _connection_errors())
    return by_status(what, reason, status, code, unanswered=unanswered)


_translated = partial(translated, _translate)


def _is_answer(error: Exception) -> bool:
    """Whether S3 said so, and not this machine, of a file that credentials come from."""
    return _code_and_status(error)[1] != 0


def _code_and_status(error: Exception) -> tuple[str, int]:
    """S3's error code and the HTTP status; s3fs raises a builtin error, with botocore's as its cause."""
    client_error = error if isinstance(error, boto_errors.ClientError) else error.__cause__
    if not isinstance(client_error, boto_errors.ClientError):
        return "", 0
    response: Any = client_error.response
    return str(response["Error"].get("Code", "")), int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


# --- the bridge to obstore ------------------------------------------------------------------------------------------


# What an s3fs filesystem can be given. Anything not named here or below keeps the bytes on the fsspec plane.
_RESOLVED_BY_BOTOCORE = names(
    "anon endpoint_url key secret token username password use_ssl profile client_kwargs config_kwargs "
    "s3_additional_kwargs requester_pays cache_regions"
)
_ABOUT_OTHER_CALLS = names(
    "default_block_size default_fill_cache default_cache_type use_listings_cache listings_expiry_time max_paths "
    "skip_instance_cache asynchronous loop fixed_upload_size"
)  # listings, file objects, and how fsspec keeps instances
_POSITIONAL = len(("anon", "endpoint_url", "key", "secret", "token"))
_ONLY_AT_THEIR_DEFAULT = {"version_aware": False, "local_expiry_check": False, "session": None, "max_concurrency": 10}
_CLIENT_KWARGS = names(
    "region_name endpoint_url use_ssl verify aws_access_key_id aws_secret_access_key aws_session_token"
)
_CONFIG_KWARGS = names(
    "region_name signature_version connect_timeout read_timeout proxies s3 retries parameter_validation tcp_keepalive "
    "ignore_configured_endpoint_urls max_pool_connections request_checksum_calculation response_checksum_validation"
)
_RETRIES_IN_CONFIG = frozenset({"max_attempts", "total_max_attempts", "mode"})
_S3_CONFIG = frozenset({"addressing_style", "payload_signing_enabled"})
_ADDITIONAL_KWARGS = names(
    "ServerSideEncryption SSEKMSKeyId BucketKeyEnabled SSECustomerAlgorithm SSECustomerKey SSECustomerKeyMD5 "
    "RequestPayer"
)
_UNSAID_BY_A_URL = names("RequestPayer SSECustomerKey ExpectedBucketOwner")
# In the section "s3" of the AWS configuration file: what is part of the address that botocore gives, and what is for
# the AWS CLI alone.
_NOTHING_TO_TRANSLATE = names(
    "us_east_1_regional_endpoint max_concurrent_requests max_queue_size multipart_threshold multipart_chunksize "
    "max_bandwidth io_chunksize preferred_transfer_client target_bandwidth"
)
_MOST_CONNECTIONS = Backend.range_concurrency


def _obstore_backend(fs: S3FileSystem) -> ObstoreBackend:
    """The obstore backend for ``fs``.

    Raises:
        UntranslatableError: a setting does not translate.
        StoragePermissionError: the credentials' profile does not exist.
    """
    _check_filesystem(fs)
    return _S3ThroughObstore(fs)


class _S3ThroughObstore(ObstoreBackend):
    """S3 through obstore, beside an s3fs filesystem that its user goes on using."""

    def __init__(self, fs: S3FileSystem) -> None:
        bridge = _Bridge(fs)
        super().__init__("s3", bridge.open_store, forget=fs.invalidate_cache, verify=bridge.verify)
        self._through_s3fs = S3Backend(bridge.fs)

    def can_hold(self, path: str) -> bool:
        """Nor does obstore know access points by their ARN, or how to sign for directory buckets."""
        bucket, _, _ = path.partition("/")
        return super().can_hold(path) and not (bucket.startswith("arn:") or bucket.endswith("--x-s3"))

    async def abort_upload(self, path: str, age: float) -> None:
        await run_on(self._through_s3fs.loop, self._through_s3fs.abort_upload, path, age)


def _check_filesystem(fs: S3FileSystem) -> None:
    """Raises UntranslatableError for settings that obstore has nothing for."""
    if type(fs) is not S3FileSystem:
        raise UntranslatableError(f"the filesystem class {type(fs).__name__}, a subclass of S3FileSystem")
    if len(fs.storage_args) > _POSITIONAL:
        raise UntranslatableError("positional arguments after the token")
    known = _RESOLVED_BY_BOTOCORE | _ABOUT_OTHER_CALLS | set(_ONLY_AT_THEIR_DEFAULT)
    require_known("the option", {*fs.storage_options, *fs.kwargs}, known)
    for name, default in _ONLY_AT_THEIR_DEFAULT.items():
        if fs.storage_options.get(name, default) != default:
            raise UntranslatableError(f"the option {name!r}")
    require_known("client_kwargs", fs.client_kwargs, _CLIENT_KWARGS)
    require_known("config_kwargs", fs.config_kwargs, _CONFIG_KWARGS)
    _encryption(fs.s3_additional_kwargs)


class _Address(NamedTuple):
    """Where botocore sends requests for a bucket."""

    endpoint: str
    virtual_hosted: bool
    region: str


def _address(url: str, bucket: str, asked: str, region: str) -> _Address:
    """The address in botocore's URL of an object ``key``, moved to the region that the bucket is in.

    Args:
        url: The object's URL, made for the region ``asked``.
        bucket: The bucket.
        asked: The region that the client is configured for.
        region: The bucket's; another one than ``asked`` on AWS only.
    """
    parts = urlsplit(url)
    virtual_hosted = unquote(parts.path) == "/key"
    prefix = "" if virtual_hosted else parts.path.removesuffix(f"/{bucket}/key")
    host = parts.netloc
    if region != asked:
        regional = f".{asked}.amazonaws." in host  # the global endpoint, of us-east-1, names no region
        host = host.replace(f".{asked}.amazonaws." if regional else ".amazonaws.", f".{region}.amazonaws.")
    return _Address(f"{parts.scheme}://{host}{prefix}", virtual_hosted, region)


class _Bridge:
    """Makes obstore stores from an s3fs filesystem.

    Raises:
        UntranslatableError: the configuration that botocore resolved does not translate.
        StoragePermissionError: it could not be resolved.
    """

    def __init__(self, fs: S3FileSystem) -> None:
        # An asynchronous instance works on its user's loop only, which need not run, or live, when obstore asks for
        # credentials: its twin, with the same settings, lives on fsspec's own loop.
        self.fs = fs
        if fs.asynchronous:
            self.fs = S3FileSystem(*fs.storage_args, **{**fs.storage_options, "asynchronous": False, "loop": None})
        with _translated("s3://", "connect to"):
            self.fs.connect()
        config = self.fs.s3.meta.config
        self._config = _store_config(self.fs, config)
        self._client_options = _client_options(self.fs, config, urlsplit(self.fs.s3.meta.endpoint_url).scheme)
        self._retry = _retry_config(config)
        self.verify = _direct_trust(self.fs)

    async def open_store(self, bucket: str) -> Any:
        """The store of a bucket; on any event loop."""
        with _translated(f"s3://{bucket}", "connect to"):
            address = await run_on(self.fs.loop, self._resolve, bucket)
        return S3Store(
            bucket,
            # Not "endpoint": AWS_ENDPOINT_URL_S3 in the environment would go before it, and botocore has decided.
            aws_endpoint_url_s3=address.endpoint,
            region=address.region,
            virtual_hosted_style_request=address.virtual_hosted,
            client_options=self._client_options | {"allow_http": address.endpoint.startswith("http://")},
            retry_config=self._retry,
            credential_provider=None if self.fs.anon else credentials_from(self.fs.loop, self._credentials, bucket),
            **self._config,
        )

    async def _resolve(self, bucket: str) -> _Address:
        """Asks botocore for the address of an object: endpoint rules, profile and environment are in its answer."""
        client = await self._client(bucket)
        if not self.fs.anon:
            await self._credentials(bucket)  # raises where there are none, before obstore goes looking for its own
        url = await client.generate_presigned_url("head_object", Params={"Bucket": bucket, "Key": "key"})
        region = client.meta.region_name
        if region in {None, "aws-global"}:
            region = "us-east-1"
        on_aws = urlsplit(url).netloc.endswith((".amazonaws.com", ".amazonaws.com.cn"))
        actual = await self._region_of(client, bucket) if on_aws else None
        return _address(url, bucket, region, actual or region)

    async def _region_of(self, client: Any, bucket: str) -> str | None:
        """The bucket's region, where AWS tells: botocore follows redirects to it, obstore does not."""
        try:
            response = await client.head_bucket(Bucket=bucket)
        except boto_errors.ClientError as error:  # not allowed, say; the header is there all the same
            response = error.response
        region: str | None = response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("x-amz-bucket-region")
        return region

    async def _credentials(self, bucket: str) -> Any:
        """Obstore's ``S3Credential`` from s3fs's client, which refreshes them: profiles, SSO, roles, IRSA work."""
        client = await self._client(bucket)
        # The only way to what create_client was given or found: botocore has no public one.
        credentials = client._request_signer._credentials
        if credentials is None:
            raise boto_errors.NoCredentialsError
        frozen = await credentials.get_frozen_credentials()
        expiry: datetime | None = getattr(credentials, "_expiry_time", None)
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            # None for those that never change. botocore refreshes 15 minutes ahead, well before obstore asks again.
            "expires_at": expiry and expiry.astimezone(UTC),  # obstore takes no other time zone
        }

    async def _client(self, bucket: str) -> Any:
        await self.fs.set_session()
        return await self.fs.get_s3(bucket)


def _store_config(fs: S3FileSystem, config: Any) -> dict[str, Any]:
    """The ``S3Config`` settings that do not depend on the bucket."""
    asked_for = {name: value for name, value in (config.s3 or {}).items() if value not in {None, False}}
    if asked_for.get("signature_version") == "s3v4":
        del asked_for["signature_version"]  # obstore's only one
    s3 = {name: value for name, value in asked_for.items() if name not in _NOTHING_TO_TRANSLATE}
    require_known("the S3 configuration", s3, _S3_CONFIG)
    if config.signature_version not in {None, "s3v4", UNSIGNED}:
        raise UntranslatableError(f"the signature version {config.signature_version!r}")
    for name in ("client_cert", "proxies_config", "use_dualstack_endpoint", "use_fips_endpoint", "user_agent_extra"):
        if getattr(config, name, None):
            raise UntranslatableError(f"the configuration {name!r}")
    for name in ("request_checksum_calculation", "response_checksum_validation"):
        if fs.config_kwargs.get(name, "when_required") != "when_required":
            raise UntranslatableError(f"config_kwargs {name!r}")
    payer = fs.req_kw.get("RequestPayer") or fs.s3_additional_kwargs.get("RequestPayer")
    return {
        # A SHA-256 of every byte costs more than sending it; S3 accepts that there is none.
        "unsigned_payload": not s3.get("payload_signing_enabled", False),
        "skip_signature": bool(fs.anon),
        "request_payer": payer == "requester",
        "s3_express": False,
        **_encryption(fs.s3_additional_kwargs),
    }


def _encryption(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The ``S3Config`` settings for ``s3_additional_kwargs``, all of them."""
    require_known("s3_additional_kwargs", arguments, _ADDITIONAL_KWARGS)
    settings: dict[str, Any] = {}
    if algorithm := arguments.get("ServerSideEncryption"):
        settings["server_side_encryption"] = algorithm
    if key_id := arguments.get("SSEKMSKeyId"):
        settings["sse_kms_key_id"] = key_id
    if "BucketKeyEnabled" in arguments:
        settings["sse_bucket_key_enabled"] = bool(arguments["BucketKeyEnabled"])
    if key := arguments.get("SSECustomerKey"):
        raw = key.encode() if isinstance(key, str) else key
        settings["server_side_encryption"] = "sse-c"
        settings["sse_customer_key_base64"] = base64.b64encode(raw).decode()  # what botocore does with it
    return settings


def _client_options(fs: S3FileSystem, config: Any, scheme: str) -> ClientConfig:
    """Obstore's ``ClientConfig`` for the connection settings that botocore resolved."""
    options: ClientConfig = {"connect_timeout": timedelta(seconds=config.connect_timeout)}
    # botocore limits the wait for a socket. obstore's read_timeout counts from the start of the request, so that a
    # part going up a thin line would run into it: only the request as a whole has a limit, and a generous one.
    if config.read_timeout < S3FileSystem.read_timeout:
        raise UntranslatableError(f"config_kwargs 'read_timeout' below {S3FileSystem.read_timeout} s")
    options["timeout"] = max(timedelta(seconds=config.read_timeout), UPLOAD_PATIENCE)
    verify = _trusted(fs)
    if verify is False:
        options["allow_invalid_certificates"] = True
    elif verify is not True:
        options["root_certificate"] = Path(verify).read_bytes()
    if config.proxies is not None:
        if not config.proxies.get(scheme):  # obstore would take one from the environment
            raise UntranslatableError(f"config_kwargs 'proxies' with none for {scheme}")
        options["proxy_url"] = config.proxies[scheme]
    if "max_pool_connections" in fs.config_kwargs and fs.config_kwargs["max_pool_connections"] < _MOST_CONNECTIONS:
        raise UntranslatableError(f"config_kwargs 'max_pool_connections' below {_MOST_CONNECTIONS}")
    return options


def _direct_trust(fs: S3FileSystem) -> str | bool | None:
    """What :func:`_trusted` says of a connected filesystem; None where a URL does not say all that there is to say.

    It does not say who pays, and has no key that the customer keeps. Proxies and client certificates are for the
    client that knows them, as is whatever a class or a session of the user's does.
    """
    config = fs.s3.meta.config
    arguments = {**fs.req_kw, **fs.s3_additional_kwargs}
    users = type(fs) is not S3FileSystem or fs.storage_options.get("session") is not None
    if users or fs.anon or config.proxies or config.client_cert or _UNSAID_BY_A_URL & set(arguments):
        return None
    try:
        return _trusted(fs)
    except UntranslatableError:
        return None


def _trusted(fs: S3FileSystem) -> str | bool:
    """The file with the certificates of the authorities to trust; True for the usual ones, False for anyone."""
    verify = fs.client_kwargs.get("verify")
    if verify is None:
        verify = fs.session.get_config_variable("ca_bundle") or os.environ.get("REQUESTS_CA_BUNDLE")
    if not isinstance(verify, str | os.PathLike):
        return verify is not False
    if not Path(verify).is_file():
        raise UntranslatableError(f"the certificates {os.fspath(verify)!r}, which are not one file")
    return os.fspath(verify)


def _retry_config(config: Any) -> Any:
    """Obstore's ``RetryConfig``, or None for its own: 10 retries within 3 minutes."""
    retries = config.retries or {}
    require_known("config_kwargs 'retries'", retries, _RETRIES_IN_CONFIG)
    if retries.get("mode") == "adaptive":
        raise UntranslatableError("config_kwargs 'retries' in the mode 'adaptive'")
    if "total_max_attempts" in retries:
        return {"max_retries": retries["total_max_attempts"] - 1, "retry_timeout": timedelta(minutes=3)}
    if "max_attempts" in retries:
        return {"max_retries": retries["max_attempts"], "retry_timeout": timedelta(minutes=3)}
    return None
