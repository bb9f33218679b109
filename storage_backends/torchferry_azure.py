"""Azure Blob Storage for torchferry: ``az://``, ``abfs://`` and ``abfss://``.

Two planes, both configured by an adlfs filesystem: :class:`AzureBackend` sends everything through the client that
adlfs made (``azure.storage.blob.aio``); where every setting translates, obstore moves the bytes with adlfs's
credentials.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import uuid
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from azure.core import MatchConditions
from azure.core.credentials import AzureSasCredential
from azure.core.exceptions import AzureError, ClientAuthenticationError, HttpResponseError
from azure.storage.blob import BlobBlock, BlobSasPermissions, generate_blob_sas
from azure.storage.blob._shared.authentication import SharedKeyCredentialPolicy
from obstore.store import AzureStore

from torchferry.engine.loops import run_on
from torchferry.errors import (
    CheckpointNotFoundError,
    StorageError,
    StoragePermissionError,
    UnsupportedOptionError,
)
from torchferry.storage.base import MIB, Backend, Chunk, ObjectStat, Plane
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
from torchferry.engine.cancellation import run_shielded
from torchferry.engine.transport import DirectReader, SignedGet
from torchferry.engine.writer import MultipartUpload, PartSizes, part_size_for, upload_parts
from torchferry.storage.obstore import ObstoreBackend
from torchferry.storage.translation import REFUSED, by_status, require_key, translated

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator, Callable, Mapping, Sequence

    from adlfs import AzureBlobFileSystem
    from azure.storage.blob.aio import BlobClient
    from fsspec import AbstractFileSystem

__all__ = ["AzureBackend"]

logger = logging.getLogger("torchferry.storage")

# https://learn.microsoft.com/rest/api/storageservices/understanding-block-blobs--append-blobs--and-page-blobs
_MOST_BLOCKS = 50_000
_LARGEST_BLOCK = 4000 * MIB
_SMALLEST_BLOCK = MIB
_LARGEST_SINGLE_PUT = MIB  # Azure takes more, but the client library copies it, and sends it in one piece
_IN_FLIGHT = 10
_CLEANUP_SECONDS = 30.0
_LATE_BLOCK_SECONDS = 0.1
_MOST_TELLING_BYTES = 1 << 16
_INVALID_BLOCK_LIST = "InvalidBlockList"
_OTHER_WRITER = "{}: another writer wrote it at the same time, and Azure kept that one."
_SIGNED_FOR = timedelta(hours=1)
_SCOPE = "https://storage.azure.com/.default"


class AzureBackend(Backend):
    """Azure Blob Storage through adlfs's client: every setting of the filesystem is honoured.

    A version is the blob's ETag. A large blob is staged as blocks, concurrently, and committed at once. Block ids are
    random, so that blocks of two writers are never mixed; of two that write one blob at the same time, the first to
    commit wins, and Azure discards the other's blocks: that one gets a :class:`~torchferry.errors.StorageError`.

    After a failure or cancel, uncommitted blocks are discarded as far as Azure lets one: see
    :meth:`discard_uncommitted`.
    """

    plane = "fsspec"

    def __init__(self, fs: AzureBlobFileSystem) -> None:
        self._fs = fs
        self._timeouts: dict[str, Any] = vars(fs).get("_timeout_kwargs", {})
        with suppress(UntranslatableError):  # then there are settings that only adlfs can honour
            _require_translatable(fs)
            self.direct = DirectReader(self.sign)

    @classmethod
    def from_filesystem(cls, fs: AbstractFileSystem, plane: Plane) -> Backend:
        """The obstore plane where all settings of ``fs`` translate, or where ``plane`` says so; else this one.

        Raises:
            UnsupportedOptionError: ``plane`` is "obstore", and a setting does not translate.
        """
        return choose_plane(plane, "Azure", "adlfs", fsspec=partial(cls, fs), obstore=partial(_obstore_backend, fs))

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The filesystem's event loop; None where its user drives it from a loop of their own."""
        return None if self._fs.asynchronous else self._fs.loop

    def url(self, path: str) -> str:
        """``abfs://`` and the path."""
        return f"abfs://{path}"

    def write_cost(self, size: int, part_size: int | None) -> int:
        """What the connections buffer, or the copy of a small blob; blocks are sent from the chunks' own memory."""
        del part_size
        return max(self._in_flight * 2 * SEND_PIECE, min(size, _LARGEST_SINGLE_PUT))

    async def stat(self, path: str) -> ObjectStat:
        """Looks a blob up, past adlfs's listings cache."""
        with _translated(self.url(path), "look up"):
            found = await self.blob(path).get_blob_properties(**self._timeouts)
        return ObjectStat(self.url(path), found.size, found.etag, dict(found.metadata or {}))

    async def read(self, path: str, start: int, stop: int, stat: ObjectStat) -> Chunk:
        """Reads a range, pinned to the ETag."""
        if stop <= start:
            return b""
        pinned: dict[str, Any] = (
            {"etag": stat.etag, "match_condition": MatchConditions.IfNotModified} if stat.etag else {}
        )
        with _translated(self.url(path), "read"):
            download = await self.blob(path).download_blob(
                start, stop - start, max_concurrency=1, **pinned, **self._timeouts
            )
            data = await download.readall()
        if len(data) != stop - start:
            raise StorageError(
                f"Cannot read the bytes {start} to {stop} of {self.url(path)}: the store returned {len(data)} bytes."
            )
        chunk: bytes = data
        return chunk

    async def sign(self, path: str, stat: ObjectStat) -> SignedGet:
        """The request that reads a version directly, with the credentials of adlfs's client."""
        blob = self.blob(path)
        url, credential = str(blob.url), blob.credential
        if isinstance(credential, SharedKeyCredentialPolicy):
            signature = generate_blob_sas(
                credential.account_name,
                blob.container_name,
                blob.blob_name,
                account_key=credential.account_key,
                permission=BlobSasPermissions(read=True),
                expiry=datetime.now(UTC) + _SIGNED_FOR,
            )
            url += f"?{signature}"
        elif isinstance(credential, AzureSasCredential):
            url += f"?{credential.signature.lstrip('?')}"
        elif credential is not None:
            token = (await _bearer_token(credential))["token"]
            headers = {"Authorization": f"Bearer {token}", "x-ms-version": blob.api_version}
            return SignedGet.if_match(url, stat.etag, headers)
        return SignedGet.if_match(url, stat.etag)

    async def write(
        self,
        path: str,
        chunks: AsyncIterable[Chunk],
        *,
        size_hint: int,
        part_size: int | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> ObjectStat:
        """Uploads a small blob with one request, a large one as blocks that are committed at once."""
        limits = {"maximum": _LARGEST_BLOCK, "max_parts": _MOST_BLOCKS}
        sizes = PartSizes(part_size_for(size_hint, part_size, minimum=_SMALLEST_BLOCK, **limits), **limits)
        upload = _BlockUpload(self, path, _storable(self.url(path), metadata or {}))
        return await upload_parts(upload, chunks, sizes, in_flight=self._in_flight)

    async def delete(self, path: str) -> None:
        """Deletes a blob, with its snapshots."""
        with _translated(self.url(path), "delete"):
            try:
                await self.blob(path).delete_blob(delete_snapshots="include", **self._timeouts)
            except HttpResponseError as error:
                if error.status_code != HTTPStatus.NOT_FOUND:
                    raise
        self.forget(path)

    async def discard_uncommitted(self, path: str, mine: Callable[[BlobBlock], bool]) -> None:
        """Discards the uncommitted blocks of a blob that does not exist, after a failed upload.

        Azure has no request for it. It discards them a week after the last of them came; when the blob is written;
        or, and that is what this does, when an empty block list is committed, which makes an empty blob, deleted at
        once. For the moment in between there is an empty blob.

        A blob that exists is left alone, and so are the blocks staged for it, which nobody can see: what discards them
        makes another version of it, or empties it (``docs/clouds.md``). So is one that the credentials may not delete,
        or that the container's policy makes immutable.

        Args:
            path: Where the blob would be.
            mine: Whether a block is the failed upload's. Where there are others too, another upload is under way, and
                all stay.
        """
        blob = self.blob(path)
        with _translated(self.url(path), "clean up"):
            try:
                _, uncommitted = await blob.get_block_list("uncommitted", **self._timeouts)
            except HttpResponseError as error:
                if error.status_code == HTTPStatus.NOT_FOUND:
                    return
                raise
            if not uncommitted or not all(map(mine, uncommitted)):
                return
            if await self._may_delete(blob) and not await self._immutable(blob):
                await self._commit_nothing_and_delete(blob)

    async def block_sizes(self, path: str) -> list[int]:
        """How many bytes each block of a blob has, in its order; none for a blob that was put in one request."""
        with _translated(self.url(path), "look up"):
            committed, _ = await self.blob(path).get_block_list("committed", **self._timeouts)
        return [block.size for block in committed]

    def blob(self, path: str) -> BlobClient:
        """The client of one blob."""
        container, _, key = path.partition("/")
        require_key(self.url(path), key)
        version = None
        if self._fs.version_aware:
            key, _, version = key.partition("?versionid=")
        client: BlobClient = self._fs.service_client.get_blob_client(container, key, version_id=version or None)
        return client

    def forget(self, path: str) -> None:
        """Lets adlfs's listings find what is there now."""
        self._fs.invalidate_cache(self._fs._parent(path))

    @property
    def _in_flight(self) -> int:
        return min(_IN_FLIGHT, self._fs.max_concurrency or _IN_FLIGHT)

    async def _may_delete(self, blob: BlobClient) -> bool:
        """Whether the credentials may delete the blob, which does not exist: asked with an ETag that no blob has."""
        try:
            await blob.delete_blob(etag='"none"', match_condition=MatchConditions.IfNotModified, **self._timeouts)
        except HttpResponseError as error:
            return error.status_code in {HTTPStatus.NOT_FOUND, HTTPStatus.PRECONDITION_FAILED}
        return True

    async def _immutable(self, blob: BlobClient) -> bool:
        """Whether what is written to the container cannot be deleted for a while; False where nobody tells."""
        container = self._fs.service_client.get_container_client(blob.container_name)
        try:
            policy = await container.get_container_properties(**self._timeouts)
        except HttpResponseError:
            return False
        versions = policy.immutable_storage_with_versioning_enabled
        return bool(policy.has_immutability_policy or policy.has_legal_hold or versions)

    async def _commit_nothing_and_delete(self, blob: BlobClient) -> None:
        try:
            empty: dict[str, Any] = await blob.commit_block_list(
                [], match_condition=MatchConditions.IfMissing, **self._timeouts
            )
        except HttpResponseError as error:
            if error.status_code in {HTTPStatus.CONFLICT, HTTPStatus.PRECONDITION_FAILED}:  # there is a blob
                return
            raise
        await blob.delete_blob(etag=empty["etag"], match_condition=MatchConditions.IfNotModified, **self._timeouts)


def _storable(url: str, metadata: Mapping[str, str]) -> dict[str, str]:
    """User metadata as Azure takes it: its names must be C# identifiers, in ASCII, whose case does not count.

    Azure looks at it with the last request of an upload, and takes spaces around a value for a wrong signature.

    Raises:
        UnsupportedOptionError: two names would become one, or a value is not ASCII.
    """
    storable: dict[str, str] = {}
    asked: dict[str, str] = {}
    for name, value in metadata.items():
        if not value.isascii():
            raise UnsupportedOptionError(f"{url}: Azure keeps metadata in ASCII only, unlike {name!r}: {value!r}.")
        identifier = re.sub(r"^(?=[0-9])", "_", re.sub(r"[^A-Za-z0-9_]", "_", name))
        if (other := asked.setdefault(identifier.lower(), name)) != name:
            raise UnsupportedOptionError(f"{url}: the metadata {other!r} and {name!r} have the same name on Azure.")
        storable[identifier] = value.strip()
    return storable


class _BlockUpload(MultipartUpload[BlobBlock, ObjectStat]):
    """One blob on its way through adlfs's client."""

    def __init__(self, backend: AzureBackend, path: str, metadata: dict[str, str]) -> None:
        self._backend = backend
        self._path = path
        self._metadata = metadata
        self._blob = backend.blob(path)
        self._size = 0
        self._staged: set[str] = set()  # ids of blocks that the store has, or may have

    async def put_whole(self, body: Sequence[Chunk]) -> ObjectStat:
        if sum(map(len, body)) > _LARGEST_SINGLE_PUT:
            return await self._put_as_block(body)
        with self._translated():
            answer = await self._blob.upload_blob(
                b"".join(body), overwrite=True, metadata=self._metadata, **self._backend._timeouts
            )
        self._size = sum(map(len, body))
        return self._published(answer)

    async def start(self) -> None:
        """Nothing: the first block opens the upload."""

    async def put_part(self, index: int, body: Sequence[Chunk]) -> BlobBlock:
        # As long as those of adlfs and obstore: all ids of a blob, also those that another upload left behind, must be.
        block = BlobBlock(uuid.uuid4().hex)
        data = RequestBody(body)
        sent: Any = data  # the library's types do not know that it takes asynchronous iterables too
        stage = partial(self._blob.stage_block, block.id, sent, length=len(data), **self._backend._timeouts)
        with self._translated():
            try:
                await whole_or_not_at_all(data, stage)
            except HttpResponseError:  # refused: not staged
                raise
            except BaseException:  # who knows
                self._staged.add(block.id)
                raise
        self._staged.add(block.id)
        self._size += len(data)
        return block

    async def finish(self, parts: Sequence[BlobBlock]) -> ObjectStat:
        with self._translated():
            answer = await self._blob.commit_block_list(list(parts), metadata=self._metadata, **self._backend._timeouts)
        return self._published(answer)

    async def abort(self) -> None:
        if self._staged:
            await self._backend.discard_uncommitted(self._path, lambda block: block.id in self._staged)

    async def _put_as_block(self, body: Sequence[Chunk]) -> ObjectStat:
        try:
            return await self.finish([await self.put_part(0, body)])
        except BaseException:
            await run_shielded(self.abort, patience=_CLEANUP_SECONDS)
            raise

    def _published(self, answer: Mapping[str, Any]) -> ObjectStat:
        self._backend.forget(self._path)
        return ObjectStat(self._backend.url(self._path), self._size, answer["etag"], self._metadata)

    def _translated(self) -> Any:
        return _translated(self._backend.url(self._path), "write")


# --- errors ---------------------------------------------------------------------------------------------------------


def _translate(what: str, error: Exception) -> StorageError:
    # https://learn.microsoft.com/rest/api/storageservices/blob-service-error-codes
    status = error.status_code or 0 if isinstance(error, HttpResponseError) else 0
    code = getattr(error, "error_code", None) or ""
    code = str(getattr(code, "value", code))  # an enumeration where the library knows the code
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    if code in {"ContainerNotFound", "ContainerBeingDeleted"}:
        return CheckpointNotFoundError(f"{what}: the container does not exist.")
    if status == HTTPStatus.NOT_FOUND:
        return CheckpointNotFoundError(f"{what}: there is no such blob.")
    if code == _INVALID_BLOCK_LIST:
        return StorageError(_OTHER_WRITER.format(what))
    if isinstance(error, ClientAuthenticationError) and status not in REFUSED:
        return StoragePermissionError(f"{what}: no usable credentials. {reason}")
    unanswered = isinstance(error, ConnectionError | TimeoutError) or (isinstance(error, AzureError) and not status)
    return by_status(what, reason, status, code, unanswered=unanswered)


_translated = partial(translated, _translate)


# --- the bridge to obstore ------------------------------------------------------------------------------------------

# What an adlfs filesystem can be given. Anything not named here keeps the bytes on the fsspec plane.
_IN_THE_CLIENT = names(
    "account_name account_key connection_string credential sas_token client_id client_secret tenant_id anon "
    "account_host location_mode"
)
_ABOUT_OTHER_CALLS = names(
    "request_session socket_timeout blocksize loop asynchronous default_fill_cache default_cache_type "
    "assume_container_exists use_listings_cache listings_expiry_time max_paths skip_instance_cache"
)  # listings, file objects, how fsspec keeps instances, and what adlfs itself does not use
_UNTRANSLATED = names("version_aware max_concurrency timeout connection_timeout read_timeout")


def _obstore_backend(fs: AzureBlobFileSystem) -> ObstoreBackend:
    """The obstore backend for ``fs``.

    Raises:
        UntranslatableError: a setting does not translate.
    """
    _require_translatable(fs)
    return once_a_process(fs, lambda: _AzureThroughObstore(fs))


def _require_translatable(fs: AzureBlobFileSystem) -> None:
    """Raises UntranslatableError for settings that obstore has nothing for."""
    if f"{type(fs).__module__}.{type(fs).__qualname__}" != "adlfs.spec.AzureBlobFileSystem":
        raise UntranslatableError(f"the filesystem class {type(fs).__name__}, a subclass of AzureBlobFileSystem")
    # What else there is goes to DefaultAzureCredential, and is in the credential.
    about_credential = {name for name in fs.storage_options if name.startswith(("exclude_", "managed_identity_"))}
    known = _IN_THE_CLIENT | _ABOUT_OTHER_CALLS | _UNTRANSLATED | about_credential
    require_known("the option", fs.storage_options, known)
    for name in _UNTRANSLATED:
        if fs.storage_options.get(name):
            raise UntranslatableError(f"the option {name!r}")
    if fs.service_client.location_mode != "primary":
        raise UntranslatableError(f"the location mode {fs.service_client.location_mode!r}")


class _AzureThroughObstore(ObstoreBackend):
    """Azure through obstore, beside an adlfs filesystem that its user goes on using."""

    def __init__(self, fs: AzureBlobFileSystem) -> None:
        # An asynchronous instance works on its user's loop only, which need not run when obstore asks for credentials:
        # its twin, with the same settings, lives on fsspec's own loop.
        twin = fs
        if fs.asynchronous:
            twin = type(fs)(*fs.storage_args, **{**fs.storage_options, "asynchronous": False, "loop": None})
        forget = AzureBackend(fs).forget
        super().__init__("abfs", partial(_open_store, twin), max_parts=_MOST_BLOCKS, forget=forget, verify=True)
        self._through_adlfs = AzureBackend(twin)

    async def write(
        self,
        path: str,
        chunks: AsyncIterable[Chunk],
        *,
        size_hint: int,
        part_size: int | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> ObjectStat:
        # obstore sends header names in lower case.
        described = {name.lower(): value for name, value in _storable(self.url(path), metadata or {}).items()}
        # obstore does not tell the ids of its blocks: a size that no other upload has tells them from another's.
        part_size = part_size_for(size_hint, part_size, max_parts=_MOST_BLOCKS) + secrets.randbelow(_MOST_TELLING_BYTES)
        size = 0

        async def counted() -> AsyncIterator[Chunk]:
            nonlocal size
            async for chunk in chunks:
                size += len(chunk)
                yield chunk

        try:
            return await super().write(path, counted(), size_hint=size_hint, part_size=part_size, metadata=described)
        except (StoragePermissionError, CheckpointNotFoundError):  # nothing was staged
            raise
        except BaseException as error:
            if not isinstance(error, StorageError) or _INVALID_BLOCK_LIST not in str(error):
                sizes = {part_size, size % part_size}  # of all blocks, and of the last
                await self._clean_up(path, lambda block: block.size in sizes, error)
                raise
            return await self._find_committed(path, _block_sizes(size, part_size), described, error)

    async def abort_upload(self, path: str, age: float) -> None:
        """Nothing: Azure has no uploads, and ``write`` discards blocks whatever ended it."""

    async def _sign(self, path: str, stat: ObjectStat) -> SignedGet:
        return await run_on(self._through_adlfs.loop, self._through_adlfs.sign, path, stat)

    async def delete(self, path: str) -> None:
        # obstore sends a batch of one, which takes other permissions than a deletion, and loses what went wrong.
        await run_on(self._through_adlfs.loop, self._through_adlfs.delete, path)
        self.forget(path)

    async def _find_committed(
        self, path: str, sizes: list[int], metadata: dict[str, str], error: StorageError
    ) -> ObjectStat:
        """What is there when Azure did not find the blocks to commit.

        Another writer was faster; or they are committed, the reply was lost, and obstore repeated its request. The
        sizes of the blocks tell which: another writer of as many bytes cuts them elsewhere.
        """
        adlfs = self._through_adlfs
        try:
            found = await self.stat(path)
            committed = await run_on(adlfs.loop, adlfs.block_sizes, path)
        except CheckpointNotFoundError:
            raise error from None
        if committed != sizes:
            raise StorageError(_OTHER_WRITER.format(f"Cannot write {found.url}")) from error
        self.forget(path)
        return ObjectStat(found.url, found.size, found.etag, metadata)

    async def _clean_up(self, path: str, mine: Callable[[BlobBlock], bool], reason: BaseException) -> None:
        """Discards uncommitted blocks, which obstore leaves; where that fails, says so with ``reason``."""
        adlfs = self._through_adlfs
        try:
            await run_shielded(run_on, adlfs.loop, self._discard_twice, path, mine, patience=_CLEANUP_SECONDS)
        except StorageError as error:
            message = f"What was staged could not be removed: {error}"
            reason.add_note(message)
            logger.warning("%s", message)

    async def _discard_twice(self, path: str, mine: Callable[[BlobBlock], bool]) -> None:
        """Discards, and looks again: a block that was on its way when obstore stopped can arrive a moment later."""
        await self._through_adlfs.discard_uncommitted(path, mine)
        await asyncio.sleep(_LATE_BLOCK_SECONDS)
        await self._through_adlfs.discard_uncommitted(path, mine)


def _block_sizes(size: int, part_size: int) -> list[int]:
    """How many bytes each block has of an object of ``size`` bytes in blocks of ``part_size``."""
    return [min(part_size, size - start) for start in range(0, size, part_size)]


async def _open_store(fs: AzureBlobFileSystem, container: str) -> Any:
    """The obstore store of a container; on any event loop."""
    client = fs.service_client
    return AzureStore(
        container,
        account_name=client.account_name,
        endpoint=f"{client.scheme}://{client.primary_hostname}".rstrip("/"),
        client_options={"allow_http": client.scheme == "http", "timeout": UPLOAD_PATIENCE},
        **_credentials(fs),
    )


def _credentials(fs: AzureBlobFileSystem) -> dict[str, Any]:
    """The ``AzureStore`` arguments for the credential that adlfs's client uses."""
    client = fs.service_client
    if sas := urlsplit(client.url).query:  # of a URL, a connection string, or the option sas_token
        return {"credential_provider": partial(_sas, lambda: sas)}
    if client.credential is None:
        return {"skip_signature": True}
    if isinstance(client.credential, SharedKeyCredentialPolicy):
        return {"account_key": client.credential.account_key}
    if isinstance(client.credential, AzureSasCredential):
        return {"credential_provider": partial(_sas, lambda: client.credential.signature)}
    return {"credential_provider": credentials_from(fs.loop, _bearer_token, client.credential)}


def _sas(signature: Any) -> Any:
    """Obstore's ``AzureSASToken``; asked for again when it expires: it may have been replaced by then."""
    token: str = signature().lstrip("?")
    expiry = parse_qs(token.replace("+", "%2B")).get("se")  # the zone of a time, not a space
    return {"sas_token": token, "expires_at": _time(expiry[0]) if expiry else None}


async def _bearer_token(credential: Any) -> Any:
    """Obstore's ``AzureBearerToken``; azure-identity keeps it, and renews it before it expires."""
    token = await credential.get_token(_SCOPE)
    return {"token": token.token, "expires_at": datetime.fromtimestamp(token.expires_on, UTC)}


def _time(text: str) -> datetime:
    time = datetime.fromisoformat(text)
    return time if time.tzinfo else time.replace(tzinfo=UTC)
