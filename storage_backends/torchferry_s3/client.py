"""Requests by s3fs's own client, one attempt each, and requests that it only signs."""

from __future__ import annotations

import weakref
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from http import HTTPStatus
from typing import Any

from botocore.exceptions import ClientError
from s3fs import S3FileSystem

from torchferry.engine.transport import SignedRequest
from torchferry_s3.errors import transient

__all__ = ["S3Client"]

_ours: ContextVar[bool] = ContextVar("torchferry_s3_ours", default=False)
_signed: ContextVar[list[Any] | None] = ContextVar("torchferry_s3_signed", default=None)

_METHODS = {"get_object": "GET", "put_object": "PUT", "upload_part": "PUT"}


class S3Client:
    """The client of an s3fs filesystem, with the filesystem's additional arguments, encryption, requester pays.

    Its own repetitions (botocore's and s3fs's) are off: the engine repeats.
    """

    def __init__(self, fs: S3FileSystem) -> None:
        self._fs = fs
        self._prepared: weakref.WeakSet[Any] = weakref.WeakSet()  # clients that have what _client registers

    async def call(self, operation: str, **arguments: Any) -> dict[str, Any]:
        """One S3 operation, one attempt. Raises botocore's errors."""
        client = await self._client(arguments["Bucket"])
        method = getattr(client, operation)
        token = _ours.set(True)
        try:
            response: dict[str, Any] = await method(**self._fs._get_s3_method_kwargs(method, **arguments))
        finally:
            _ours.reset(token)
        return response

    async def sign(self, operation: str, **arguments: Any) -> SignedRequest:
        """The request for an operation, with a signature in its URL that is good for an hour."""
        client = await self._client(arguments["Bucket"])
        method = getattr(client, operation)
        kwargs = self._fs._get_s3_method_kwargs(method, **arguments)
        box: list[Any] = []
        token = _signed.set(box)
        try:
            url = await client.generate_presigned_url(operation, Params=kwargs)
        finally:
            _signed.reset(token)
        headers = dict(box[-1].headers.items())  # what the signature covers, and is not in the URL
        return SignedRequest(_METHODS[operation], url, headers)

    async def _client(self, bucket: str) -> Any:
        await self._fs.set_session()
        client = await self._fs.get_s3(bucket)
        if client in self._prepared:
            return client
        self._prepared.add(client)
        events = client.meta.events
        events.register_first("needs-retry.s3", _no_repetition, unique_id="torchferry-needs-retry")
        events.register_first("choose-signer.s3", _version_4, unique_id="torchferry-choose-signer")
        events.register("before-sign.s3", _keep_request, unique_id="torchferry-before-sign")
        _follow_no_redirects(client)
        return client


def _no_repetition(
    response: Any = None, operation: Any = None, caught_exception: Exception | None = None, **_: object
) -> None:
    """Raises what botocore would repeat a request of ours for; leaves the rest, such as another region, to botocore."""
    if not _ours.get():
        return
    if caught_exception is not None:
        raise caught_exception
    http, parsed = response
    if http.status_code >= HTTPStatus.BAD_REQUEST and "Error" in parsed:
        error = ClientError(parsed, operation.name)
        if transient(error) is not None:
            raise error


def _follow_no_redirects(client: Any) -> None:
    """Has the client's sessions of aiohttp follow no redirect of a request of ours.

    They would send session tokens and customers' keys to whatever host a store names. Other regions of S3 are
    botocore's to find: it signs anew for them.
    """
    http_session = client._endpoint.http_session
    if isinstance(getattr(http_session, "_get_session", None), _GuardedSessions):
        return
    if hasattr(http_session, "_get_session"):
        http_session._get_session = _GuardedSessions(http_session._get_session)
    elif not isinstance(http_session._session, _GuardedSession):  # aiobotocore before 2.21
        http_session._session = _GuardedSession(http_session._session)


class _GuardedSessions:
    """Makes what ``get_session()`` returns a :class:`_GuardedSession`."""

    def __init__(self, get_session: Callable[..., Awaitable[Any]]) -> None:
        self._get_session = get_session

    async def __call__(self, *args: Any) -> _GuardedSession:
        return _GuardedSession(await self._get_session(*args))


class _GuardedSession:
    """A session of aiohttp that follows no redirects of requests of ours."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def request(self, *args: Any, **options: Any) -> Any:
        if _ours.get():
            options["allow_redirects"] = False
        return self._session.request(*args, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


def _version_4(signature_version: Any, **_: object) -> str | None:
    """Has botocore sign our URLs with signature version 4, unless its user chose another.

    By itself it takes version 2 in the older regions, which newer buckets refuse there, too, as does what is encrypted
    with KMS: https://docs.aws.amazon.com/AmazonS3/latest/API/Appendix-Sigv2.html
    """
    ours = _signed.get() is not None
    return "s3v4-query" if ours and signature_version in {"v4-query", "s3v4-query"} else None


def _keep_request(request: Any, **_: object) -> None:
    box = _signed.get()
    if box is not None:
        box.append(request)
