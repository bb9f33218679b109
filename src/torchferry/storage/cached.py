"""fsspec's caches (simplecache, filecache, blockcache): reads go through the cache, all else goes to the store."""

from __future__ import annotations

import logging
import threading
from collections.abc import AsyncIterable, AsyncIterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torchferry.engine.cancellation import clean_up, in_thread
from torchferry.engine.types import Buffer, Chunk, ObjectStat
from torchferry.engine.writer import UploadPlan
from torchferry.errors import CheckpointChangedError, UnsupportedOptionError, mask
from torchferry.storage.base import Backend, Leftover, ListedObject
from torchferry.storage.generic import GenericBackend
from torchferry.storage.translate import generic_error, translated

if TYPE_CHECKING:
    import asyncio

    from fsspec import AbstractFileSystem
    from fsspec.implementations.cached import CachingFileSystem

__all__ = ["CachedBackend"]

logger = logging.getLogger("torchferry.storage")

_turns: WeakKeyDictionary[CachingFileSystem, threading.Lock] = WeakKeyDictionary()


class CachedBackend(Backend):
    """A store with a cache of fsspec's in front of it.

    When a whole copy is in the cache, it is read, and the store is not asked: whether it is still what the store has is
    the cache's business (``check_files``, ``expiry_time``). What is fetched is checked against the version asked for.
    What is written or deleted through the cache leaves it.

    Args:
        store: The backend of the filesystem that is cached.
        fs: The cache.
    """

    def __init__(self, store: Backend, fs: CachingFileSystem) -> None:
        if fs.compression:
            raise UnsupportedOptionError("A cache with compression= holds other bytes than the store: leave it out.")
        self.checks_chunks = store.checks_chunks
        self.reads_loans = store.reads_loans
        self._store = store
        self.keeps_metadata = store.keeps_metadata
        self.has_directories = store.has_directories
        self._fs = fs
        self._turn = _turns.setdefault(fs, threading.Lock())  # two threads would both fetch, into one file

    @classmethod
    def from_filesystem(cls, fs: AbstractFileSystem) -> CachedBackend:
        """A backend for a cache in front of any filesystem."""
        return cls(GenericBackend.from_filesystem(fs.fs), fs)

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The store's."""
        return self._store.loop

    def url(self, path: str) -> str:
        """The URL in the store."""
        return self._store.url(path)

    def upload_plan(self, size: int, part_size: int | None = None) -> UploadPlan:
        """The store's."""
        return self._store.upload_plan(size, part_size)

    async def stat(self, path: str) -> ObjectStat:
        return await self._store.stat(path)

    async def read(self, path: str, start: int, stop: int, stat: ObjectStat) -> Buffer:
        with translated(generic_error, self.url(path), "read"):
            data, was_whole = await in_thread(self._read, path, start, stop)
        if not was_whole or len(data) != stop - start:
            now = await self._store.stat(path)
            if (now.etag, now.size) != (stat.etag, stat.size) or len(data) != stop - start:
                await in_thread(self._forget, path)
                raise CheckpointChangedError(
                    f"{self.url(path)} was replaced while it was being read, or after its copy in the cache was made. "
                    "The copy has been taken out of the cache: load again."
                )
        return data

    async def write(
        self,
        path: str,
        chunks: AsyncIterable[Chunk],
        *,
        plan: UploadPlan,
        metadata: Mapping[str, str] | None = None,
    ) -> ObjectStat:
        try:
            return await self._store.write(path, chunks, plan=plan, metadata=metadata)
        finally:
            await clean_up(partial(self._forget, path))

    async def delete(self, path: str) -> None:
        await self._store.delete(path)
        await in_thread(self._forget, path)

    async def list(self, prefix: str) -> AsyncIterator[ListedObject]:
        async for found in self._store.list(prefix):
            yield found

    async def leftovers(self, prefix: str) -> AsyncIterator[Leftover]:
        async for found in self._store.leftovers(prefix):
            yield found

    async def discard(self, leftover: Leftover) -> bool:
        return await self._store.discard(leftover)

    def _read(self, path: str, start: int, stop: int) -> tuple[bytes, bool]:
        """The bytes, and whether all of the object was in the cache before."""
        with self._turn:
            copy = self._fs._check_file(path)
            was_whole = isinstance(copy, str) or (bool(copy) and copy[0]["blocks"] is True)
            data: bytes = self._fs.cat_file(path, start=start, end=stop) if stop > start else b""
            return data, was_whole

    def _forget(self, path: str) -> None:
        """Takes a copy out of the cache."""
        with self._turn:
            copy: Any = self._fs._check_file(path)
            if not copy:
                return
            try:
                self._fs.pop_from_cache(path)
                Path(copy if isinstance(copy, str) else copy[1]).unlink(missing_ok=True)  # simplecache's pop does not
            except OSError as error:
                logger.warning("%s", mask(f"An old copy of {self.url(path)} stays in the cache: {error}"))
