"""Gives out tokens on this machine, as the clouds' OAuth servers do. Nothing here needs pytest."""

from __future__ import annotations

import http.server
import json
import ssl
import threading
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import parse_qsl

from torchferry.testing.servers import HOST

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["TokenServer"]


class TokenServer(ABC):
    """An OAuth server, running in a thread of its own while its ``with`` block lasts.

    Args:
        certificate: The files with its certificate and its key, to speak TLS.

    Attributes:
        port: Its port on 127.0.0.1.
    """

    def __init__(self, certificate: tuple[Path, Path] | None = None) -> None:
        answer = self.answer

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                form = dict(parse_qsl(self.rfile.read(int(self.headers["Content-Length"])).decode()))
                status, fields = answer(self.path, **form)
                content = json.dumps(fields).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: object) -> None:
                """Nothing."""

        self._server = http.server.ThreadingHTTPServer((HOST, 0), Handler)
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever)

    @abstractmethod
    def answer(self, path: str, **form: str) -> tuple[int, dict[str, Any]]:
        """The status and the fields of the answer to a form that was sent to ``path``."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
