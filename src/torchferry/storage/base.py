"""The storage protocol: what torchferry asks of an object store.

A backend turns an fsspec filesystem, which is how users configure storage, into a few verbs on whole objects. It knows
nothing of checkpoints. What a backend needs is in :mod:`torchferry.storage`, :mod:`torchferry.engine.types`,
:mod:`torchferry.engine.writer` and :mod:`torchferry.errors`; one that speaks HTTP finds the rest in
:mod:`torchferry.storage.http`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterable, AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, ClassVar

from torchferry.engine.cancellation import in_thread
from torchferry.engine.memory import copy_bytes
from torchferry.engine.transfer import current
from torchferry.engine.types import MIB, Buffer, Chunk, ObjectStat
from torchferry.engine.writer import UploadPlan
from torchferry.errors import StorageError

if TYPE_CHECKING:
    import asyncio

    from fsspec import AbstractFileSystem

__all__ = ["Backend", "Leftover", "ListedObject"]

_COPIED = 4 * MIB  # at a time


@dataclass(frozen=True, slots=True)
class ListedObject:
    """An object in a listing.

    Attributes:
        path: As the backend's verbs take it.
        url: Its full URL.
        size: In bytes.
        etag: Its version, as in :class:`~torchferry.engine.types.ObjectStat`; None where a listing does not tell.
        modified: When it was written, with a time zone; None where a listing does not tell.
    """

    path: str
    url: str
    size: int
    etag: str | None = None
    modified: datetime | None = None


@dataclass(frozen=True, slots=True)
class Leftover:
    """What a writer that was killed left behind.

    Attributes:
        path: What was being written, or the temporary object itself.
        url: The same as a URL.
        kind: "multipart upload", "uncommitted blocks" or "temporary file".
        id: Tells it from others of the same path: an upload's id; "" where there is only one.
        modified: When it was begun or last changed, with a time zone; None where the store does not tell.
    """

    path: str
    url: str
    kind: str
    id: str = ""
    modified: datetime | None = None


class Backend(ABC):
    """Verbs on the objects of one store.

    ``path`` is a path as the filesystem's ``_strip_protocol`` gives it (``bucket/key`` for clouds).

    Every verb raises :class:`~torchferry.errors.StorageError` or one of its subclasses, with the
    object's URL in the message and the client's exception as ``__cause__``:

    * :class:`~torchferry.errors.CheckpointNotFoundError`: no such object, bucket or container.
    * :class:`~torchferry.errors.StoragePermissionError`: bad or missing credentials, or not allowed.
    * :class:`~torchferry.errors.StorageUnavailableError`: still failing when the retry policy gave up.
    """

    range_size: ClassVar[int] = 8 * MIB
    """How many bytes one read should ask for, for the best throughput of many at once."""

    range_concurrency: ClassVar[int] = 24
    """How many reads should be under way at once."""

    checks_chunks: bool = False
    """Whether :meth:`write` publishes nothing that does not match the chunks' CRC32s. If not, the producer computes
    them again when they have been written, to notice that their memory was changed meanwhile."""

    reads_loans: bool = False
    """Whether :meth:`write` reads chunks within :func:`torchferry.engine.lending.reading` only. If not, what may change
    during a save is copied before."""

    keeps_metadata: bool = False
    """Whether :meth:`stat` returns the metadata that :meth:`write` was given."""

    has_directories: bool = False
    """Whether names lie in directories, as files do, which must be there; else a prefix is only the start of names."""

    further_options: ClassVar[Collection[str] | None] = None
    """Storage options that :meth:`filesystem_class` takes beside those that its signature names; None: any."""

    options_elsewhere: ClassVar[Mapping[str, str]] = {}
    """What other libraries call an option, and what to write here: ``{"aws_access_key_id": "key"}``."""

    @classmethod
    def filesystem_class(cls) -> type[AbstractFileSystem] | None:
        """The class of filesystem for URLs of this backend's protocols, whatever is registered for them in fsspec.

        A filesystem of another class that is given as ``filesystem=`` is used as any fsspec filesystem is. None (the
        default): whatever is registered.
        """
        return None

    @classmethod
    @abstractmethod
    def from_filesystem(cls, fs: AbstractFileSystem) -> Backend:
        """Makes a backend that talks to the store that ``fs`` is configured for.

        This is what an entry point of the group ``torchferry.storage_backends`` names the class for: the
        entry point's name is the URL protocol. May take a second; called in a worker thread.

        Raises:
            StorageError: the store's configuration cannot be used.
        """

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The event loop that the verbs must run on; None (the default) where any loop will do."""
        return None

    @abstractmethod
    def url(self, path: str) -> str:
        """The full URL of ``path``."""

    def upload_plan(self, size: int, part_size: int | None = None) -> UploadPlan:
        """How to cut an object of about ``size`` bytes into parts; ``part_size`` is the user's choice, if any.

        The one place where a store's limits stand.
        """
        return UploadPlan.for_size(size, part_size)

    @abstractmethod
    async def stat(self, path: str) -> ObjectStat:
        """Looks an object up."""

    @abstractmethod
    async def read(self, path: str, start: int, stop: int, stat: ObjectStat) -> Buffer:
        """Reads the bytes ``start`` to ``stop`` (exclusive) of the version that ``stat`` names.

        Returns exactly ``stop - start`` bytes, of exactly that version.

        Raises:
            CheckpointChangedError: the object is not that version any more.
        """

    async def read_into(self, path: str, start: int, buffers: Sequence[memoryview], stat: ObjectStat) -> None:
        """Fills ``buffers``, one after the other, with the bytes from ``start`` of the version that ``stat`` names.

        By default it copies what ``read`` returns, 4 MiB at a time.

        Raises:
            CheckpointChangedError: the object is not that version any more.
        """
        for piece in (buffer[at : at + _COPIED] for buffer in buffers for at in range(0, len(buffer), _COPIED)):
            stop = start + len(piece)
            data = await self.read(path, start, stop, stat)
            if len(data) != len(piece):
                raise StorageError(f"{stat.url}: the store sent {len(data)} bytes where {len(piece)} were asked for.")
            await in_thread(copy_bytes, piece, data)
            current().moved(len(piece))
            start = stop

    @abstractmethod
    async def write(
        self,
        path: str,
        chunks: AsyncIterable[Chunk],
        *,
        plan: UploadPlan,
        metadata: Mapping[str, str] | None = None,
    ) -> ObjectStat:
        """Publishes the chunks as one object, atomically: all of it at the end, or nothing.

        What was at ``path`` before stays readable until then. When ``chunks`` raises, the store fails, or the
        caller is cancelled, everything staged is removed (parts, blocks, temporary files) before the error goes on.
        A cancel takes a second at most, and the object does not appear afterwards; only when the request that publishes
        was sent already, its answer is awaited, for 10 seconds at most.

        Args:
            path: Where to.
            chunks: Consumed once, in order, and to its end before anything is published. Chunks of any
                size, empty ones too. Their memory is bounded and may be needed for the next ones: keep no chunk that
                has been sent, and of those whose sending has not begun no more than one part needs.
            plan: What :meth:`upload_plan` returned; parts of other sizes are allowed.
            metadata: User metadata to store with the object, where the store can.
        """

    @abstractmethod
    async def delete(self, path: str) -> None:
        """Deletes an object. One that is not there is no error."""

    async def copy(self, source: str, target: str, size: int) -> bool:
        """Copies an object of ``size`` bytes within the store, which moves the bytes itself.

        Returns False, and has done nothing, where the store cannot (the default): then read and write it. What was at
        ``target`` is replaced at the end, as :meth:`write` does. A cancel waits for the store's answer, for 10 seconds
        at most: who deletes what was copied must not be overtaken by it.
        """
        del source, target, size
        return False

    @abstractmethod
    def list(self, prefix: str) -> AsyncIterator[ListedObject]:
        """Lists the objects whose path begins with ``prefix``, a page at a time, in no particular order.

        A missing bucket, container or directory raises :class:`~torchferry.errors.CheckpointNotFoundError`; an empty
        one, or no such objects, gives nothing.
        """

    @abstractmethod
    def leftovers(self, prefix: str) -> AsyncIterator[Leftover]:
        """Lists what writers to paths that begin with ``prefix`` have staged and not published.

        That may be a writer that was killed, or one that is under way: :attr:`Leftover.modified` tells its age.
        """

    @abstractmethod
    async def discard(self, leftover: Leftover) -> bool:
        """Removes what :meth:`leftovers` found; returns False where the store has no safe way to."""
