"""Blocks that are staged and not committed: whose they are, how old, and how to be rid of them."""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, TypeVar

from azure.core import MatchConditions
from azure.core.exceptions import AzureError, HttpResponseError
from azure.storage.blob import BlobBlock

from torchferry.errors import CheckpointNotFoundError, StorageError, StorageUnavailableError

if TYPE_CHECKING:
    from azure.storage.blob.aio import BlobClient

    from torchferry_azure.backend import AzureBackend

__all__ = ["UncommittedBlocks", "fingerprint", "new_block_id", "newest"]

T = TypeVar("T")

_OURS = re.compile("([0-9a-f]{12})7[0-9a-f]{19}")
_NO_ETAG = '"none"'  # that no blob has
_UNCHANGED = MatchConditions.IfNotModified
_THERE_IS_A_BLOB = frozenset({HTTPStatus.CONFLICT, HTTPStatus.PRECONDITION_FAILED})


def new_block_id() -> str:
    """A random id for a block: milliseconds since 1970 in 12 hexadecimal digits, the digit 7, 19 random digits.

    It is as long as those of adlfs: all ids of a blob, those that another upload left behind among them, must be of one
    length. A random UUID, which others use, has a 4 where this has the 7.
    """
    return f"{time.time_ns() // 1_000_000:012x}7{secrets.token_hex(10)[1:]}"


def newest(blocks: Sequence[BlobBlock]) -> datetime | None:
    """When the last of these blocks was staged, by the clocks of their writers; None where none is torchferry's."""
    times = [int(found[1], 16) for block in blocks if (found := _OURS.fullmatch(str(block.id)))]
    return datetime.fromtimestamp(max(times) / 1000, UTC) if times else None


def fingerprint(blocks: Sequence[BlobBlock]) -> str:
    """Tells these blocks from others of the same blob."""
    ids = ",".join(sorted(str(block.id) for block in blocks))
    return hashlib.sha256(ids.encode()).hexdigest()[:16]


class UncommittedBlocks:
    """The uncommitted blocks of one blob."""

    def __init__(self, backend: AzureBackend, path: str) -> None:
        self._backend = backend
        self._path = path
        self._client = backend.client
        self._blob: BlobClient = backend.client.blob(path)
        self._why_never: str | None = None  # why no blocks of this blob can be discarded; None where nobody has asked

    async def list(self) -> Sequence[BlobBlock]:
        """The blocks; none where there is no such blob."""
        try:
            _, uncommitted = await self._call(partial(self._client.call, self._blob.get_block_list, "uncommitted"))
        except CheckpointNotFoundError:
            return []
        return uncommitted

    async def seen(self) -> bool:
        """Whether there are some, with one attempt; False where there is no answer."""
        try:
            _, uncommitted = await self._client.call(self._blob.get_block_list, "uncommitted")
        except AzureError:
            return False
        return bool(uncommitted)

    async def discard(self, mine: Callable[[Sequence[BlobBlock]], bool]) -> str:
        """Discards them, where the blob does not exist; returns why some stay, or "" where none do.

        Azure has no request for it. It discards them a week after the last of them came; when the blob is written;
        or, and that is what this does, when an empty block list is committed, which makes an empty blob, deleted at
        once. For the moment in between there is an empty blob.

        A blob that exists is left alone, and so are the blocks staged for it, which nobody can see: what discards them
        makes another version of it, or empties it (``docs/stores/azure.md``). So is one that the credentials may not
        delete, or that the container's policy makes immutable.

        Args:
            mine: Whether all of these blocks are the caller's. Where there are others too, another upload is under way,
                and all stay.
        """
        blocks = await self.list()
        if blocks and self._why_never is None:
            self._why_never = await self._ask_why_never()
            blocks = await self.list()  # once more, because that took a while
        if not blocks:
            return ""
        if not mine(blocks):
            return "another upload to this blob is under way"
        return self._why_never or await self._commit_nothing_and_delete()

    async def _ask_why_never(self) -> str:
        if not await self._may_delete():
            return "the credentials may not delete blobs"
        if await self._immutable():
            return "the container's policy keeps blobs from being deleted"
        return ""

    async def _may_delete(self) -> bool:
        """Whether the credentials may delete the blob, which does not exist: asked with an ETag that no blob has."""

        async def delete() -> bool:
            try:
                await self._client.call(self._blob.delete_blob, etag=_NO_ETAG, match_condition=_UNCHANGED)
            except HttpResponseError as error:
                if error.status_code in {HTTPStatus.NOT_FOUND, HTTPStatus.PRECONDITION_FAILED}:
                    return True
                raise
            return True

        try:
            return await self._call(delete)
        except StorageUnavailableError:
            raise
        except StorageError:
            return False

    async def _immutable(self) -> bool:
        """Whether what is written to the container cannot be deleted for a while; False where nobody tells."""
        container = self._client.container(self._blob.container_name)
        try:
            policy = await self._call(partial(self._client.call, container.get_container_properties))
        except StorageUnavailableError:
            raise
        except StorageError:
            return False
        versions = policy.immutable_storage_with_versioning_enabled
        return bool(policy.has_immutability_policy or policy.has_legal_hold or versions)

    async def _commit_nothing_and_delete(self) -> str:
        mark = {"torchferry_discards": new_block_id()}  # tells our empty blob, where the reply to its commit is lost

        async def commit() -> str | None:
            try:
                made = await self._client.call(
                    self._blob.commit_block_list, [], match_condition=MatchConditions.IfMissing, metadata=mark
                )
            except HttpResponseError as error:
                if error.status_code not in _THERE_IS_A_BLOB:
                    raise
            else:
                return str(made["etag"])
            found = await self._client.call(self._blob.get_blob_properties)
            return str(found.etag) if found.metadata == mark else None

        etag = await self._call(commit)
        if etag is None:
            return "the blob exists, and they go with its next version, or after a week"
        delete = partial(self._client.call, self._blob.delete_blob, etag=etag, match_condition=_UNCHANGED)
        with suppress(CheckpointNotFoundError):  # deleted already, and the reply was lost
            await self._call(delete)
        return ""

    async def _call(self, request: Callable[[], Awaitable[T]]) -> T:
        return await self._backend.call("clean up", self._path, request)
