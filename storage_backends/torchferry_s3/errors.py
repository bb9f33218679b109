"""What S3 and botocore say when something is wrong, and the torchferry error for it."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import botocore.exceptions as boto_errors
import s3fs.core
from aiohttp import ClientConnectorError

from torchferry.engine.retry import Transient, transient_answer
from torchferry.errors import CheckpointNotFoundError, StorageError, StoragePermissionError
from torchferry.storage.translate import by_status, upload_gone

__all__ = [
    "DAMAGED",
    "NoSuchBucketError",
    "code_and_status",
    "known_etag",
    "may_have_arrived",
    "transient",
    "translate",
]

DAMAGED = frozenset(
    {"BadDigest", "InvalidDigest", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch", "ContentSHA256Mismatch"}
)
"""Codes for a body that does not match its checksum: it was damaged on the way."""

_PERMISSION_CODES = frozenset(
    [
        "AccessDenied",
        "AccountProblem",
        "AllAccessDisabled",
        "AuthorizationHeaderMalformed",
        "CredentialsNotSupported",
        "ExpiredToken",
        "InvalidAccessKeyId",
        "InvalidPayer",
        "InvalidSecurity",
        "InvalidToken",
        "NotSignedUp",
        "RequestTimeTooSkewed",
        "SignatureDoesNotMatch",
        "TokenRefreshRequired",
    ]
)
_UNAVAILABLE_CODES = frozenset(
    ["InternalError", "RequestTimeout", "ServiceUnavailable", "SlowDown", "Throttling", "ThrottlingException"]
)
_UNSURE = frozenset({HTTPStatus.INTERNAL_SERVER_ERROR, HTTPStatus.BAD_GATEWAY, HTTPStatus.GATEWAY_TIMEOUT})
_CREDENTIAL_ERRORS = (
    boto_errors.NoCredentialsError,
    boto_errors.PartialCredentialsError,
    boto_errors.CredentialRetrievalError,
    boto_errors.ProfileNotFound,
    boto_errors.SSOError,
    boto_errors.TokenRetrievalError,
)


class NoSuchBucketError(FileNotFoundError):
    """The bucket is what is missing."""


def transient(error: Exception) -> Transient | None:
    """Whether the same request may succeed later. Users can add to s3fs's list of such errors."""
    if isinstance(error, boto_errors.ClientError):
        code, status = code_and_status(error)
        if code in _UNAVAILABLE_CODES or code in DAMAGED:
            return Transient()
        headers: Any = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
        if (hint := transient_answer(status, headers)) is not None:
            return hint
    elif isinstance(error, _connection_errors()) and not _is_tls_refusal(error):
        return Transient()
    return Transient() if s3fs.core.CUSTOM_ERROR_HANDLER(error) else None


def translate(what: str, error: Exception) -> StorageError:
    """The torchferry error; ``what`` is "Cannot <verb> <url>"."""
    code, status = code_and_status(error)
    reason = str(error) or type(error).__name__
    if isinstance(error, NoSuchBucketError) or code == "NoSuchBucket":
        return CheckpointNotFoundError(
            f"{what}: the bucket does not exist: make it, or look at its name and the endpoint."
        )
    if code == "NoSuchUpload":
        return upload_gone(what, reason)
    if status == HTTPStatus.NOT_FOUND:
        return CheckpointNotFoundError(f"{what}: there is no such object.")
    # A FileNotFoundError that S3 did not answer: a token's file, or the program of a credential_process.
    if isinstance(error, (FileNotFoundError, *_CREDENTIAL_ERRORS)):
        return StoragePermissionError(
            f"{what}: no usable credentials. {reason.rstrip('.')}. They come from AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, from AWS_PROFILE, or from key= and secret=; anon=True goes without."
        )
    if code in _PERMISSION_CODES:
        status = HTTPStatus.FORBIDDEN
    unanswered = code in _UNAVAILABLE_CODES or (isinstance(error, _connection_errors()) and not _is_tls_refusal(error))
    return by_status(what, reason, status, code, unanswered=unanswered)


def may_have_arrived(error: BaseException) -> bool:
    """Whether S3 may have done what it was asked for, although this is all that came back."""
    if not isinstance(error, Exception):  # cancelled
        return True
    if status := code_and_status(error)[1]:
        return status in _UNSURE
    cause = getattr(error, "kwargs", {}).get("error")  # aiohttp's, from which botocore's is made
    never_sent = isinstance(error, boto_errors.ConnectTimeoutError) or isinstance(cause, ClientConnectorError)
    return isinstance(error, _connection_errors()) and not never_sent


def known_etag(answer: Mapping[str, Any]) -> str | None:
    """The ETag of an answer; None where there is none, or an empty one, as in Ceph 16's answer to a completion."""
    etag = str(answer.get("ETag") or "")
    return etag if etag.strip('"') else None


def code_and_status(error: BaseException) -> tuple[str, int]:
    """S3's error code and the HTTP status; "" and 0 where S3 did not answer."""
    if not isinstance(error, boto_errors.ClientError):
        return "", 0
    response: Any = error.response
    return str(response["Error"].get("Code", "")), int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _connection_errors() -> tuple[type[Exception], ...]:
    """What a broken or silent connection raises; looked up each time, because users can add to s3fs's list."""
    return (
        *s3fs.core.S3_RETRYABLE_ERRORS,
        boto_errors.ConnectionError,
        boto_errors.HTTPClientError,
        ConnectionError,
        TimeoutError,
    )


def _is_tls_refusal(error: Exception) -> bool:
    """Whether TLS failed in a way that will not change: a certificate that is not trusted, no version in common."""
    if not isinstance(error, boto_errors.SSLError):
        return False
    cause = getattr(error.kwargs.get("error"), "os_error", None)  # aiohttp's, from which botocore's is made
    return not isinstance(cause, ssl.SSLEOFError | ssl.SSLZeroReturnError | ssl.SSLSyscallError)
