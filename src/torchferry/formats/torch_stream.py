"""``torch.save`` as a stream of chunks.

``torch.save`` runs in a thread and writes into a :class:`_Writer`. What it writes comes in three kinds
(torch 2.13, ``torch/serialization.py`` and ``caffe2/serialize/inline_container.cc``):

* a large CPU storage, whole and in one view of its own memory: handed on as it is, nothing is copied;
* a large storage from another device, as a view of a temporary that torch frees after ``write`` returns,
* and everything small (pickle, zip headers, small storages): both are copied, into blocks of the memory ledger.
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
from typing import Any

import anyio
import torch
from anyio import from_thread, to_thread
from isal import isal_zlib

from torchferry.engine.cancellation import stops_as_errors
from torchferry.engine.channel import Channel, ChannelClosedError
from torchferry.engine.memory import BLOCK_SIZE, CPU_SAVES, EVERYTHING_ELSE, Claim, Ledger, address_of
from torchferry.engine.tasks import task_group
from torchferry.engine.transfer import current
from torchferry.engine.types import MIB, Chunk
from torchferry.engine.writer import UploadPlan
from torchferry.formats.archive import DESCRIPTOR_SIGNATURE
from torchferry.formats.checksum import Crc32Filler

__all__ = ["TorchStream"]

_ZERO_COPY_FROM = MIB  # a smaller view is cheaper to copy than to hand over on its own
_PIECE = 8 * MIB  # a large view is handed over in pieces: stores bound what is under way by counting what they get
_SMALL_PART = 5 * MIB  # where most is copied: more parts are under way in the same memory; 5 MiB is S3's least
_COPYING_PART = 16 * MIB  # where more than that is copied, and yet less than half: two such saves fit the ledger
_DEVICE_SHARE = 8  # from a device, a part is at most this share of the ledger, so that several are under way
_QUEUE = 4  # chunks between torch.save and the store
_FILLED = ("2.13.", "2.14.")  # the versions of torch whose CRC32s Crc32Filler fills in
_RECORD_OVERHEAD = 256  # bytes of zip headers, padding and directory for a record, at most (64-byte alignment)


class TorchStream(AsyncIterator["Chunk"]):
    """The chunks of one ``torch.save``: made in a thread, taken on an event loop, while :meth:`running`.

    It ends when all of them are taken, never because pickling raises a StopAsyncIteration.

    Args:
        obj: Anything that ``torch.save`` takes.
        plan_for: The store's upload plan for a size in bytes and a part size, or None for the store's own.
        part_size: Bytes in a part, where the user chose.

    Attributes:
        size_hint: About how many bytes the chunks are together; known while running.
        plan: The store's plan for that; known while running. No chunk crosses the end of a part.
    """

    def __init__(
        self,
        obj: Any,
        *,
        plan_for: Callable[[int, int | None], UploadPlan] = UploadPlan.for_size,
        part_size: int | None = None,
    ) -> None:
        self.size_hint = 0
        self.plan = UploadPlan()
        self._obj = obj
        self._plan_for = plan_for
        self._part_size = part_size
        self._transfer = current()
        self._chunks: Channel[Chunk] = Channel(_QUEUE)
        self._storages = _Storages()
        self._claims: list[Claim] = []
        self._waits_for: Ledger = CPU_SAVES
        self._begun = anyio.Event()
        self._closed = False
        self._failure: Exception | None = None

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[TorchStream]:
        """Enters once the object is pickled and the memory ledger has room for the stream.

        On leaving, the thread has ended: by itself, or, where not all chunks were taken, with an error at its
        next write.

        Raises:
            Exception: what ``torch.save`` raised; also when the consumer raised because of it.
        """
        try:
            async with task_group() as tasks:
                tasks.start_soon(self._produce)
                try:
                    with self._transfer.stage("pickling"):
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
            # So must what hangs on the error: its traceback holds torch's file writer, and that one this object.
            self._obj = None
            self._failure = None
            self._storages.clear()
            for claim in self._claims:
                claim.close()

    async def __anext__(self) -> Chunk:
        self._transfer.tell()
        try:
            return await self._chunks.take()
        except ChannelClosedError:
            if self._failure is not None:
                raise self._failure from self._failure.__cause__  # else the ChannelClosedError would be its context
            raise StopAsyncIteration from None

    async def _produce(self) -> None:
        try:
            # A limiter of its own: streams that wait for memory must not keep threads from those they wait for.
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
            self._chunks.end()

    def _torch_save(self) -> None:
        filler = Crc32Filler() if torch.serialization.get_crc32_options() and _can_fill() else None
        writer = _Writer(self._storages, self._chunks.put, filler)

        def on_opened() -> None:
            if filler is not None:  # torch.save has read the option; what the object itself may save has its CRC32s
                torch.serialization.set_crc32_options(compute_crc32=True)

        def on_pickled(pickle_size: int) -> None:
            writer.begin(self._begin(pickle_size), self.plan)

        recorder = _recording_pickle(on_opened, self._storages.add, on_pickled)
        if filler is not None:
            torch.serialization.set_crc32_options(compute_crc32=False)  # in this context, which is the thread's own
        try:
            torch.save(self._obj, writer, pickle_module=recorder)  # type: ignore[arg-type]  # write and flush will do
        finally:
            writer.close()

    def _begin(self, pickle_size: int) -> Claim:
        """Called when the object is pickled and nothing is written: claims memory, and lets the consumer begin."""
        copied = pickle_size + self._storages.copied_bytes + _RECORD_OVERHEAD * (len(self._storages) + 8)
        self.size_hint = copied + self._storages.lent_bytes
        self._waits_for = ledger = EVERYTHING_ELSE if self._storages.on_device else CPU_SAVES
        part_size = self._part_size
        if self._storages.on_device:
            part_size = min(self.plan_size(part_size), ledger.limit // _DEVICE_SHARE)
        elif part_size is None and self._storages.copied_bytes > self._storages.lent_bytes:
            part_size = _SMALL_PART
        elif part_size is None and copied > _COPYING_PART:
            part_size = _COPYING_PART
        self.plan = self._plan_for(self.size_hint, part_size)
        # A store holds up to a part back before it sends any of it: with one block more there is always room to go on.
        claim = self._claim(ledger, min(copied, self.plan.part_size + BLOCK_SIZE))
        if self.plan.memory:
            self._claim(ledger, min(self.plan.memory, self.size_hint))
        from_thread.run_sync(self._begun.set)
        return claim

    def plan_size(self, part_size: int | None) -> int:
        """The part size that the store would take."""
        return self._plan_for(self.size_hint, part_size).part_size

    def _claim(self, ledger: Ledger, need: int) -> Claim:
        claim = ledger.claim(need, abandoned=lambda: self._closed)
        self._claims.append(claim)
        if self._closed:  # meanwhile: nobody else gives it back
            claim.close()
        return claim

    def _close(self) -> None:
        self._closed = True
        self._chunks.close()
        for claim in self._claims:
            claim.abandon()
        self._waits_for.wake()


class _Writer:
    """The file object that ``torch.save`` writes into; where it leaves the CRC32s out, ``filler`` fills them in."""

    def __init__(self, storages: _Storages, emit: Callable[[Chunk], None], filler: Crc32Filler | None) -> None:
        self._storages = storages
        self._send = emit
        self._filler = filler
        self._claim: Claim | None = None
        self._plan = UploadPlan()
        self._part = 0  # the number of the part that is being filled
        self._left = 0  # bytes until its end
        self._block = memoryview(b"")
        self._emitted = 0
        self._filled = 0

    def begin(self, claim: Claim, plan: UploadPlan) -> None:
        """Called before the first write: the memory for copies, and where parts end."""
        self._claim = claim
        self._plan = plan
        self._left = plan.part_at(0)

    def write(self, data: memoryview) -> int:
        """Takes what torch writes; ``data`` is torch's again when this returns."""
        size = len(data)
        if size >= _ZERO_COPY_FROM and (lent := self._storages.lend(data)) is not None:
            self._emit_copies()
            self._emit(lent, self._filler)
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

    def close(self) -> None:
        """Lets go of the block, and takes no other: torch may keep this object, and end its archive later."""
        self._claim = None
        self._block = memoryview(b"")
        self._emitted = self._filled = 0

    def _copy(self, data: memoryview) -> None:
        if self._claim is None:  # torch.save failed: torch ends an archive that nobody will see
            return
        while len(data):
            if self._filled == len(self._block):
                self._emit_copies()
                self._block = memoryview(b"")  # let go of before waiting for the next: it may be the one
                self._block = self._claim.take()
                self._emitted = self._filled = 0
            count = min(len(data), len(self._block) - self._filled)
            self._block[self._filled : self._filled + count] = data[:count]
            self._filled += count
            data = data[count:]

    def _emit_copies(self) -> None:
        """Emits what was copied and not emitted yet; what is left of the block is for the next copies."""
        if self._emitted < self._filled:
            self._emit(self._block[self._emitted : self._filled].toreadonly(), None)
            self._emitted = self._filled

    def _emit(self, view: memoryview, filler: Crc32Filler | None) -> None:
        """Emits bytes in chunks that end where parts end; ``filler`` is told of the bytes of a record."""
        while len(view):
            piece = view[: min(len(view), self._left, _PIECE)]
            crc32 = isal_zlib.crc32(piece)
            if filler is not None:
                filler.add(piece, crc32)
            self._send(Chunk(piece, crc32))
            view = view[len(piece) :]
            self._left -= len(piece)
            if not self._left:
                self._part += 1
                self._left = self._plan.part_at(self._part)


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
