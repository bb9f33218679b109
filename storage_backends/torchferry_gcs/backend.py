"""The Google Cloud Storage backend."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Mapping
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar
from xml.etree.ElementTree import Element

from gcsfs.core import GCSFileSystem

from torchferry.engine.retry import Transient
from torchferry.engine.transport import Answer, SignedRequest, Transport
from torchferry.engine.types import Chunk, ObjectStat
from torchferry.engine.writer import Limits, UploadPlan, upload
from torchferry.errors import CheckpointChangedError, CheckpointNotFoundError, StorageError, TorchferryError
from torchferry.storage.base import Leftover, ListedObject
from torchferry.storage.http import Engine, HttpBackend
from torchferry.storage.translate import require_key
from torchferry_gcs import errors
from torchferry_gcs.client import GcsClient, Reply, text_of
from torchferry_gcs.metadata import storable
from torchferry_gcs.target import Target
from torchferry_gcs.upload import GcsUpload

if TYPE_CHECKING:
    import asyncio

    from fsspec import AbstractFileSystem

__all__ = ["GcsBackend", "GcsEngine"]

_LIMITS = Limits()  # those of S3: https://cloud.google.com/storage/quotas#requests


class GcsEngine(Engine):
    """The engine, and what it has learned of the server.

    Attributes:
        speaks_xml: Whether the server speaks Google's XML API; None where nobody has asked it yet.
    """

    speaks_xml: bool | None = None


class _UploadGoneError(TorchferryError):
    """There is no such upload any more."""


class GcsBackend(HttpBackend):
    """Google Cloud Storage, configured by a gcsfs filesystem: its session, credentials and settings are used.

    A version is the object's generation. The filesystem option ``kms_key_name``, which gcsfs itself leaves alone, names
    the Cloud KMS key to encrypt with.
    """

    keeps_metadata = True
    checksum_refused: ClassVar[frozenset[int]] = frozenset()
    options_elsewhere: ClassVar[Mapping[str, str]] = {
        "anon": "token='anon'",
        "anonymous": "token='anon'",
        "credentials": "token",
        "key_file": "token",
        "keyfile": "token",
        "project_id": "project",
        "service_account": "token",
        "service_account_file": "token",
        "service_account_key": "token",
        "user_project": "requester_pays",
    }

    def __init__(self, fs: GCSFileSystem) -> None:
        super().__init__()
        self._fs = fs
        self.client = GcsClient(fs)
        self.kms_key_name: str | None = fs.storage_options.get("kms_key_name")

    @classmethod
    def filesystem_class(cls) -> type[AbstractFileSystem]:
        """gcsfs's; the one that newer ones register for buckets of other kinds is a subclass of it."""
        kind: type[AbstractFileSystem] = GCSFileSystem
        return kind

    @classmethod
    def from_filesystem(cls, fs: AbstractFileSystem) -> GcsBackend:
        """A backend for a gcsfs filesystem, or a subclass of it."""
        return cls(fs)

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The filesystem's event loop; None where its user drives it from a loop of their own."""
        return None if self._fs.asynchronous else self._fs.loop

    def url(self, path: str) -> str:
        """``gs://`` and the path."""
        return f"gs://{path}"

    def upload_plan(self, size: int, part_size: int | None = None) -> UploadPlan:
        """Parts of 16 MiB, or what the size needs; GCS takes 10,000 of 5 MiB to 5 GiB."""
        return UploadPlan.for_size(size, part_size, limits=_LIMITS)

    async def engine(self) -> GcsEngine:
        """The engine, unless a class or a session of the user's or a client certificate asks for the client."""
        engine = Engine.of(self._fs, self._make_engine, lambda fs: vars(fs).get("_session"))
        assert isinstance(engine, GcsEngine)  # noqa: S101 - it is what _make_engine makes
        return engine

    async def stat(self, path: str) -> ObjectStat:
        """Looks an object up, past gcsfs's listings cache."""
        found = await self.call("look up", path, partial(self._lookup, path))
        return ObjectStat(self.url(path), int(found["size"]), found.get("generation"), dict(found.get("metadata", {})))

    async def sign_read(self, path: str, stat: ObjectStat) -> SignedRequest:
        url = self._download_url(path, stat)
        version = None if stat.etag is None else ("x-goog-generation", stat.etag)
        return SignedRequest("GET", url, await self.client.headers(url), version)

    async def read_through_client(self, path: str, start: int, buffer: memoryview, stat: ObjectStat) -> None:
        asked = f"bytes {start}-{start + len(buffer) - 1}"

        def check(answered: Mapping[str, str]) -> None:
            if stat.etag is not None and answered.get("x-goog-generation", stat.etag) != stat.etag:
                raise CheckpointChangedError(f"{self.url(path)} was replaced while it was being read.")
            offered = answered.get("Content-Range", f"bytes 0-{stat.size - 1}").partition("/")[0]
            if offered != asked:
                raise StorageError(f"Cannot read the {asked} of {self.url(path)}: the store offered {offered}.")

        try:
            url = self._download_url(path, stat)
            await self.client.read_into(url, {"Range": asked.replace(" ", "=")}, buffer, check)
        except Exception as error:
            if not errors.is_missing(error):
                raise
            await self._lookup(path)  # raises where there is no object, or no bucket
            raise CheckpointChangedError(f"{self.url(path)} was replaced while it was being read.") from error

    async def write(
        self,
        path: str,
        chunks: AsyncIterable[Chunk],
        *,
        plan: UploadPlan,
        metadata: Mapping[str, str] | None = None,
    ) -> ObjectStat:
        """Uploads with one request of the JSON API, or a multipart upload of the XML API.

        A server that does not speak the XML API gets a resumable upload of the JSON API.
        """
        bucket, key, _ = self.address(path)
        kept = storable(self.url(path), metadata or {})
        return await upload(GcsUpload(Target(self, path, bucket, key, kept)), chunks, plan)

    async def delete(self, path: str) -> None:
        """Deletes an object."""
        bucket, key, generation = self.address(path)
        request = partial(self.client.call, "DELETE", self.client.object_url(bucket, key, generation=generation))
        try:
            await self.call("delete", path, request)
        except CheckpointNotFoundError:
            return
        self.forget(path)

    async def copy(self, source: str, target: str, size: int) -> bool:
        """With a rewrite, which GCS may want to be asked for several times."""
        token: str | None = None
        while True:
            url = self.client.rewrite_url(self.address(source), self.address(target), rewriteToken=token)
            request = partial(self.client.call, "POST", url)
            answer = (await self.call_shielded("copy", target, request)).json()
            if answer["done"]:
                self.forget(target)
                return True
            token = answer["rewriteToken"]

    async def list(self, prefix: str) -> AsyncIterator[ListedObject]:
        bucket, _, key = prefix.partition("/")
        token: str | None = None
        while True:
            url = self.client.objects_url(
                bucket,
                prefix=key or None,
                pageToken=token,
                fields="items(name,size,generation,updated),nextPageToken",
            )
            page = await self.call("list", prefix, partial(self._page, url))
            for found in page.get("items", []):
                path = f"{bucket}/{found['name']}"
                modified = _time(found.get("updated"))
                yield ListedObject(path, self.url(path), int(found["size"]), found.get("generation"), modified)
            token = page.get("nextPageToken")
            if not token:
                return

    async def leftovers(self, prefix: str) -> AsyncIterator[Leftover]:
        """Multipart uploads; each was last changed when its last part came, which takes one more request to know.

        Sessions of resumable uploads cannot be listed, and vanish after a week.
        """
        bucket, _, key = prefix.partition("/")
        await self.call("list", prefix, partial(self._of_bucket, self._first_object_url(bucket)))
        async for _, found in self.uploads(prefix, bucket, key):
            path, upload_id = f"{bucket}/{text_of(found, 'Key')}", text_of(found, "UploadId")
            try:
                parts = [part async for part in self.parts(path, upload_id)]
            except _UploadGoneError:  # completed or aborted meanwhile
                continue
            times = [_time(text_of(found, "Initiated")), *(_time(text_of(part, "LastModified")) for part in parts)]
            modified = max(filter(None, times), default=None)
            yield Leftover(path, self.url(path), "multipart upload", upload_id, modified)

    async def discard(self, leftover: Leftover) -> bool:
        await self.abort_upload(leftover.path, leftover.id)
        return True

    async def uploads(self, path: str, bucket: str, prefix: str) -> AsyncIterator[tuple[str, Element]]:
        """The multipart uploads under way; nothing where the server does not speak the XML API.

        Each as https://cloud.google.com/storage/docs/xml-api/get-bucket-uploads has it, with the store's own time.
        """
        if (await self.engine()).speaks_xml is False:
            return
        markers: dict[str, str] = {}
        while True:
            url = self.client.xml_url(bucket, "", uploads="", **({"prefix": prefix} if prefix else {}), **markers)
            try:
                reply = await self.call("list", path, partial(self._of_bucket, url))
            except StorageError as error:
                if errors.is_not_xml(error.__cause__):
                    return
                raise
            page = reply.xml("ListMultipartUploadsResult")
            if page is None:
                return
            for found in page.iterfind("{*}Upload"):
                yield reply.headers.get("Date", ""), found
            if text_of(page, "IsTruncated") != "true":
                return
            markers = {
                "key-marker": text_of(page, "NextKeyMarker"),
                "upload-id-marker": text_of(page, "NextUploadIdMarker"),
            }

    async def parts(self, path: str, upload_id: str) -> AsyncIterator[Element]:
        """The parts of an upload: https://cloud.google.com/storage/docs/xml-api/get-object-multipart."""
        bucket, _, key = path.partition("/")
        marker: dict[str, str] = {}

        async def request() -> Reply:
            try:
                return await self.client.call("GET", self.client.xml_url(bucket, key, uploadId=upload_id, **marker))
            except Exception as error:
                if errors.is_missing(error):
                    raise _UploadGoneError from error
                raise

        while True:
            page = (await self.call("list", path, request)).xml("ListPartsResult")
            if page is None:
                return
            for part in page.iterfind("{*}Part"):
                yield part
            if text_of(page, "IsTruncated") != "true":
                return
            marker = {"part-number-marker": text_of(page, "NextPartNumberMarker")}

    async def abort_upload(self, path: str, upload_id: str) -> None:
        """Aborts a multipart upload; one that is not there (any more) is no error."""
        bucket, _, key = path.partition("/")
        url = self.client.xml_url(bucket, key, uploadId=upload_id)

        async def abort() -> None:
            try:
                await self.client.call("DELETE", url)
            except Exception as error:
                if not errors.is_missing(error):
                    raise

        await self.call("clean up", path, abort)

    def address(self, path: str) -> tuple[str, str, str | None]:
        """The bucket, the key, and the generation where the path names one."""
        bucket, key, generation = self._fs.split_path(path)
        require_key(self.url(path), path)
        return bucket, key, generation

    def forget(self, path: str) -> None:
        """Lets gcsfs's listings find what is there now."""
        self._fs.invalidate_cache(path)

    async def resource(self, bucket: str, key: str, generation: str | None = None) -> dict[str, Any]:
        """An object as the store describes it: https://cloud.google.com/storage/docs/json_api/v1/objects#resource.

        One attempt.
        """
        return (await self.client.call("GET", self.client.object_url(bucket, key, generation=generation))).json()

    def is_damaged(self, answer: Answer) -> bool:
        return errors.is_damage(answer.body)

    def is_damage(self, error: Exception) -> bool:
        return isinstance(error, errors.GcsAnswerError) and error.damaged

    def transient(self, error: Exception) -> Transient | None:
        return errors.transient(error)

    def translate(self, what: str, error: Exception) -> StorageError:
        return errors.translate(what, error)

    async def _lookup(self, path: str) -> dict[str, Any]:
        bucket, key, generation = self.address(path)
        try:
            return await self.resource(bucket, key, generation)
        except Exception as error:
            if errors.is_missing(error):
                await self._require_bucket(bucket)
            raise

    async def _require_bucket(self, bucket: str) -> None:
        """Raises NoSuchBucketError where that is why nothing was found: an object's 404 does not tell."""
        try:
            # Listing, because whoever may read objects may mostly list them, and seldom look at the bucket itself.
            await self._of_bucket(self._first_object_url(bucket))
        except errors.NoSuchBucketError:
            raise
        except Exception:  # noqa: BLE001 - not allowed to know: then what the first request said stands
            return

    async def _of_bucket(self, url: str) -> Reply:
        """What is in a bucket. One attempt."""
        with errors.missing_bucket():
            return await self.client.call("GET", url)

    async def _page(self, url: str) -> dict[str, Any]:
        return (await self._of_bucket(url)).json()

    def _first_object_url(self, bucket: str) -> str:
        return self.client.objects_url(bucket, maxResults="1", fields="kind")

    def _download_url(self, path: str, stat: ObjectStat) -> str:
        bucket, key, _ = self.address(path)
        return self.client.download_url(bucket, key, generation=stat.etag)

    def _make_engine(self) -> GcsEngine:
        why_not = self.client.why_not_engine
        return GcsEngine(None, why_not) if why_not else GcsEngine(Transport())


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None
