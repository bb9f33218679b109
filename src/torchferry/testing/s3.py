"""What tests of S3 share: the way around the backend, and a server in front of the store that changes what is said."""

from __future__ import annotations

import http.client
import http.server
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

from torchferry.storage.registry import open_backend
from torchferry.testing.conformance import StoreUnderTest
from torchferry.testing.servers import HOST, S3Server, storage_options_for

__all__ = ["Exchange", "Front", "S3Store"]


class S3Store(StoreUnderTest):
    """A place in a bucket.

    Args:
        client: A plain client of botocore's: the way around.
        url: The place, "s3://bucket/prefix".
        storage_options: What s3fs takes.
    """

    keeps_metadata = True

    def __init__(self, client: Any, url: str, storage_options: dict[str, Any]) -> None:
        self.options = {"storage_options": storage_options}
        self.backend, self._prefix = open_backend(url, storage_options=storage_options)
        self._client = client

    def path(self, name: str) -> str:
        return f"{self._prefix}/{name}"

    def raw_write(self, path: str, data: bytes) -> None:
        self._client.put_object(**self.address(path), Body=data)

    def raw_read(self, path: str) -> bytes:
        data: bytes = self._client.get_object(**self.address(path))["Body"].read()
        return data

    def raw_exists(self, path: str) -> bool:
        bucket, _, key = path.partition("/")
        found = self._client.list_objects_v2(Bucket=bucket, Prefix=key)
        return any(entry["Key"] == key for entry in found.get("Contents", []))

    def leftovers(self) -> list[str]:
        return [upload["Key"] for upload in self.uploads()]

    def uploads(self) -> list[dict[str, Any]]:
        """The uploads that are open, as S3 lists them."""
        bucket, _, prefix = self._prefix.partition("/")
        found: list[dict[str, Any]] = self._client.list_multipart_uploads(Bucket=bucket, Prefix=prefix).get(
            "Uploads", []
        )
        return found

    @staticmethod
    def address(path: str) -> dict[str, str]:
        """Bucket and key of a path."""
        bucket, _, key = path.partition("/")
        return {"Bucket": bucket, "Key": key}


@dataclass(slots=True)
class Exchange:
    """A request that came to a :class:`Front`, and the answer it gets: both can be changed.

    Attributes:
        method: The request's method.
        target: Its path and query.
        request: Its header fields, the names in lower case.
        body: Its body.
        status: The answer's status; 0 before the store was asked. Who sets it before answers in its place.
        answer: The answer's header fields.
        content: Its body.
    """

    method: str
    target: str
    request: dict[str, str]
    body: bytes
    status: int = 0
    answer: dict[str, str] = field(default_factory=dict)
    content: bytes = b""

    def refuse(self, status: int, code: str) -> None:
        """Answers with an error in S3's words."""
        self.status, self.answer = status, {"Content-Type": "application/xml"}
        self.content = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()


class Front:
    """An HTTP server in front of a store, while its ``with`` block lasts.

    Args:
        server: The store.
        before: Called with each exchange before the store is asked.
        after: Called with each exchange before it is answered.

    Attributes:
        log: All exchanges so far.
        storage_options: What s3fs takes to go through it.
    """

    def __init__(  # noqa: C901 - a handler in a closure
        self,
        server: S3Server,
        *,
        before: Callable[[Exchange], object] = lambda _: None,
        after: Callable[[Exchange], object] = lambda _: None,
    ) -> None:
        self.log: list[Exchange] = []
        log = self.log

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except ConnectionError:  # the client has given up
                    self.close_connection = True

            def __getattr__(self, name: str) -> Any:
                if name.startswith("do_"):
                    return self._handle
                raise AttributeError(name)

            def _handle(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                fields = {name.lower(): value for name, value in self.headers.items()}
                exchange = Exchange(self.command, self.path, fields, body)
                log.append(exchange)
                before(exchange)
                if not exchange.status:
                    _ask(server.port, exchange)
                after(exchange)
                self.send_response_only(exchange.status)
                for name, value in exchange.answer.items():
                    if name.lower() not in {"content-length", "connection", "transfer-encoding"}:
                        self.send_header(name, value)
                length = len(exchange.content)
                if self.command == "HEAD":
                    length = int(exchange.answer.get("Content-Length", 0))
                self.send_header("Content-Length", str(length))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(exchange.content)

        self._server = http.server.ThreadingHTTPServer((HOST, 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        endpoint = f"http://{HOST}:{self._server.server_port}"
        self.storage_options = storage_options_for(endpoint, server.key, server.secret, server.region)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _ask(port: int, exchange: Exchange) -> None:
    connection = http.client.HTTPConnection(HOST, port)
    fields = {name: value for name, value in exchange.request.items() if name not in {"connection", "expect"}}
    connection.request(exchange.method, exchange.target, body=exchange.body or None, headers=fields)
    response = connection.getresponse()
    exchange.status = response.status
    exchange.answer = dict(response.headers.items())
    exchange.content = response.read()
    connection.close()
