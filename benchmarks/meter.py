"""Measures one operation of this process: time, CPU, memory, and the bytes that really moved."""

from __future__ import annotations

import resource
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
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
        peak_bytes: Memory at the highest, over what the process held before: its resident set, and the pages of its
            memory files, mapped or not. Page cache of files on disk is not in it.
        endpoint_bytes: What the endpoint received (a save) or sent (a load); None where it does not count.
        loopback_bytes: What went over the loopback device, from whomever.
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_bytes: int = 0
    endpoint_bytes: int | None = None
    loopback_bytes: int = 0
    _unmapped_until: tuple[int, int] | None = field(default=None, repr=False)

    def before_touching(self) -> None:
        """To be called when a load has returned, before its pages are read.

        A page of a memory file counts as resident only once it was read, but takes memory all along: those that
        become resident from here on are added to the highest memory up to here.
        """
        status = _status()
        self._unmapped_until = status["VmHWM"], status["RssShmem"]

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
    baseline = _status()["VmRSS"]
    cpu_before = _cpu_seconds()
    began = time.perf_counter()

    yield result

    result.seconds = time.perf_counter() - began
    result.cpu_seconds = _cpu_seconds() - cpu_before
    status = _status()
    peak = status["VmHWM"]
    if result._unmapped_until is not None:
        peak_until, shared_until = result._unmapped_until
        peak = max(peak, peak_until + status["RssShmem"] - shared_until)
    result.peak_bytes = max(0, peak - baseline)
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
