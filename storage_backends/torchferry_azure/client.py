"""Requests by adlfs's own client, one attempt each, and requests that it only signs."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

import anyio
from azure.core.credentials import AccessToken, AzureSasCredential
from azure.storage.blob import BlobSasPermissions, generate_blob_sas
from azure.storage.blob._shared.authentication import SharedKeyCredentialPolicy

from torchferry.engine.transport import SignedRequest
from torchferry.storage.translate import require_key

if TYPE_CHECKING:
    from adlfs import AzureBlobFileSystem
    from azure.storage.blob.aio import BlobClient, ContainerClient

__all__ = ["AzureClient"]

T = TypeVar("T")

_CONNECT = 10  # seconds
_SILENCE = 30  # seconds without a byte, after which a request has failed
_SIGNED_FOR = timedelta(hours=1)  # every request has a signature of its own, or one of the last minute
_SCOPE = "https://storage.azure.com/.default"
_TOKEN_SECONDS = 30.0  # the longest that getting a token may take
_RENEW = 300.0  # seconds before its end that a token is replaced, as the client library does
_PAGE = 5000  # names in a page of a listing: the most there are
_READ = BlobSasPermissions(read=True)
_WRITE = BlobSasPermissions(create=True, write=True)


class AzureClient:
    """The client of an adlfs filesystem, with the filesystem's credentials and time limits.

    Its own repetitions are off, because the engine repeats: by itself it waits 15 seconds before the first. It follows
    no redirects: it would sign its request again for the other host.

    Args:
        fs: The filesystem.
        display: The URL of a path, for messages.

    Attributes:
        silence: Seconds without a byte after which a request has failed: the filesystem's ``read_timeout``, or 30.
    """

    def __init__(self, fs: AzureBlobFileSystem, display: Callable[[str], str]) -> None:
        self._fs = fs
        self._display = display
        configured: Mapping[str, Any] = vars(fs).get("_timeout_kwargs", {})
        self._options: dict[str, Any] = {
            "connection_timeout": _CONNECT,
            "read_timeout": _SILENCE,
            **configured,
            "retry_total": 0,
            "permit_redirects": False,
        }
        self.silence = float(self._options["read_timeout"])
        self._server_timeout: int | None = configured.get("timeout")
        self._token: AccessToken | None = None
        self._token_lock = anyio.Lock()  # parts that begin together need one token

    def address(self, path: str) -> tuple[str, str, str | None]:
        """The container, the blob's name, and its version where the path names one.

        ``?versionid=`` is part of the name for a filesystem that is not ``version_aware``.
        """
        container, _, name = path.partition("/")
        require_key(self._display(path), path)
        if not self._fs.version_aware:
            return container, name, None
        name, marker, version = name.partition("?versionid=")
        return container, name, version if marker else None

    def blob(self, path: str) -> BlobClient:
        """The client of one blob."""
        container, name, version = self.address(path)
        client: BlobClient = self._fs.service_client.get_blob_client(container, name, version_id=version or None)
        return client

    def container(self, name: str) -> ContainerClient:
        """The client of a container."""
        client: ContainerClient = self._fs.service_client.get_container_client(name)
        return client

    async def call(self, operation: Callable[..., Awaitable[T]], *args: Any, **kwargs: Any) -> T:
        """One operation of a client, one attempt. Raises the client library's errors."""
        return await operation(*args, **kwargs, **self._options)

    async def list_page(
        self, container: str, prefix: str, include: Sequence[str], token: str | None
    ) -> tuple[list[Any], Any]:
        """One page of a listing, as ``BlobProperties``, and the token of the next; one attempt."""
        found = self.container(container).list_blobs(
            prefix or None, include=list(include), results_per_page=_PAGE, **self._options
        )
        pages = found.by_page(token)
        page = [blob async for blob in await anext(pages)]
        return page, pages.continuation_token  # type: ignore[attr-defined]

    async def sign_read(self, path: str, etag: str | None) -> SignedRequest:
        """The request that reads a blob of this ETag."""
        blob = self.blob(path)
        query = {"versionid": blob.version_id} if blob.version_id else {}
        url, headers = await self._signed(blob, _READ, query)
        return SignedRequest.get(url, etag, headers)

    async def sign_write(self, path: str, query: Mapping[str, str], headers: Mapping[str, str]) -> SignedRequest:
        """A PUT request to a blob."""
        url, credentials = await self._signed(self.blob(path), _WRITE, query)
        return SignedRequest("PUT", url, {**credentials, **headers})

    async def _signed(
        self, blob: BlobClient, permission: BlobSasPermissions, query: Mapping[str, str]
    ) -> tuple[str, dict[str, str]]:
        """A URL and headers, with the credential of the client; made with an account's key, a signature in the URL."""
        parts = [f"{name}={quote(value, safe='')}" for name, value in query.items()]
        if self._server_timeout is not None:
            parts.append(f"timeout={self._server_timeout}")
        headers = {"x-ms-version": blob.api_version, "x-ms-date": formatdate(usegmt=True)}
        credential: Any = blob.credential
        if isinstance(credential, SharedKeyCredentialPolicy):
            parts.append(
                generate_blob_sas(
                    credential.account_name,
                    blob.container_name,
                    blob.blob_name,
                    account_key=credential.account_key,
                    permission=permission,
                    expiry=datetime.now(UTC) + _SIGNED_FOR,
                    version_id=blob.version_id,
                )
            )
        elif isinstance(credential, AzureSasCredential):
            parts.append(credential.signature.lstrip("?"))
        elif credential is not None:
            headers["Authorization"] = f"Bearer {await self._bearer_token(credential)}"
        url, _, signature = str(blob.url).partition("?")  # where the client was made with one
        if signature:
            parts.append(signature)
        return (f"{url}?{'&'.join(parts)}" if parts else url), headers

    async def _bearer_token(self, credential: Any) -> str:
        async with self._token_lock:
            if self._token is None or self._token.expires_on - time.time() < _RENEW:
                with anyio.move_on_after(_TOKEN_SECONDS) as scope:
                    self._token = await credential.get_token(_SCOPE)
                if scope.cancelled_caught:
                    raise TimeoutError(f"no token for {_TOKEN_SECONDS:.0f} s")
            assert self._token is not None  # noqa: S101 - for the types
            return self._token.token
