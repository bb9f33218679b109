"""``torch.save`` as a stream of chunks.

``torch.save`` runs in a thread and writes into a :class:`ChunkWriter`. What it writes comes in three kinds
(torch 2.13, ``torch/serialization.py`` and ``caffe2/serialize/inline_container.cc``):

* a large CPU storage, whole and in one view of its own memory: handed on as it is, nothing is copied;
* a large storage from another device, as a view of a temporary that torch frees after ``write`` returns,
* and everything small (pickle, zip headers, small storages): both are copied, into blocks of the memory ledger.
"""

from __future__ import annotations

import contextvars
import io
import os
import threading
import traceback
import types
from bisect import bisect_right, insort
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import anyio
import torch
from anyio import from_thread, to_thread
from isal import isal_zlib

from torchferry.engine.cancellation import in_thread, stops_as_errors
from torchferry.engine.channel import Channel, ChannelClosedError
from torchferry.engine.lending import Loans, lend, reading, when_back
from torchferry.engine.memory import BLOCK_SIZE, CPU_SAVES, EVERYTHING_ELSE, Claim, Ledger, address_of
from torchferry.engine.tasks import task_group
from torchferry.engine.transfer import current
from torchferry.engine.types import MIB, Chunk
from torchferry.engine.writer import UploadPlan
from torchferry.formats.archive import DESCRIPTOR_SIGNATURE
from torchferry.formats.changes import Changes
from torchferry.formats.checksum import Crc32Filler, UnknownLayoutError
from torchferry.formats.torch_hooks import NO_MODES, TorchModes, crc32_option_is_of_the_context, torch_save
from torchferry.formats.torch_pickle import Pickled, recording_pickle, replaying_pickle

__all__ = [
    "COPYING_PART",
    "DEVICE_SHARE",
    "LENT_FROM",
    "PIECE",
    "QUEUE",
    "SMALL_PART",
    "ChunkWriter",
    "Storages",
    "TorchStream",
    "fills_crc32s",
]

LENT_FROM = MIB
"""Bytes from which on a CPU storage is sent from its own memory; a smaller one is cheaper to copy."""

PIECE = 8 * MIB  # a large view is handed over in pieces: stores bound what is under way by counting what they get
SMALL_PART = 5 * MIB  # where most is copied: more parts are under way in the same memory; 5 MiB is S3's least
COPYING_PART = 16 * MIB  # where more than that is copied, and yet less than half: two such saves fit the ledger
DEVICE_SHARE = 8  # from a device, a part is at most this share of the ledger, so that several are under way
QUEUE = 4  # chunks between torch.save and the store
_surprised = threading.Event()  # a save met what _knows_layout had not seen: torch computes the CRC32s from then on
_ZEROS = memoryview(bytes(64 << 10))
_RECORD_OVERHEAD = 256  # bytes of zip headers, padding and directory for a record, at most (64-byte alignment)


class TorchStream(AsyncIterator["Chunk"]):
    """The chunks of one ``torch.save``: made in a thread, taken on an event loop, while :meth:`running`.

    It ends when all of them are taken, never because pickling raises a StopAsyncIteration.

    Args:
        obj: Anything that ``torch.save`` takes, or :class:`.torch_pickle.Pickled`.
        plan_for: The store's upload plan for a size in bytes and a part size, or None for the store's own.
        part_size: Bytes in a part, where the user chose.
        modes: Of torch, in which it is saved.
        url: For messages.
        store_checks: Whether the store compares what it gets with the chunks' CRC32s.
        store_reads_loans: Whether the store reads chunks within :func:`.lending.reading`.
        lazy: Gives the bytes of some storages in place of those in memory, by address and size
            (:class:`.lazy.LazyTensors`); only where :func:`fills_crc32s`.

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
        modes: TorchModes = NO_MODES,
        url: str = "",
        store_checks: bool = False,
        store_reads_loans: bool = False,
        lazy: Callable[[int, int], Iterator[Chunk] | None] | None = None,
    ) -> None:
        self._lazy = lazy
        self.size_hint = 0
        self.plan = UploadPlan()
        self._obj = obj
        self._plan_for = plan_for
        self._part_size = part_size
        self._modes = modes
        self._transfer = current()
        self._chunks: Channel[Chunk] = Channel(QUEUE)
        self._store_reads_loans = store_reads_loans
        self._lent = obj.lent if isinstance(obj, Pickled) else None
        if isinstance(obj, Pickled):
            self._transfer.holds(obj.copied)
        self._changes = Changes(url) if self._lent is None else self._lent.changes
        self._changes.recheck = not store_checks
        self._storages = Storages(obj, are_lent=not modes.skips_data)
        self._claim: Claim | None = None
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
            self._changes.forget()
            if self._lent is not None:
                self._transfer.holds(self._lent.copied)
                self._lent.end()
            if self._claim is not None:
                self._claim.close()

    async def __anext__(self) -> Chunk:
        self._transfer.tell()
        try:
            return await self._chunks.take()
        except ChannelClosedError:
            if self._failure is not None:
                raise self._failure from self._failure.__cause__  # else the ChannelClosedError would be its context
        await self._check_unchanged()
        raise StopAsyncIteration

    async def _produce(self) -> None:
        try:
            # A limiter of its own: streams that wait for memory must not keep threads from those they wait for.
            await to_thread.run_sync(self._save_in_thread, limiter=anyio.CapacityLimiter(1))
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

    async def _check_unchanged(self) -> None:
        """Called before anything is published: raises where a tensor was changed."""
        if self._changes.takes_time:
            await in_thread(self._look_for_changes)
        else:
            self._look_for_changes()

    def _look_for_changes(self) -> None:
        if self._lent is None:
            self._changes.check()
            return
        with self._lent.loans.held() as are_lent:
            if are_lent:
                self._changes.check()

    def _save_in_thread(self) -> None:
        try:
            stops_as_errors(self._torch_save)
        except Exception as error:
            if not self._closed:
                raise
            # Nobody sees it. Its frames hold the tensors: they go here, in a thread that the interpreter waits for when
            # it ends, and not with the collector.
            traceback.clear_frames(error.__traceback__)

    def _torch_save(self) -> None:
        fills = torch.serialization.get_crc32_options() and not self._modes.skips_data and fills_crc32s()
        filler = Crc32Filler() if fills else None
        if self._lent is not None and not self._store_reads_loans:
            self._lent.recall()
        writer = ChunkWriter(self._storages, self._chunks.put, filler, self._changes, self._lazy)
        tensors: list[torch.Tensor] = []

        def on_opened() -> None:
            if filler is not None:  # torch.save has read the option; what the object itself may save has its CRC32s
                torch.serialization.set_crc32_options(compute_crc32=True)

        def on_pickled(data: io.BytesIO) -> None:
            if not isinstance(self._obj, Pickled):
                self._changes.watch(tensors, self._storages.lent)
                tensors.clear()
            writer.begin(self._begin(data.tell()), self.plan)

        if isinstance(self._obj, Pickled):
            recorder = replaying_pickle(self._obj, on_opened, self._storages.add, on_pickled)
        else:
            recorder = recording_pickle(on_opened, self._storages.add, tensors.append, on_pickled)
        if filler is not None:
            torch.serialization.set_crc32_options(compute_crc32=False)  # in this context, which is the thread's own
        self._save_to(writer, recorder)

    def _save_to(self, writer: ChunkWriter, recorder: Any) -> None:
        """Runs torch.save. Where a write fails, its error goes on, and not the one that torch makes of it."""
        failure = None
        try:
            with self._modes.applied():
                torch_save(self._obj, writer, pickle_module=recorder)  # type: ignore[arg-type]  # write and flush will do
        except RuntimeError:
            if writer.error is None:
                raise
            failure = writer.error
        finally:
            writer.error = None
            writer.close()
        try:  # out here, where torch's error is not its context: their frames refer to each other, and to the tensors
            if failure is not None:
                raise failure
        finally:
            del failure

    def _begin(self, pickle_size: int) -> Claim:
        """Called when the object is pickled and nothing is written: claims memory, and lets the consumer begin."""
        copied = pickle_size + self._storages.copied_bytes + _RECORD_OVERHEAD * (len(self._storages) + 8)
        self.size_hint = copied + self._storages.lent_bytes
        self._waits_for = ledger = EVERYTHING_ELSE if self._storages.on_device else CPU_SAVES
        part_size = self._part_size
        if self._storages.on_device:
            part_size = min(self.plan_size(part_size), ledger.limit // DEVICE_SHARE)
        elif part_size is None and self._storages.copied_bytes > self._storages.lent_bytes:
            part_size = SMALL_PART
        elif part_size is None and copied > COPYING_PART:
            part_size = COPYING_PART
        self.plan = self._plan_for(self.size_hint, part_size)
        return self._begin_with(ledger, copied)

    def _begin_with(self, ledger: Ledger, copied: int) -> Claim:
        """Claims memory for a stream of which ``copied`` bytes are copied, and lets the consumer begin."""
        # A store holds up to a part back before it sends any of it: with one block more there is always room to go on.
        self._claim = claim = ledger.claim(
            min(copied, self.plan.part_size + BLOCK_SIZE),
            beside=min(self.plan.memory, self.size_hint),
            abandoned=lambda: self._closed,
        )
        if self._closed:  # meanwhile: nobody else gives it back
            claim.close()
        from_thread.run_sync(self._begun.set)
        return claim

    def plan_size(self, part_size: int | None) -> int:
        """The part size that the store would take."""
        return self._plan_for(self.size_hint, part_size).part_size

    def _close(self) -> None:
        self._closed = True
        self._chunks.close()
        if self._claim is not None:
            self._claim.abandon()
        self._waits_for.wake()


class ChunkWriter:
    """The file object that ``torch.save`` writes into; where it leaves the CRC32s out, ``filler`` fills them in."""

    def __init__(
        self,
        storages: Storages,
        emit: Callable[[Chunk], None],
        filler: Crc32Filler | None,
        changes: Changes,
        lazy: Callable[[int, int], Iterator[Chunk] | None] | None = None,
    ) -> None:
        self._lazy = lazy
        self._storages = storages
        self._changes = changes
        self._send = emit
        self._filler = filler
        self._claim: Claim | None = None
        self._plan = UploadPlan()
        self._part = 0  # the number of the part that is being filled
        self._left = 0  # bytes until its end
        self._block = memoryview(b"")
        self._emitted = 0
        self._filled = 0
        self.error: Exception | None = None  # what the first write that failed raised

    def begin(self, claim: Claim, plan: UploadPlan) -> None:
        """Called before the first write: the memory for copies, and where parts end."""
        self._claim = claim
        self._plan = plan
        self._left = plan.part_at(0)

    def write(self, data: memoryview) -> int:
        """Takes what torch writes; ``data`` is torch's again when this returns."""
        try:
            return self._write(data)
        except Exception as error:
            self.error = self.error or error
            if isinstance(error, UnknownLayoutError):
                _surprised.set()
            raise

    def _write(self, data: memoryview) -> int:
        size = len(data)
        if self._lazy is not None and size and (chunks := self._lazy(address_of(data), size)) is not None:
            if size >= LENT_FROM:
                self._emit_copies()
                for chunk in chunks:
                    self._emit(memoryview(chunk.data), fills=True)
                return size
            data = memoryview(b"".join(chunk.data for chunk in chunks))
        if size >= LENT_FROM and (owner := self._storages.owner_of(data)) is not None:
            self._emit_copies()
            self._emit(data, owner)
            return size
        filled = data if self._filler is None else self._filler.fill(data)
        if self._filled + size <= len(self._block):  # the fast way for the many small writes
            self._block[self._filled : self._filled + size] = filled
            self._filled += size
        else:
            self._copy(memoryview(filled))
        return size

    def seek(self, count: int, whence: int) -> None:
        """Called by torch in place of a write, to leave out so many bytes from here (``skip_data``): zeros."""
        assert whence == os.SEEK_CUR  # noqa: S101 - torch does nothing else
        while count:
            size = min(count, len(_ZEROS))
            self.write(_ZEROS[:size])
            count -= size

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
            self._emit(self._block[self._emitted : self._filled].toreadonly())
            self._emitted = self._filled

    def _emit(self, view: memoryview, owner: _Owner | None = None, *, fills: bool = False) -> None:
        """Emits bytes in chunks that end where parts end; those of a storage from its own memory.

        Args:
            view: The bytes.
            owner: The storage that they lie in.
            fills: Whether they are a record's, whose CRC32 is filled in.
        """
        while len(view):
            piece = view[: min(len(view), self._left, PIECE)]
            view = view[len(piece) :]
            self._left -= len(piece)
            self._send(self._copied(piece, fills=fills) if owner is None else self._lend(piece, owner))
            if not self._left:
                self._part += 1
                self._left = self._plan.part_at(self._part)

    def _copied(self, piece: memoryview, *, fills: bool) -> Chunk:
        crc32 = isal_zlib.crc32(piece)
        if fills and self._filler is not None:
            self._filler.add(piece, crc32)
        return Chunk(piece, crc32)

    def _lend(self, piece: memoryview, owner: _Owner) -> Chunk:
        lent = lend(piece, owner.storage, owner.loans)
        with reading(lent) as memory:
            crc32 = isal_zlib.crc32(memory)
            if self._filler is not None:
                self._filler.add(memory, crc32)
            if owner.may_change:
                self._changes.check_sent()
        if owner.loans is not None and owner.loans.recalled:
            return Chunk(memory, crc32)  # of the copy
        if owner.loans is not None or (owner.may_change and self._changes.recheck):
            when_back(lent, partial(self._came_back, piece, crc32, owner.loans))
        return Chunk(lent, crc32)

    def _came_back(self, piece: memoryview, crc32: int, loans: Loans | None) -> None:
        self._changes.sent(piece, crc32)
        if loans is not None:
            loans.came_back(piece)


class _Owner(NamedTuple):
    """A storage that the bytes of a chunk lie in.

    Attributes:
        storage: It.
        may_change: Whether anybody but torchferry has it.
        loans: Where it may be recalled.
    """

    storage: torch.UntypedStorage
    may_change: bool
    loans: Loans | None


class Storages:
    """The storages that ``torch.save`` found in the object.

    Args:
        obj: What is saved.
        are_lent: Whether torch writes the bytes of large ones from their own memory, as it does unless it skips data.
    """

    def __init__(self, obj: Any, *, are_lent: bool = True) -> None:
        self._are_lent = are_lent
        self._pickled = obj if isinstance(obj, Pickled) else None
        # (address, size, position in _owners) of those that can be lent; several may begin at one address
        self._by_address: list[tuple[int, int, int]] = []
        self._owners: list[_Owner] = []
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
        if on_cpu and size >= LENT_FROM and self._are_lent:
            insort(self._by_address, (storage.data_ptr(), size, len(self._owners)))
            lent = self._pickled.lent if self._pickled is not None else None
            loans = lent.loans if lent is not None and lent.has(storage) else None
            self._owners.append(_Owner(storage, self._pickled is None or loans is not None, loans))
            self.lent_bytes += size
        else:
            self.copied_bytes += size

    @property
    def lent(self) -> list[torch.UntypedStorage]:
        """Those that are sent from their own memory."""
        return [owner.storage for owner in self._owners]

    def clear(self) -> None:
        """Lets go of the storages; those that are lent live on until they come back."""
        self._by_address.clear()
        self._owners.clear()
        self._pickled = None

    def owner_of(self, data: memoryview) -> _Owner | None:
        """The CPU storage that these bytes lie in, if any."""
        address = address_of(data)
        found = bisect_right(self._by_address, address, key=lambda entry: entry[0]) - 1
        if found < 0:
            return None
        start, size, position = self._by_address[found]
        return self._owners[position] if address + len(data) <= start + size else None


def fills_crc32s() -> bool:
    """Whether a stream computes CRC32s itself, and torch does not read storages for them."""
    return not _surprised.is_set() and _knows_layout()


@cache
def _knows_layout() -> bool:
    """Whether this torch, told to leave CRC32s out, writes what Crc32Filler knows.

    Asked of torch itself, not of its version: the option must be one for each thread (in older ones it is one for
    all: then nothing is tried), and a small archive that is filled in must be the one that torch writes, to the byte.
    """
    if not crc32_option_is_of_the_context():
        return False
    looks_like_a_descriptor = torch.frombuffer(bytearray(DESCRIPTOR_SIGNATURE * 4), dtype=torch.uint8)
    obj = [torch.empty(0), looks_like_a_descriptor, torch.ones(MIB)]
    filler, plain, filled = Crc32Filler(), io.BytesIO(), io.BytesIO()
    filling = types.SimpleNamespace(write=lambda data: filled.write(filler.fill(data)), flush=filled.flush)

    def save_both() -> None:
        for compute_crc32, file in ((True, plain), (False, filling)):
            torch.serialization.set_crc32_options(compute_crc32)
            torch_save(obj, file)

    try:
        contextvars.copy_context().run(save_both)
    except Exception:  # noqa: BLE001  # whatever it is: torch's own CRC32s will do
        return False
    return filled.getvalue() == plain.getvalue()
