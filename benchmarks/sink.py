"""Takes what is sent to it over HTTP, and drops it: ``python benchmarks/sink.py`` prints its port on 127.0.0.1."""

from __future__ import annotations

import http.server
import threading
from typing import Any

_PIECE = 1 << 20


class Handler(http.server.BaseHTTPRequestHandler):
    """Takes a PUT to its last byte, and keeps its length."""

    protocol_version = "HTTP/1.1"
    buffer = threading.local()
    received = 0

    def do_PUT(self) -> None:
        view = memoryview(bytearray(_PIECE))
        left = int(self.headers["Content-Length"])
        while left:
            count = self.rfile.readinto(view[: min(left, _PIECE)])  # type: ignore[attr-defined]  # it is a BufferedReader
            if not count:
                return
            left -= count
            Handler.received += count
        self._answer(b"")

    def do_GET(self) -> None:
        self._answer(str(Handler.received).encode())

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main() -> None:
    """Serves until it is killed."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
