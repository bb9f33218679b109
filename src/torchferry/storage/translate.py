"""How backends turn errors of clients and filesystems into torchferry's."""

from __future__ import annotations

import errno
from contextlib import contextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING

from torchferry.errors import (
    CheckpointChangedError,
    CheckpointNotFoundError,
    StorageError,
    StoragePermissionError,
    StorageUnavailableError,
    TorchferryError,
    UnsupportedURLError,
    masked,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["REFUSED", "by_status", "describe", "generic_error", "require_key", "translated", "upload_gone"]

REFUSED = frozenset({HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN})
_MISSING = frozenset({HTTPStatus.NOT_FOUND, HTTPStatus.GONE})
_BUSY = frozenset({HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS})


def require_key(url: str, path: str) -> None:
    """Raises a StorageError where a URL has no key: requests without one are about the bucket, and may make one.

    An UnsupportedURLError where it has no bucket: a path of this machine, perhaps, that became a URL.
    """
    bucket, _, key = path.partition("/")
    if not key:
        raise StorageError(errno.EISDIR, f"{url} names a bucket or container, not an object in it.")
    if not bucket:
        raise UnsupportedURLError(f"{url} names no bucket: an object's URL has one, as in s3://bucket/checkpoint.pt.")


@contextmanager
def translated(translate: Callable[[str, Exception], StorageError], url: str, verb: str) -> Iterator[None]:
    """Raises what ``translate("Cannot <verb> <url>", error)`` returns in place of any error but torchferry's own."""
    try:
        yield
    except TorchferryError:
        raise
    except Exception as error:  # noqa: BLE001 - a client may raise anything
        raise translate(f"Cannot {verb} {url}", error) from masked(error)


def by_status(what: str, reason: str, status: int, code: str = "", *, unanswered: bool = False) -> StorageError:
    """The error for a request that failed, where nothing but its HTTP status tells which.

    Args:
        what: What was tried.
        reason: What the client says.
        status: The answer's status; 0 where there is none, or nobody knows.
        code: The store's own name for the error, where it has one.
        unanswered: Whether there was no answer, or one that is as good as none.
    """
    if status in REFUSED:
        return StoragePermissionError(f"{what}: the store refused these credentials ({code or int(status)}). {reason}")
    if status == HTTPStatus.PRECONDITION_FAILED:
        return CheckpointChangedError(f"{what}: it was replaced meanwhile.")
    if unanswered or status in _BUSY or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return StorageUnavailableError(f"{what}: the store is not available, after all retries. {reason}")
    return StorageError(f"{what}: {reason} {f'({code})' if code else ''}".rstrip())


def upload_gone(what: str, reason: str) -> StorageError:
    """The error where the store does not know the upload that is to be completed, or to get a part."""
    return StorageUnavailableError(
        f"{what}: the upload is gone, because it was aborted, or completed and the answer lost. The object may or may "
        f"not be complete; saving again is safe. {reason}"
    )


def generic_error(what: str, error: Exception) -> StorageError:
    """The error for one that a filesystem raised, whichever filesystem that is."""
    if isinstance(error, FileNotFoundError):
        cause = error.__cause__  # fsspec's http says so of a server that refused, failed or was not there, too
        status = getattr(cause, "status", 0)
        if not isinstance(cause, Exception) or not type(cause).__module__.startswith("aiohttp.") or status in _MISSING:
            return CheckpointNotFoundError(errno.ENOENT, f"{what}: there is no such file.")
        return by_status(what, describe(cause), status, unanswered=not status)
    if isinstance(error, NotImplementedError):
        return StoragePermissionError(
            errno.EROFS, f"{what}: this filesystem is read-only, or cannot move files into place."
        )
    message = f"{what}: {describe(error)}"
    if not isinstance(error, OSError):
        return StorageError(message)
    if isinstance(error, ConnectionError | TimeoutError):
        return StorageUnavailableError(message)
    refused = isinstance(error, PermissionError) or error.errno == errno.EROFS
    return (StoragePermissionError if refused else StorageError)(error.errno or errno.EIO, message)


def describe(error: Exception) -> str:
    """The error's type and text."""
    return f"{type(error).__name__}: {error}"
