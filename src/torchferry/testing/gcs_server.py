"""A server that answers as Google Cloud Storage does, as far as a client that moves checkpoints asks it.

No server that runs on one machine has Google's XML multipart uploads. This one has, and the JSON API for the same
objects: generations that change with each write, preconditions, and CRC32C and MD5 that uploads are checked against. It
asks for no credentials; :class:`torchferry.testing.gcs.TokenProxy` does.

Run as a program (``python gcs_server.py --port 8000 --directory DIRECTORY``); imports nothing of torchferry. What
Google does is documented at https://cloud.google.com/storage/docs/ (xml-api, json_api); objects have no older versions.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import http.client
import itertools
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import parse_qsl, quote, unquote, urlsplit
from xml.etree import ElementTree as ET
from xml.sax.saxutils import escape

import google_crc32c

__all__: list[str] = []

SMALLEST_PART = 5 << 20
MOST_PARTS = 10_000
_PIECE = 1 << 20
_REWRITTEN = 1 << 20  # bytes that a rewrite copies at the first request
_NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"
_META = "x-goog-meta-"


class Refusal(Exception):  # noqa: N818 - an answer
    """The answer to a request that cannot be fulfilled.

    Args:
        status: Its HTTP status.
        code: What the XML API calls it.
        message: What is wrong, in words.
        reason: What the JSON API calls it.
    """

    def __init__(self, status: int, code: str, message: str, reason: str = "invalid") -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.reason = status, code, message, reason


@dataclass(frozen=True, slots=True)
class Body:
    """Bytes that were received, in a file."""

    path: Path
    size: int
    crc32c: int
    md5: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Object:
    """One object: its bytes are those of its bodies, one after the other."""

    bucket: str
    name: str
    bodies: tuple[Body, ...]
    crc32c: str
    md5: str | None
    generation: int
    metadata: Mapping[str, str]
    content_type: str
    updated: datetime

    @property
    def size(self) -> int:
        return sum(body.size for body in self.bodies)

    @property
    def etag(self) -> str:
        """As the XML API gives it: the MD5, where there is one."""
        return base64.b64decode(self.md5).hex() if self.md5 else f"-{self.generation:x}"


@dataclass(slots=True)
class Upload:
    """An upload under way: of parts (XML) or resumable (JSON), whose one part grows."""

    id: str
    bucket: str
    name: str
    metadata: Mapping[str, str]
    content_type: str
    declared: Mapping[str, str] = field(default_factory=dict)
    parts: dict[int, Body] = field(default_factory=dict)
    started: datetime = field(default_factory=lambda: datetime.now(UTC))


class Store:
    """All buckets, in memory; what they hold, in files of one directory."""

    def __init__(self, directory: Path) -> None:
        self.lock = threading.Lock()
        self.buckets: dict[str, dict[str, Object]] = {}
        self.uploads: dict[str, Upload] = {}
        self.resumable: dict[str, Upload] = {}
        self._directory = directory
        self._numbers = itertools.count()
        self._generation = 0

    def new_file(self) -> Path:
        return self._directory / f"{next(self._numbers)}"

    def new_id(self) -> str:
        return base64.urlsafe_b64encode(os.urandom(24)).decode()

    def bucket(self, name: str) -> dict[str, Object]:
        try:
            return self.buckets[name]
        except KeyError:
            raise Refusal(404, "NoSuchBucket", "The specified bucket does not exist.", "notFound") from None

    def object(self, bucket: str, name: str, generation: str | None = None) -> Object:
        found = self.bucket(bucket).get(name)
        if found is None or generation not in {None, str(found.generation)}:
            raise Refusal(404, "NoSuchKey", f"No such object: {bucket}/{name}", "notFound")
        return found

    def upload(self, upload_id: str, bucket: str, name: str) -> Upload:
        found = self.uploads.get(upload_id)
        if found is None or (found.bucket, found.name) != (bucket, name):
            raise Refusal(404, "NoSuchUpload", "The requested upload was not found.", "notFound")
        return found

    def publish(self, upload: Upload, bodies: tuple[Body, ...], if_generation: str | None) -> Object:
        """Puts an object in place of what has its name.

        Args:
            upload: Its name and metadata.
            bodies: Its bytes.
            if_generation: The generation that it may replace, "0" for none; None: any.
        """
        crc32c = _crc32c_of(bodies)
        md5 = bodies[0].md5 if len(bodies) == 1 else None
        with self.lock:
            objects = self.bucket(upload.bucket)
            old = objects.get(upload.name)
            if if_generation is not None and if_generation != str(old.generation if old else 0):
                message = "At least one of the pre-conditions you specified did not hold."
                raise Refusal(412, "PreconditionFailed", message, "conditionNotMet")
            self._generation = max(self._generation + 1, time.time_ns() // 1000)
            objects[upload.name] = new = Object(
                bucket=upload.bucket,
                name=upload.name,
                bodies=bodies,
                crc32c=crc32c,
                md5=base64.b64encode(md5).decode() if md5 else None,
                generation=self._generation,
                metadata=upload.metadata,
                content_type=upload.content_type,
                updated=datetime.now(UTC),
            )
        if old:
            _remove(old.bodies)
        return new

    def delete(self, bucket: str, name: str, generation: str | None, if_generation: str | None) -> None:
        with self.lock:
            found = self.object(bucket, name, generation)
            if if_generation not in {None, str(found.generation)}:
                raise Refusal(412, "PreconditionFailed", "The generation is another.", "conditionNotMet")
            del self.buckets[bucket][name]
        _remove(found.bodies)


_NOT_ALLOWED = Refusal(405, "MethodNotAllowed", "The specified method is not allowed against this resource.")


class Handler(BaseHTTPRequestHandler):
    """Answers one request after another on one connection."""

    protocol_version = "HTTP/1.1"
    server_version = "UploadServer"
    disable_nagle_algorithm = True
    store: Store

    def _handle(self) -> None:
        parts = urlsplit(self.path)
        self.query = dict(parse_qsl(parts.query, keep_blank_values=True))
        steps = parts.path.split("/")[1:]
        self.received: Body | None = None
        if steps[0] in {"upload", "download"}:
            steps = steps[1:]
        json_api = steps[:2] == ["storage", "v1"]
        try:
            self.received = self._receive(with_md5="partNumber" not in self.query)
            if json_api:
                self._json(*map(unquote, steps[2:]))
            else:
                self._xml(unquote(steps[0]), unquote("/".join(steps[1:])))
        except Refusal as refusal:
            self._refuse(refusal, json_api=json_api)
        except ConnectionError:  # nobody is there for the answer
            self.close_connection = True
        finally:
            if self.received:
                _remove([self.received])

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PATCH = _handle  # noqa: N815 - http.server's names

    # --- the XML API

    def _xml(self, bucket: str, name: str) -> None:
        if not name:
            self._xml_bucket(bucket)
        elif "uploadId" in self.query:
            self._xml_upload(bucket, name)
        else:
            self._xml_object(bucket, name)

    def _xml_bucket(self, bucket: str) -> None:
        if self.command == "PUT":
            with self.store.lock:
                self.store.buckets.setdefault(bucket, {})
            self._answer(200)
            return
        self.store.bucket(bucket)
        if self.command == "HEAD":
            self._answer(200)
        elif self.command != "GET":
            raise _NOT_ALLOWED
        elif "uploads" in self.query:
            self._list_uploads(bucket)
        else:
            self._list_xml(bucket)

    def _xml_object(self, bucket: str, name: str) -> None:
        generation, if_generation = self.query.get("generation"), self.headers.get("x-goog-if-generation-match")
        match self.command:
            case "GET" | "HEAD":
                self._send(self.store.object(bucket, name, generation))
            case "PUT":
                self._check_digests()
                upload = Upload("", bucket, name, *self._described())
                new = self.store.publish(upload, (self._taken(),), if_generation)
                self._answer(200, b"", _headers_of(new))
            case "POST" if "uploads" in self.query:
                self.store.bucket(bucket)
                upload = Upload(self.store.new_id(), bucket, name, *self._described())
                self.store.uploads[upload.id] = upload
                fields = {"Bucket": bucket, "Key": name, "UploadId": upload.id}
                self._answer(200, _xml("InitiateMultipartUploadResult", _elements(fields)))
            case "DELETE":
                self.store.delete(bucket, name, generation, if_generation)
                self._answer(204)
            case _:
                raise _NOT_ALLOWED

    def _xml_upload(self, bucket: str, name: str) -> None:
        upload = self.store.upload(self.query["uploadId"], bucket, name)
        match self.command:
            case "PUT":
                self._put_part(upload)
            case "POST":
                self._complete(upload)
            case "GET":
                self._list_parts(upload)
            case "DELETE":
                with self.store.lock:
                    del self.store.uploads[self.store.upload(upload.id, bucket, name).id]
                _remove(upload.parts.values())
                self._answer(204)
            case _:
                raise _NOT_ALLOWED

    def _put_part(self, upload: Upload) -> None:
        self._check_digests()
        number = int(self.query["partNumber"])
        if not 1 <= number <= MOST_PARTS:
            raise Refusal(400, "InvalidArgument", f"Part number must be an integer between 1 and {MOST_PARTS}.")
        with self.store.lock:
            self.store.upload(upload.id, upload.bucket, upload.name)  # it may have been completed or aborted meanwhile
            replaced = upload.parts.get(number)
            upload.parts[number] = part = self._taken()
        _remove([replaced] if replaced else [])
        self._answer(200, b"", [("ETag", _part_etag(part)), ("x-goog-hash", f"crc32c={_base64(part.crc32c)}")])

    def _complete(self, upload: Upload) -> None:
        parts = _asked_for(self._text(), upload)
        with self.store.lock:
            del self.store.uploads[self.store.upload(upload.id, upload.bucket, upload.name).id]
        try:
            new = self.store.publish(upload, parts, self.headers.get("x-goog-if-generation-match"))
        except Refusal:
            self.store.uploads[upload.id] = upload
            raise
        _remove(part for part in upload.parts.values() if part not in parts)
        place = f"http://{self._host}/{new.bucket}/{quote(new.name)}"
        fields = {"Location": place, "Bucket": new.bucket, "Key": new.name}
        document = _xml("CompleteMultipartUploadResult", _elements({**fields, "ETag": f'"{new.etag}"'}))
        self._answer(200, document, [h for h in _headers_of(new) if h[0] != "ETag"])

    def _list_uploads(self, bucket: str) -> None:
        prefix, most = self.query.get("prefix", ""), int(self.query.get("max-uploads", 1000))
        marker = (self.query.get("key-marker", ""), self.query.get("upload-id-marker", "\U0010ffff"))
        with self.store.lock:
            uploads = [u for u in self.store.uploads.values() if u.bucket == bucket and u.name.startswith(prefix)]
        uploads = sorted((u for u in uploads if (u.name, u.id) > marker), key=lambda u: (u.name, u.id))
        page = uploads[:most]
        fields = {
            "Bucket": bucket,
            "Prefix": prefix,
            "MaxUploads": most,
            "IsTruncated": _bool(len(page) < len(uploads)),
        }
        if page:
            fields |= {"NextKeyMarker": page[-1].name, "NextUploadIdMarker": page[-1].id}
        entries = [{"Key": u.name, "UploadId": u.id, "Initiated": _time(u.started)} for u in page]
        document = _elements(fields) + "".join(f"<Upload>{_elements(entry)}</Upload>" for entry in entries)
        self._answer(200, _xml("ListMultipartUploadsResult", document))

    def _list_parts(self, upload: Upload) -> None:
        most, marker = int(self.query.get("max-parts", 1000)), int(self.query.get("part-number-marker", 0))
        parts = sorted((number, part) for number, part in list(upload.parts.items()) if number > marker)
        page = parts[:most]
        fields: dict[str, object] = {"Bucket": upload.bucket, "Key": upload.name, "UploadId": upload.id}
        fields |= {"IsTruncated": _bool(len(page) < len(parts)), "NextPartNumberMarker": page[-1][0] if page else 0}
        entries = [
            {"PartNumber": n, "ETag": _part_etag(p), "Size": p.size, "LastModified": _time(upload.started)}
            for n, p in page
        ]
        document = _elements(fields) + "".join(f"<Part>{_elements(entry)}</Part>" for entry in entries)
        self._answer(200, _xml("ListPartsResult", document))

    def _list_xml(self, bucket: str) -> None:
        most, after = int(self.query.get("max-keys", 1000)), self.query.get("continuation-token", "")
        objects, prefixes, token = self._page(bucket, after, most)
        fields: dict[str, Any] = {"Name": bucket, "Prefix": self.query.get("prefix", ""), "MaxKeys": most}
        fields |= {"KeyCount": len(objects) + len(prefixes), "IsTruncated": _bool(bool(token))}
        fields |= {"NextContinuationToken": token} if token else {}
        document = _elements(fields)
        for o in objects:
            entry = {"Key": o.name, "Generation": o.generation, "LastModified": _time(o.updated), "Size": o.size}
            document += f"<Contents>{_elements(entry)}<ETag>&quot;{o.etag}&quot;</ETag></Contents>"
        document += "".join(f"<CommonPrefixes>{_elements({'Prefix': p})}</CommonPrefixes>" for p in prefixes)
        self._answer(200, _xml("ListBucketResult", document))

    # --- the JSON API

    def _json(self, *steps: str) -> None:
        match self.command, steps:
            case "POST", ["b"]:
                name = json.loads(self._text())["name"]
                with self.store.lock:
                    self.store.buckets.setdefault(name, {})
                self._answer_json(_bucket(name))
            case "GET", ["b"]:
                self._answer_json({"kind": "storage#buckets", "items": [_bucket(name) for name in self.store.buckets]})
            case "GET", ["b", bucket]:
                self.store.bucket(bucket)
                self._answer_json(_bucket(bucket))
            case "GET", ["b", bucket, "o"]:
                self._list_json(bucket)
            case _, ["b", bucket, "o"]:
                self.store.bucket(bucket)
                self._json_upload(bucket)
            case "POST", ["b", bucket, "o", name, "rewriteTo", "b", target, "o", new_name]:
                self._rewrite(self.store.object(bucket, name, self.query.get("sourceGeneration")), target, new_name)
            case _, ["b", bucket, "o", name]:
                self._json_object(bucket, name)
            case _:
                raise self._not_implemented()

    def _list_json(self, bucket: str) -> None:
        most, after = int(self.query.get("maxResults", 1000)), self.query.get("pageToken", "")
        objects, prefixes, token = self._page(bucket, after, most)
        page = {"items": [_resource(o) for o in objects], "prefixes": prefixes, "nextPageToken": token}
        self._answer_json({"kind": "storage#objects", **{name: value for name, value in page.items() if value}})

    def _json_object(self, bucket: str, name: str) -> None:
        generation = self.query.get("generation")
        if self.command == "DELETE":
            self.store.delete(bucket, name, generation, self.query.get("ifGenerationMatch"))
            self._answer(204)
        elif self.command not in {"GET", "HEAD"}:
            raise self._not_implemented()
        elif self.query.get("alt") == "media":
            self._send(self.store.object(bucket, name, generation))
        else:
            self._answer_json(_resource(self.store.object(bucket, name, generation)))

    def _rewrite(self, found: Object, bucket: str, name: str) -> None:
        """Copies an object; a large one when it is asked for the second time."""
        size = str(found.size)
        if found.size > _REWRITTEN and "rewriteToken" not in self.query:
            token = {"done": False, "rewriteToken": self.store.new_id(), "totalBytesRewritten": "0"}
            self._answer_json({"kind": "storage#rewriteResponse", "objectSize": size, **token})
            return
        bodies = tuple(replace(body, path=self.store.new_file()) for body in found.bodies)
        for body, old in zip(bodies, found.bodies, strict=True):
            body.path.hardlink_to(old.path)
        upload = Upload("", bucket, name, found.metadata, found.content_type)
        new = _resource(self.store.publish(upload, bodies, self.query.get("ifGenerationMatch")))
        done = {"done": True, "totalBytesRewritten": size, "resource": new}
        self._answer_json({"kind": "storage#rewriteResponse", "objectSize": size, **done})

    def _json_upload(self, bucket: str) -> None:
        match self.command, self.query.get("uploadType"):
            case "PUT" | "POST" | "DELETE", _ if "upload_id" in self.query:
                self._go_on_resumable()
            case "POST", "media":
                self._insert(Upload("", bucket, self.query["name"], {}, self._content_type), self._taken())
            case "POST", "multipart":
                self._insert(*self._related(bucket))
            case "POST", "resumable":
                self._start_resumable(bucket)
            case _:
                raise self._not_implemented()

    def _not_implemented(self) -> Refusal:
        return Refusal(501, "NotImplemented", f"{self.command} {self.path} is not implemented.", "notImplemented")

    def _insert(self, upload: Upload, body: Body) -> None:
        """Makes an object of an upload whose declared checksums hold."""
        digests = {"crc32c": _base64(body.crc32c), "md5Hash": base64.b64encode(body.md5 or b"").decode()}
        for name, called in (("crc32c", "CRC32C"), ("md5Hash", "MD5 hash")):
            if (given := upload.declared.get(name)) and given != digests[name]:
                _remove([body])
                message = f'Provided {called} "{given}" doesn\'t match calculated {called} "{digests[name]}".'
                raise Refusal(400, "BadDigest", message)
        self._answer_json(_resource(self.store.publish(upload, (body,), self.query.get("ifGenerationMatch"))))

    def _described_by(self, bucket: str, resource: Mapping[str, Any], content_type: str) -> Upload:
        name = resource.get("name") or self.query["name"]
        declared = {key: resource[key] for key in ("crc32c", "md5Hash") if key in resource}
        metadata = resource.get("metadata") or {}
        return Upload("", bucket, name, metadata, resource.get("contentType", content_type), declared)

    def _related(self, bucket: str) -> tuple[Upload, Body]:
        """The resource and the bytes that a body of ``multipart/related`` holds."""
        boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])
        assert boundary
        assert self.received
        whole = self.received.path.read_bytes()
        _, resource, media = whole.split(b"--" + boundary[1].encode(), 2)
        media = media[: media.rindex(b"--" + boundary[1].encode() + b"--")]
        _, resource = re.split(rb"\r?\n\r?\n", resource, maxsplit=1)
        head, data = re.split(rb"\r?\n\r?\n", media, maxsplit=1)
        data = data.removesuffix(b"\n").removesuffix(b"\r")
        kind = re.search(rb"(?i)content-type:\s*(\S+)", head)
        upload = self._described_by(bucket, json.loads(resource), kind[1].decode() if kind else "")
        path = self.store.new_file()
        path.write_bytes(data)
        return upload, Body(path, len(data), google_crc32c.value(data), hashlib.md5(data).digest())  # noqa: S324

    def _start_resumable(self, bucket: str) -> None:
        resource = json.loads(self._text() or "{}")
        upload = self._described_by(bucket, resource, self.headers.get("X-Upload-Content-Type", ""))
        upload.id = self.store.new_id()
        self.store.resumable[upload.id] = upload
        place = f"http://{self._host}{urlsplit(self.path).path}?uploadType=resumable&upload_id={upload.id}"
        if "ifGenerationMatch" in self.query:
            place += f"&ifGenerationMatch={self.query['ifGenerationMatch']}"
        self._answer(200, b"", [("Location", place), ("X-GUploader-UploadID", upload.id)])

    def _go_on_resumable(self) -> None:
        upload = self.store.resumable.get(self.query["upload_id"])
        if upload is None:
            raise Refusal(404, "NoSuchUpload", "No such upload.", "notFound")
        if self.command == "DELETE":
            del self.store.resumable[upload.id]
            _remove(upload.parts.values())
            self._answer(499)
            return
        stored = upload.parts.get(0) or Body(self.store.new_file(), 0, 0)
        stored.path.touch()
        content_range = self.headers.get("Content-Range", f"bytes 0-{self._taken_size - 1}/{self._taken_size}")
        parsed = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", content_range)
        if parsed is None or (parsed[1] and int(parsed[1]) != stored.size):
            raise Refusal(400, "InvalidArgument", f"Content-Range {content_range} does not follow {stored.size} bytes.")
        assert self.received
        with stored.path.open("ab") as file, self.received.path.open("rb") as new:
            shutil.copyfileobj(new, file, _PIECE)
        stored = upload.parts[0] = Body(stored.path, stored.size + self.received.size, 0)
        if parsed[2] == str(stored.size):
            del self.store.resumable[upload.id]
            self._insert(upload, _summed(stored))
        else:
            self._answer(308, b"", [("Range", f"bytes=0-{stored.size - 1}")] if stored.size else [])

    # --- what both have

    def _page(self, bucket: str, after: str, most: int) -> tuple[list[Object], list[str], str]:
        """A page of a listing: objects, common prefixes, and what the next page comes after ("" at the end)."""
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter")
        with self.store.lock:
            objects = sorted(self.store.bucket(bucket).values(), key=lambda o: o.name)
        found: dict[str, Object | None] = {}
        for o in objects:
            if o.name.startswith(prefix):
                head, mark, _ = o.name[len(prefix) :].partition(delimiter) if delimiter else (o.name, "", "")
                found.setdefault(prefix + head + mark if mark else o.name, None if mark else o)
        names = sorted(name for name in found if name > after)
        page = names[:most]
        listed = [entry for name in page if (entry := found[name])]
        return listed, [name for name in page if not found[name]], page[-1] if len(page) < len(names) else ""

    def _send(self, found: Object) -> None:
        """Answers with an object, or with the range of it that is asked for."""
        if (etag := self.headers.get("If-Match")) and etag.strip('"') not in {found.etag, "*"}:
            raise Refusal(412, "PreconditionFailed", "The ETag is another.", "conditionNotMet")
        start, stop, status = 0, found.size, 200
        headers = [*_headers_of(found), ("Accept-Ranges", "bytes"), ("Content-Type", found.content_type)]
        if asked := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            start = int(asked[1]) if asked[1] else max(0, found.size - int(asked[2]))
            stop = min(found.size, int(asked[2]) + 1) if asked[1] and asked[2] else found.size
            if start >= found.size:
                raise Refusal(416, "InvalidRange", "The requested range cannot be satisfied.")
            status = 206
            headers.append(("Content-Range", f"bytes {start}-{stop - 1}/{found.size}"))
        headers += [(_META + name, value.encode().decode("latin-1")) for name, value in found.metadata.items()]
        with suppress(FileNotFoundError):  # replaced just now: the connection ends too early
            files = [body.path.open("rb") for body in found.bodies]
            self._head(status, stop - start, headers)
            if self.command != "HEAD":
                for body, file in zip(found.bodies, files, strict=True):
                    with file:
                        if start < body.size and stop > 0:
                            self._send_file(file.fileno(), max(start, 0), min(stop, body.size))
                    start, stop = start - body.size, stop - body.size
            for file in files:
                file.close()
            return
        self.close_connection = True

    def _send_file(self, source: int, start: int, stop: int) -> None:
        self.wfile.flush()
        while start < stop:
            start += os.sendfile(self.connection.fileno(), source, start, stop - start)

    def _receive(self, *, with_md5: bool) -> Body | None:
        """Receives the body of the request, if there is one, into a file."""
        pieces: Iterable[memoryview]
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            pieces = self._chunks()
        elif length := int(self.headers.get("Content-Length", 0)):
            pieces = self._pieces(length)
        else:
            pieces = []
        path, size, crc32c = self.store.new_file(), 0, 0
        md5 = hashlib.md5() if with_md5 else None  # noqa: S324 - what Google has
        try:
            with path.open("wb", buffering=0) as file:
                for piece in pieces:
                    file.write(piece)
                    size += len(piece)
                    crc32c = google_crc32c.extend(crc32c, bytes(piece))
                    if md5:
                        md5.update(piece)
        except BaseException:
            path.unlink()
            raise
        return Body(path, size, crc32c, md5.digest() if md5 else None)

    def _pieces(self, length: int) -> Iterable[memoryview]:
        buffer = memoryview(bytearray(min(length, _PIECE)))
        while length:
            count = self.rfile.readinto1(buffer[:length])
            if not count:
                raise ConnectionResetError
            yield buffer[:count]
            length -= count

    def _chunks(self) -> Iterable[memoryview]:
        while size := int(self.rfile.readline().split(b";")[0] or b"x", 16):
            yield memoryview(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline() not in {b"\r\n", b""}:
            pass

    @property
    def _taken_size(self) -> int:
        return self.received.size if self.received else 0

    def _taken(self) -> Body:
        """The body of the request, which stays when the request is over."""
        assert self.received
        body, self.received = self.received, None
        return body

    def _text(self) -> str:
        assert self.received
        return self.received.path.read_text()

    @property
    def _host(self) -> str:
        return self.headers.get("X-Forwarded-Host") or self.headers.get("Host") or ""

    @property
    def _content_type(self) -> str:
        return self.headers.get("Content-Type") or "binary/octet-stream"

    def _described(self) -> tuple[Mapping[str, str], str]:
        metadata = {
            name.lower().removeprefix(_META): value.encode("latin-1").decode("utf-8", "replace")
            for name, value in self.headers.items()
            if name.lower().startswith(_META)
        }
        return metadata, self._content_type

    def _check_digests(self) -> None:
        """Refuses a body that is not what ``x-goog-hash`` or ``Content-MD5`` says."""
        assert self.received
        given = ",".join(self.headers.get_all("x-goog-hash", [])).replace(" ", "").split(",")
        expected = dict(digest.split("=", 1) for digest in given if digest)
        if md5 := self.headers.get("Content-MD5"):
            expected["md5"] = md5
        if expected.keys() - {"crc32c", "md5"}:
            raise Refusal(400, "InvalidDigest", "The Content-MD5 or checksum value that you specified is not valid.")
        calculated = {"crc32c": _base64(self.received.crc32c)}
        if "md5" in expected:
            found = self.received.md5 or hashlib.md5(self.received.path.read_bytes()).digest()  # noqa: S324
            calculated["md5"] = base64.b64encode(found).decode()
        for name, value in expected.items():
            if value != calculated[name]:
                message = f"The {name.upper()} you specified did not match what we computed: {calculated[name]}."
                raise Refusal(400, "BadDigest", message)

    def _refuse(self, refusal: Refusal, *, json_api: bool) -> None:
        if json_api:
            details = {"message": refusal.message, "domain": "global", "reason": refusal.reason}
            error = {"code": refusal.status, "message": refusal.message, "errors": [details]}
            self._answer_json({"error": error}, refusal.status)
        else:
            fields = _elements({"Code": refusal.code, "Message": refusal.message})
            document = f"<?xml version='1.0' encoding='UTF-8'?><Error>{fields}</Error>".encode()
            self._answer(refusal.status, document)

    def _answer_json(self, resource: Mapping[str, Any], status: int = 200) -> None:
        self._answer(status, json.dumps(resource).encode(), [("Content-Type", "application/json; charset=UTF-8")])

    def _answer(self, status: int, content: bytes = b"", headers: Iterable[tuple[str, str]] = ()) -> None:
        headers = list(headers)
        if content and not any(name == "Content-Type" for name, _ in headers):
            headers.append(("Content-Type", "application/xml; charset=UTF-8"))
        self._head(status, len(content), headers)
        if self.command != "HEAD":
            self.wfile.write(content)

    def _head(self, status: int, length: int, headers: Iterable[tuple[str, str]]) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        if status not in {204, 304}:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Nothing: the proxies in front of it keep a log."""


class Server(ThreadingHTTPServer):
    """A thread for each connection."""

    daemon_threads = True
    request_queue_size = 512

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are no errors."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def _asked_for(document: str, upload: Upload) -> tuple[Body, ...]:
    """The parts that a request to complete names."""
    try:
        elements = [e for e in ET.fromstring(document) if e.tag.rpartition("}")[2] == "Part"]  # noqa: S314 - a test's own
        wanted = [{child.tag.rpartition("}")[2]: child.text or "" for child in e} for e in elements]
        numbers = [int(part["PartNumber"]) for part in wanted]
    except (ET.ParseError, KeyError, ValueError):
        wanted, numbers = [], []
    if not numbers:
        raise Refusal(400, "MalformedCompleteMultipartUploadRequest", "The list of parts is missing or malformed.")
    if sorted(set(numbers)) != numbers:
        raise Refusal(400, "InvalidPartOrder", "The list of parts was not in ascending order.")
    parts = []
    for number, part in zip(numbers, wanted, strict=True):
        found = upload.parts.get(number)
        if found is None or part.get("ETag", "").strip('"') != _part_etag(found).strip('"'):
            raise Refusal(400, "InvalidPart", f"Part {number} could not be found, or its ETag is another.")
        parts.append(found)
    if any(part.size < SMALLEST_PART for part in parts[:-1]):
        raise Refusal(400, "EntityTooSmall", "Your proposed upload is smaller than the minimum object size allowed.")
    return tuple(parts)


def _summed(body: Body) -> Body:
    data = body.path.read_bytes()
    return Body(body.path, body.size, google_crc32c.value(data), hashlib.md5(data).digest())  # noqa: S324


def _crc32c_of(bodies: tuple[Body, ...]) -> str:
    if len(bodies) == 1:
        return _base64(bodies[0].crc32c)
    crc32c = 0
    for body in bodies:
        with body.path.open("rb", buffering=0) as file:
            while piece := file.read(_PIECE):
                crc32c = google_crc32c.extend(crc32c, bytes(piece))
    return _base64(crc32c)


def _remove(bodies: Iterable[Body]) -> None:
    for body in bodies:
        body.path.unlink(missing_ok=True)


def _part_etag(part: Body) -> str:
    return f'"{part.crc32c:08x}{part.size:x}"'


def _headers_of(found: Object) -> list[tuple[str, str]]:
    """What each answer about an object says of it."""
    hashes = [("x-goog-hash", f"crc32c={found.crc32c}")] + ([("x-goog-hash", f"md5={found.md5}")] if found.md5 else [])
    return [
        ("ETag", f'"{found.etag}"'),
        ("Last-Modified", format_datetime(found.updated, usegmt=True)),
        ("x-goog-generation", str(found.generation)),
        ("x-goog-metageneration", "1"),
        ("x-goog-stored-content-length", str(found.size)),
        *hashes,
    ]


def _resource(found: Object) -> dict[str, Any]:
    """An object as the JSON API describes it."""
    fields = {
        "kind": "storage#object",
        "id": f"{found.bucket}/{found.name}/{found.generation}",
        "name": found.name,
        "bucket": found.bucket,
        "generation": str(found.generation),
        "metageneration": "1",
        "contentType": found.content_type,
        "size": str(found.size),
        "crc32c": found.crc32c,
        "md5Hash": found.md5,
        "etag": base64.b64encode(str(found.generation).encode()).decode(),
        "metadata": dict(found.metadata),
        "timeCreated": _time(found.updated),
        "updated": _time(found.updated),
        "storageClass": "STANDARD",
        "componentCount": len(found.bodies) if len(found.bodies) > 1 else None,
    }
    return {name: value for name, value in fields.items() if value not in (None, {})}


def _bucket(name: str) -> dict[str, Any]:
    return {"kind": "storage#bucket", "id": name, "name": name, "location": "US", "storageClass": "STANDARD"}


def _base64(crc32c: int) -> str:
    return base64.b64encode(crc32c.to_bytes(4, "big")).decode()


def _elements(fields: Mapping[str, object]) -> str:
    return "".join(f"<{name}>{escape(str(value))}</{name}>" for name, value in fields.items())


def _xml(root: str, content: str) -> bytes:
    return f"<?xml version='1.0' encoding='UTF-8'?><{root} xmlns='{_NAMESPACE}'>{content}</{root}>".encode()


def _bool(value: bool) -> str:
    return "true" if value else "false"


def _time(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def main() -> NoReturn:
    """Serves until it is killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--directory", type=Path, required=True, help="an empty directory for what is stored")
    chosen = parser.parse_args()
    http.client._MAXHEADERS = 1000  # type: ignore[attr-defined]  # noqa: SLF001 - metadata may have more than 100
    Handler.store = Store(chosen.directory)
    with Server(("127.0.0.1", chosen.port), Handler) as server:
        server.serve_forever()
    raise SystemExit


if __name__ == "__main__":
    main()
