"""Google Cloud Storage for torchferry: ``gs://`` and ``gcs://``.

Two planes, both configured by a gcsfs filesystem: :class:`GcsBackend` sends everything through gcsfs itself (JSON
API); where every setting translates, obstore moves the bytes (XML API) with gcsfs's credentials.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import secrets
from contextlib import suppress
from datetime import UTC, timedelta
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote, urlsplit

import aiohttp
import gcsfs.retry
import google.auth.exceptions
import google_crc32c
import requests
from gcsfs.retry import HttpError
from obstore.store import GCSStore

from torchferry.engine.tasks import task_group
from torchferry.errors import (
    CheckpointChangedError,
    CheckpointNotFoundError,
    StorageError,
    StoragePermissionError,
)
from torchferry.storage.base import MIB, Backend, Chunk, ObjectStat, Plane
from torchferry.engine.body import SEND_PIECE, RequestBody, whole_or_not_at_all
from torchferry.storage.bridge import (
    UPLOAD_PATIENCE,
    UntranslatableError,
    choose_plane,
    names,
    once_a_process,
    require_known,
)
from torchferry.engine.cancellation import in_thread
from torchferry.engine.transport import DirectReader, SignedGet
from torchferry.engine.writer import MultipartUpload, PartSizes, part_size_for, upload_parts
from torchferry.storage.obstore import ObstoreBackend
from torchferry.storage.translation import by_status, require_key, translated

if TYPE_CHECKING:
    import asyncio
    from collections.abc import AsyncIterable, Mapping, Sequence

    from fsspec import AbstractFileSystem
    from gcsfs import GCSFileSystem

__all__ = ["GcsBackend"]

logger = logging.getLogger("torchferry.storage")

_IN_FLIGHT = 10  # parts, composes or deletions under way at once
_MOST_SOURCES = 32  # of one compose: https://cloud.google.com/storage/docs/composite-objects
_LARGEST_PART = 64 << 30
_SMALLEST_PART = MIB
_CONTENT_TYPE = "application/octet-stream"


class GcsBackend(Backend):
    """Google Cloud Storage through gcsfs: every setting of the filesystem is honoured, gcsfs makes every request.

    A version is the object's generation. A large object is uploaded as components, concurrently, which are then
    composed into it in one atomic step and removed. They lie beside it, named ``.torchferry-<id>/<number>``. Every
    request carries the CRC32C of what it sends, and the store's answer is checked against it.

    The filesystem option ``kms_key_name``, which gcsfs itself leaves alone, names the Cloud KMS key to encrypt with.
    """

    plane = "fsspec"

    def __init__(self, fs: GCSFileSystem) -> None:
        self._fs = fs
        self._kms_key_name: str | None = fs.storage_options.get("kms_key_name")
        with suppress(UntranslatableError):  # then there are settings that only gcsfs can honour
            _require_translatable(fs)
            self.direct = DirectReader(self.sign)

    @classmethod
    def from_filesystem(cls, fs: AbstractFileSystem, plane: Plane) -> Backend:
        """The obstore plane where all settings of ``fs`` translate, or where ``plane`` says so; else this one.

        Raises:
            UnsupportedOptionError: ``plane`` is "obstore", and a setting does not translate.
        """
        return choose_plane(
            plane,
            "Google Cloud Storage",
            "gcsfs",
            fsspec=partial(cls, fs),
            obstore=partial(_obstore_backend, fs, forced=plane == "obstore"),
        )

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The filesystem's event loop; None where its user drives it from a loop of their own."""
        return None if self._fs.asynchronous else self._fs.loop

    def url(self, path: str) -> str:
        """``gs://`` and the path."""
        return f"gs://{path}"

    def write_cost(self, size: int, part_size: int | None) -> int:
        """What the connections buffer; parts are sent from the chunks' own memory."""
        del size, part_size
        return _IN_FLIGHT * 2 * SEND_PIECE

    async def stat(self, path: str) -> ObjectStat:
        """Looks an object up, past gcsfs's listings cache."""
        with _translated(self.url(path), "look up"):
            found = await self._lookup(path)
        return self._stat(path, found)

    async def read(self, path: str, start: int, stop: int, stat: ObjectStat) -> Chunk:
        """Reads a range of the generation that ``stat`` names, with one GET request."""
        if stop <= start:
            return b""
        bucket, key, _ = self.address(path)
        with _translated(self.url(path), "read"):
            try:
                headers, data = await self._fs._call(
                    "GET",
                    f"{self._fs._location}/download/storage/v1/b/{{}}/o/{{}}",
                    bucket,
                    key,
                    alt="media",
                    generation=stat.etag,
                    headers={"Range": f"bytes={start}-{stop - 1}"},
                )
            except FileNotFoundError as error:
                await self._lookup(path)  # raises where there is no object, or no bucket
                raise CheckpointChangedError(f"{self.url(path)} was replaced while it was being read.") from error
        asked = f"bytes {start}-{stop - 1}"
        offered = headers.get("Content-Range", asked).partition("/")[0]
        if offered != asked or len(data) != stop - start:
            raise StorageError(
                f"Cannot read the bytes {start} to {stop} of {self.url(path)}: "
                f"the store returned {len(data)} bytes ({offered})."
            )
        chunk: bytes = data
        return chunk

    async def sign(self, path: str, stat: ObjectStat) -> SignedGet:
        """The request that reads a version directly, with gcsfs's credentials."""
        bucket, key, _ = self.address(path)
        url = f"{self._fs._location}/download/storage/v1/b/{quote(bucket)}/o/{quote(key, safe='')}?alt=media"
        headers = await in_thread(_headers, self._fs)
        if stat.etag is None or not stat.etag.isdecimal():  # a server without generations
            return SignedGet.if_match(url, stat.etag, headers)
        return SignedGet(f"{url}&generation={stat.etag}", headers, ("x-goog-generation", stat.etag))

    async def write(
        self,
        path: str,
        chunks: AsyncIterable[Chunk],
        *,
        size_hint: int,
        part_size: int | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> ObjectStat:
        """Uploads a small object with one request, a large one as components that are composed."""
        size = part_size_for(size_hint, part_size, minimum=_SMALLEST_PART, maximum=_LARGEST_PART)
        upload = _Composition(self, path, dict(metadata or {}))
        return await upload_parts(upload, chunks, PartSizes(size, maximum=_LARGEST_PART), in_flight=_IN_FLIGHT)

    async def delete(self, path: str) -> None:
        """Deletes an object."""
        bucket, key, generation = self.address(path)
        with _translated(self.url(path), "delete"):
            try:
                await self._fs._call("DELETE", "b/{}/o/{}", bucket, key, generation=generation)
            except FileNotFoundError:
                return
        self._forget(path)

    def address(self, path: str) -> tuple[str, str, str | None]:
        """The bucket, the key, and the generation where the path names one."""
        bucket, key, generation = self._fs.split_path(path)
        require_key(self.url(path), key)
        return bucket, key, generation

    async def _lookup(self, path: str) -> dict[str, Any]:
        """The object's resource: https://cloud.google.com/storage/docs/json_api/v1/objects#resource."""
        bucket, key, generation = self.address(path)
        try:
            found: dict[str, Any] = await self._fs._call(
                "GET", "b/{}/o/{}", bucket, key, generation=generation, json_out=True
            )
        except FileNotFoundError:
            await self._require_bucket(bucket)
            raise
        return found

    async def _require_bucket(self, bucket: str) -> None:
        """Raises _NoSuchBucketError where that is why nothing was found: an object's 404 does not tell."""
        try:
            # Listing, because whoever may read objects may mostly list them, and seldom look at the bucket itself.
            await self._fs._call("GET", "b/{}/o", bucket, maxResults=1, fields="kind")
        except FileNotFoundError as error:
            raise _NoSuchBucketError from error
        except Exception:  # noqa: BLE001 - not allowed to know: then what the first request said stands
            return

    def _stat(self, path: str, found: Mapping[str, Any]) -> ObjectStat:
        return ObjectStat(self.url(path), int(found["size"]), found.get("generation"), dict(found.get("metadata", {})))

    def _forget(self, path: str) -> None:
        self._fs.invalidate_cache(path)


class _Component(NamedTuple):
    """An object that is, or becomes, a source of a compose: its name, and which version of it."""

    name: str
    generation: str | None


class _Composition(MultipartUpload[_Component, ObjectStat]):
    """One object on its way through gcsfs."""

    def __init__(self, backend: GcsBackend, path: str, metadata: dict[str, str]) -> None:
        self._backend = backend
        self._path = path
        self._metadata = metadata
        self._bucket, self._key, _ = backend.address(path)
        parent = self._key[: self._key.rfind("/") + 1]
        self._prefix = f"{parent}.torchferry-{secrets.token_hex(8)}/"
        self._components: list[str] = []  # those that exist, or may

    async def put_whole(self, body: Sequence[Chunk]) -> ObjectStat:
        with self._translated():
            return self._published(await self._insert(body))

    async def start(self) -> None:
        """Nothing: components are objects of their own."""

    async def put_part(self, index: int, body: Sequence[Chunk]) -> _Component:
        name = self._next_name(f"{index:05}")
        with self._translated():
            return _Component(name, (await self._insert_component(name, body)).get("generation"))

    async def finish(self, parts: Sequence[_Component]) -> ObjectStat:
        level = 0
        with self._translated():
            while len(parts) > _MOST_SOURCES:
                parts = await self._compose_groups(parts, level)
                level += 1
            found = await self._compose(self._key, parts)
        if failures := await self._remove_components():
            logger.warning(
                "%s is complete, but %d of its components in gs://%s/%s could not be removed: %s",
                *(self._backend.url(self._path), len(failures), self._bucket, self._prefix, failures[0]),
            )
        return self._published(found)

    async def abort(self) -> None:
        with self._translated():
            if failures := await self._remove_components():
                raise failures[0]

    async def _compose_groups(self, parts: Sequence[_Component], level: int) -> list[_Component]:
        """Composes components into larger ones, in order: fewer are left, if possible 32."""
        groups = _grouped(parts)
        composed: dict[int, _Component] = {}

        async def compose(index: int) -> None:
            if len(groups[index]) == 1:
                composed[index] = groups[index][0]
                return
            name = self._next_name(f"composed-{level}-{index:05}")
            composed[index] = _Component(name, (await self._compose(name, groups[index])).get("generation"))

        await _concurrently(compose, range(len(groups)))
        return [composed[index] for index in range(len(groups))]

    async def _compose(self, name: str, sources: Sequence[_Component]) -> dict[str, Any]:
        """Makes an object from others: https://cloud.google.com/storage/docs/json_api/v1/objects/compose.

        Atomic, and safe to repeat when a reply was lost: the sources stay as they are.
        """
        final = name == self._key
        request = {
            "kind": "storage#composeRequest",
            "sourceObjects": [source._asdict() for source in sources],
            "destination": {
                "contentType": _CONTENT_TYPE,
                **({"metadata": self._metadata} if final and self._metadata else {}),
            },
        }
        found: dict[str, Any] = await self._backend._fs._call(
            "POST",
            "b/{}/o/{}/compose",
            self._bucket,
            name,
            json=request,
            kmsKeyName=self._backend._kms_key_name,
            json_out=True,
        )
        return found

    async def _insert(self, data: Sequence[Chunk]) -> dict[str, Any]:
        """Uploads the object in one request: its description, and its bytes.

        The description has the CRC32C, so that the store refuses damaged bytes.
        https://cloud.google.com/storage/docs/uploading-objects (JSON API, multipart upload)
        """
        checksum = await in_thread(_crc32c, data)
        description: dict[str, Any] = {"name": self._key, "contentType": _CONTENT_TYPE, "crc32c": checksum}
        if self._metadata:
            description["metadata"] = self._metadata
        boundary = secrets.token_hex(16)
        head = (
            f"--{boundary}\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n{json.dumps(description)}\r\n"
            f"--{boundary}\r\nContent-Type: {_CONTENT_TYPE}\r\n\r\n"
        )
        body = RequestBody([head.encode(), *data, f"\r\n--{boundary}--\r\n".encode()])
        return await self._upload(
            body, checksum, content_type=f"multipart/related; boundary={boundary}", uploadType="multipart"
        )

    async def _insert_component(self, name: str, data: Sequence[Chunk]) -> dict[str, Any]:
        """Uploads a component: a request of nothing but its bytes; damaged ones are noticed before they are composed.

        https://cloud.google.com/storage/docs/uploading-objects (JSON API, media upload)
        """
        checksum = await in_thread(_crc32c, data)
        return await self._upload(
            RequestBody(data), checksum, content_type=_CONTENT_TYPE, uploadType="media", name=name
        )

    async def _upload(
        self, body: RequestBody, checksum: str, *, content_type: str, **parameters: str
    ) -> dict[str, Any]:
        fs = self._backend._fs
        call = partial(
            fs._call,
            "POST",
            f"{fs._location}/upload/storage/v1/b/{{}}/o",
            self._bucket,
            headers={"Content-Type": content_type, "Content-Length": str(len(body))},
            data=body,
            json_out=True,
            kmsKeyName=self._backend._kms_key_name,
            **parameters,
        )
        found: dict[str, Any] = await whole_or_not_at_all(body, call)
        if found.get("crc32c", checksum) != checksum:
            raise StorageError(
                f"Cannot write {self._backend.url(self._path)}: bytes were damaged on the way to the store "
                f"(CRC32C {found['crc32c']} instead of {checksum})."
            )
        return found

    async def _remove_components(self) -> list[Exception]:
        """Removes every component, and returns what went wrong."""
        failures: list[Exception] = []

        async def remove(index: int) -> None:
            try:
                await self._backend._fs._call("DELETE", "b/{}/o/{}", self._bucket, self._components[index])
            except FileNotFoundError:
                return
            except Exception as error:  # noqa: BLE001 - the others are to be removed all the same
                failures.append(error)

        await _concurrently(remove, range(len(self._components)))
        self._components.clear()
        return failures

    def _next_name(self, name: str) -> str:
        self._components.append(self._prefix + name)
        return self._components[-1]

    def _published(self, found: Mapping[str, Any]) -> ObjectStat:
        self._backend._forget(self._path)
        return ObjectStat(self._backend.url(self._path), int(found["size"]), found.get("generation"), self._metadata)

    def _translated(self) -> Any:
        return _translated_write(self._backend.url(self._path), "write")


def _grouped(parts: Sequence[_Component]) -> list[Sequence[_Component]]:
    """Cuts more than 32 components into groups, most of them of one: the fewest composes that leave 32 components.

    Where composing them once does not leave so few, all are in groups of 32.
    """
    excess = len(parts) - _MOST_SOURCES
    full, rest = divmod(excess, _MOST_SOURCES - 1)  # a compose of 32 leaves 31 fewer
    sizes = [_MOST_SOURCES] * full + ([rest + 1] if rest else [])
    if sum(sizes) > len(parts):
        sizes = [_MOST_SOURCES] * (len(parts) // _MOST_SOURCES)
    groups = []
    start = 0
    for size in sizes:
        groups.append(parts[start : start + size])
        start += size
    return groups + [parts[index : index + 1] for index in range(start, len(parts))]


async def _concurrently(func: Any, indexes: range) -> None:
    """Calls ``func`` with every index, a few at once."""
    left = iter(indexes)

    async def work() -> None:
        for index in left:
            await func(index)

    async with task_group() as tasks:
        for _ in range(min(_IN_FLIGHT, len(indexes))):
            tasks.start_soon(work)


def _crc32c(data: Sequence[Chunk]) -> str:
    """The CRC32C of buffers, as GCS writes it: big-endian, in base64."""
    value = 0
    for chunk in data:
        view = memoryview(chunk)
        for start in range(0, len(view), SEND_PIECE):  # it takes bytes only: copied in pieces that stay in the cache
            value = google_crc32c.extend(value, bytes(view[start : start + SEND_PIECE]))
    return base64.b64encode(value.to_bytes(4, "big")).decode()


# --- errors ---------------------------------------------------------------------------------------------------------


class _NoSuchBucketError(FileNotFoundError):
    """The bucket is what is missing."""


def _translate(what: str, error: Exception, missing: str = "there is no such object") -> StorageError:
    """The torchferry error for one of gcsfs; ``missing`` says what a 404 means."""
    status = _status(error)
    reason = str(error) or type(error).__name__
    if isinstance(error, _NoSuchBucketError):
        return CheckpointNotFoundError(f"{what}: the bucket does not exist.")
    if isinstance(error, FileNotFoundError):
        return CheckpointNotFoundError(f"{what}: {missing}.")
    unanswered = isinstance(error, _CONNECTION_ERRORS)
    if isinstance(error, _CREDENTIAL_ERRORS) and not unanswered:
        return StoragePermissionError(f"{what}: no usable credentials. {reason}")
    return by_status(what, reason, status, unanswered=unanswered)


_translated = partial(translated, _translate)
_translated_write = partial(translated, partial(_translate, missing="the bucket does not exist"))

_CONNECTION_ERRORS = (
    aiohttp.ClientError,
    google.auth.exceptions.TransportError,
    requests.exceptions.RequestException,
    ConnectionError,
    TimeoutError,
)
_CREDENTIAL_ERRORS = (
    google.auth.exceptions.GoogleAuthError,
    *([gcsfs.retry.NonRetryableError] if "NonRetryableError" in vars(gcsfs.retry) else []),  # newer gcsfs has it
)


def _status(error: Exception) -> int:
    """The HTTP status behind an error of gcsfs (``gcsfs.retry.validate_response``); 0 where it does not tell."""
    if isinstance(error, HttpError) and error.code is not None:
        return int(error.code)
    if type(error) is OSError and str(error).startswith("Forbidden"):
        return HTTPStatus.FORBIDDEN
    if isinstance(error, FileExistsError):  # what it makes of a 412
        return HTTPStatus.PRECONDITION_FAILED
    return 0


# --- the bridge to obstore ------------------------------------------------------------------------------------------

# What a gcsfs filesystem can be given. Anything not named here or below keeps the bytes on the fsspec plane.
_TRANSLATED = names("project access token requests_timeout requester_pays endpoint_url")
_ABOUT_OTHER_CALLS = names(
    "block_size cache_timeout secure_serialize check_connection asynchronous loop timeout default_location "
    "use_listings_cache listings_expiry_time max_paths skip_instance_cache finalize_on_close "
    "mrd_pool_cache_size max_mrd_pool_cache_queue_size memmove_max_workers "
    "retry_timeout retry_initial retry_maximum retry_multiplier"
)  # listings, file objects, buckets, gRPC, and how fsspec keeps instances
_UNTRANSLATED = names("consistency session_kwargs version_aware kms_key_name")
_FILESYSTEM_CLASSES = names("gcsfs.core.GCSFileSystem gcsfs.extended_gcsfs.ExtendedGcsFileSystem")


def _obstore_backend(fs: GCSFileSystem, *, forced: bool) -> ObstoreBackend:
    """The obstore backend for ``fs``.

    Raises:
        UntranslatableError: a setting does not translate.
    """
    _require_translatable(fs)
    host = urlsplit(fs._location).hostname or ""
    if not forced and not _speaks_xml(host):
        raise UntranslatableError(
            f"the endpoint {fs._location}, which may not speak Google's XML API (plane='obstore' says it does)"
        )
    return once_a_process(fs, lambda: _GcsThroughObstore(fs))


class _GcsThroughObstore(ObstoreBackend):
    """Google Cloud Storage through obstore, beside a gcsfs filesystem that its user goes on using.

    A version is the object's generation, on this plane too; its ETag only where a server has no generations. Google's
    ETags may be those of the bytes, and the same after they were written anew.

    Without credentials only reads go through obstore: for anything else it looks for some of its own, and does not find
    the user's.
    """

    def __init__(self, fs: GCSFileSystem) -> None:
        super().__init__("gs", _Bridge(fs).open_store, forget=fs.invalidate_cache, verify=True)
        self._through_gcsfs = GcsBackend(fs)
        self._anonymously = self._through_gcsfs if fs.credentials.credentials is None else None

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The loop of gcsfs where that writes; else any."""
        return self._anonymously.loop if self._anonymously else None

    async def read(self, path: str, start: int, stop: int, stat: ObjectStat) -> Chunk:
        try:
            return await super().read(path, start, stop, stat)
        except CheckpointNotFoundError as error:
            await self.stat(path)  # raises where there is no object, or no bucket
            raise CheckpointChangedError(f"{self.url(path)} was replaced while it was being read.") from error

    async def _sign(self, path: str, stat: ObjectStat) -> SignedGet:
        return await self._through_gcsfs.sign(path, stat)

    async def write(
        self,
        path: str,
        chunks: AsyncIterable[Chunk],
        *,
        size_hint: int,
        part_size: int | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> ObjectStat:
        write = self._anonymously.write if self._anonymously else super().write
        return await write(path, chunks, size_hint=size_hint, part_size=part_size, metadata=metadata)

    async def delete(self, path: str) -> None:
        await (self._anonymously.delete(path) if self._anonymously else super().delete(path))

    def _version(self, found: Mapping[str, Any]) -> str | None:
        return found["version"] or super()._version(found)

    def _pinned_to(self, version: str) -> dict[str, str]:
        return {"version": version} if version.isdecimal() else super()._pinned_to(version)  # ETags are in quotes


def _require_translatable(fs: GCSFileSystem) -> None:
    """Raises UntranslatableError for settings that obstore has nothing for."""
    if f"{type(fs).__module__}.{type(fs).__qualname__}" not in _FILESYSTEM_CLASSES:
        raise UntranslatableError(f"the filesystem class {type(fs).__name__}, a subclass of GCSFileSystem")
    require_known("the option", fs.storage_options, _TRANSLATED | _ABOUT_OTHER_CALLS | _UNTRANSLATED)
    for name, value in (
        ("consistency", fs.consistency != "none"),
        ("session_kwargs", fs.session_kwargs),
        ("version_aware", fs.version_aware),
        ("kms_key_name", fs.storage_options.get("kms_key_name")),
    ):
        if value:
            raise UntranslatableError(f"the option {name!r}")
    if vars(fs).get("_use_client_cert"):
        raise UntranslatableError("a client certificate (mutual TLS)")


def _speaks_xml(host: str) -> bool:
    """Whether a host is Google's own, in any universe; private endpoints are below googleapis.com too."""
    universe = os.environ.get("GOOGLE_CLOUD_UNIVERSE_DOMAIN", "googleapis.com")  # as gcsfs has it
    return host.endswith(".googleapis.com") or host == f"storage.{universe}"


class _Bridge:
    """Makes obstore stores from a gcsfs filesystem."""

    def __init__(self, fs: GCSFileSystem) -> None:
        self._fs = fs

    async def open_store(self, bucket: str) -> Any:
        """The store of a bucket; on any event loop."""
        with _translated(f"gs://{bucket}", "connect to"):
            headers = await in_thread(_headers, self._fs)
        headers.pop("authorization", None)
        anonymous = self._fs.credentials.credentials is None
        timeout = self._fs.requests_timeout
        return GCSStore(
            bucket,
            base_url=self._fs._location,
            skip_signature=anonymous,
            credential_provider=None if anonymous else self._credential,
            client_options={
                "allow_http": self._fs._location.startswith("http://"),
                "default_headers": headers,
                "timeout": timedelta(seconds=timeout) if timeout else UPLOAD_PATIENCE,
            },
        )

    def _credential(self) -> Any:
        """Obstore's ``GCSCredential`` from gcsfs's credentials, which are renewed 5 minutes before they expire.

        Obstore asks again less than that before, in threads of its own.
        """
        headers = _headers(self._fs)
        expiry = self._fs.credentials.credentials.expiry
        return {
            "token": headers["authorization"].removeprefix("Bearer "),
            "expires_at": expiry.replace(tzinfo=UTC) if expiry else None,  # google-auth's is UTC, and does not say so
        }


def _headers(fs: GCSFileSystem) -> dict[str, str]:
    """What google-auth and gcsfs add to a request: the token, and the project to bill."""
    headers: dict[str, str] = {}
    fs.credentials.apply(headers)
    if project := fs._get_params({}).get("userProject"):
        headers["x-goog-user-project"] = project
    return headers
