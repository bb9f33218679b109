"""Objects as Python's files: read by ranges, written as one upload, for libraries that want a file."""

from __future__ import annotations

import ctypes
import io
import threading
import weakref
from collections.abc import AsyncIterator
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from torchferry.engine.channel import Channel, ChannelClosedError
from torchferry.engine.loops import Call, own_loop, refuse_own_loop, run, wait_for
from torchferry.engine.memory import BLOCK_SIZE, CPU_SAVES, EVERYTHING_ELSE, address_of
from torchferry.engine.reader import RangeReader, Readable
from torchferry.engine.transfer import Transfer, current
from torchferry.engine.types import MIB, Chunk, ObjectStat
from torchferry.errors import mask
from torchferry.formats.changes import Changes
from torchferry.formats.torch_stream import COPYING_PART, QUEUE, SMALL_PART, ChunkWriter, Storages
from torchferry.storage.base import Backend

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Buffer

__all__ = ["RangeFile", "UploadFile"]

_WINDOW = 64 << 10  # bytes: a shorter read reads so many, which are kept for the next ones
_KEPT = 8 * MIB  # bytes of them at most

_uploads: weakref.WeakSet[_Upload] = weakref.WeakSet()  # that have not ended
_lock = threading.Lock()


class RangeFile(io.RawIOBase):
    """One version of an object as a file, read by ranges, many at once for a long read.

    Args:
        backend: Of the store.
        path: The object, as the backend takes it.
        stat: The version.
    """

    def __init__(self, backend: Readable, path: str, stat: ObjectStat) -> None:
        super().__init__()
        self._open = partial(RangeReader, backend, path, stat)
        self._reader = self._open()
        self._size = stat.size
        self._at = 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Where the next read begins."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Goes to a position, also one after the end; returns it."""
        at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if at < 0:
            raise ValueError(f"There is no position {at} in {self._reader.url}.")
        self._at = at
        return at

    def readinto(self, buffer: Buffer, /) -> int:
        """Fills the buffer, or what there is of it until the end; returns how many bytes that was."""
        view = memoryview(buffer)
        size = min(view.nbytes, max(0, self._size - self._at))
        if size:
            self._fill(view.cast("B")[:size])
        self._at += size
        return size

    def readall(self) -> bytes:
        """All from here, read at once into the memory that is returned."""
        size = max(0, self._size - self._at)
        data = bytes(size)
        if size < _WINDOW:
            writable = bytearray(size)
            self._fill(memoryview(writable))
            data = bytes(writable)
        else:  # nobody else has this object yet
            memory = (ctypes.c_char * size).from_address(address_of(data))
            memory.owner = data  # type: ignore[attr-defined]  # its views may outlive this call for a moment
            self._fill(memoryview(memory).cast("B"))
        self._at += size
        return data

    def _fill(self, view: memoryview) -> None:
        start, stop = self._at, self._at + len(view)
        if not len(view):
            return
        if len(view) < _WINDOW:  # torch reads an archive's directory in many short reads
            first, last = start - start % _WINDOW, min(self._size, stop + -stop % _WINDOW)
            if sum(len(kept) for _, kept in self._reader.kept) > _KEPT:
                self._reader = self._open()
            view[:] = run(self._reader.read, first, last)[start - first : stop - first]
            return
        reader = self._open()
        ranges = reader.plan_into_memory([(start, stop)])
        run(reader.stream, ranges, _ignore, memory=lambda first, last: [view[first - start : last - start]])


class _Upload:
    """An upload that goes on while its bytes are written.

    Attributes:
        thread: That began it.
    """

    def __init__(self, backend: Backend, path: str, data: object) -> None:
        refuse_own_loop()
        self._path, self._url, self._backend = path, mask(backend.url(path)), backend
        self._storages = storages = _storages_of(data)
        self._changes = Changes(self._url)
        self._changes.recheck = not self._backend.checks_chunks
        self._writer = ChunkWriter(storages, self._put, None, self._changes)
        lent = storages.lent_bytes > storages.copied_bytes
        self._plan = self._backend.upload_plan(
            storages.lent_bytes + storages.copied_bytes, COPYING_PART if lent else SMALL_PART
        )
        self._ledger = CPU_SAVES if lent else EVERYTHING_ELSE
        self._complete = False
        self._begun: Future[None] = Future()
        self._ended: Future[None] = Future()
        self.thread = threading.get_ident()
        with _lock:  # who waits for memory that its own files hold waits for ever
            self._waits = all(other.thread != self.thread for other in _uploads)
            _uploads.add(self)
        self._call = Call(self._send, self._end, loop=own_loop(self._backend.loop))
        try:
            self._call.start()
            wait_for(self._begun)
        except BaseException:
            self.abort()
            raise
        if self._ended.done():
            self._call.result()

    def write(self, view: memoryview) -> int:
        """Sends bytes, or copies them. Raises what the upload has failed with."""
        try:
            return self._writer.write(view)
        except (ChannelClosedError, InterruptedError):
            wait_for(self._ended)
            self._call.result()
            raise

    def finish(self) -> None:
        """Publishes the object."""
        try:
            self._writer.flush()
            self._complete = True
            self._channel.end()
        except (ChannelClosedError, InterruptedError):
            self._complete = False
        try:
            wait_for(self._ended)
        except BaseException:
            self.abort()
            raise
        self._release()
        self._call.result()

    def abort(self) -> None:
        """Gives up what was sent, and waits until nothing of it is left."""
        self.cancel()
        wait_for(self._ended)

    def cancel(self) -> None:
        """Gives up what was sent, and does not wait."""
        if not self._ended.done():
            self._call.cancel()
        self._release()

    def _release(self) -> None:
        """Lets go of the tensors. Called where nobody writes any more."""
        self._writer.close()
        self._changes.forget()
        self._storages.clear()

    async def _send(self) -> None:
        with Transfer("save", self._url).running(None):
            # A store holds up to a part back before it sends any of it: with one block more there is always room.
            claim = await self._ledger.claim_async(
                self._plan.part_size + BLOCK_SIZE, beside=self._plan.memory, waits=self._waits
            )
            self._channel: Channel[Chunk] = Channel(QUEUE)
            try:
                self._writer.begin(claim, self._plan)
                self._begun.set_result(None)
                stat = await self._backend.write(self._path, self._chunks(), plan=self._plan)
                current().moved_at_least(stat.size)
            finally:
                self._channel.close()
                claim.close()

    async def _chunks(self) -> AsyncIterator[Chunk]:
        while True:
            try:
                yield await self._channel.take()
            except ChannelClosedError:
                break
        if not self._complete:
            raise InterruptedError("The upload was given up.")
        self._changes.check()

    def _put(self, chunk: Chunk) -> None:
        self._channel.put(chunk)

    def _end(self) -> None:
        with _lock:
            _uploads.discard(self)
        for future in (self._ended, self._begun):
            if not future.done():
                future.set_result(None)


class UploadFile(io.RawIOBase):
    """An object as a file to be written. It goes out in parts meanwhile.

    Closing the file publishes the object. Leaving a ``with`` by an exception does not, nor does letting go of the file.

    Args:
        backend: Of the store.
        path: Where to, as the backend takes it.
        data: What ``torch.save`` will write into it: large CPU tensors of that are sent from their own memory. None
            where it is not known: all is copied.
    """

    def __init__(self, backend: Backend, path: str, data: object = None) -> None:
        super().__init__()
        self._upload = _Upload(backend, path, data)
        try:
            weakref.finalize(self, self._upload.cancel).atexit = False
        except BaseException:  # a signal's: nobody else ends it
            self._upload.abort()
            raise
        self._failure: BaseException | None = None

    def writable(self) -> bool:
        """It is."""
        return True

    def write(self, data: Buffer, /) -> int:
        """Sends or copies bytes: they may change when this returns, but for those of ``data`` tensors.

        Raises:
            StorageError: the upload has failed.
        """
        view = memoryview(data)
        if self.closed:
            raise ValueError("The stream is closed.")
        if not view.nbytes:
            return 0
        view = view.cast("B")
        try:
            return self._upload.write(view)
        except BaseException as error:
            self._failure = error
            raise

    def close(self) -> None:
        """Publishes the object, once all of it is there; raises what kept it from that, a write that failed too."""
        if self.closed:
            return
        failure, self._failure = self._failure, None
        if failure is not None:
            self._upload.abort()
            super().close()
            raise failure
        try:
            self._upload.finish()
        finally:
            super().close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        self._upload.abort()
        super().close()
        failure, self._failure = self._failure, None
        if failure is not None and error is not failure:  # torch makes a RuntimeError of it
            raise failure

    def __del__(self) -> None:
        """Does nothing, where a file's own would close it and so publish the object."""


def _storages_of(data: object) -> Storages:
    """The storages of the tensors in what is to be saved."""
    found = Storages(None)
    for leaf in tree_leaves(data):
        tensor = leaf.to_local() if isinstance(leaf, DTensor) else leaf
        if type(tensor) in {torch.Tensor, torch.nn.Parameter} and tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            found.add(f"{storage.device} {storage.data_ptr()}", storage)
    return found


def _ignore(start: int, buffer: object) -> None:
    """What came is where it belongs."""
