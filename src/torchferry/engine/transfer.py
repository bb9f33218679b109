"""One save, load, copy or verify: its progress, its patience, and the report of it.

The public functions open a :class:`Transfer`; everything below finds it with :func:`current`, through a context
variable, which tasks and worker threads inherit. What moves bytes says so to it, and asks nothing of it but how
patient to be.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from time import monotonic, perf_counter
from typing import TYPE_CHECKING, Any

import anyio

from torchferry.arguments import require_callback, require_seconds
from torchferry.engine.cancellation import stops_as_errors
from torchferry.engine.html import html_table
from torchferry.engine.tasks import task_group
from torchferry.engine.types import MIB
from torchferry.errors import mask
from torchferry.printable import printable

if TYPE_CHECKING:
    from fsspec.callbacks import Callback

__all__ = ["GIVE_UP_AFTER", "Transfer", "TransferReport", "current"]

GIVE_UP_AFTER: ContextVar[float] = ContextVar("give_up_after", default=120.0)
"""Seconds without progress after which requests are not repeated any more, where the user chose no other."""

_TICK = 0.1  # seconds between two calls of the user's callback

logger = logging.getLogger("torchferry")


@dataclass(frozen=True, slots=True, repr=False)
class TransferReport:
    """What a save, load, copy or verify did. Logged in one line at INFO by the logger "torchferry".

    Attributes:
        verb: "save", "load", "copy" or "verify".
        url: The object; of a copy, the target.
        nbytes: Bytes of the object that were moved, each counted once.
        seconds: From the call to its return.
        stages: Seconds in each stage, by name. Stages overlap: sending goes on while the object is pickled.
        parts: Parts that were uploaded; 0 for an object that went up in one request, and for loads.
        requests: HTTP requests by the engine and by the filesystem's client, those that failed among them.
        retries: Requests that were repeated after a failure.
        client_bytes: Bytes that did not go through the engine's sockets but through the filesystem's own client.
        client_reasons: Why they did: the reasons, each once.
        peak_memory: The most bytes of host memory that were held at once, beside the tensors.
        warnings: What the user should know of a transfer that succeeded; logged as well.
    """

    verb: str
    url: str
    nbytes: int
    seconds: float
    stages: Mapping[str, float] = field(default_factory=dict)
    parts: int = 0
    requests: int = 0
    retries: int = 0
    client_bytes: int = 0
    client_reasons: tuple[str, ...] = ()
    peak_memory: int = 0
    warnings: tuple[str, ...] = ()

    @property
    def bytes_per_second(self) -> float:
        """The throughput of the whole call, in bytes a second."""
        return self.nbytes / self.seconds if self.seconds else 0.0

    def __repr__(self) -> str:
        return f"<TransferReport of {self}>"

    def _repr_html_(self) -> str:
        """A table, for notebooks."""
        rows = {
            "bytes": f"{self.nbytes:,}",
            "seconds": f"{self.seconds:.2f}",
            "GB/s": f"{self.bytes_per_second / 1e9:.2f}",
            "parts": f"{self.parts:,}",
            "requests": f"{self.requests:,}",
            "retries": f"{self.retries:,}",
            "peak of host memory": f"{self.peak_memory / MIB:.0f} MiB",
            **{f"stage {name}": f"{seconds:.2f} s" for name, seconds in self.stages.items()},
            **(
                {"by the client": f"{self.client_bytes:,}: {'; '.join(self.client_reasons)}"}
                if self.client_bytes
                else {}
            ),
        }
        return html_table(f"{self.verb} {self.url}", rows.items())

    def __str__(self) -> str:
        stages = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self.stages.items())
        notes = [f"{self.parts} parts"] if self.parts else []
        notes.append(f"{self.requests} requests")
        if self.retries:
            notes.append(f"{self.retries} retries")
        if self.client_bytes:
            notes.append(
                f"{self.client_bytes / 1e6:.1f} MB by the filesystem's client ({'; '.join(self.client_reasons)})"
            )
        return (
            f"{self.verb} {self.url}: {self.nbytes / 1e6:.1f} MB in {self.seconds:.2f} s "
            f"({self.bytes_per_second / 1e9:.2f} GB/s); {', '.join(notes)}" + (f"; {stages}" if stages else "")
        )


class Transfer:
    """A save, load, copy or verify that is under way. Its counters may be changed in any thread.

    Args:
        verb: "save", "load", "copy" or "verify".
        url: What it is about, for the report.
        callback: Told the size, and of bytes as they are moved, every 0.1 s, on the event loop.
        give_up_after: Seconds without progress after which requests are not repeated any more.

    Raises:
        TypeError: ``callback`` is none.
        UnsupportedOptionError: ``give_up_after`` is no number of seconds.

    Attributes:
        give_up_after: As above.
        last_progress: When the last bytes moved, on the clock ``time.monotonic``.
    """

    def __init__(
        self, verb: str = "", url: str = "", *, callback: Callback | None = None, give_up_after: float | None = None
    ) -> None:
        require_callback(callback)
        require_seconds("give_up_after", give_up_after)
        self.give_up_after = GIVE_UP_AFTER.get() if give_up_after is None else give_up_after
        self.last_progress = monotonic()
        self._verb = verb
        self._url = url
        self._callback = callback
        self._begun = perf_counter()
        self._lock = threading.Lock()
        self._stages: dict[str, float] = {}
        self._counts = {"parts": 0, "requests": 0, "retries": 0, "client_bytes": 0}
        self._reasons: dict[str, None] = {}
        self._size = 0
        self._moved = 0
        self._most_moved = 0
        self._told = 0
        self._memory = 0
        self._peak_memory = 0
        self._warnings: list[str] = []

    # --- what moves bytes says

    def moved(self, nbytes: int) -> None:
        """Counts bytes that have arrived, or that the store has acknowledged; negative ones are taken back."""
        with self._lock:
            self._moved += nbytes
            progress = self._moved > self._most_moved
            self._most_moved = max(self._moved, self._most_moved)
        if progress:
            self.progressed()

    def progressed(self) -> None:
        """Notes that bytes moved that no earlier attempt had moved: a part that fails each time is no progress."""
        self.last_progress = monotonic()

    def moved_at_least(self, nbytes: int) -> None:
        """Counts what a backend that counts nothing has moved: there are so many bytes now."""
        with self._lock:
            self._moved = max(self._moved, nbytes)

    def start_again(self, nbytes: int) -> None:
        """Counts on from so many bytes: what has moved beyond them is moved once more, and that is progress."""
        with self._lock:
            self._moved = self._most_moved = nbytes
        self.progressed()

    def count(self, name: str, number: int = 1) -> None:
        """Adds to one of the report's numbers: "parts", "requests" or "retries"."""
        with self._lock:
            self._counts[name] += number

    def through_client(self, nbytes: int, reason: str) -> None:
        """Notes that bytes go through the filesystem's client, and why."""
        with self._lock:
            self._counts["client_bytes"] += nbytes
            self._reasons[printable(mask(reason))] = None  # it may be what the store says

    def holds(self, nbytes: int) -> None:
        """Notes that more memory is held (or less, where negative), in bytes."""
        with self._lock:
            self._memory += nbytes
            self._peak_memory = max(self._peak_memory, self._memory)

    def warn(self, text: str) -> None:
        """Logs what the user should know, and has it in the report."""
        text = mask(text)
        logger.warning("%s", text)
        self._warnings.append(text)

    @contextmanager
    def reading_side(self) -> Generator[None]:
        """For the reads of a copy: in here, bytes that arrive are not counted; the target's are."""
        token = _current.set(_ReadingSide(self))
        try:
            yield
        finally:
            _current.reset(token)

    @contextmanager
    def stage(self, name: str) -> Generator[None]:
        """Counts the time in it to a stage."""
        begun = perf_counter()
        try:
            yield
        finally:
            seconds = perf_counter() - begun
            with self._lock:
                self._stages[name] = self._stages.get(name, 0.0) + seconds

    # --- the user's callback

    def set_size(self, nbytes: int) -> None:
        """Tells the callback how many bytes there will be."""
        self._size = nbytes
        if self._callback is not None:
            stops_as_errors(self._callback.set_size, nbytes)

    def tell(self, *, complete: bool = False) -> None:
        """Tells the callback of the bytes that moved since the last time; of the last byte only when ``complete``.

        What was taken back is not told: the callback hears of more bytes when there are more than before.
        """
        if self._callback is None:
            return
        with self._lock:
            moved = min(self._moved, self._size - (not complete))
            news = max(0, moved - self._told)
            self._told += news
        if news:
            stops_as_errors(self._callback.relative_update, news)

    @asynccontextmanager
    async def telling(self) -> AsyncGenerator[None]:
        """Tells the callback every 0.1 s while in here, and at the end. What it raises cancels the body and goes on."""
        if self._callback is None:
            yield
            return
        async with task_group() as tasks:
            tasks.start_soon(self._tick)
            yield
            tasks.cancel_scope.cancel()
        self.tell(complete=True)

    async def _tick(self) -> None:
        while True:
            await anyio.sleep(_TICK)
            self.tell()

    # --- the report

    def report(self) -> TransferReport:
        """The report, as of now."""
        with self._lock:
            return TransferReport(
                self._verb,
                self._url,
                nbytes=self._moved,
                seconds=perf_counter() - self._begun,
                stages=dict(self._stages),
                client_reasons=tuple(self._reasons),
                peak_memory=self._peak_memory,
                warnings=tuple(self._warnings),
                **self._counts,
            )

    @contextmanager
    def running(self, deliver: Callable[[TransferReport], object] | None) -> Generator[Transfer]:
        """Makes this the current transfer; at the end logs the report, and hands it to ``deliver``.

        An error of ``deliver`` is logged and not raised: what is reported has happened.
        """
        token = _current.set(self)
        try:
            with _span(self._verb, self._url) as span:
                try:
                    yield self
                except BaseException:
                    if self._callback is not None:
                        stops_as_errors(self._callback.close)  # a bar that would stay where it is
                    raise
                finally:
                    report = self.report()
                    if span is not None:
                        span.set_attributes(_attributes(report))
        finally:
            _current.reset(token)
            self._callback = None  # timers of HTTP clients hold their context, and so this transfer, for a while
        logger.info("%s", report)
        if deliver is not None:
            try:
                deliver(report)
            except Exception:
                logger.exception("What report= named did not take this: %s", report)


class _ReadingSide(Transfer):
    """Counts to another transfer all but the bytes that move."""

    def __init__(self, whole: Transfer) -> None:
        super().__init__(give_up_after=whole.give_up_after)
        self._whole = whole

    def progressed(self) -> None:
        super().progressed()
        self._whole.progressed()

    def count(self, name: str, number: int = 1) -> None:
        self._whole.count(name, number)

    def through_client(self, nbytes: int, reason: str) -> None:
        self._whole.through_client(nbytes, reason)

    def holds(self, nbytes: int) -> None:
        self._whole.holds(nbytes)

    def warn(self, text: str) -> None:
        self._whole.warn(text)

    @contextmanager
    def stage(self, name: str) -> Generator[None]:
        with self._whole.stage(name):
            yield


_current: ContextVar[Transfer | None] = ContextVar("torchferry_transfer", default=None)


def current() -> Transfer:
    """The transfer that the caller is part of; where there is none, one that nobody looks at."""
    return _current.get() or Transfer()


@cache
def _tracer() -> Any:
    try:
        from opentelemetry import trace
    except ImportError:
        return None
    return trace.get_tracer("torchferry")


def _span(verb: str, url: str) -> AbstractContextManager[Any]:
    """An OpenTelemetry span, where opentelemetry-api is installed."""
    tracer = _tracer()
    if tracer is None:
        return nullcontext()
    span: AbstractContextManager[Any] = tracer.start_as_current_span(
        f"torchferry.{verb}", attributes={"torchferry.url": url}
    )
    return span


def _attributes(report: TransferReport) -> dict[str, Any]:
    numbers = ("nbytes", "seconds", "parts", "requests", "retries", "client_bytes", "peak_memory")
    stages = {f"torchferry.stage.{name}": seconds for name, seconds in report.stages.items()}
    return {**{f"torchferry.{name}": getattr(report, name) for name in numbers}, **stages}
