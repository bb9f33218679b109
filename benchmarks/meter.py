"""Measures one operation of this process: time, CPU, memory, and the bytes that really moved."""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.endpoint import Store

_PATIENCE = 2.0  # seconds for the endpoint to finish counting an answer that has already arrived


@dataclass
class Measurement:
    """What an operation took.

    Attributes:
        began: When it began, by ``time.monotonic()``, which is the same for all processes.
        seconds: Of wall-clock time.
        cpu_seconds: Of CPU time, user and system, in all threads of this process and in its children.
        resident_before: The process's resident memory just before, in bytes.
        peak_bytes: Resident memory at the highest, over that.
        endpoint_bytes: What the endpoint received (a save) or sent (a load); None where it does not count.
        loopback_bytes: What went over the loopback device, from whomever.
    """

    began: float = 0.0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    resident_before: int = 0
    peak_bytes: int = 0
    endpoint_bytes: int | None = None
    loopback_bytes: int = 0

    def problem(self, payload: int) -> str | None:
        """Why this does not count; None if it does."""
        if self.endpoint_bytes is not None and self.endpoint_bytes < payload:
            return f"the endpoint counted {self.endpoint_bytes} bytes of {payload}"
        if self.loopback_bytes < payload:
            return f"{self.loopback_bytes} bytes of {payload} went over the loopback"
        return None


@contextmanager
def measuring(store: Store, verb: str, payload: int) -> Iterator[Measurement]:
    """Measures what is done in the block, and then the bytes that moved; ``payload`` is how many should have."""
    direction = "received" if verb == "save" else "sent"
    count: Callable[[], int] = (lambda: store.counters()[direction]) if store.counts else (lambda: 0)
    result = Measurement()
    counted_before, loopback_before = count(), _loopback_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to what is resident now
    result.resident_before = _status()["VmRSS"]
    cpu_before = _cpu_seconds()
    result.began = time.monotonic()

    yield result

    result.seconds = time.monotonic() - result.began
    result.cpu_seconds = _cpu_seconds() - cpu_before
    result.peak_bytes = max(0, _status()["VmHWM"] - result.resident_before)
    result.loopback_bytes = _loopback_bytes() - loopback_before
    if store.counts:
        deadline = time.monotonic() + _PATIENCE
        while (counted := count() - counted_before) < payload and time.monotonic() < deadline:
            time.sleep(0.01)
        result.endpoint_bytes = counted


def _cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


class MemoryWatch:
    """Watches, from another process, memory that does not count as resident: pages of memory files not mapped yet.

    Samples what a process holds, 50 times a second, until the block ends. (Resident memory by itself has no need of
    this: the kernel remembers its peak.)
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._samples: list[tuple[float, int]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def peak(self, began: float, seconds: float) -> int:
        """The most that the process held in that time, in bytes."""
        return max((held for at, held in self._samples if began <= at <= began + seconds), default=0)

    def _watch(self) -> None:
        with suppress(OSError, KeyError):  # the process has ended
            while not self._ended.wait(0.02):
                self._samples.append((time.monotonic(), _held_bytes(self._pid)))


def _held_bytes(pid: int) -> int:
    files: dict[int, int] = {}  # by inode: a file may be open more than once
    for fd in os.scandir(f"/proc/{pid}/fd"):
        with suppress(OSError):
            if os.readlink(fd.path).startswith("/memfd:"):  # noqa: PTH115 - 50 times a second
                stat = fd.stat()
                files[stat.st_ino] = stat.st_blocks * 512
    status = _status(pid)
    return status["VmRSS"] + max(0, sum(files.values()) - status["RssShmem"])


def _status(pid: int | str = "self") -> dict[str, int]:
    """The memory figures of /proc/<pid>/status, in bytes."""
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[-1] == "kB"}


def _loopback_bytes() -> int:
    for line in Path("/proc/net/dev").read_text().splitlines():
        device, _, figures = line.partition(":")
        if device.strip() == "lo":
            return int(figures.split()[0])
    return 0


def warm_memory(size: int) -> None:
    """Fills ``size`` bytes of memory, or most of what is free, and gives them back.

    A virtual machine may have to get memory from its host first, which costs up to ten times what using it does, and
    may give back within seconds what nobody uses. Which contender has to pay for that should not be left to chance.
    """
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    size = min(size, int(available * 0.7))
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        buffer = (ctypes.c_char * size).from_buffer(memory)
        ctypes.memset(buffer, 1, size)
        del buffer
