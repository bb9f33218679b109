"""What the tests of loading share: a store that counts what is asked of it."""

from __future__ import annotations

import io
import mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from anyio.lowlevel import checkpoint

from torchferry import loading
from torchferry.engine.types import Buffer, Chunk, ObjectStat
from torchferry.engine.writer import UploadPlan
from torchferry.errors import CheckpointChangedError
from torchferry.storage.base import Backend, Leftover, ListedObject

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator, Callable, Mapping


class CountingStore(Backend):
    """Objects in memory, by name; counts requests and bytes."""

    range_size = 64 << 10
    range_concurrency = 4

    def __init__(self) -> None:
        self.objects: dict[str, Any] = {}
        self.stats = 0
        self.reads: list[tuple[int, int]] = []
        self.under_way = 0
        self.most_under_way = 0
        self.on_read: Callable[[], object] = lambda: None

    @property
    def requests(self) -> int:
        return self.stats + len(self.reads)

    @property
    def nbytes(self) -> int:
        return sum(stop - start for start, stop in self.reads)

    def put(self, obj: Any) -> str:
        """Stores what torch.save makes of an object, bytes as they are, or a file; returns the URL."""
        if isinstance(obj, Path):
            with obj.open("rb") as file:
                self.objects["x"] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        else:
            self.objects["x"] = obj if isinstance(obj, bytes) else _saved(obj)
        return self.url("x")

    @classmethod
    def from_filesystem(cls, fs: Any) -> Backend:
        raise NotImplementedError

    def url(self, path: str) -> str:
        return f"count://{path}"

    async def stat(self, path: str) -> ObjectStat:
        self.stats += 1
        return ObjectStat(self.url(path), len(self.objects[path]), str(id(self.objects[path])))

    async def read(self, path: str, start: int, stop: int, stat: ObjectStat) -> Buffer:
        self.reads.append((start, stop))
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        self.on_read()
        await checkpoint()
        if stat.etag != str(id(self.objects[path])):
            raise CheckpointChangedError(f"{stat.url} was replaced.")
        self.under_way -= 1
        return bytes(self.objects[path][start:stop])

    async def write(
        self,
        path: str,
        chunks: AsyncIterable[Chunk],
        *,
        plan: UploadPlan,
        metadata: Mapping[str, str] | None = None,
    ) -> ObjectStat:
        raise NotImplementedError

    async def delete(self, path: str) -> None:
        raise NotImplementedError

    def list(self, prefix: str) -> AsyncIterator[ListedObject]:
        raise NotImplementedError

    def leftovers(self, prefix: str) -> AsyncIterator[Leftover]:
        raise NotImplementedError

    async def discard(self, leftover: Leftover) -> bool:
        raise NotImplementedError


@pytest.fixture
def counting_store(monkeypatch: pytest.MonkeyPatch) -> CountingStore:
    """A store that every URL leads to; ``put(obj)`` gives the URL."""
    store = CountingStore()

    async def opened(*_: Any) -> tuple[CountingStore, str]:
        return store, "x"

    monkeypatch.setattr(loading, "_open", opened)
    return store


def _saved(obj: Any) -> bytes:
    file = io.BytesIO()
    torch.save(obj, file)
    return file.getvalue()
