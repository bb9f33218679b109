"""The one retry policy: which failures are repeated, how long after, and for how long.

Exponential backoff with full jitter (https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/): before
repetition number n, a random time between 0 and 0.1 s x 2^n, at most 10 s; longer where ``Retry-After`` says so.
Repeated until nothing of the transfer has moved for ``give_up_after`` seconds (120 by default), the last time at their
end.
"""

from __future__ import annotations

import email.utils
import logging
import random
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from time import monotonic
from typing import Protocol, TypeVar

import anyio

from torchferry.engine.transfer import current
from torchferry.errors import mask

__all__ = ["TRANSIENT_STATUSES", "AnswerError", "Transient", "retry_after", "retrying", "transient_answer"]

T = TypeVar("T")


class Headers(Protocol):
    """Headers of an answer, whichever client they come from."""

    def items(self) -> Iterable[tuple[str, str]]:
        """Names and values."""


TRANSIENT_STATUSES = frozenset({HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS})
"""Repeated, as is every status from 500 on but 501 (not implemented) and 505 (HTTP version)."""

_NOT_TRANSIENT = frozenset({HTTPStatus.NOT_IMPLEMENTED, HTTPStatus.HTTP_VERSION_NOT_SUPPORTED})
_FIRST_BACKOFF = 0.1  # seconds
_LONGEST_BACKOFF = 10.0  # seconds

logger = logging.getLogger("torchferry.engine")


@dataclass(frozen=True, slots=True)
class Transient:
    """Says of a failure that the same request may succeed later.

    Attributes:
        after: Seconds that the store asks to wait, as in ``Retry-After``.
    """

    after: float = 0.0


class AnswerError(OSError):
    """An answer that repeating the request may change: what the engine raises for a status such as 503.

    Attributes:
        transient: When to repeat it.
    """

    def __init__(self, message: str, transient: Transient) -> None:
        super().__init__(message)
        self.transient = transient


def transient_answer(status: int, headers: Headers | None = None) -> Transient | None:
    """Whether a request that got this status should be repeated, and when."""
    busy = status in TRANSIENT_STATUSES or (status >= HTTPStatus.INTERNAL_SERVER_ERROR and status not in _NOT_TRANSIENT)
    return Transient(retry_after(headers) if headers is not None else 0.0) if busy else None


def retry_after(headers: Headers) -> float:
    """The seconds of a ``Retry-After`` header, which is a number or a date; 0.0 where there is none."""
    value = next((text for name, text in headers.items() if name.lower() == "retry-after"), "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, (email.utils.parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):  # no date; or one without a time zone
        return 0.0


async def retrying(
    attempt: Callable[[], Awaitable[T]], transient: Callable[[Exception], Transient | None], what: str
) -> T:
    """Awaits ``attempt()`` again and again until it succeeds, or fails in a way that will not change.

    Args:
        attempt: One request.
        transient: Whether a failure may change, and when.
        what: What is tried, for the log: "Cannot write s3://...".

    Raises:
        Exception: the last failure, where it is not transient, or where nothing of the transfer moved for too long.
    """
    transfer = current()
    begun = monotonic()
    failures = 0
    while True:
        transfer.count("requests")
        try:
            return await attempt()
        except Exception as error:
            hint = error.transient if isinstance(error, AnswerError) else transient(error)
            if hint is None:
                raise
            backoff = random.uniform(0, min(_LONGEST_BACKOFF, _FIRST_BACKOFF * 2**failures))  # noqa: S311 - no secret
            left = max(begun, transfer.last_progress) + transfer.give_up_after - monotonic()
            if left <= 0 or hint.after > left:
                raise
            delay = min(max(backoff, hint.after), left)
            reason = mask(f"{type(error).__name__}: {error}")
        failures += 1
        transfer.count("retries")
        logger.warning("%s: %s. Trying again in %.1f s.", mask(what), reason.rstrip(" ."), delay)
        await anyio.sleep(delay)
