"""The Azure backend."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any, ClassVar

from adlfs import AzureBlobFileSystem
from azure.core import MatchConditions
from azure.core.exceptions import HttpResponseError

from torchferry.engine.cancellation import in_thread
from torchferry.engine.memory import copy_bytes
from torchferry.engine.retry import Transient
from torchferry.engine.transport import Answer, SignedRequest, Transport
from torchferry.engine.types import MIB, Chunk, ObjectStat
from torchferry.engine.writer import Limits, UploadPlan, upload
from torchferry.errors import CheckpointNotFoundError, StorageError, UnsupportedURLError
from torchferry.storage.base import Leftover, ListedObject
from torchferry.storage.http import Engine, HttpBackend, error_code
from torchferry_azure import errors
from torchferry_azure.blocks import UncommittedBlocks, fingerprint, newest
from torchferry_azure.client import AzureClient
from torchferry_azure.letting_go import let_go, session_of
from torchferry_azure.metadata import storable
from torchferry_azure.upload import AzureUpload

if TYPE_CHECKING:
    import asyncio

    from azure.storage.blob import BlobProperties
    from fsspec import AbstractFileSystem

__all__ = ["AzureBackend"]

# https://learn.microsoft.com/rest/api/storageservices/understanding-block-blobs--append-blobs--and-page-blobs
_LIMITS = Limits(smallest_part=MIB, largest_part=4000 * MIB, most_parts=50_000)


class AzureBackend(HttpBackend):
    """Azure Blob Storage, configured by an adlfs filesystem, whose client signs every request.

    A version is the blob's ETag. A large blob is staged as blocks, concurrently, and committed at once. Block ids are
    random, so that blocks of two writers are never mixed; of two that write one blob at the same time, the first to
    commit wins, and Azure discards the other's blocks: that one gets a :class:`~torchferry.errors.StorageError`.

    After a failure or cancel, uncommitted blocks are discarded as far as Azure lets one: see
    :meth:`torchferry_azure.blocks.UncommittedBlocks.discard`. A note on the error, and the log, say which stay.
    """

    keeps_metadata = True
    checksum_refused: ClassVar[frozenset[int]] = frozenset({400, 501})
    options_elsewhere: ClassVar[Mapping[str, str]] = {
        "access_key": "account_key",
        "azure_storage_account_key": "account_key",
        "azure_storage_account_name": "account_name",
        "conn_str": "connection_string",
        "endpoint": "account_host",
        "endpoint_url": "account_host",
        "key": "account_key",
        "sas": "sas_token",
        "sas_key": "sas_token",
        "token": "credential",
    }

    def __init__(self, fs: AzureBlobFileSystem) -> None:
        super().__init__()
        self._fs = fs
        self.client = AzureClient(fs, self.url)

    @classmethod
    def filesystem_class(cls) -> type[AbstractFileSystem]:
        """The class of adlfs."""
        kind: type[AbstractFileSystem] = AzureBlobFileSystem
        return kind

    @classmethod
    def from_filesystem(cls, fs: AbstractFileSystem) -> AzureBackend:
        """A backend for an adlfs filesystem, or a subclass of it."""
        return cls(fs)

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The filesystem's event loop; None where its user drives it from a loop of their own."""
        return None if self._fs.asynchronous else self._fs.loop

    def url(self, path: str) -> str:
        """``abfs://`` and the path."""
        return f"abfs://{path}"

    def upload_plan(self, size: int, part_size: int | None = None) -> UploadPlan:
        """Blocks of 16 MiB, or what the size needs; Azure takes 50,000 of up to 4000 MiB.

        The filesystem's ``max_concurrency`` is honoured where it is less than 32.
        """
        plan = UploadPlan.for_size(size, part_size, limits=_LIMITS)
        return replace(plan, in_flight=min(plan.in_flight, self._fs.max_concurrency or plan.in_flight))

    async def engine(self) -> Engine:
        """The engine, unless a class of the user's or a location mode asks for the client."""
        return Engine.of(self._fs, self._make_engine, session_of)

    async def stat(self, path: str) -> ObjectStat:
        """Looks a blob up, past adlfs's listings cache."""
        blob = self.client.blob(path)
        found = await self.call("look up", path, partial(self.client.call, blob.get_blob_properties))
        return ObjectStat(self.url(path), found.size, found.etag or None, dict(found.metadata or {}))

    async def sign_read(self, path: str, stat: ObjectStat) -> SignedRequest:
        return await self.client.sign_read(path, stat.etag)

    async def read_through_client(self, path: str, start: int, buffer: memoryview, stat: ObjectStat) -> None:
        pinned: dict[str, Any] = {}
        if stat.etag:
            pinned = {"etag": stat.etag, "match_condition": MatchConditions.IfNotModified}
        download = self.client.blob(path).download_blob
        answer: Any = await self.client.call(download, start, len(buffer), max_concurrency=1, **pinned)
        data: bytes = await answer.readall()
        if len(data) != len(buffer):
            raise StorageError(
                f"Cannot read the bytes {start} to {start + len(buffer)} of {self.url(path)}: the store returned "
                f"{len(data)} bytes."
            )
        await in_thread(copy_bytes, buffer, data)

    async def write(
        self,
        path: str,
        chunks: AsyncIterable[Chunk],
        *,
        plan: UploadPlan,
        metadata: Mapping[str, str] | None = None,
    ) -> ObjectStat:
        """Uploads a small blob with one request, a large one as blocks that are committed at once."""
        self._require_no_version(path)
        return await upload(AzureUpload(self, path, storable(self.url(path), metadata or {})), chunks, plan)

    async def delete(self, path: str) -> None:
        """Deletes a blob, with its snapshots."""
        self._require_no_version(path)
        delete = partial(self.client.call, self.client.blob(path).delete_blob, delete_snapshots="include")
        try:
            await self.call("delete", path, delete)
        except CheckpointNotFoundError:
            return
        self.forget(path)

    async def list(self, prefix: str) -> AsyncIterator[ListedObject]:
        async for path, found in self._blobs(prefix, ["metadata"]):
            etag = f'"{found.etag.strip(chr(34))}"' if found.etag else None  # a listing has them without quotes
            yield ListedObject(path, self.url(path), found.size, etag, found.last_modified)

    async def leftovers(self, prefix: str) -> AsyncIterator[Leftover]:
        """Blobs that are nothing but uncommitted blocks.

        Those beside a blob that exists are not listed: that would take a request for each blob, and nothing safe
        removes them. When blocks of torchferry were staged stands in their ids; Azure does not tell.
        """
        async for path, found in self._blobs(prefix, ["metadata", "uncommittedblobs"]):
            if not found.size and (blocks := await UncommittedBlocks(self, path).list()):
                begun = newest(blocks) or found.last_modified
                yield Leftover(path, self.url(path), "uncommitted blocks", fingerprint(blocks), begun)

    async def discard(self, leftover: Leftover) -> bool:
        """Discards blocks, if they are still the same, there is no blob, and the credentials may delete it."""
        blocks = UncommittedBlocks(self, leftover.path)
        return not await blocks.discard(lambda found: fingerprint(found) == leftover.id)

    def forget(self, path: str) -> None:
        """Lets adlfs's listings find what is there now."""
        self._fs.invalidate_cache(self._fs._parent(path))

    def is_damaged(self, answer: Answer) -> bool:
        return errors.says_damaged(error_code(answer), str(answer))

    def is_damage(self, error: Exception) -> bool:
        return isinstance(error, HttpResponseError) and errors.says_damaged(
            errors.code_and_status(error)[0], str(error)
        )

    def transient(self, error: Exception) -> Transient | None:
        return errors.transient(error)

    def translate(self, what: str, error: Exception) -> StorageError:
        return errors.translate(what, error)

    async def _blobs(self, prefix: str, include: Sequence[str]) -> AsyncIterator[tuple[str, BlobProperties]]:
        """The blobs of a listing, with their paths, without the directories of a hierarchical namespace."""
        container, _, start = prefix.partition("/")
        token: str | None = None
        while True:
            page = partial(self.client.list_page, container, start, include, token)
            blobs, token = await self.call("list", prefix, page)
            for found in blobs:
                if (found.metadata or {}).get("hdi_isfolder") != "true":
                    yield f"{container}/{found.name}", found
            if not token:
                return

    def _require_no_version(self, path: str) -> None:
        if self.client.address(path)[2] is not None:
            raise UnsupportedURLError(
                f"{self.url(path)} names a version of a blob, which can only be read: leave out ?versionid= and what "
                "follows."
            )

    def _make_engine(self) -> Engine:
        let_go(self._fs)
        if type(self._fs) is not AzureBlobFileSystem:
            return Engine(None, f"{type(self._fs).__name__} is a subclass of AzureBlobFileSystem")
        if (mode := self._fs.service_client.location_mode) != "primary":
            return Engine(None, f"the location mode is {mode}")
        return Engine(_transport(self.client.silence))


@cache
def _transport(silence: float) -> Transport:
    """The connections of all filesystems: adlfs keeps every one of its filesystems until the process ends."""
    return Transport(silence=silence)
