"""The obstore plane: bytes move through obstore (Rust, object_store), for every cloud alike.

A cloud's module translates its fsspec filesystem into an obstore store; this one does the rest.
Facts about obstore 0.12 that this relies on, each with a test: ``put_async`` sends the buffers of
an async iterator without copying them, and aborts the multipart upload when the iterator raises;
a cancelled ``put_async`` would leave the upload behind.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any

import anyio
import obstore
from obstore import exceptions as obstore_errors

from torchferry.engine.tasks import carrying_exits, releasing_exits
from torchferry.errors import (
    CheckpointChangedError,
    CheckpointNotFoundError,
    StorageError,
    StoragePermissionError,
    StorageUnavailableError,
    UnsupportedOptionError,
)
from torchferry.storage.base import Backend, Chunk, ObjectStat, Plane
from torchferry.engine.cancellation import to_the_end, wait_through_cancellations
from torchferry.engine.transport import DirectReader, SignedGet
from torchferry.storage.metadata import require_storable
from torchferry.engine.writer import part_size_for
from torchferry.storage.translation import require_key, upload_gone

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem
    from obstore.store import ObjectStore

__all__ = ["ObstoreBackend"]

logger = logging.getLogger("torchferry.storage")

_PARTS_IN_FLIGHT = 24
_ABORT_SECONDS = 30.0
_SIGNED_FOR = timedelta(hours=1)
_NO_CONTAINER = ("NoSuchBucket", "ContainerNotFound")
_STANDARD_ATTRIBUTES = frozenset(
    {
        "Content-Disposition",
        "Content-Encoding",
        "Content-Language",
        "Content-Type",
        "Cache-Control",
        "Storage-Class",
    }
)
_TAKEN_FOR_STANDARD = frozenset(
    form for name in map(str.lower, _STANDARD_ATTRIBUTES) for form in (name, name.replace("-", ""))
)


class ObstoreBackend(Backend):
    """An object store behind obstore.

    Args:
        protocol: The URL protocol, for messages.
        open_store: Makes the obstore store of a bucket (or container). Called once for each.
        max_parts: How many parts the store allows in one upload.
        forget: Called with the path of what was written or deleted: lets the listings of the filesystem, which its user
            goes on using, find what is there now.
        verify: Whose certificates to trust when ranges are read directly (see :class:`DirectReader`); None to read
            nothing directly.
    """

    plane = "obstore"

    def __init__(
        self,
        protocol: str,
        open_store: Callable[[str], Awaitable[ObjectStore]],
        *,
        max_parts: int = 10_000,
        forget: Callable[[str], None],
        verify: str | bool | None = None,
    ) -> None:
        self._protocol = protocol
        self._open_store = open_store
        self._max_parts = max_parts
        self.forget = forget
        self._stores: dict[str, ObjectStore] = {}
        if verify is not None:
            self.direct = DirectReader(self._sign, verify=verify)

    @classmethod
    def from_filesystem(cls, fs: AbstractFileSystem, plane: Plane) -> Backend:
        """Not for this class: a cloud's own backend makes one, with what it knows of its filesystem."""
        raise TypeError(f"{cls.__name__} is made by a cloud's backend.")

    def url(self, path: str) -> str:
        return f"{self._protocol}://{path}"

    def can_hold(self, path: str) -> bool:
        """Whether obstore asks the store for this very name: not where a part is empty, ``.`` or ``..``."""
        _, _, key = path.partition("/")
        return not any(part in {"", ".", ".."} for part in key.split("/")) and not re.search(r"[\x00-\x1f\x7f]", key)

    async def stat(self, path: str) -> ObjectStat:
        store, key = await self._locate(path)
        with self._translated(path, "look up"):
            try:
                result = await obstore.get_async(store, key, options={"head": True})
            except FileNotFoundError:
                # The answer to a HEAD has no body. The one to a GET says whether the bucket is missing too.
                result = await obstore.get_async(store, key)
        metadata = {name: value for name, value in result.attributes.items() if name not in _STANDARD_ATTRIBUTES}
        return ObjectStat(self.url(path), result.meta["size"], self._version(result.meta), metadata)

    async def read(self, path: str, start: int, stop: int, stat: ObjectStat) -> Chunk:
        if stop <= start:
            return b""  # obstore takes no empty range
        store, key = await self._locate(path)
        options: Any = {"range": (start, stop)}
        if stat.etag is not None:
            options |= self._pinned_to(stat.etag)
        with self._translated(path, "read"):
            result = await obstore.get_async(store, key, options=options)
            if stat.etag not in {None, result.meta["e_tag"], result.meta["version"]}:  # some stores ignore the pin
                raise CheckpointChangedError(f"{self.url(path)} was replaced while it was being read.")
            data = memoryview(await result.buffer_async())
        if len(data) != stop - start:
            raise StorageUnavailableError(
                f"{self.url(path)}: read {len(data)} bytes where {stop - start} were asked for ({start} to {stop})."
            )
        return data

    async def write(
        self,
        path: str,
        chunks: AsyncIterable[Chunk],
        *,
        size_hint: int,
        part_size: int | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> ObjectStat:
        attributes = self._attributes(path, metadata or {})
        store, key = await self._locate(path)
        part_size = part_size_for(size_hint, part_size, max_parts=self._max_parts)
        source = _Interruptible(chunks)
        first = await source.take(part_size)
        if source.exhausted:  # a single request puts it: no upload to complete or abort
            body: Any = iter(first) if first else b""
            put = obstore.put_async(store, key, body, attributes=attributes, use_multipart=False)
        else:
            source.prepend(first)
            del first  # only the source holds a chunk, so that its memory is free when it has been sent
            put = obstore.put_async(
                store,
                key,
                source,
                attributes=attributes,
                use_multipart=True,
                chunk_size=part_size,
                max_concurrency=_PARTS_IN_FLIGHT,
            )
        with self._translated(path, "write"):
            result = await _interruptible(put, source, partial(self._remove_upload, path, monotonic()))
        self.forget(path)
        return ObjectStat(self.url(path), source.size, self._version(result), attributes)

    async def delete(self, path: str) -> None:
        store, key = await self._locate(path)
        with suppress(CheckpointNotFoundError), self._translated(path, "delete"):
            await obstore.delete_async(store, key)
        self.forget(path)

    async def abort_upload(self, path: str, age: float) -> None:
        """For subclasses: removes, by other means, an upload that obstore has not aborted in time.

        Args:
            path: Where to.
            age: How many seconds ago the write began.

        Raises:
            StorageError: there are no such means, or they do not tell which upload it is.
        """
        raise StorageError(f"Cannot abort the upload to {self.url(path)}: a request of it did not end in time.")

    def _attributes(self, path: str, metadata: Mapping[str, str]) -> dict[str, str]:
        """What obstore takes user metadata as; it panics at what no header can be, which an object's copy may bring."""
        require_storable(self.url(path), metadata)
        for name in metadata:
            if name.lower() in _TAKEN_FOR_STANDARD:
                raise UnsupportedOptionError(
                    f"{self.url(path)}: obstore takes the metadata {name!r} for a header of HTTP: name it otherwise, "
                    "or use plane='fsspec' (or TORCHFERRY_PLANE=fsspec)."
                )
        return dict(metadata)

    async def _remove_upload(self, path: str, began: float) -> None:
        try:
            with anyio.fail_after(_ABORT_SECONDS):
                await self.abort_upload(path, monotonic() - began)
        except Exception as error:  # noqa: BLE001 - the cancel that is on its way matters more
            reason = str(error) or type(error).__name__
            logger.warning("What was staged for %s may still be there: %s", self.url(path), reason)

    def _version(self, found: Mapping[str, Any]) -> str | None:
        """What names a version: of what obstore returned for an object, the ETag."""
        etag: str | None = found["e_tag"]
        return etag

    def _pinned_to(self, version: str) -> dict[str, str]:
        """The options of a request for this version only."""
        return {"if_match": version}

    async def _sign(self, path: str, stat: ObjectStat) -> SignedGet:
        """The request that reads a version directly."""
        store: Any  # the store of a cloud: others cannot sign
        store, key = await self._locate(path)
        return SignedGet.if_match(await obstore.sign_async(store, "GET", key, _SIGNED_FOR), stat.etag)

    async def _locate(self, path: str) -> tuple[ObjectStore, str]:
        bucket, _, key = path.partition("/")
        require_key(self.url(path), key)
        if not self.can_hold(path):
            raise UnsupportedOptionError(
                f"{self.url(path)}: obstore does not reach this name: correct it (an empty part, such as in 'a//b', "
                "is often a slip), or use plane='fsspec' (or TORCHFERRY_PLANE=fsspec)."
            )
        if bucket not in self._stores:
            with self._translated(path, "open"):
                self._stores[bucket] = await self._open_store(bucket)
        return self._stores[bucket], key

    @contextmanager
    def _translated(self, path: str, verb: str) -> Iterator[None]:
        try:
            yield
        except (obstore_errors.BaseError, FileNotFoundError) as error:
            raise _translate(self.url(path), verb, error) from error


class _Interruptible(AsyncIterator["Chunk"]):
    """Chunks on their way into obstore, which calls ``__anext__`` in tasks of its own.

    A cancel cannot reach those, so :meth:`interrupt` makes the iterator raise: that is what obstore
    aborts the upload for.

    Attributes:
        exhausted: Whether there are no more chunks.
        size: Bytes taken so far.
        asked: Whether obstore has asked for a chunk, which it does when it has opened an upload.
    """

    def __init__(self, chunks: AsyncIterable[Chunk]) -> None:
        self._chunks = aiter(chunks)
        self._ahead: list[Chunk] = []
        self._pulling: asyncio.Task[Any] | None = None
        self._interrupted = False
        self.exhausted = False
        self.size = 0
        self.asked = False

    async def take(self, size: int) -> list[Chunk]:
        """Takes chunks until they are more than ``size`` bytes together, or the end."""
        taken: list[Chunk] = []
        while self.size <= size and not self.exhausted:
            try:
                taken.append(await self._next())
            except StopAsyncIteration:
                break
        return taken

    def prepend(self, chunks: list[Chunk]) -> None:
        """Makes ``chunks``, taken before, the next ones again."""
        self._ahead = chunks[::-1]

    def interrupt(self) -> None:
        """Makes the pending and every later ``__anext__`` raise."""
        self._interrupted = True
        if self._pulling is not None:
            self._pulling.cancel()

    async def __anext__(self) -> Chunk:
        return await carrying_exits(self._next)

    async def _next(self) -> Chunk:
        if self._interrupted:
            raise InterruptedError("interrupted by the caller")
        if self._ahead:
            self.asked = True
            return self._ahead.pop()
        self._pulling = asyncio.current_task()
        try:
            while not len(chunk := await anext(self._chunks)):  # obstore takes an empty buffer for the end
                pass
        except StopAsyncIteration:
            self.exhausted = True
            raise
        except asyncio.CancelledError:
            if self._interrupted:
                raise InterruptedError("interrupted by the caller") from None
            raise
        finally:
            self._pulling = None
        self.size += len(chunk)
        return chunk


async def _interruptible(put: Awaitable[Any], source: _Interruptible, remove: Callable[[], Awaitable[None]]) -> Any:
    """Awaits ``put``; on cancel has it abort its upload, and waits for that, before the cancel goes on.

    Obstore aborts at once if it still asks for chunks; after the last one it waits for the requests under way, and
    where one of those hangs, ``remove`` is called in the end.
    """
    future = asyncio.ensure_future(put)
    try:
        with releasing_exits():
            return await asyncio.shield(future)
    except asyncio.CancelledError:
        source.interrupt()
        await wait_through_cancellations(future, _ABORT_SECONDS)
        if not future.cancelled():
            future.exception()  # looked at, so that asyncio does not log it as forgotten
        elif source.asked:
            await to_the_end(remove)
        raise


def _translate(url: str, verb: str, error: BaseException) -> StorageError:
    """The torchferry error for one of obstore's."""
    reason = _reason(error)
    if isinstance(error, FileNotFoundError):
        return _translate_not_found(url, verb, reason)
    if isinstance(error, obstore_errors.PermissionDeniedError | obstore_errors.UnauthenticatedError):
        return StoragePermissionError(f"Cannot {verb} {url}: the store refused these credentials. {reason}")
    if isinstance(error, obstore_errors.PreconditionError | obstore_errors.NotModifiedError):
        return CheckpointChangedError(f"{url} was replaced while it was being read. {reason}")
    if ("after" in reason and "retries" in reason) or "error sending request" in reason:
        return StorageUnavailableError(f"Cannot {verb} {url}: the store is not available. {reason}")
    return StorageError(f"Cannot {verb} {url}: {reason}")


def _translate_not_found(url: str, verb: str, reason: str) -> StorageError:
    what = f"Cannot {verb} {url}"
    if any(code in reason for code in _NO_CONTAINER):
        return CheckpointNotFoundError(f"{what}: the bucket or container does not exist. {reason}")
    if verb == "write":
        return upload_gone(what, reason)
    return CheckpointNotFoundError(f"{what}: no such object. {reason}")


def _reason(error: BaseException) -> str:
    """What obstore says, without the time it took and with the store's own words instead of its XML."""
    text = str(error).split("\n\nDebug source", 1)[0].strip()
    text = re.sub(r" in [\d.]+(ns|µs|ms|s)\b", "", text)
    if xml := re.search(r"<Code>(.*?)</Code>(?:\s*<Message>(.*?)</Message>)?", text, re.DOTALL):
        text = f"{text.partition('<')[0].rstrip(': ')}: {': '.join(filter(None, xml.groups()))}"
    return text
