"""Measures one operation of this process: time, CPU, memory, and the bytes that really moved."""

from __future__ import annotations

import ctypes
import mmap
import resource
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.endpoint import Store

_PATIENCE = 2.0  # seconds for the endpoint to finish counting an answer that has already arrived


@dataclass
class Measurement:
    """What an operation took.

    Attributes:
        seconds: Of wall-clock time.
        cpu_seconds: Of CPU time, user and system, in all threads of this process and in its children.
        peak_bytes: The process's resident memory at the highest, over what it was just before.
        endpoint_bytes: What the endpoint received (a save) or sent (a load); None where it does not count.
        loopback_bytes: What went over the loopback device, from whomever.
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0
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
    resident_before, cpu_before = _status()["VmRSS"], _cpu_seconds()
    began = time.monotonic()

    yield result

    result.seconds = time.monotonic() - began
    result.cpu_seconds = _cpu_seconds() - cpu_before
    result.peak_bytes = max(0, _status()["VmHWM"] - resident_before)
    result.loopback_bytes = _loopback_bytes() - loopback_before
    if store.counts:
        deadline = time.monotonic() + _PATIENCE
        while (counted := count() - counted_before) < payload and time.monotonic() < deadline:
            time.sleep(0.01)
        result.endpoint_bytes = counted


def _cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _status() -> dict[str, int]:
    """The memory figures of /proc/self/status, in bytes."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[-1] == "kB"}


def _loopback_bytes() -> int:
    for line in Path("/proc/net/dev").read_text().splitlines():
        device, _, figures = line.partition(":")
        if device.strip() == "lo":
            return int(figures.split()[0])
    return 0


@contextmanager
def warm_memory(size: int, *, spare: int = 0) -> Iterator[None]:
    """Fills ``size`` bytes of memory, or most of what is available less ``spare``, and gives them back after the block.

    A virtual machine may have to get memory from its host first, which costs up to ten times what using it does, and
    may give back within seconds what nobody uses. Which contender has to pay for that should not be left to chance.
    """
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    size = max(1, min(size, int(available * 0.9) - spare))
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        buffer = (ctypes.c_char * size).from_buffer(memory)
        ctypes.memset(buffer, 1, size)
        del buffer
        yield
