"""What Azure and its client library say when something is wrong, and the torchferry error for it."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from azure.core.exceptions import AzureError, ClientAuthenticationError, DecodeError, HttpResponseError

from torchferry.engine.retry import Transient, transient_answer
from torchferry.errors import CheckpointNotFoundError, StorageError, StoragePermissionError
from torchferry.storage.translate import REFUSED, by_status

__all__ = ["DAMAGED", "INVALID_BLOCK_LIST", "code_and_status", "says_damaged", "transient", "translate"]

# https://learn.microsoft.com/rest/api/storageservices/blob-service-error-codes
DAMAGED = frozenset({"Md5Mismatch", "Crc64Mismatch"})
"""Codes for a body that does not match its checksum: it was damaged on the way."""

INVALID_BLOCK_LIST = "InvalidBlockList"
"""The code for a commit of blocks that are not there."""

_NO_CONTAINER = frozenset({"ContainerNotFound", "ContainerBeingDeleted"})
_PERMISSION_CODES = frozenset({"InvalidAuthenticationInfo", "PublicAccessNotPermitted"})  # answered with 400 and 409
_CONDITION_CODES = frozenset({"", "ConditionNotMet"})  # of 412; others are about leases


def transient(error: Exception) -> Transient | None:
    """Whether the same request may succeed later."""
    code, status = code_and_status(error)
    if isinstance(error, DecodeError) or says_damaged(code, str(error)):  # an answer that broke off; a damaged body
        return Transient()
    if isinstance(error, HttpResponseError) and error.response is not None:
        response: Any = error.response
        return transient_answer(status, response.headers)
    no_credentials = isinstance(error, ClientAuthenticationError)
    return Transient() if isinstance(error, AzureError) and not no_credentials else None


def translate(what: str, error: Exception) -> StorageError:
    """The torchferry error; ``what`` is "Cannot <verb> <url>"."""
    code, status = code_and_status(error)
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    if code in _NO_CONTAINER or status == HTTPStatus.NOT_FOUND:
        missing = "the container does not exist" if code in _NO_CONTAINER else "there is no such blob"
        return CheckpointNotFoundError(f"{what}: {missing}.")
    if code == INVALID_BLOCK_LIST:
        return StorageError(f"{what}: another writer wrote it at the same time, and Azure kept that one.")
    if HTTPStatus.MULTIPLE_CHOICES <= status < HTTPStatus.BAD_REQUEST:
        return StorageError(f"{what}: a redirect ({status}) was answered, and is not followed.")
    if isinstance(error, ClientAuthenticationError) and status not in REFUSED:
        return StoragePermissionError(f"{what}: no usable credentials. {reason}")
    if status == HTTPStatus.PRECONDITION_FAILED and code not in _CONDITION_CODES:
        return StorageError(f"{what}: {reason} ({code})")
    if code in _PERMISSION_CODES:
        status = HTTPStatus.FORBIDDEN
    return by_status(what, reason, status, code, unanswered=isinstance(error, AzureError) and not status)


def code_and_status(error: BaseException) -> tuple[str, int]:
    """Azure's error code and the HTTP status; "" and 0 where Azure did not answer."""
    if not isinstance(error, HttpResponseError):
        return "", 0
    code = getattr(error, "error_code", None) or ""
    return str(getattr(code, "value", code)), error.status_code or 0  # an enumeration where the library knows the code


def says_damaged(code: str, text: str) -> bool:
    """Whether an error says that a body arrived damaged. Azurite has no code of its own for that."""
    return code in DAMAGED or (code == "InvalidOperation" and "contentMD5" in text)
