"""What Google Cloud Storage and gcsfs say when something is wrong, and the torchferry error for it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus

import aiohttp
import gcsfs.retry
import google.auth.exceptions
import requests
from gcsfs.retry import HttpError

from torchferry.engine.retry import Transient, transient_answer
from torchferry.errors import CheckpointNotFoundError, StorageError, StoragePermissionError
from torchferry.storage.translate import by_status, upload_gone

__all__ = [
    "GcsAnswerError",
    "NoSuchBucketError",
    "is_damage",
    "is_missing",
    "is_not_xml",
    "may_have_arrived",
    "missing_bucket",
    "status_of",
    "transient",
    "translate",
]

_DAMAGED = re.compile(rb"<Code>BadDigest</Code>|(CRC32C|MD5)[^.]* (doesn't|did not) match ")
_UNKNOWN_REQUEST = frozenset({400, 404, 405, 501})
_UNSURE = frozenset({500, 502, 504})
_XML = [re.compile(rb"<%s>([^<]*)</%s>" % (name, name)) for name in (b"Code", b"Message", b"Details")]


class NoSuchBucketError(FileNotFoundError):
    """The bucket is what is missing."""


class GcsAnswerError(Exception):
    """An answer that is no success.

    Attributes:
        status: The HTTP status.
        code: The store's name for the error, such as "NoSuchUpload"; empty where it has none.
        headers: The answer's headers.
        damaged: Whether the store says that a body arrived damaged.
    """

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.damaged = is_damage(body)
        self.code, message = _explained(body)
        detail = message or body[:300].decode("utf-8", "replace").strip()
        if HTTPStatus.MULTIPLE_CHOICES <= status < HTTPStatus.BAD_REQUEST:
            detail = "The store redirects to another host, which the credentials are not sent to."
        super().__init__(f"status {status}" + (f": {detail}" if detail else ""))


def is_damage(body: bytes) -> bool:
    """Whether the body of an answer says that what was sent does not match its checksum."""
    return _DAMAGED.search(body) is not None


def is_missing(error: Exception) -> bool:
    """Whether the store says that there is no such thing."""
    if isinstance(error, GcsAnswerError):
        return error.status == HTTPStatus.NOT_FOUND
    return isinstance(error, FileNotFoundError)  # what gcsfs makes of it


def is_not_xml(error: BaseException | None) -> bool:
    """Whether a request of the XML API was answered by a server that does not know it: no XML tells what is wrong."""
    if isinstance(error, GcsAnswerError):
        return not error.code and error.status in _UNKNOWN_REQUEST
    return isinstance(error, Exception) and (is_missing(error) or status_of(error) in _UNKNOWN_REQUEST)


def may_have_arrived(error: BaseException) -> bool:
    """Whether the store may have done what it was asked for, although this is all that came back."""
    if not isinstance(error, Exception):  # cancelled
        return True
    if isinstance(error, aiohttp.ClientConnectorError):
        return False
    status = status_of(error)
    return status in _UNSURE if status else isinstance(error, _CONNECTION_ERRORS)


@contextmanager
def missing_bucket() -> Iterator[None]:
    """For requests that need nothing but the bucket: where something is missing, it is that."""
    try:
        yield
    except Exception as error:
        if is_missing(error):
            raise NoSuchBucketError from error
        raise


def transient(error: Exception) -> Transient | None:
    """Whether the same request may succeed later."""
    if isinstance(error, GcsAnswerError):
        return Transient() if error.damaged else transient_answer(error.status, error.headers)
    if isinstance(error, (*_CONNECTION_ERRORS, gcsfs.retry.ChecksumError)):
        return None if isinstance(error, aiohttp.ClientConnectorCertificateError) else Transient()
    for refused in (error, error.__cause__):  # newer gcsfs wraps google-auth's
        if isinstance(refused, google.auth.exceptions.GoogleAuthError):
            return Transient() if refused.retryable else None
    return transient_answer(status_of(error))


def translate(what: str, error: Exception) -> StorageError:
    """The torchferry error; ``what`` is "Cannot <verb> <url>"."""
    reason = str(error) or type(error).__name__
    code = error.code if isinstance(error, GcsAnswerError) else ""
    if isinstance(error, NoSuchBucketError) or code == "NoSuchBucket":
        return CheckpointNotFoundError(
            f"{what}: the bucket does not exist: make it, or look at its name and the endpoint."
        )
    if code == "NoSuchUpload":
        return upload_gone(what, reason)
    if is_missing(error):
        return CheckpointNotFoundError(f"{what}: there is no such object.")
    unanswered = isinstance(error, _CONNECTION_ERRORS)
    if isinstance(error, _CREDENTIAL_ERRORS) and not unanswered:
        return StoragePermissionError(f"{what}: no usable credentials. {reason}")
    return by_status(what, reason, status_of(error), code, unanswered=unanswered)


_CONNECTION_ERRORS = (
    aiohttp.ClientConnectionError,
    aiohttp.ClientPayloadError,
    google.auth.exceptions.TransportError,
    requests.exceptions.RequestException,
    ConnectionError,
    TimeoutError,
)
_CREDENTIAL_ERRORS = (
    google.auth.exceptions.GoogleAuthError,
    *([gcsfs.retry.NonRetryableError] if "NonRetryableError" in vars(gcsfs.retry) else []),  # newer gcsfs has it
)


def _explained(body: bytes) -> tuple[str, str]:
    """The code and the message in an error's body: JSON or XML."""
    try:
        error = json.loads(body)["error"]
    except (ValueError, TypeError, KeyError):
        code, *texts = (
            match.group(1).decode("utf-8", "replace") if match else "" for match in (text.search(body) for text in _XML)
        )
        return code, " ".join(filter(None, texts))
    return ("", str(error.get("message", ""))) if isinstance(error, dict) else ("", str(error))


def status_of(error: Exception) -> int:
    """The HTTP status behind an error of ours or of gcsfs (``gcsfs.retry.validate_response``); 0 where it has none."""
    if isinstance(error, GcsAnswerError):
        return error.status
    if isinstance(error, HttpError) and error.code is not None:
        return int(error.code)
    if type(error) is OSError and str(error).startswith("Forbidden"):
        return HTTPStatus.FORBIDDEN
    if isinstance(error, FileExistsError):  # what it makes of a 412
        return HTTPStatus.PRECONDITION_FAILED
    if type(error) is ValueError and str(error).startswith("Bad Request"):
        return HTTPStatus.BAD_REQUEST
    return 0
