"""Requests by gcsfs's own client, one attempt each, and what it adds to a request: token, project to bill.

The one place that knows gcsfs from the inside: its session, and how it makes headers and parameters. gcsfs repeats what
goes through its ``_call`` six times itself, follows redirects with the session's headers, and hides ``Retry-After``.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any
from urllib.parse import quote, urlencode
from xml.etree import ElementTree as ET

import aiohttp
import gcsfs.core
from yarl import URL

from torchferry.engine.cancellation import in_thread
from torchferry.engine.memory import copy_bytes
from torchferry.storage.body import RequestBody
from torchferry_gcs.errors import GcsAnswerError

__all__ = ["GcsClient", "Reply", "text_of"]

_MOST_REDIRECTS = 5
_TOKEN_PATIENCE = 0.5  # seconds that a cancel waits for a token that is being renewed
_READ_PIECE = 256 << 10


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer.

    Attributes:
        headers: Its headers; their names are looked up without regard to case.
        body: Its body.
    """

    headers: Mapping[str, str]
    body: bytes

    def json(self) -> dict[str, Any]:
        """The body, from JSON."""
        found: dict[str, Any] = json.loads(self.body)
        return found

    def xml(self, root: str) -> ET.Element | None:
        """The body, if it is an XML document with this root; else None."""
        try:
            found = ET.fromstring(self.body)  # noqa: S314 - from the store; expat bounds what entities become
        except ET.ParseError:
            return None
        return found if found.tag.rpartition("}")[2] == root else None


def text_of(element: ET.Element, name: str) -> str:
    """The text of an element's child, in any namespace; empty where there is none."""
    return element.findtext(f"{{*}}{name}") or ""


class GcsClient:
    """The client of a gcsfs filesystem, with its session, credentials, project to bill and time-out.

    Requests of a subclass that makes requests its own way go through its ``_call``, with that one's repetitions.
    """

    def __init__(self, fs: gcsfs.core.GCSFileSystem) -> None:
        self._fs = fs
        self._by_call = any(
            not getattr(type(fs), name).__module__.startswith("gcsfs.") for name in ("_call", "_request")
        )

    @property
    def why_not_engine(self) -> str:
        """Why only this client can honour the filesystem's settings; empty where the engine can, too."""
        if not type(self._fs).__module__.startswith("gcsfs."):
            return f"{type(self._fs).__name__} is a subclass of GCSFileSystem"
        if self._fs.session_kwargs:
            return "the filesystem has session_kwargs"
        if vars(self._fs).get("_use_client_cert"):
            return "there is a client certificate"
        return ""

    # --- addresses

    def object_url(self, bucket: str, key: str, **parameters: str | None) -> str:
        """An object of the JSON API."""
        return self._json_url(f"/storage/v1/b/{_quoted(bucket)}/o/{_quoted(key)}", parameters)

    def rewrite_url(
        self, source: tuple[str, str, str | None], target: tuple[str, str, str | None], **parameters: str | None
    ) -> str:
        """A copy of an object, each given by bucket, key and generation, in the JSON API."""
        (bucket, key, generation), (to_bucket, to_key, _) = source, target
        path = f"/storage/v1/b/{_quoted(bucket)}/o/{_quoted(key)}/rewriteTo/b/{_quoted(to_bucket)}/o/{_quoted(to_key)}"
        return self._json_url(path, {"sourceGeneration": generation, **parameters})

    def objects_url(self, bucket: str, **parameters: str | None) -> str:
        """The objects of a bucket, in the JSON API."""
        return self._json_url(f"/storage/v1/b/{_quoted(bucket)}/o", parameters)

    def download_url(self, bucket: str, key: str, **parameters: str | None) -> str:
        """The bytes of an object, in the JSON API."""
        return self._json_url(
            f"/download/storage/v1/b/{_quoted(bucket)}/o/{_quoted(key)}", {"alt": "media", **parameters}
        )

    def upload_url(self, bucket: str, **parameters: str | None) -> str:
        """Where the JSON API takes uploads."""
        return self._json_url(f"/upload/storage/v1/b/{_quoted(bucket)}/o", parameters)

    def xml_url(self, bucket: str, key: str, **parameters: str) -> str:
        """A bucket or an object of the XML API. Parameters that are empty go without "="."""
        query = "&".join(f"{name}={_quoted(value)}" if value else name for name, value in parameters.items())
        place = f"{self._location}/{_quoted(bucket)}" + (f"/{quote(key, safe='/')}" if key else "")
        return f"{place}?{query}"

    # --- requests

    async def headers(self, url: str) -> dict[str, str]:
        """What gcsfs sends with a request, its token above all; it is renewed where it expires soon.

        The XML API learns from a header which project to bill; the JSON API from the URL, as gcsfs has it.
        """
        if self._fs.credentials.credentials is None:
            headers: dict[str, str] = self._fs._get_headers(None)
        else:
            headers = await in_thread(self._fs._get_headers, None, interrupt=lambda: _TOKEN_PATIENCE)
        project = self._fs._get_params({}).get("userProject")
        if project and "userProject=" not in url:
            headers["x-goog-user-project"] = project
        return headers

    async def call(
        self, method: str, url: str, *, headers: Mapping[str, str] | None = None, body: bytes | RequestBody = b""
    ) -> Reply:
        """One request, one attempt.

        Raises:
            GcsAnswerError: the answer is an error, or a redirect to another host.
            Exception: what aiohttp, google-auth and gcsfs raise.
        """
        if self._by_call:
            fields, content = await self._fs._call(method, url, headers=dict(headers or {}), data=_seekable(body))
            return Reply(fields, content)
        async with self._answer(method, url, headers or {}, body) as response:
            return Reply(response.headers, await response.read())

    async def read_into(
        self, url: str, headers: Mapping[str, str], buffer: memoryview, check: Callable[[Mapping[str, str]], None]
    ) -> None:
        """Fills ``buffer`` with the answer's body. ``check`` looks at the answer's headers first.

        Raises:
            ConnectionResetError: the body has another length.
        """
        if self._by_call:
            reply = await self.call("GET", url, headers=headers)
            check(reply.headers)
            _require_length(len(reply.body), len(buffer))
            await in_thread(copy_bytes, buffer, reply.body)
            return
        async with self._answer("GET", url, headers, b"") as response:
            check(response.headers)
            filled = 0
            async for piece in response.content.iter_chunked(_READ_PIECE):
                if filled + len(piece) <= len(buffer):
                    buffer[filled : filled + len(piece)] = piece
                filled += len(piece)
            _require_length(filled, len(buffer))

    @asynccontextmanager
    async def _answer(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | RequestBody
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The answer, if it is a success. Redirects are followed where they lead to the same host."""
        session: aiohttp.ClientSession = await self._fs._set_session()
        place = URL(url, encoded=True)
        fields = {**await self.headers(url), **headers, "Content-Length": str(len(body))}
        if method in {"GET", "DELETE"}:
            del fields["Content-Length"]
        seconds = self._fs.requests_timeout
        timeout = seconds if seconds is None or isinstance(seconds, aiohttp.ClientTimeout) else _total(seconds)
        for _ in range(_MOST_REDIRECTS):
            async with session.request(
                method, place, headers=fields, data=_seekable(body), timeout=timeout, allow_redirects=False
            ) as response:
                target = response.headers.get("Location") if _redirects(response.status) else None
                if target is not None and method == "GET":
                    elsewhere = place.join(URL(target, encoded=True))
                    if elsewhere.origin() == place.origin():
                        place = elsewhere
                        continue
                if response.status >= HTTPStatus.BAD_REQUEST or target is not None:
                    raise GcsAnswerError(response.status, response.headers, await response.read())
                yield response
                return
        raise aiohttp.TooManyRedirects(response.request_info, response.history)

    def _json_url(self, path: str, parameters: Mapping[str, str | None]) -> str:
        given = {name: value for name, value in parameters.items() if value is not None}
        query = urlencode(given if self._by_call else self._fs._get_params(given), quote_via=quote)
        return f"{self._location}{path}" + (f"?{query}" if query else "")

    @property
    def _location(self) -> str:
        return str(self._fs._location).rstrip("/")


def _seekable(body: bytes | RequestBody) -> gcsfs.core.UnclosableBytesIO | RequestBody | None:
    """A body as gcsfs sends it: aiohttp warns of large ``bytes``."""
    return gcsfs.core.UnclosableBytesIO(body) if body and isinstance(body, bytes) else body or None


def _quoted(name: str) -> str:
    return quote(name, safe="")


def _redirects(status: int) -> bool:
    return HTTPStatus.MULTIPLE_CHOICES < status < HTTPStatus.BAD_REQUEST and status != HTTPStatus.NOT_MODIFIED


def _total(seconds: float) -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(total=seconds)


def _require_length(length: int, expected: int) -> None:
    if length != expected:
        raise ConnectionResetError(f"the body has {length} bytes instead of {expected}")
