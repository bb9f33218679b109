"""``torch.save`` as a stream of chunks.

``torch.save`` runs in a thread and writes into a :class:`_Writer`. What it writes comes in three kinds
(torch 2.13, ``torch/serialization.py`` and ``caffe2/serialize/inline_container.cc``):

* a large CPU storage, whole and in one view of its own memory: handed on as it is, nothing is copied;
* a large storage from another device, as a view of a temporary that torch frees after ``write`` returns,
* and everything small (pickle, zip headers, small storages): both are copied, into blocks that are reused.
"""

from __future__ import annotations

import contextvars
import ctypes
import io
import pickle
import types
from bisect import bisect_right, insort
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import anyio
import torch
from anyio import from_thread, to_thread

from torchferry.engine.memory import PROCESS_BUDGET, Blocks, address_of
from torchferry.engine.tasks import task_group
from torchferry.formats.archive import DESCRIPTOR_SIGNATURE
from torchferry.formats.checksum import Crc32Filler
from torchferry.storage.base import MIB, Chunk
from torchferry.engine.cancellation import stops_as_errors
from torchferry.engine.writer import part_size_for

if TYPE_CHECKING:
    from fsspec.callbacks import Callback

__all__ = ["CheckpointStream"]

_ZERO_COPY_FROM = MIB  # a smaller view is cheaper to copy than to hand over on its own
_PIECE = 8 * MIB  # a large view is handed over in pieces: stores bound what is under way by counting what they get
_SMALL_PART = 5 * MIB  # where most is copied, so that the window holds some of them: 5 MiB is the least that S3 takes
_QUEUE = 4  # chunks between torch.save and the store
_FILLED = ("2.13.", "2.14.")  # the versions of torch whose CRC32s Crc32Filler fills in
_RECORD_OVERHEAD = 256  # bytes of zip headers, padding and directory for a record, at most (64-byte alignment)


class CheckpointStream(AsyncIterator["Chunk"]):
    """The chunks of one ``torch.save``: made in a thread, taken on an event loop, while :meth:`running`.

    It ends when all of them are taken, never because pickling or the callback raises a StopAsyncIteration.

    Args:
        obj: Anything that ``torch.save`` takes.
        write_cost: How many bytes of memory the consumer will need, given the size of the stream in bytes.
        part_size: Bytes in a part of the consumer's, where the user chose.
        callback: Told the size, and of bytes as they are taken.

    Attributes:
        size_hint: About how many bytes the chunks are together; known while running.
        part_size: Bytes in a part of the consumer's, which may hold back that much; None for its own default.
    """

    def __init__(
        self,
        obj: Any,
        *,
        write_cost: Callable[[int], int] = lambda _size: 0,
        part_size: int | None = None,
        callback: Callback | None = None,
    ) -> None:
        self.size_hint = 0
        self._obj = obj
        self._write_cost = write_cost
        self.part_size = part_size
        self._callback = callback
        self._send, self._receive = anyio.create_memory_object_stream[Chunk](_QUEUE)
        self._storages = _Storages()
        self._blocks = Blocks()
        self._begun = anyio.Event()
        self._reserved = 0
        self._taken = 0
        self._closed = False
        self._failure: Exception | None = None

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[CheckpointStream]:
        """Enters once the object is pickled and the process's memory budget has room for the stream.

        On leaving, the thread has ended: by itself, or, where not all chunks were taken, with an error at its
        next write.

        Raises:
            Exception: what ``torch.save`` raised; also when the consumer raised because of it.
        """
        try:
            async with task_group() as tasks:
                tasks.start_soon(self._produce)
                try:
                    await self._begun.wait()
                    yield self
                finally:
                    self._close()
        except Exception as error:
            if self._failure is None or self._failure is error:
                raise
            raise self._failure from self._failure.__cause__  # a store's client may have wrapped it
        finally:
            # Classes made by torch.save refer to this one in cycles: what is large must not wait for the collector.
            self._obj = None
            self._storages.clear()
            self._blocks.clear()
            PROCESS_BUDGET.give(self._reserved)

    async def __anext__(self) -> Chunk:
        try:
            chunk = await self._receive.receive()
        except anyio.EndOfStream:
            if self._failure is not None:
                raise self._failure from self._failure.__cause__  # else the EndOfStream would be its context
            if self._callback is not None:
                stops_as_errors(self._callback.set_size, self._taken)  # no longer a hint
            raise StopAsyncIteration from None
        self._taken += len(chunk)
        if self._callback is not None:
            stops_as_errors(self._callback.relative_update, len(chunk))
        return chunk

    async def _produce(self) -> None:
        try:
            # A limiter of its own: streams that wait for the budget must not keep threads from those they wait for.
            await to_thread.run_sync(stops_as_errors, self._torch_save, limiter=anyio.CapacityLimiter(1))
        except Exception as error:  # noqa: BLE001  # it goes on from __anext__, so that the consumer cleans up
            if not self._closed:
                self._failure = error
        except BaseException:
            if not self._closed:  # else the consumer's own error is the reason
                self._failure = InterruptedError("torch.save was interrupted")
            raise
        finally:
            self._begun.set()
            self._send.close()

    def _torch_save(self) -> None:
        filler = Crc32Filler() if torch.serialization.get_crc32_options() and _can_fill() else None
        writer = _Writer(self._storages, self._blocks, self._emit, filler)

        def on_opened() -> None:
            if filler is not None:  # torch.save has read the option; what the object itself may save has its CRC32s
                torch.serialization.set_crc32_options(compute_crc32=True)

        recorder = _recording_pickle(on_opened, self._storages.add, self._begin)
        if filler is not None:
            torch.serialization.set_crc32_options(compute_crc32=False)  # in this context, which is the thread's own
        torch.save(self._obj, writer, pickle_module=recorder)  # type: ignore[arg-type]  # write and flush is what it uses

    def _begin(self, pickle_size: int) -> None:
        """Called when the object is pickled and nothing is written: reserves memory, and lets the consumer begin."""
        copied = pickle_size + self._storages.copied_bytes + _RECORD_OVERHEAD * (len(self._storages) + 8)
        self.size_hint = copied + self._storages.lent_bytes
        # A store holds up to a part back before it sends any of it: with twice that there is always room to go on.
        window = 2 * part_size_for(self.size_hint, self.part_size)
        if self.part_size is None and self._storages.copied_bytes > self._storages.lent_bytes:
            self.part_size = _SMALL_PART
        cost = min(copied, window) + self._write_cost(self.size_hint)
        self._reserved = PROCESS_BUDGET.take(cost, abandoned=lambda: self._closed)
        # Never less than that: where more is copied than expected, the stream must not stall. What comes from a device
        # takes more, to go up over many connections; from the CPU, only storages below 1 MiB are copied.
        self._blocks.allow(window, borrows=self._storages.on_device)
        if self._callback is not None:
            self._callback.set_size(self.size_hint)
        from_thread.run_sync(self._begun.set)

    def _emit(self, chunk: Chunk) -> None:
        from_thread.run(self._send.send, chunk)

    def _close(self) -> None:
        self._closed = True
        self._receive.close()
        self._blocks.abandon()
        PROCESS_BUDGET.wake()


class _Writer:
    """The file object that ``torch.save`` writes into; where it leaves the CRC32s out, ``filler`` fills them in."""

    def __init__(
        self, storages: _Storages, blocks: Blocks, emit: Callable[[Chunk], None], filler: Crc32Filler | None
    ) -> None:
        self._storages = storages
        self._blocks = blocks
        self._emit = emit
        self._filler = filler
        self._block = memoryview(b"")
        self._emitted = 0
        self._filled = 0

    def write(self, data: memoryview) -> int:
        """Takes what torch writes; ``data`` is torch's again when this returns."""
        size = len(data)
        if size >= _ZERO_COPY_FROM and (lent := self._storages.lend(data)) is not None:
            self._emit_copies()
            for start in range(0, size, _PIECE):
                piece = lent[start : start + _PIECE]
                if self._filler is not None:
                    self._filler.add(piece)
                self._emit(piece)
            return size
        filled = data if self._filler is None else self._filler.fill(data)
        if self._filled + size <= len(self._block):  # the fast way for the many small writes
            self._block[self._filled : self._filled + size] = filled
            self._filled += size
        else:
            self._copy(memoryview(filled))
        return size

    def flush(self) -> None:
        """Called by torch at the end, when everything is written."""
        self._emit_copies()
        self._block = memoryview(b"")

    def _copy(self, data: memoryview) -> None:
        while len(data):
            if self._filled == len(self._block):
                self._emit_copies()
                self._block = memoryview(b"")  # let go of before waiting for the next: it may be the one
                self._block = self._blocks.take()
                self._emitted = self._filled = 0
            count = min(len(data), len(self._block) - self._filled)
            self._block[self._filled : self._filled + count] = data[:count]
            self._filled += count
            data = data[count:]

    def _emit_copies(self) -> None:
        """Emits what was copied and not emitted yet; what is left of the block is for the next copies."""
        if self._emitted < self._filled:
            self._emit(self._block[self._emitted : self._filled].toreadonly())
            self._emitted = self._filled


class _Storages:
    """The storages that ``torch.save`` found in the object."""

    def __init__(self) -> None:
        # (address, size, position in _storages) of those that can be lent; several may begin at one address
        self._by_address: list[tuple[int, int, int]] = []
        self._storages: list[torch.UntypedStorage] = []
        self._seen: set[str] = set()
        self.copied_bytes = 0
        self.lent_bytes = 0
        self.on_device = False  # any of them

    def __len__(self) -> int:
        return len(self._seen)

    def add(self, key: str, storage: torch.UntypedStorage) -> None:
        """Notes a storage; ``key`` is its name in the archive."""
        if key in self._seen:
            return
        self._seen.add(key)
        size = storage.nbytes()
        on_cpu = storage.device.type == "cpu"
        self.on_device |= not on_cpu
        if on_cpu and size >= _ZERO_COPY_FROM:
            insort(self._by_address, (storage.data_ptr(), size, len(self._storages)))
            self._storages.append(storage)
            self.lent_bytes += size
        else:
            self.copied_bytes += size

    def clear(self) -> None:
        """Lets go of the storages; those that are lent live on until they come back."""
        self._by_address.clear()
        self._storages.clear()

    def lend(self, data: memoryview) -> memoryview | None:
        """The same bytes as a view that keeps their storage alive, as ``data`` does not; None if in no CPU storage."""
        address = address_of(data)
        found = bisect_right(self._by_address, address, key=lambda entry: entry[0]) - 1
        if found < 0:
            return None
        start, size, position = self._by_address[found]
        if address + len(data) > start + size:
            return None
        lent = (ctypes.c_char * len(data)).from_address(address)
        # Every view of `lent` keeps it, and it keeps the storage.
        lent.storage = self._storages[position]  # type: ignore[attr-defined]
        return memoryview(lent).cast("B").toreadonly()


@cache
def _can_fill() -> bool:
    """Whether this torch, told to leave CRC32s out, writes what Crc32Filler knows.

    Those of _FILLED: up to some version before, the option is one for all threads; a later one is for somebody to look
    at, and computes its own CRC32s until then. Tried on a small archive, for a torch that somebody built or patched.
    """
    if not torch.__version__.startswith(_FILLED):
        return False
    looks_like_a_descriptor = torch.frombuffer(bytearray(DESCRIPTOR_SIGNATURE * 4), dtype=torch.uint8)
    obj = [torch.empty(0), looks_like_a_descriptor, torch.ones(MIB)]
    filler, plain, filled = Crc32Filler(), io.BytesIO(), io.BytesIO()
    filling = types.SimpleNamespace(write=lambda data: filled.write(filler.fill(data)), flush=filled.flush)

    def save_both() -> None:
        for compute_crc32, file in ((True, plain), (False, filling)):
            torch.serialization.set_crc32_options(compute_crc32)
            torch.save(obj, file)

    try:
        contextvars.copy_context().run(save_both)
    except Exception:  # noqa: BLE001  # whatever it is: torch's own CRC32s will do
        return False
    return filled.getvalue() == plain.getvalue()


def _recording_pickle(
    on_opened: Callable[[], None],
    on_storage: Callable[[str, torch.UntypedStorage], None],
    on_pickled: Callable[[int], None],
) -> Any:
    """A ``pickle_module`` for ``torch.save`` that tells when pickling begins, of each storage, and when it is done.

    ``torch.save`` subclasses the module's ``Pickler`` and overrides ``persistent_id``, which returns
    ``("storage", type, key, location, numel)`` for each storage; the bytes it writes are the pickle module's own.
    """

    class RecordingPickler(pickle.Pickler):
        def __init_subclass__(cls) -> None:
            torchs = cls.persistent_id

            def persistent_id(self: Any, obj: Any) -> Any:
                pid = torchs(self, obj)
                if pid is not None:
                    typed = isinstance(obj, torch.TypedStorage)
                    on_storage(pid[2], obj._untyped_storage if typed else obj)  # noqa: SLF001  # .untyped() warns
                return pid

            cls.persistent_id = persistent_id  # type: ignore[method-assign]

        def __init__(self, file: Any, *args: Any, **kwargs: Any) -> None:
            on_opened()
            super().__init__(file, *args, **kwargs)
            self._file = file

        def dump(self, obj: Any) -> None:
            super().dump(obj)
            on_pickled(self._file.tell())

    return types.SimpleNamespace(__name__=pickle.__name__, Pickler=RecordingPickler)
