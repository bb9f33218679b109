"""What all clouds share: the engine moves the bodies, the filesystem's own client does the rest.

A cloud's backend says what its requests look like, and has the filesystem's client sign them (:class:`HttpBackend`).
A part or a range that the engine cannot move goes through that client, within the same upload or load.
"""

from __future__ import annotations

import re
import time
import weakref
from abc import abstractmethod
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import anyio

from torchferry.engine.cancellation import in_thread, run_shielded
from torchferry.engine.retry import AnswerError, Transient, retrying
from torchferry.engine.transfer import current
from torchferry.engine.transport import Answer, SignedRequest, Transport, UnmovableError
from torchferry.engine.types import Buffer, Chunk, ObjectStat
from torchferry.engine.writer import Body
from torchferry.errors import (
    ChangedWhileSavingError,
    StorageError,
    StorageUnavailableError,
    TorchferryError,
    masked,
)
from torchferry.storage.base import Backend
from torchferry.storage.translate import translated

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

__all__ = ["NOT_OF_A_CHECKSUM", "Engine", "HttpBackend", "error_code"]

T = TypeVar("T")

NOT_OF_A_CHECKSUM = frozenset(
    {
        *("AccessDenied", "ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "NoSuchBucket", "NoSuchUpload"),
        *("AuthenticationFailed", "AuthorizationFailure", "AuthorizationPermissionMismatch", "ContainerNotFound"),
        *("EntityTooLarge", "QuotaExceeded", "RequestBodyTooLarge", "RequestTimeTooSkewed", "TokenRefreshRequired"),
        *("IncompleteBody", "InvalidAuthenticationInfo", "RequestTimeout", "Throttling", "ThrottlingException"),
    }
)
"""Codes of refusals that have nothing to do with a checksum: the request is not sent once more without one.

It could succeed for another reason, and the store would be taken for one that refuses checksums.
"""

_CALL_SECONDS = 60.0  # the longest that one request of the client without a body may take
_PUBLISH_PATIENCE = 10.0  # seconds that a cancel waits for the answer to a request that publishes
_SLOWEST = 50_000  # bytes a second: a request of the client with a body has that much more time
_SIGNED = 8  # signed reads that are kept: several objects may be read side by side
_FRESH = 60.0  # seconds for which a signed read is used: no client hands out one that expires sooner
_ODD_ANSWERS = 3  # in a row, after which the engine rests
_REST = 60.0  # seconds for which everything then goes through the client
_CLIENT_TURN = 3  # every third attempt goes through the client: it may know a way that the engine does not
_KEPT_OPEN = 8  # filesystems whose idle connections stay open
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
    def of(
        cls,
        fs: AbstractFileSystem,
        make: Callable[[], Engine],
        session_of: Callable[[AbstractFileSystem], object] = lambda _: None,
    ) -> Engine:
        """The engine of a filesystem: ``make()`` the first time. It goes when the filesystem goes.

        That may be late: the filesystems of fsspec are freed by the garbage collector alone. So the connections that
        are idle stay open for the last eight filesystems only, the client's among them.

        Args:
            fs: The filesystem.
            make: Makes its engine.
            session_of: Its client's session of aiohttp, as of when it is asked.
        """
        engine: Engine | None = vars(fs).get("_torchferry_engine")
        if engine is None:
            engine = vars(fs)["_torchferry_engine"] = make()
            _kept_open.append((weakref.ref(fs), session_of))
            while len(_kept_open) > _KEPT_OPEN:
                with suppress(IndexError):  # another thread was faster
                    _close_idle(*_kept_open.popleft())
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


_kept_open: deque[tuple[weakref.ref[AbstractFileSystem], Callable[[AbstractFileSystem], object]]] = deque()


def _close_idle(ref: weakref.ref[AbstractFileSystem], session_of: Callable[[AbstractFileSystem], object]) -> None:
    """Closes the connections of a filesystem that no request is on."""
    fs = ref()
    if fs is None:
        return
    engine: Engine = vars(fs)["_torchferry_engine"]
    if engine.transport is not None:
        engine.transport.connections.close_idle()
    connector = getattr(session_of(fs), "connector", None)
    loop = getattr(fs, "loop", None)
    if connector is not None and loop is not None and not loop.is_closed():
        loop.call_soon_threadsafe(_close_idle_of, connector)


def _close_idle_of(connector: Any) -> None:
    """The same for aiohttp, which has no public way; where it has changed, they stay for its own 15 seconds."""
    for connections in getattr(connector, "_conns", {}).values():
        while connections:
            connections.pop()[0].close()


class HttpBackend(Backend):
    """A store that speaks HTTP."""

    checks_chunks = True
    reads_loans = True

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

    def is_damage(self, error: Exception) -> bool:
        """The same of an error of the client's; by default, no."""
        return False

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
        with self.translated(verb, path):
            attempt = partial(_limited, seconds, request)
            return await retrying(attempt, self._transient, f"Cannot {verb} {self.url(path)}")

    async def call_shielded(self, verb: str, path: str, request: Callable[[], Awaitable[T]]) -> T:
        """:meth:`call`; a cancel waits for its end, at most 10 seconds: what it has made can be deleted then."""
        return await run_shielded(self.call, verb, path, request, patience=_PUBLISH_PATIENCE)

    async def publish(
        self,
        path: str,
        request: Callable[[], Awaitable[T]],
        find: Callable[[], Awaitable[T | None]] | None = None,
        *,
        seconds: float = _CALL_SECONDS,
    ) -> T:
        """Awaits a request of the client that makes an object appear, as :meth:`call` does.

        A cancel waits for the answer to an attempt that is under way, at most 10 seconds; between two attempts it does
        not wait, and there is no other one.

        Args:
            path: The object.
            request: One attempt.
            find: Makes the result from what is there, with one attempt, where that is what was to be published; returns
                None where it is not. Asked where no attempt was answered, or another one was refused after that: the
                store may have published it all the same.
            seconds: The longest that one attempt may take.
        """
        attempts = 0

        async def attempt() -> T:
            nonlocal attempts
            attempts += 1
            return await run_shielded(_limited, seconds, request, patience=_PUBLISH_PATIENCE)

        try:
            return await self.call("write", path, attempt, seconds=seconds + _PUBLISH_PATIENCE)
        except StorageError as error:
            if find is not None and (attempts > 1 or isinstance(error, StorageUnavailableError)):
                with suppress(Exception):  # that the store cannot be asked either is no news
                    if (found := await _limited(_CALL_SECONDS, find)) is not None:
                        return found
            raise

    def translated(self, verb: str, path: str) -> AbstractContextManager[None]:
        """Turns errors of the client and the engine into torchferry's."""
        return translated(self._translate, self.url(path), verb)

    async def read(self, path: str, start: int, stop: int, stat: ObjectStat) -> Buffer:
        """Reads a range into memory of its own."""
        data = bytearray(stop - start)
        await self.read_into(path, start, [memoryview(data)], stat)
        return data

    async def read_into(self, path: str, start: int, buffers: Sequence[memoryview], stat: ObjectStat) -> None:
        """Reads a range by the engine, with one request; or where that does not work through the client."""
        nbytes = sum(map(len, buffers))
        if not nbytes:
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
                    await engine.transport.read_into(request, start, buffers, stat.size)
                except UnmovableError as error:
                    reason, odd = str(error), True
                    self._signed.clear()
                else:
                    engine.note_success()
                    return
            with _limit(_CALL_SECONDS + nbytes / _SLOWEST):
                at = start
                for buffer in filter(None, buffers):
                    await self.read_through_client(path, at, buffer, stat)
                    at += len(buffer)
            _note_client(engine, nbytes, reason, odd=odd)

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

        async def is_unchanged() -> bool:
            return await in_thread(unchanged or (lambda: _has_its_crc32(body)))

        async def attempt() -> T:
            nonlocal attempts
            attempts += 1
            engine = await self.engine()
            reason = engine.why_client(attempts)
            odd = False
            if not reason and engine.transport is not None:
                try:
                    answer = await self._send_by_engine(engine, path, body, sign, publishes, is_unchanged)
                except UnmovableError as error:
                    reason, odd = str(error), True
                else:
                    engine.note_success()
                    try:
                        return accept(answer)
                    except AnswerError:  # it is sent again, and counted again
                        current().moved(-body.size)
                        raise
            try:
                with _limit(_CALL_SECONDS + body.size / _SLOWEST):
                    result = await through_client()
            except Exception as error:
                if self.is_damage(error) and not await is_unchanged():
                    raise ChangedWhileSavingError.at(self.url(path)) from masked(error)
                raise
            if not engine.checksums:
                await self._check_unchanged(path, body, publishes)
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
        is_unchanged: Callable[[], Awaitable[bool]],
    ) -> Answer:
        transport = engine.transport
        assert transport is not None  # noqa: S101 - asked before
        checked = engine.checksums
        answer = await transport.send(await sign(checked), body.buffers, publishes=publishes)
        if answer.ok:
            if not checked:
                await self._check_unchanged(path, body, publishes)
            return answer
        if self.is_damaged(answer):
            if not await is_unchanged():
                raise ChangedWhileSavingError.at(self.url(path))
            raise AnswerError(f"the bytes arrived damaged ({error_code(answer) or answer})", Transient())
        if checked and answer.status in self.checksum_refused and error_code(answer) not in NOT_OF_A_CHECKSUM:
            current().count("requests")
            answer = await transport.send(await sign(False), body.buffers, publishes=publishes)
            if answer.ok:
                engine.checksums = False
                await self._check_unchanged(path, body, publishes)
                return answer
        code = error_code(answer)
        raise UnmovableError(f"status {answer.status}" + (f" ({code})" if code else ""))

    async def _check_unchanged(self, path: str, body: Body, published: bool) -> None:
        """Where the store has not checked a body: whether its memory still is what it was."""
        if not published and not await in_thread(_has_its_crc32, body):
            raise ChangedWhileSavingError.at(self.url(path))

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
            reason = str(error) or type(error).__name__
            return StorageUnavailableError(f"{what}: the store is not available, after all retries. {reason}")
        return self.translate(what, error)


def _note_client(engine: Engine, nbytes: int, reason: str, *, odd: bool) -> None:
    """Notes bytes that the client has moved; ``odd`` where the engine had got an answer that it could not use."""
    if odd:
        engine.note_odd()
    current().through_client(nbytes, reason)
    current().moved(nbytes)


def _has_its_crc32(body: Body) -> bool:
    return Body([Chunk(chunk.data) for chunk in body.chunks]).crc32 == body.crc32


def error_code(answer: Answer) -> str:
    """The store's own name for an error: from its XML, or Azure's header; empty where there is none."""
    if header := answer.headers.get("x-ms-error-code"):
        return str(header)
    found = _CODE.search(answer.body)
    return found.group(1).decode("utf-8", "replace") if found else ""


async def _limited(seconds: float, request: Callable[[], Awaitable[T]]) -> T:
    with _limit(seconds):
        return await request()


@contextmanager
def _limit(seconds: float) -> Iterator[None]:
    """A time-out whose error says how long was waited."""
    with anyio.move_on_after(seconds) as scope:
        yield
    if scope.cancelled_caught:
        raise TimeoutError(f"no answer for {seconds:.0f} s")
