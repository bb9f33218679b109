"""The storage protocol: what torchferry asks of an object store.

A backend turns an fsspec filesystem, which is how users configure storage, into four verbs on
whole objects. It knows nothing of checkpoints. Backends import only this package and
:mod:`torchferry.errors`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias

from torchferry.engine.memory import copy_bytes
from torchferry.errors import StorageError
from torchferry.engine.cancellation import in_thread

if TYPE_CHECKING:
    import asyncio

    from fsspec import AbstractFileSystem

    from torchferry.engine.transport import DirectReader

__all__ = ["MIB", "Backend", "Chunk", "ObjectStat", "Plane"]

MIB = 1 << 20
_COPIED = 4 * MIB  # at a time

Plane: TypeAlias = Literal["auto", "fsspec", "obstore"]
"""Which client moves the bytes: the fsspec filesystem itself, obstore, or the best one that honours every setting."""

Chunk: TypeAlias = "bytes | bytearray | memoryview"
"""A contiguous buffer of bytes. Whoever holds it keeps its memory alive; nobody writes to it."""


@dataclass(frozen=True, slots=True)
class ObjectStat:
    """One version of one object.

    Attributes:
        url: The object's full URL.
        size: Its length in bytes.
        etag: Names this version: an ETag (S3, Azure), a generation (GCS), or what the filesystem has in
            its place. None where a store has nothing of the kind: its reads cannot be pinned.
        metadata: User metadata stored with the object. ``write`` returns what it was given, or what a backend made of
            that for a store that is particular about names; ``stat`` what the store holds.
    """

    url: str
    size: int
    etag: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict, compare=False)


class Backend(ABC):
    """Four verbs on the objects of one store, through one plane.

    ``path`` is a path as the filesystem's ``_strip_protocol`` gives it (``bucket/key`` for clouds).

    Every verb raises :class:`~torchferry.errors.StorageError` or one of its subclasses, with the
    object's URL in the message and the client's exception as ``__cause__``:

    * :class:`~torchferry.errors.CheckpointNotFoundError`: no such object, bucket or container.
    * :class:`~torchferry.errors.StoragePermissionError`: bad or missing credentials, or not allowed.
    * :class:`~torchferry.errors.StorageUnavailableError`: still failing after the client's retries.
    """

    plane: ClassVar[str]
    """Which client moves the bytes: "fsspec", "obstore" or "local". For logs and messages."""

    direct: DirectReader | None = None
    """Reads ranges without a copy, where the store's client can sign the requests for it; None (the default) if not."""

    range_size: ClassVar[int] = 8 * MIB
    """How many bytes one ``read`` should ask for, for the best throughput of many at once."""

    range_concurrency: ClassVar[int] = 24
    """How many reads should be under way at once."""

    @classmethod
    @abstractmethod
    def from_filesystem(cls, fs: AbstractFileSystem, plane: Plane) -> Backend:
        """Makes a backend that talks to the store that ``fs`` is configured for.

        This is what an entry point of the group ``torchferry.storage_backends`` names the class for: the
        entry point's name is the URL protocol. It may return a backend of another class, one for each plane.

        Raises:
            UnsupportedOptionError: ``plane`` is forced, and ``fs`` has settings that it cannot honour.
        """

    def can_hold(self, path: str) -> bool:
        """Whether this plane reaches the name as it is; True by default. Where not, "auto" takes the fsspec plane."""
        del path
        return True

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The event loop that the verbs must run on; None (the default) where any loop will do."""
        return None

    @abstractmethod
    def url(self, path: str) -> str:
        """The full URL of ``path``."""

    def write_cost(self, size: int, part_size: int | None) -> int:
        """How many bytes of memory ``write`` takes at its peak beyond the chunks it is handed.

        A save reserves this much of the process's budget before it calls ``write``. None (0) by default: a
        backend that sends chunks as they are.
        """
        return 0

    @abstractmethod
    async def stat(self, path: str) -> ObjectStat:
        """Looks an object up."""

    @abstractmethod
    async def read(self, path: str, start: int, stop: int, stat: ObjectStat) -> Chunk:
        """Reads the bytes ``start`` to ``stop`` (exclusive) of the version that ``stat`` names.

        Returns exactly ``stop - start`` bytes, of exactly that version.

        Raises:
            CheckpointChangedError: the object is not that version any more.
        """

    async def read_into(self, path: str, start: int, buffer: memoryview, stat: ObjectStat) -> None:
        """Fills ``buffer`` with the bytes from ``start`` of the version that ``stat`` names.

        Directly, where that works; else it copies what ``read`` returns.

        Raises:
            CheckpointChangedError: the object is not that version any more.
        """
        if self.direct is not None and await self.direct.read_into(path, start, buffer, stat):
            return
        for at in range(0, len(buffer), _COPIED):
            piece = buffer[at : at + _COPIED]
            data = await self.read(path, start + at, start + at + len(piece), stat)
            if len(data) != len(piece):
                raise StorageError(f"{stat.url}: the store sent {len(data)} bytes where {len(piece)} were asked for.")
            await in_thread(copy_bytes, piece, data)

    @abstractmethod
    async def write(
        self,
        path: str,
        chunks: AsyncIterable[Chunk],
        *,
        size_hint: int,
        part_size: int | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> ObjectStat:
        """Publishes the chunks as one object, atomically: all of it at the end, or nothing.

        What was at ``path`` before stays readable until then. When ``chunks`` raises, the store fails, or the
        caller is cancelled, everything staged is removed (parts, blocks, components, temporary files)
        before the error goes on.

        Args:
            path: Where to.
            chunks: Consumed once, in order, and to its end before anything is published. Chunks of any
                size, empty ones too. Their memory is bounded and may be needed for the next ones: no reference is
                kept to a chunk that has been sent, and none to more than one part's that have not begun to be.
            size_hint: About how many bytes will come; parts are made large enough for it.
            part_size: Bytes in a part, where the user chose; the store's minimum and maximum still hold.
            metadata: User metadata to store with the object, where the store can.
        """

    @abstractmethod
    async def delete(self, path: str) -> None:
        """Deletes an object. One that is not there is no error."""
