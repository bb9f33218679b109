"""Copies of storages in host memory that is kept from one snapshot to the next.

The first time, most of the time goes into pages that the system has to make; from then on a copy runs at the speed of
memory. So the memory is kept, in huge pages where the system has them.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import sys
import threading
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

from torchferry.engine.cancellation import ThreadPool
from torchferry.engine.lending import Loans
from torchferry.engine.memory import address_of
from torchferry.engine.types import MIB
from torchferry.formats.changes import Changes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["LentStorages", "Snapshot", "Snapshots", "copy_memory", "size_of_copies"]

logger = logging.getLogger("torchferry")

_ALIGNMENT = 64  # bytes: of a copy in memory
_HUGE_PAGE = 2 * MIB
_WIPE_ON_FORK = 18  # MADV_WIPEONFORK, Linux
_MOST_THREADS = 8  # more do not copy faster
_SLICE = 16 * MIB  # copied by one thread at a time

_copiers = ThreadPool(_MOST_THREADS, "torchferry-copy")


class Snapshots:
    """Memory for copies of storages, kept from one snapshot to the next.

    It is one piece, in use until all copies of a snapshot are gone. Where it is still in use, a snapshot takes another:
    how many there may be is for the caller to bound (:data:`.memory.SNAPSHOTS`).
    """

    def __init__(self) -> None:
        self._kept: _Memory | None = None
        self._streams: dict[torch.device, Any] = {}
        self._lock = threading.RLock()  # re-entrant: memory comes back in finalizers, which run anywhere
        if hasattr(os, "register_at_fork"):  # not on Windows
            os.register_at_fork(after_in_child=self._forget)

    def copy(self, storages: Sequence[torch.UntypedStorage]) -> list[torch.UntypedStorage]:
        """Copies of storages, as :meth:`Snapshot.copy`."""
        return self.open(size_of_copies(storages)).copy(storages)

    def open(self, size: int) -> Snapshot:
        """A snapshot with room for ``size`` bytes. Room that is not used takes no memory.

        Raises:
            OSError: the machine has no memory for it.
        """
        with self._lock:
            memory, self._kept = self._kept, None
        memory = memory or _Memory()
        memory.grow_to(size)
        lease = (ctypes.c_char * memory.size).from_buffer(memory.map)
        released = threading.Event()
        weakref.finalize(lease, self._came_back, memory, released).atexit = False
        return Snapshot(lease, memory, self._streams, released)

    def free(self) -> None:
        """Gives back the memory that is kept for the next snapshot."""
        with self._lock:
            self._kept = None

    def _came_back(self, memory: _Memory, released: threading.Event) -> None:
        with self._lock:
            if self._kept is None or self._kept.size < memory.size:
                self._kept = memory
        released.set()

    def _forget(self) -> None:
        """In a forked child: its memory is its own, and there is none yet."""
        self._lock = threading.RLock()
        self._kept = None
        self._streams = {}


class Snapshot:
    """Room for copies. It is free again when this object, and all that it made, is gone.

    Attributes:
        released: Set when it is free.
    """

    def __init__(
        self, lease: Any, memory: _Memory, streams: dict[torch.device, Any], released: threading.Event
    ) -> None:
        self.released = released
        self._lease = lease
        self._memory = memory
        self._streams = streams
        self._used = 0

    def copy(self, storages: Sequence[torch.UntypedStorage]) -> list[torch.UntypedStorage]:
        """Copies of the storages' bytes in host memory, each a storage of its own. Returns when they are made.

        From an accelerator into pinned memory, on a stream of its own, all before the first is waited for; from host
        memory in several threads. A storage without bytes (of the device "meta") is returned as it is.
        """
        if any(storage.device.type == "cuda" for storage in storages):
            self._memory.pin()
        copies = [storage if storage.device.type == "meta" else self._storage(storage.nbytes()) for storage in storages]
        pairs = list(zip(storages, copies, strict=True))
        streams = self._start_copies([pair for pair in pairs if pair[0].device.type not in {"cpu", "meta"}])
        try:
            copy_memory(
                (copy.data_ptr(), storage.data_ptr(), storage.nbytes())
                for storage, copy in pairs
                if storage.device.type == "cpu"
            )
        finally:
            for stream in streams:
                stream.synchronize()
        return copies

    def copy_ranges(self, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
        """Copies of ranges of memory, each given by its first and last address, exclusive."""
        copies = [self._take(stop - start, aligned=False) for start, stop in ranges]
        copy_memory((address_of(copy), start, stop - start) for copy, (start, stop) in zip(copies, ranges, strict=True))
        return [copy.toreadonly() for copy in copies]

    def _take(self, size: int, *, aligned: bool = True) -> memoryview:
        place = self._used
        self._used += _aligned(size) if aligned else size
        if self._used > len(self._lease):
            raise ValueError("The snapshot has no more room.")
        return memoryview(self._lease)[place : place + size].cast("B")

    def _storage(self, size: int) -> torch.UntypedStorage:
        if not size:
            return torch.UntypedStorage(0)  # type: ignore[no-untyped-call]
        return torch.frombuffer(self._take(size), dtype=torch.uint8).untyped_storage()

    def _start_copies(self, pairs: Sequence[tuple[torch.UntypedStorage, torch.UntypedStorage]]) -> list[Any]:
        """Copies from devices; what is not done when this returns is when the streams that it returns are."""
        used = []
        for device in dict.fromkeys(storage.device for storage, _ in pairs):
            here = [(storage, copy) for storage, copy in pairs if storage.device == device]
            module = torch.get_device_module(device)
            if not hasattr(module, "Stream"):
                for storage, copy in here:
                    copy.copy_(storage)
                continue
            stream = self._streams.get(device)
            if stream is None:
                stream = self._streams[device] = module.Stream(device)
            stream.wait_stream(module.current_stream(device))
            used.append(stream)
            with module.stream(stream):
                for storage, copy in here:
                    copy.copy_(storage, non_blocking=True)
        return used


class LentStorages:
    """CPU storages that are read where they lie until they are about to change.

    Args:
        storages: None overlaps another.
        tensors: What shows whether they have changed.
        snapshot: Where the rest is copied to; it has room for all.
        url: For messages.

    Attributes:
        loans: Their memory.
        changes: Whether somebody has changed it who did not say so.
        copied: Bytes that were copied when they were recalled.
    """

    def __init__(
        self, storages: Sequence[torch.UntypedStorage], tensors: Iterable[torch.Tensor], snapshot: Snapshot, url: str
    ) -> None:
        self.loans = Loans([(storage.data_ptr(), storage.nbytes()) for storage in storages])
        self.changes = Changes(url)
        self.changes.watch(tensors, storages)
        self.copied = 0
        self._addresses = {storage.data_ptr() for storage in storages}
        self._snapshot: Snapshot | None = snapshot

    def has(self, storage: torch.UntypedStorage) -> bool:
        """Whether it is one of these."""
        return storage.data_ptr() in self._addresses

    def recall(self) -> None:
        """Copies what has not been sent. They may change when this returns, or raises.

        Raises:
            ChangedWhileSavingError: they have changed already. The save fails, with the same error.
        """
        self.loans.recall(self._copy)

    def end(self) -> None:
        """Called when the save is over: nothing is needed any more."""
        self.loans.end()
        self.changes.forget()
        self._snapshot = None

    def _copy(self, ranges: Sequence[tuple[int, int]]) -> Sequence[memoryview]:
        assert self._snapshot is not None  # noqa: S101 - not ended
        self.changes.check()
        copies = self._snapshot.copy_ranges(ranges)
        self.changes.forget()
        self.copied = sum(map(len, copies))
        return copies


def _unpin(runtime: Any, address: int, owner: int) -> None:
    if os.getpid() == owner:  # in a forked child, CUDA does not work
        runtime.cudaHostUnregister(address)


class _Memory:
    """One piece of host memory, which a forked child finds empty: it shares no page, and copies none.

    Attributes:
        size: In bytes.
        map: The memory; not to be used any more once it has grown.
    """

    def __init__(self) -> None:
        self.size = 0
        self.map = mmap.mmap(-1, _HUGE_PAGE)
        self._pinned: Any = None

    def grow_to(self, size: int) -> None:
        """Makes it at least ``size`` bytes; pages that are there stay. Only while nobody uses it."""
        size = max(1, -(-size // _HUGE_PAGE)) * _HUGE_PAGE
        if size <= self.size:
            return
        self._unpin()
        if self.size and sys.platform == "linux":
            self.map.resize(size)
        elif sys.platform == "linux":
            self.map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            for advice in (mmap.MADV_HUGEPAGE, _WIPE_ON_FORK):
                with suppress(OSError):  # a kernel that does not know it
                    self.map.madvise(advice)
        else:
            self.size = 0
            del self.map
            self.map = mmap.mmap(-1, size)
        self.size = size

    def pin(self) -> None:
        """Makes it memory that CUDA copies into without a copy in between."""
        if self._pinned is not None:
            return
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        result = runtime.cudaHostRegister(address, self.size, 0)
        if int(result):
            logger.warning("The memory of snapshots cannot be pinned (%s): copies from the device are slower.", result)
            return
        self._pinned = weakref.finalize(self, _unpin, runtime, address, os.getpid())
        self._pinned.atexit = False

    def _unpin(self) -> None:
        if self._pinned is not None:
            self._pinned()
            self._pinned = None


def size_of_copies(storages: Iterable[torch.UntypedStorage]) -> int:
    """Bytes of a snapshot of the storages."""
    return sum(_aligned(storage.nbytes()) for storage in storages if storage.device.type != "meta")


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def copy_memory(copies: Iterable[tuple[int, int, int]]) -> None:
    """Copies memory in several threads, this one among them. Returns when all is copied.

    Args:
        copies: Address to copy to, address to copy from, and bytes, of each.
    """
    slices = [
        (target + at, source + at, min(_SLICE, size - at))
        for target, source, size in copies
        for at in range(0, size, _SLICE)
    ]
    total = sum(size for _, _, size in slices)
    work = iter(slices)
    taking = threading.Lock()

    def copy_some() -> None:
        while True:
            with taking:
                found = next(work, None)
            if found is None:
                return
            ctypes.memmove(*found)

    helpers = []
    if total > _SLICE:
        with suppress(RuntimeError):  # the interpreter is about to end: there are no threads any more
            for _ in range(min(_MOST_THREADS, _cores()) - 1):
                helpers.append(_copiers.executor.submit(copy_some))  # noqa: PERF401  # those that began are waited for
    try:
        copy_some()
    finally:
        for helper in helpers:
            helper.result()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
