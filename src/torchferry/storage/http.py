"""What all clouds share: the engine moves the bodies, the filesystem's own client does the rest.

A cloud's backend says what its requests look like, and has the filesystem's client sign them (:class:`HttpBackend`).
A part or a range that the engine cannot move goes through that client, within the same upload or load.
"""

from __future__ import annotations

import re
import time
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import TYPE_CHECKING, ClassVar, TypeVar

import anyio

from torchferry.engine.cancellation import in_thread
from torchferry.engine.retry import AnswerError, Transient, retrying
from torchferry.engine.transfer import current
from torchferry.engine.transport import Answer, SignedRequest, Transport, UnmovableError
from torchferry.engine.types import Buffer, Chunk, ObjectStat
from torchferry.engine.writer import Body
from torchferry.errors import ChangedWhileSavingError, StorageError, StorageUnavailableError, TorchferryError
from torchferry.storage.base import Backend
from torchferry.storage.translate import translated

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

__all__ = ["Engine", "HttpBackend", "changed_while_saving", "error_code"]

T = TypeVar("T")

_CALL_SECONDS = 60.0  # the longest that one request of the client without a body may take
_SLOWEST = 50_000  # bytes a second: a request of the client with a body has that much more time
_SIGNED = 8  # signed reads that are kept: several objects may be read side by side
_FRESH = 60.0  # seconds for which a signed read is used: no client hands out one that expires sooner
_ODD_ANSWERS = 3  # in a row, after which the engine rests
_REST = 60.0  # seconds for which everything then goes through the client
_CLIENT_TURN = 3  # every third attempt goes through the client: it may know a way that the engine does not
_CODE = re.compile(rb"<Code>([^<]+)</Code>")


class Engine:
    """The engine's connections to one store, and what it has learned of it.

    Args:
        transport: The connections; None where only the client can honour the filesystem's settings.
        why_not: Where ``transport`` is None: the reason, for the report.

    Attributes:
        transport: As above.
        checksums: Whether the store takes checksums with uploads; False once it has refused one.
    """

    def __init__(self, transport: Transport | None, why_not: str = "") -> None:
        self.transport = transport
        self.checksums = True
        self._why_not = why_not
        self._odd_answers = 0
        self._rests_until = 0.0

    @classmethod
    def of(cls, fs: AbstractFileSystem, make: Callable[[], Engine]) -> Engine:
        """The engine of a filesystem: ``make()`` the first time. It goes when the filesystem goes."""
        engine: Engine = vars(fs).setdefault("_torchferry_engine", None) or make()
        vars(fs)["_torchferry_engine"] = engine
        return engine

    def why_client(self, attempt: int) -> str:
        """Why the attempt of this number, from 1, is the client's; empty where it is the engine's."""
        if self.transport is None:
            return self._why_not
        if time.monotonic() < self._rests_until:
            return "the engine rests after odd answers"
        return "" if attempt % _CLIENT_TURN else "the engine failed twice"

    def note_odd(self) -> None:
        """Counts what only the client could move; after three in a row the engine rests for 60 seconds."""
        self._odd_answers += 1
        if self._odd_answers >= _ODD_ANSWERS:
            self._rests_until = time.monotonic() + _REST
            self._odd_answers = 0

    def note_success(self) -> None:
        """Counts from 0 again."""
        self._odd_answers = 0


class HttpBackend(Backend):
    """A store that speaks HTTP."""

    damaged_codes: ClassVar[frozenset[str]] = frozenset()
    """The store's error codes for a body that does not match its checksum."""

    checksum_refused: ClassVar[frozenset[int]] = frozenset({400, 403, 501})
    """Statuses with which the store may refuse a checksum: the body is sent again without one."""

    def __init__(self) -> None:
        self._signed: OrderedDict[tuple[str, str | None], tuple[SignedRequest, float]] = OrderedDict()

    # --- what a cloud says

    @abstractmethod
    async def engine(self) -> Engine:
        """The engine of the backend's filesystem, :meth:`Engine.of`; connects the filesystem where that is needed."""

    @abstractmethod
    async def sign_read(self, path: str, stat: ObjectStat) -> SignedRequest:
        """The request for the version that ``stat`` names, without a range; used for 60 seconds."""

    @abstractmethod
    async def read_through_client(self, path: str, start: int, buffer: memoryview, stat: ObjectStat) -> None:
        """Fills ``buffer`` with one request of the client."""

    @abstractmethod
    def transient(self, error: Exception) -> Transient | None:
        """Whether the client's error may not come again; connection errors and time-outs need not be looked at."""

    @abstractmethod
    def translate(self, what: str, error: Exception) -> StorageError:
        """The torchferry error for one of the client's; ``what`` is "Cannot <verb> <url>"."""

    # --- what a cloud may say

    def is_damaged(self, answer: Answer) -> bool:
        """Whether the store says that a body arrived damaged; by default, its error code tells."""
        return error_code(answer) in self.damaged_codes

    # --- what a cloud gets

    async def call(
        self, verb: str, path: str, request: Callable[[], Awaitable[T]], *, seconds: float = _CALL_SECONDS
    ) -> T:
        """Awaits a request of the client, again where it failed for now, and translates its errors.

        Args:
            verb: What is done, for messages: "look up".
            path: To what.
            request: One attempt, without retries of its own.
            seconds: The longest that one attempt may take.
        """

        async def attempt() -> T:
            with _limit(seconds):
                return await request()

        with self.translated(verb, path):
            return await retrying(attempt, self._transient, f"Cannot {verb} {self.url(path)}")

    def translated(self, verb: str, path: str) -> AbstractContextManager[None]:
        """Turns errors of the client and the engine into torchferry's."""
        return translated(self._translate, self.url(path), verb)

    async def read(self, path: str, start: int, stop: int, stat: ObjectStat) -> Buffer:
        """Reads a range into memory of its own."""
        data = bytearray(stop - start)
        await self.read_into(path, start, memoryview(data), stat)
        return data

    async def read_into(self, path: str, start: int, buffer: memoryview, stat: ObjectStat) -> None:
        """Reads a range by the engine, or where that does not work through the client."""
        if not buffer:
            return
        attempts = 0

        async def attempt() -> None:
            nonlocal attempts
            attempts += 1
            engine = await self.engine()
            reason = engine.why_client(attempts)
            odd = False
            if not reason and engine.transport is not None:
                try:
                    request = await self._signed_read(path, stat)
                    await engine.transport.read_into(request, start, buffer, stat.size)
                except UnmovableError as error:
                    reason, odd = str(error), True
                    self._signed.clear()
                else:
                    engine.note_success()
                    return
            with _limit(_CALL_SECONDS + len(buffer) / _SLOWEST):
                await self.read_through_client(path, start, buffer, stat)
            _note_client(engine, len(buffer), reason, odd=odd)

        with self.translated("read", path):
            await retrying(attempt, self._transient, f"Cannot read {self.url(path)}")

    async def send(
        self,
        path: str,
        body: Body,
        *,
        sign: Callable[[bool], Awaitable[SignedRequest]],
        accept: Callable[[Answer], T],
        through_client: Callable[[], Awaitable[T]],
        publishes: bool = False,
        unchanged: Callable[[], bool] | None = None,
    ) -> T:
        """Sends a body by the engine, or where that does not work through the client; again where it failed for now.

        A store that refuses the checksum gets the body without one, and is remembered. A body that arrived damaged is
        sent again.

        Args:
            path: What is being written.
            body: What is sent.
            sign: Makes the request, with a checksum where its argument is true.
            accept: Makes the result from an answer that is a success.
            through_client: One attempt by the client; returns the same result.
            publishes: Whether the object appears with this request.
            unchanged: Whether the body's memory still has the checksum that was sent; asked in a thread, where the body
                arrived damaged. By default, its CRC32 tells.

        Raises:
            ChangedWhileSavingError: the body's memory is not what it was when its checksum was computed.
        """
        attempts = 0

        async def attempt() -> T:
            nonlocal attempts
            attempts += 1
            engine = await self.engine()
            reason = engine.why_client(attempts)
            odd = False
            if not reason and engine.transport is not None:
                try:
                    answer = await self._send_by_engine(engine, path, body, sign, publishes, unchanged)
                except UnmovableError as error:
                    reason, odd = str(error), True
                else:
                    engine.note_success()
                    return accept(answer)
            with _limit(_CALL_SECONDS + body.size / _SLOWEST):
                result = await through_client()
            _note_client(engine, body.size, reason, odd=odd)
            return result

        with self.translated("write", path):
            return await retrying(attempt, self._transient, f"Cannot write {self.url(path)}")

    async def _send_by_engine(
        self,
        engine: Engine,
        path: str,
        body: Body,
        sign: Callable[[bool], Awaitable[SignedRequest]],
        publishes: bool,
        unchanged: Callable[[], bool] | None,
    ) -> Answer:
        transport = engine.transport
        assert transport is not None  # noqa: S101 - asked before
        checked = engine.checksums
        answer = await transport.send(await sign(checked), body.buffers, publishes=publishes)
        if answer.ok:
            return answer
        if self.is_damaged(answer):
            if not await in_thread(unchanged or (lambda: _has_its_crc32(body))):
                raise changed_while_saving(self.url(path))
            raise AnswerError(f"the bytes arrived damaged ({error_code(answer) or answer})", Transient())
        if checked and answer.status in self.checksum_refused:
            current().count("requests")
            answer = await transport.send(await sign(False), body.buffers, publishes=publishes)
            if answer.ok:
                engine.checksums = False
                return answer
        code = error_code(answer)
        raise UnmovableError(f"status {answer.status}" + (f" ({code})" if code else ""))

    async def _signed_read(self, path: str, stat: ObjectStat) -> SignedRequest:
        version = path, stat.etag
        now = time.monotonic()
        request, since = self._signed.get(version, (None, 0.0))
        if request is None or now - since >= _FRESH:
            request = await self.sign_read(path, stat)
            self._signed[version] = request, now
            while len(self._signed) > _SIGNED:
                with suppress(KeyError):  # another thread was faster
                    self._signed.popitem(last=False)
        return request

    def _transient(self, error: Exception) -> Transient | None:
        if isinstance(error, TorchferryError):
            return Transient() if isinstance(error, StorageUnavailableError) else None
        if isinstance(error, ConnectionError | TimeoutError):
            return Transient()
        return self.transient(error)

    def _translate(self, what: str, error: Exception) -> StorageError:
        if isinstance(error, AnswerError | ConnectionError | TimeoutError):
            return StorageUnavailableError(f"{what}: the store is not available, after all retries. {error}")
        return self.translate(what, error)


def _note_client(engine: Engine, nbytes: int, reason: str, *, odd: bool) -> None:
    """Notes bytes that the client has moved; ``odd`` where the engine had got an answer that it could not use."""
    if odd:
        engine.note_odd()
    current().through_client(nbytes, reason)
    current().moved(nbytes)


def _has_its_crc32(body: Body) -> bool:
    return Body([Chunk(chunk.data) for chunk in body.chunks]).crc32 == body.crc32


def changed_while_saving(url: str) -> ChangedWhileSavingError:
    """The error for a body whose memory is not what it was when its checksum was computed."""
    return ChangedWhileSavingError(
        f"{url}: a tensor was changed while it was being saved. Nothing was stored. Wait for the save before the next "
        "optimizer step, or save a copy."
    )


def error_code(answer: Answer) -> str:
    """The store's own name for an error: from its XML, or Azure's header; empty where there is none."""
    if header := answer.headers.get("x-ms-error-code"):
        return str(header)
    found = _CODE.search(answer.body)
    return found.group(1).decode("utf-8", "replace") if found else ""


@contextmanager
def _limit(seconds: float) -> Iterator[None]:
    """A time-out whose error says how long was waited."""
    with anyio.move_on_after(seconds) as scope:
        yield
    if scope.cancelled_caught:
        raise TimeoutError(f"no answer for {seconds:.0f} s")
