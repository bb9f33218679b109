"""Shelf, an object store over HTTP, in the standard library: files in one directory, names in memory.

A name is what follows ``/objects/`` or ``/uploads/``, percent-encoded. Every request has the header
``Authorization: Token <token>``; errors are JSON: ``{"code": "NoSuchObject"}``.

====================================== ======================================================================
``HEAD``, ``GET /objects/NAME``        an object; honours ``Range`` and ``If-Match``
``PUT /objects/NAME``                  stores an object with one request
``DELETE /objects/NAME``               deletes it
``PUT /uploads/NAME?id=ID``            opens an upload; the client chooses the id
``PUT /uploads/NAME?id=ID&part=N``     stores a part, from 0; replaces one of the same number
``POST /uploads/NAME?id=ID&parts=N``   publishes the parts as an object; the same request again gives the same answer
``DELETE /uploads/NAME?id=ID``         removes an upload with its parts
``GET /objects?prefix=P&after=NAME``   lists at most 1,000 objects whose names follow ``after``
``GET /uploads?prefix=P``              lists uploads that are not published
====================================== ======================================================================

A body is checked against the header ``X-Shelf-Crc32`` (8 hexadecimal digits), if there is one. Metadata is a JSON
object in ``X-Shelf-Metadata``, which comes with what stores an object or opens an upload.
"""

from __future__ import annotations

import json
import secrets
import threading
import zlib
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

__all__ = ["Shelf"]

PAGE = 1000
PIECE = 1 << 20


@dataclass
class Stored:
    """An object, or an upload: parts in files, in order."""

    metadata: str
    parts: dict[int, Path] = field(default_factory=dict)
    etag: str = field(default_factory=lambda: f'"{secrets.token_hex(8)}"')
    modified: str = field(default_factory=lambda: datetime.now(UTC).isoformat())

    @property
    def size(self) -> int:
        return sum(part.stat().st_size for part in self.parts.values())

    def remove(self) -> None:
        for part in self.parts.values():
            part.unlink()


class Refused(Exception):  # noqa: N818 - an answer
    """An answer with an error."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.status = status


class Shelf(ThreadingHTTPServer):
    """The server, on a port of 127.0.0.1, in a thread while in its ``with`` block.

    Args:
        directory: Where the files go.
        token: What clients must show.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, directory: Path, token: str = "") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.directory = directory
        self.token = token
        self.lock = threading.Lock()
        self.objects: dict[str, Stored] = {}
        self.uploads: dict[tuple[str, str], Stored] = {}
        self.published: dict[tuple[str, str], Stored] = {}
        self._thread = threading.Thread(target=self.serve_forever)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()

    def put(self, name: str, stored: Stored) -> Stored:
        """Publishes an object in place of what there is; the caller holds the lock."""
        if old := self.objects.get(name):
            old.remove()
        self.objects[name] = stored
        return stored


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1
    server: Shelf

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:  # the client has gone
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass

    def do_any(self) -> None:
        body = self.receive()
        try:
            self.serve(body)
        except Refused as refused:
            self.answer(refused.status, {"code": str(refused)})
        finally:
            if body:
                body.path.unlink(missing_ok=True)

    def serve(self, body: Body | None) -> None:
        if self.headers.get("Authorization") != f"Token {self.server.token}":
            raise Refused(403, "WrongToken")
        if body and self.headers.get("X-Shelf-Crc32", body.crc32) != body.crc32:
            raise Refused(400, "BadChecksum")
        url = urlsplit(self.path)
        kind, _, name = unquote(url.path).removeprefix("/").partition("/")
        query = {key: values[-1] for key, values in parse_qs(url.query, keep_blank_values=True).items()}
        getattr(self, f"{self.command}_{kind}".lower())(name, query, body)

    do_HEAD = do_GET = do_PUT = do_POST = do_DELETE = do_any  # noqa: N815 - http.server's names

    # --- objects

    def get_objects(self, name: str, query: dict[str, str], _: Any) -> None:
        if not name:
            with self.server.lock:
                names = sorted(each for each in self.server.objects if each.startswith(query["prefix"]))
                page = [each for each in names if each > query.get("after", "")][:PAGE]
                found = [{"name": each, **self.describe(self.server.objects[each])} for each in page]
            self.answer(200, found)
            return
        with self.server.lock:
            stored = self.find(name)
            files = [(part.open("rb"), part.stat().st_size) for _, part in sorted(stored.parts.items())]
            size = sum(length for _, length in files)
        try:
            if self.headers.get("If-Match", stored.etag) != stored.etag:
                raise Refused(412, "Replaced")
            start, stop, status = 0, size, 200
            if wanted := self.headers.get("Range"):
                first, last = wanted.removeprefix("bytes=").split("-")
                start, stop, status = int(first), min(int(last) + 1, size), 206
                if start >= size:
                    raise Refused(416, "BeyondTheEnd")
            self.send_response(status)
            self.send_header("Content-Length", str(stop - start))
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
            self.send_header("ETag", stored.etag)
            self.send_header("X-Shelf-Metadata", stored.metadata)
            self.end_headers()
            if self.command == "GET":
                self.send_files(files, start, stop)
        finally:
            for file, _ in files:
                file.close()

    head_objects = get_objects

    def put_objects(self, name: str, _: dict[str, str], body: Body) -> None:
        with self.server.lock:
            stored = self.server.put(name, Stored(self.metadata, {0: body.keep()}))
            self.answer(200, self.describe(stored))

    def delete_objects(self, name: str, *_: object) -> None:
        with self.server.lock:
            self.find(name).remove()
            del self.server.objects[name]
        self.answer(200, {})

    # --- uploads

    def get_uploads(self, _: str, query: dict[str, str], __: Any) -> None:
        with self.server.lock:
            found = [
                {"name": name, "id": upload_id, **self.describe(upload)}
                for (name, upload_id), upload in self.server.uploads.items()
                if name.startswith(query["prefix"])
            ]
        self.answer(200, found)

    def put_uploads(self, name: str, query: dict[str, str], body: Body) -> None:
        key = name, query["id"]
        with self.server.lock:
            if "part" not in query:
                self.server.uploads.setdefault(key, Stored(self.metadata))
            elif key not in self.server.uploads:
                raise Refused(404, "NoSuchUpload")
            else:
                self.server.uploads[key].parts[int(query["part"])] = body.keep()
        self.answer(200, {})

    def post_uploads(self, name: str, query: dict[str, str], _: Any) -> None:
        key = name, query["id"]
        with self.server.lock:
            if key not in self.server.published:
                upload = self.server.uploads.get(key)
                if upload is None or sorted(upload.parts) != list(range(int(query["parts"]))):
                    raise Refused(404, "NoSuchUpload")
                self.server.published[key] = self.server.put(name, self.server.uploads.pop(key))
            self.answer(200, {"etag": self.server.published[key].etag})

    def delete_uploads(self, name: str, query: dict[str, str], _: Any) -> None:
        with self.server.lock:
            upload = self.server.uploads.pop((name, query["id"]), None)
            if upload is None:
                raise Refused(404, "NoSuchUpload")
            upload.remove()
        self.answer(200, {})

    # --- what they share

    @property
    def metadata(self) -> str:
        return self.headers.get("X-Shelf-Metadata", "{}")

    def find(self, name: str) -> Stored:
        if name not in self.server.objects:
            raise Refused(404, "NoSuchObject")
        return self.server.objects[name]

    def describe(self, stored: Stored) -> dict[str, Any]:
        return {"size": stored.size, "etag": stored.etag, "modified": stored.modified}

    def receive(self) -> Body | None:
        """The body, in a file of its own; half of one ends the connection."""
        left = int(self.headers.get("Content-Length", 0))
        if self.command not in {"PUT", "POST"}:
            return None
        body = Body(self.server.directory / secrets.token_hex(16))
        with body.path.open("wb") as file:
            while left:
                piece = self.rfile.read(min(left, PIECE))
                if not piece:
                    break
                file.write(piece)
                body.crc = zlib.crc32(piece, body.crc)
                left -= len(piece)
        if left:
            body.path.unlink()
            raise ConnectionResetError
        return body

    def answer(self, status: int, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
        self.wfile.flush()

    def send_files(self, files: list[tuple[Any, int]], start: int, stop: int) -> None:
        for file, size in files:
            if start < size and stop > 0:
                file.seek(max(start, 0))
                left = min(stop, size) - max(start, 0)
                while left > 0 and (piece := file.read(min(left, PIECE))):
                    self.wfile.write(piece)
                    left -= len(piece)
            start -= size
            stop -= size


class Body:
    """The body of a request, in a file that goes with the request unless it is kept."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.crc = 0

    @property
    def crc32(self) -> str:
        return f"{self.crc:08x}"

    def keep(self) -> Path:
        kept = self.path.with_suffix(".part")
        self.path.rename(kept)
        return kept
