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
from torchferry.engine.types import MIB

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["Snapshots", "copy_memory"]

logger = logging.getLogger("torchferry")

_ALIGNMENT = 64  # bytes: of a copy in memory
_HUGE_PAGE = 2 * MIB
_WIPE_ON_FORK = 18  # MADV_WIPEONFORK, Linux
_MOST_THREADS = 8  # more do not copy faster
_SLICE = 64 * MIB  # copied by one thread at a time

_copiers = ThreadPool(_MOST_THREADS, "torchferry-copy")


class Snapshots:
    """Makes copies of storages, in memory that is kept for the next ones.

    The memory is one piece, in use until all copies of a snapshot are gone. Where it is still in use, a snapshot takes
    another: how many there may be is for the caller to bound (:data:`.memory.SNAPSHOTS`).
    """

    def __init__(self) -> None:
        self._kept: _Memory | None = None
        self._streams: dict[torch.device, Any] = {}
        self._lock = threading.RLock()  # re-entrant: memory comes back in finalizers, which run anywhere
        if hasattr(os, "register_at_fork"):  # not on Windows
            os.register_at_fork(after_in_child=self._forget)

    def copy(self, storages: Sequence[torch.UntypedStorage]) -> list[torch.UntypedStorage]:
        """Copies of the storages' bytes in host memory, each a storage of its own. Returns when they are made.

        From an accelerator into pinned memory, on a stream of its own, all before the first is waited for; from host
        memory in several threads. A storage without bytes (of the device "meta") is returned as it is.

        Raises:
            OSError: the machine has no memory for them.
        """
        places, size = _places(storages)
        lease = self._lease(size, pinned=any(storage.device.type == "cuda" for storage in storages))
        copies = [
            storage if storage.device.type == "meta" else _storage(lease, place, storage.nbytes())
            for storage, place in zip(storages, places, strict=True)
        ]
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

    def free(self) -> None:
        """Gives back the memory that is kept for the next snapshot."""
        with self._lock:
            self._kept = None

    @property
    def kept(self) -> int:
        """Bytes of memory that are kept for the next snapshot."""
        with self._lock:
            return 0 if self._kept is None else self._kept.size

    def _lease(self, size: int, *, pinned: bool) -> Any:
        """Memory that comes back when this object and all views of it are gone."""
        with self._lock:
            memory, self._kept = self._kept, None
        memory = memory or _Memory()
        memory.grow_to(size)
        if pinned:
            memory.pin()
        lease = (ctypes.c_char * size).from_buffer(memory.map)
        weakref.finalize(lease, self._came_back, memory).atexit = False
        return lease

    def _came_back(self, memory: _Memory) -> None:
        with self._lock:
            if self._kept is None or self._kept.size < memory.size:
                self._kept = memory

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

    def _forget(self) -> None:
        """In a forked child: its memory is its own, and there is none yet."""
        self._lock = threading.RLock()
        self._kept = None
        self._streams = {}


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
        result = torch.cuda.cudart().cudaHostRegister(address, self.size, 0)
        if int(result):
            logger.warning("The memory of snapshots cannot be pinned (%s): copies from the device are slower.", result)
            return
        self._pinned = weakref.finalize(self, torch.cuda.cudart().cudaHostUnregister, address)
        self._pinned.atexit = False

    def _unpin(self) -> None:
        if self._pinned is not None:
            self._pinned()
            self._pinned = None


def _places(storages: Sequence[torch.UntypedStorage]) -> tuple[list[int], int]:
    """Where in memory each copy begins, and the bytes of all."""
    places = []
    end = 0
    for storage in storages:
        places.append(end)
        if storage.device.type != "meta":
            end += -(-storage.nbytes() // _ALIGNMENT) * _ALIGNMENT
    return places, max(end, 1)


def _storage(lease: Any, place: int, nbytes: int) -> torch.UntypedStorage:
    if not nbytes:
        return torch.UntypedStorage(0)
    return torch.frombuffer(lease, dtype=torch.uint8, offset=place, count=nbytes).untyped_storage()


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
