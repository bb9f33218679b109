from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import json
import socket
import subprocess
import sys
import textwrap
import uuid
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import anyio
import pytest
from aiobotocore.session import AioSession
from botocore.exceptions import ClientError
from s3fs import S3FileSystem

import torchferry
import torchferry_s3
from torchferry.engine.loops import run_on
from torchferry.errors import (
    CheckpointChangedError,
    StorageError,
    StoragePermissionError,
    StorageUnavailableError,
    UnsupportedOptionError,
)
from torchferry.storage import bridge
from torchferry.storage.base import MIB, Backend, ObjectStat, Plane
from torchferry.storage.registry import open_backend
from torchferry.testing import CloudConformance, StoreUnderTest
from torchferry.testing.conformance import READS, Reads, cancel_at_the_end, stream
from torchferry.testing.faultproxy import Fault
from torchferry.testing.servers import storage_options_for

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import FaultyS3

    from torchferry.testing.servers import S3Server

DATA = bytes(range(256)) * (12 * 4096)  # 12 MiB: three parts of 5 MiB
PLANES: tuple[Plane, ...] = ("fsspec", "obstore")


class S3Store(StoreUnderTest):
    keeps_metadata = True

    def __init__(self, client: Any, url: str, storage_options: dict[str, Any], plane: Plane) -> None:
        self.options = {"storage_options": storage_options, "plane": plane}
        self.backend, self._prefix = open_backend(url, **self.options)
        self._client = client

    def path(self, name: str) -> str:
        return f"{self._prefix}/{name}"

    def raw_write(self, path: str, data: bytes) -> None:
        self._client.put_object(**self._address(path), Body=data)

    def raw_read(self, path: str) -> bytes:
        data: bytes = self._client.get_object(**self._address(path))["Body"].read()
        return data

    def raw_exists(self, path: str) -> bool:
        bucket, _, key = path.partition("/")
        found = self._client.list_objects_v2(Bucket=bucket, Prefix=key)
        return any(entry["Key"] == key for entry in found.get("Contents", []))

    def leftovers(self) -> list[str]:
        bucket, _, prefix = self._prefix.partition("/")
        uploads = self._client.list_multipart_uploads(Bucket=bucket, Prefix=prefix)
        return [upload["Key"] for upload in uploads.get("Uploads", [])]

    def _address(self, path: str) -> dict[str, str]:
        bucket, _, key = path.partition("/")
        return {"Bucket": bucket, "Key": key}


class S3Conformance(CloudConformance):
    plane: Plane

    @pytest.fixture
    def store(self, s3_client: Any, s3_url: str, s3_storage_options: dict[str, Any]) -> S3Store:
        return S3Store(s3_client, s3_url, s3_storage_options, self.plane)

    @pytest.fixture
    def path_in_missing_container(self) -> str:
        return "ferry-nowhere/checkpoint.pt"

    @pytest.fixture
    def unauthorized(self, s3_url: str, s3_storage_options: dict[str, Any]) -> Backend:
        options = s3_storage_options | {"secret": "wrong"}
        return open_backend(s3_url, storage_options=options, plane=self.plane)[0]


class TestS3ThroughS3fs(S3Conformance):
    plane = "fsspec"


class TestS3ThroughObstore(S3Conformance):
    plane = "obstore"


# --- faults: what networks and stores do, through a proxy


@pytest.fixture(params=PLANES)
def plane(request: pytest.FixtureRequest) -> Plane:
    chosen: Plane = request.param
    return chosen


@pytest.fixture
def through(
    plane: Plane, s3_client: Any, s3_url: str, faulty_s3: Callable[..., FaultyS3]
) -> Callable[..., tuple[S3Store, FaultyS3]]:
    """Makes the store as seen through a proxy with these faults."""

    def make(*faults: Fault, **options: Any) -> tuple[S3Store, FaultyS3]:
        faulty = faulty_s3(*faults)
        return S3Store(s3_client, s3_url, faulty.storage_options | options, plane), faulty

    return make


Through: TypeAlias = "Callable[..., tuple[S3Store, FaultyS3]]"

SURVIVABLE_WRITES = {
    "upload not started at once": Fault(method="POST", target=r"\?uploads", status=503),
    "parts refused": Fault(method="PUT", target="partNumber=", status=503, times=3),
    "part answered with an internal error": Fault(
        method="PUT", target="partNumber=2", status=500, code="InternalError"
    ),
    "part reset in the middle": Fault(method="PUT", target="partNumber=2", reset_upload_after=MIB),
    "part stored but the reply lost": Fault(method="PUT", target="partNumber=3", lose_reply=True),
    "completion refused": Fault(method="POST", target="uploadId=", status=503),
    "completion done but the reply lost": Fault(method="POST", target="uploadId=", lose_reply=True),
}


@pytest.mark.parametrize("fault", SURVIVABLE_WRITES)
async def test_upload_survives(through: Through, fault: str) -> None:
    store, faulty = through(_fresh(SURVIVABLE_WRITES[fault]))
    path = store.path("checkpoint.pt")
    written = await store.write(path, stream(DATA, MIB), metadata={"step": "1"})
    assert store.raw_read(path) == DATA
    assert await store.stat(path) == written
    assert any(request.fault for request in faulty.proxy.log)
    assert store.leftovers() == []


@pytest.mark.parametrize(
    "fault",
    [
        Fault(method="PUT", status=503),
        Fault(method="PUT", reset_upload_after=100_000),
        Fault(method="PUT", lose_reply=True),
    ],
    ids=["refused", "reset", "reply lost"],
)
async def test_small_upload_survives(through: Through, fault: Fault) -> None:
    store, faulty = through(_fresh(fault))
    path = store.path("checkpoint.pt")
    await store.write(path, stream(DATA[:MIB], 4096))
    assert store.raw_read(path) == DATA[:MIB]
    assert faulty.proxy.log[0].fault


@pytest.mark.parametrize(
    "fault",
    [
        Fault(method="GET", status=503),
        Fault(method="GET", status=500, code="InternalError"),
        Fault(method="GET", reset_download_after=MIB),
        Fault(method="GET", reset_download_after=0),
        Fault(method="GET", truncate_after=MIB),
        Fault(method="GET", truncate_after=0),
        Fault(method="GET", lose_reply=True),
        Fault(method="GET", truncate_after=MIB, times=3),
    ],
    ids=[
        *("refused", "internal error", "reset", "reset at once", "truncated", "truncated at once", "reply lost"),
        "truncated three times",
    ],
)
@READS
async def test_download_survives_with_the_right_bytes(through: Through, reads: Reads, fault: Fault) -> None:
    store, faulty = through(_fresh(fault))
    path = store.path("checkpoint.pt")
    store.raw_write(path, DATA)
    found = await store.stat(path)
    assert await getattr(store, reads)(path, 5, 3 * MIB, found) == DATA[5 : 3 * MIB]
    assert len(faulty.proxy.requests("GET")) > 1


@READS
async def test_download_that_is_always_cut_is_an_error_and_never_data(through: Through, reads: Reads) -> None:
    retries = {"config_kwargs": {"retries": {"max_attempts": 2}}}
    store, _ = through(Fault(method="GET", truncate_after=1000, times=None), **retries)
    path = store.path("checkpoint.pt")
    store.raw_write(path, DATA)
    found = await store.stat(path)
    with pytest.raises(StorageError, match=r"checkpoint\.pt"):
        await getattr(store, reads)(path, 0, 3 * MIB, found)


async def test_part_that_is_never_taken_is_unavailable_and_leaves_nothing(through: Through) -> None:
    retries = {"config_kwargs": {"retries": {"max_attempts": 1}}}
    store, _ = through(Fault(method="PUT", target="partNumber=2", status=503, times=None), **retries)
    path = store.path("checkpoint.pt")
    store.raw_write(path, b"old")
    with pytest.raises(StorageUnavailableError, match=r"checkpoint\.pt"):
        await store.write(path, stream(DATA, MIB))
    assert store.raw_read(path) == b"old"
    assert store.leftovers() == []


async def test_completion_that_is_refused_leaves_nothing(through: Through) -> None:
    store, _ = through(Fault(method="POST", target="uploadId=", status=400, code="InvalidRequest", times=None))
    path = store.path("checkpoint.pt")
    with pytest.raises(StorageError, match=r"checkpoint\.pt"):
        await store.write(path, stream(DATA, MIB))
    assert not store.raw_exists(path)
    assert store.leftovers() == []


@pytest.mark.parametrize(
    "fault",
    [
        Fault(method="POST", target="uploadId=", reset_upload_after=0, times=None),
        Fault(method="POST", target="uploadId=", status=404, code="NoSuchUpload", times=None),
    ],
    ids=["reset", "no such upload"],
)
async def test_completion_that_never_came_about_is_an_error_where_the_last_checkpoint_has_the_same_size(
    through: Through, s3_client: Any, s3_url: str, s3_storage_options: dict[str, Any], plane: Plane, fault: Fault
) -> None:
    retries = {"config_kwargs": {"retries": {"max_attempts": 1}}}
    store, _ = through(_fresh(fault), **retries)
    path, old = store.path("checkpoint.pt"), DATA[::-1]
    await S3Store(s3_client, s3_url, s3_storage_options, plane).write(path, stream(old, MIB))
    with pytest.raises(StorageError, match=r"checkpoint\.pt"):
        await store.write(path, stream(DATA, MIB))
    assert store.raw_read(path) == old
    assert store.leftovers() == []


NO_SUCH_UPLOAD = Fault(method="POST", target="uploadId=", status=404, code="NoSuchUpload", times=None)


async def test_upload_that_somebody_aborted_is_unavailable_because_saving_again_helps(through: Through) -> None:
    store, _ = through(_fresh(NO_SUCH_UPLOAD))
    path = store.path("checkpoint.pt")
    with pytest.raises(StorageUnavailableError, match=r"checkpoint\.pt: the upload is gone.*saving again is safe"):
        await store.write(path, stream(DATA, MIB))
    assert not store.raw_exists(path)
    assert store.leftovers() == []


async def test_upload_that_the_store_forgot_when_it_was_complete_is_unavailable(
    s3_client: Any, s3_url: str, faulty_s3: Callable[..., FaultyS3]
) -> None:
    """On the obstore plane, which does not know the ETag that tells; the fsspec plane finds the object complete."""
    faulty = faulty_s3(Fault(method="POST", target="uploadId=", lose_reply=True), _fresh(NO_SUCH_UPLOAD))
    store = S3Store(s3_client, s3_url, faulty.storage_options, "obstore")
    path = store.path("checkpoint.pt")
    with pytest.raises(StorageUnavailableError, match="may or may not be complete"):
        await store.write(path, stream(DATA, MIB))
    assert store.raw_read(path) == DATA


def test_parts_without_md5_digests_do_not_tell_the_etag_of_the_object() -> None:
    md5 = {"ETag": '"d41d8cd98f00b204e9800998ecf8427e"'}
    assert torchferry_s3._etag_of([md5, md5]) == "5873dd45edd01f09c1ef2e7819369e8e-2"
    for other in ('"d41d8cd98f00b204e9800998ecf8427e-3"', '"0x8DC"', '"ünïcode"'):
        assert torchferry_s3._etag_of([md5, {"ETag": other}]) is None


async def test_server_that_is_not_there_is_unavailable(plane: Plane, s3_url: str) -> None:
    with _unused_port() as port:
        options = {
            "key": "key",
            "secret": "secret",
            "endpoint_url": f"http://127.0.0.1:{port}",
            "client_kwargs": {"region_name": "us-east-1"},
            "config_kwargs": {"retries": {"max_attempts": 1}},
        }
        store = S3Store(None, s3_url, options, plane)
        with pytest.raises(StorageUnavailableError, match=s3_url):
            await store.stat(store.path("checkpoint.pt"))
        with pytest.raises(StorageUnavailableError, match=s3_url):
            await store.write(store.path("checkpoint.pt"), stream(DATA, MIB))


async def test_server_that_falls_silent_is_asked_again(s3_client: Any, s3_url: str, faulty_s3: Any) -> None:
    """On the fsspec plane, after the read timeout that the user set; obstore has a limit of minutes for a request."""
    faulty = faulty_s3(
        Fault(method="PUT", target="partNumber=2", hang=True), Fault(method="GET", target="checkpoint", hang=True)
    )
    options = faulty.storage_options | {"config_kwargs": {"read_timeout": 1}}
    store = S3Store(s3_client, s3_url, options, "auto")
    assert store.backend.plane == "fsspec"
    path = store.path("checkpoint.pt")
    written = await store.write(path, stream(DATA, MIB))
    assert await store.read(path, 0, len(DATA), written) == DATA
    assert len(faulty.proxy.requests("PUT", "partNumber=2")) == 2


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits for a moment only until obstore has aborted an upload."""
    monkeypatch.setattr("torchferry.storage.obstore._ABORT_SECONDS", 2.0)


HANGING_PART = Fault(method="PUT", target="partNumber=2", hang=True, times=None)


@pytest.mark.usefixtures("impatient")
async def test_cancel_while_a_part_hangs_leaves_nothing(
    through: Through, s3_client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    store, faulty = through(_fresh(HANGING_PART))
    path = store.path("checkpoint.pt")
    other = store._address(f"{path}.other")
    s3_client.create_multipart_upload(**other)
    await cancel_at_the_end(store, path, DATA, partial(faulty.proxy.wait_for, "PUT", "partNumber=2"))
    assert not store.raw_exists(path)
    assert store.leftovers() == [other["Key"]]
    assert caplog.text == ""


@pytest.mark.usefixtures("impatient")
async def test_cancel_while_a_part_hangs_leaves_all_uploads_where_it_cannot_tell_and_says_so(
    s3_client: Any, s3_url: str, faulty_s3: Callable[..., FaultyS3], caplog: pytest.LogCaptureFixture
) -> None:
    """On the obstore plane; the fsspec plane knows the id of its upload."""
    faulty = faulty_s3(_fresh(HANGING_PART))
    store = S3Store(s3_client, s3_url, faulty.storage_options, "obstore")
    path = store.path("checkpoint.pt")

    def open_another() -> None:
        faulty.proxy.wait_for("PUT", "partNumber=2")
        s3_client.create_multipart_upload(**store._address(path))

    await cancel_at_the_end(store, path, DATA, open_another)
    assert len(store.leftovers()) == 2
    assert f"s3://{path}: 2 could be the one" in caplog.text


async def test_only_the_upload_that_was_opened_meanwhile_is_aborted(
    s3_client: Any, s3_url: str, s3_storage_options: dict[str, Any]
) -> None:
    store = S3Store(s3_client, s3_url, s3_storage_options, "fsspec")
    backend, path = store.backend, store.path("checkpoint.pt")
    assert isinstance(backend, torchferry_s3.S3Backend)
    s3_client.create_multipart_upload(**store._address(path))
    with pytest.raises(StorageError, match="0 could be the one"):
        await run_on(backend.loop, backend.abort_upload, path, age=-60)
    assert len(store.leftovers()) == 1
    await run_on(backend.loop, backend.abort_upload, path, age=60)
    assert store.leftovers() == []


@pytest.mark.parametrize("plane", PLANES)
async def test_cancel_that_comes_again_and_again_leaves_nothing(
    s3_client: Any, s3_url: str, faulty_s3: Any, plane: Plane
) -> None:
    faulty = faulty_s3()
    store = S3Store(s3_client, s3_url, faulty.storage_options, plane)

    async def unending() -> AsyncIterator[bytes]:
        yield DATA * 3
        await asyncio.Event().wait()

    task = asyncio.create_task(store.write(store.path("checkpoint.pt"), unending()))
    await asyncio.to_thread(faulty.proxy.wait_for, "PUT", "partNumber=1")
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert store.leftovers() == []


def test_forked_child_of_a_process_that_used_obstore_still_loads(
    s3_url: str, s3_storage_options: dict[str, Any]
) -> None:
    program = """
        import os, sys, torchferry
        url, options = sys.argv[1], eval(sys.argv[2])
        torchferry.save({"a": 1}, url, storage_options=options, plane="obstore")
        if child := os.fork():
            sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        assert torchferry.load(url, storage_options=options) == {"a": 1}
        os._exit(0)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), f"{s3_url}/x", repr(s3_storage_options)]
    subprocess.run(command, check=True, timeout=60)


async def test_path_without_a_key_is_refused_and_makes_no_bucket(
    s3_client: Any, s3_storage_options: dict[str, Any]
) -> None:
    name = f"ferry-{uuid.uuid4().hex[:12]}"
    for plane in PLANES:
        backend, path = open_backend(f"s3://{name}", storage_options=s3_storage_options, plane=plane)
        with pytest.raises(StorageError, match=f"s3://{name}"):
            await run_on(backend.loop, backend.write, path, stream(b"x", 1), size_hint=1)
    assert name not in [bucket["Name"] for bucket in s3_client.list_buckets()["Buckets"]]


@pytest.mark.parametrize("key", ["a//b", "/a", "a/../b", "a/./b", "a\nb"])
async def test_key_that_obstore_would_change_is_refused_with_the_way_out(
    s3_url: str, s3_storage_options: dict[str, Any], key: str
) -> None:
    with pytest.raises(UnsupportedOptionError, match="plane='fsspec'"):
        backend, path = open_backend(f"{s3_url}/{key}", storage_options=s3_storage_options, plane="obstore")
        await backend.write(path, stream(b"x", 1), size_hint=1)


@pytest.mark.parametrize("key", ["a//b", "a\nb"])
async def test_key_that_obstore_would_change_goes_through_the_fsspec_plane(
    s3_url: str, s3_storage_options: dict[str, Any], key: str
) -> None:
    url = f"{s3_url}/{uuid.uuid4().hex}/{key}"
    await torchferry.save_async({"a": 1}, url, storage_options=s3_storage_options)
    assert await torchferry.load_async(url, storage_options=s3_storage_options) == {"a": 1}


@pytest.mark.parametrize(
    "bucket", ["arn:aws:s3:us-east-1:123456789012:accesspoint/checkpoints", "checkpoints--use1-az4--x-s3"]
)
def test_access_points_and_directory_buckets_go_through_the_fsspec_plane(
    s3_storage_options: dict[str, Any], bucket: str
) -> None:
    fs = S3FileSystem(**s3_storage_options)  # older versions of fsspec do not take an ARN in a URL without one
    backend, path = open_backend(f"s3://{bucket}/a/b.pt", filesystem=fs)
    assert (backend.plane, path) == ("fsspec", f"{bucket}/a/b.pt")


@contextlib.asynccontextmanager
async def _store_that_answers(answer: str, etag: str, plane: Plane, **options: Any) -> AsyncIterator[S3Store]:
    """A store that gives every request one answer: the status line's end, more header fields, and the body."""
    status, _, rest = answer.partition("\r\n")
    fields = f'ETag: "{etag}"\r\nLast-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\nConnection: close\r\n'

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 {status}\r\n{fields}{rest}".encode())
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    endpoint = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    options = storage_options_for(endpoint, "key", "secret") | options
    async with server:
        yield await asyncio.to_thread(S3Store, None, "s3://bucket/x", options, plane)


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize(
    "answer",
    [
        "206 OK\r\nContent-Range: bytes 0-3/8\r\nContent-Length: 4\r\n\r\nwron",
        "206 OK\r\nContent-Range: bytes 4-7/8\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nlonge\r\n0\r\n\r\n",
        "200 OK\r\nContent-Length: 4\r\n\r\nwron",
    ],
    ids=["another range", "longer", "no range"],
)
async def test_store_that_sends_other_bytes_is_not_believed(plane: Plane, answer: str) -> None:
    retries = {"config_kwargs": {"retries": {"max_attempts": 1}}}
    async with _store_that_answers(answer, "x", plane, **retries) as store:
        with pytest.raises(StorageError):
            await store.read("bucket/x", 4, 8, ObjectStat("s3://bucket/x", 8, '"x"'))


@pytest.mark.parametrize("name", ["Content-Type", "contenttype", "cache-control", "StorageClass", "a b"])
async def test_metadata_that_obstore_would_not_keep_is_refused_before_anything_is_sent(
    s3_client: Any, s3_url: str, faulty_s3: Callable[..., FaultyS3], name: str
) -> None:
    faulty = faulty_s3()
    store = S3Store(s3_client, s3_url, faulty.storage_options, "obstore")
    with pytest.raises(UnsupportedOptionError, match=name):
        await store.write(store.path("checkpoint.pt"), stream(DATA, MIB), metadata={name: "x"})
    assert faulty.proxy.log == []


@READS
@pytest.mark.parametrize("plane", PLANES)
async def test_store_that_ignores_conditions_does_not_mix_versions(plane: Plane, reads: Reads) -> None:
    answer = "206 OK\r\nContent-Range: bytes 0-3/4\r\nContent-Length: 4\r\n\r\ndata"
    async with _store_that_answers(answer, "new", plane) as store:
        read = partial(getattr(store, reads), "bucket/x", 0, 4)
        assert await read(ObjectStat("", 4, '"new"')) == b"data"
        with pytest.raises(CheckpointChangedError, match="s3://bucket/x was replaced"):
            await read(ObjectStat("", 4, '"old"'))


@pytest.mark.parametrize(
    ("options", "algorithms"),
    [
        ({}, {"crc32"}),
        ({"config_kwargs": {"request_checksum_calculation": "when_required"}}, set()),
        ({"s3_additional_kwargs": {"ChecksumAlgorithm": "SHA256"}}, {"sha256"}),
    ],
    ids=["by default", "only when required", "another algorithm"],
)
async def test_parts_carry_the_checksum_that_botocore_is_configured_for(
    s3_client: Any, s3_url: str, faulty_s3: Any, options: dict[str, Any], algorithms: set[str]
) -> None:
    """On the fsspec plane, over http."""
    store = S3Store(s3_client, s3_url, faulty_s3().storage_options | options, "fsspec")
    backend = store.backend
    assert isinstance(backend, torchferry_s3.S3Backend)
    sent: list[tuple[bytes, dict[str, Any]]] = []

    def note(request: Any, **_: Any) -> None:
        sent.append((b"".join(request.body._views), dict(request.headers.items())))

    async def listen() -> None:
        client = await backend._fs.set_session()
        for operation in ("UploadPart", "PutObject"):
            client.meta.events.register(f"before-send.s3.{operation}", note)

    await run_on(backend.loop, listen)
    await store.write(store.path("large.pt"), stream(DATA, MIB))
    await store.write(store.path("small.pt"), stream(DATA[:1000], 100))
    assert len(sent) == 4
    for body, headers in sent:
        prefix = "x-amz-checksum-"
        checksums = {name.lower().removeprefix(prefix): v for name, v in headers.items() if prefix in name.lower()}
        assert set(checksums) == algorithms
        if "crc32" in algorithms:
            assert checksums["crc32"] == base64.b64encode(zlib.crc32(body).to_bytes(4, "big"))


async def test_only_the_bytes_asked_for_travel(through: Through) -> None:
    store, faulty = through()
    path = store.path("checkpoint.pt")
    store.raw_write(path, DATA)
    found = await store.stat(path)
    await store.read(path, 0, 100, found)
    assert [request.method for request in faulty.proxy.log if "checkpoint" in request.target] == ["HEAD", "GET"]


def _fresh(fault: Fault) -> Fault:
    """A fault counts what it does: each test needs its own."""
    return dataclasses.replace(fault)


@contextlib.contextmanager
def _unused_port() -> Iterator[int]:
    """A port that is bound and not listened on, so that nobody else gets it."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


# --- settings: what a user configured for s3fs holds on either plane


def config_of(backend: Backend) -> dict[str, Any]:
    """The settings that a store of this backend is made with."""
    made = backend._open_store.__self__  # type: ignore[attr-defined]
    return {**made._config, "client": made._client_options, "retry": made._retry}


TRANSLATED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "requester pays": ({"requester_pays": True}, {"request_payer": True}),
    "anonymous": ({"anon": True, "key": None, "secret": None}, {"skip_signature": True}),
    "sse-s3": (
        {"s3_additional_kwargs": {"ServerSideEncryption": "AES256"}},
        {"server_side_encryption": "AES256"},
    ),
    "sse-kms": (
        {"s3_additional_kwargs": {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": "key", "BucketKeyEnabled": True}},
        {"server_side_encryption": "aws:kms", "sse_kms_key_id": "key", "sse_bucket_key_enabled": True},
    ),
    "sse-c": (
        {"s3_additional_kwargs": {"SSECustomerAlgorithm": "AES256", "SSECustomerKey": b"k" * 32}},
        {"server_side_encryption": "sse-c", "sse_customer_key_base64": base64.b64encode(b"k" * 32).decode()},
    ),
    "signed payloads": (
        {"config_kwargs": {"s3": {"payload_signing_enabled": True}}},
        {"unsigned_payload": False},
    ),
    "retries": (
        {"config_kwargs": {"retries": {"max_attempts": 3}}},
        {"retry": {"max_retries": 3, "retry_timeout": timedelta(minutes=3)}},
    ),
    "timeouts": (
        {"config_kwargs": {"connect_timeout": 7, "read_timeout": 1200}},
        {"client": {"connect_timeout": timedelta(seconds=7), "timeout": timedelta(seconds=1200)}},
    ),
    "certificates not checked": (
        {"client_kwargs": {"region_name": "us-east-1", "verify": False}},
        {"client": {"allow_invalid_certificates": True}},
    ),
    "proxy": (
        {"config_kwargs": {"proxies": {"http": "http://127.0.0.1:1", "https": "http://127.0.0.1:1"}}},
        {"client": {"proxy_url": "http://127.0.0.1:1"}},
    ),
    "listings and blocks, which are about other calls": (
        {"use_listings_cache": False, "default_block_size": MIB, "default_cache_type": "none"},
        {},
    ),
}


@pytest.mark.parametrize("setting", TRANSLATED)
def test_setting_reaches_obstore(s3_storage_options: dict[str, Any], setting: str) -> None:
    options, expected = TRANSLATED[setting]
    backend, _ = open_backend("s3://bucket/key", storage_options=s3_storage_options | options)
    assert backend.plane == "obstore"
    config = config_of(backend)
    for name, value in expected.items():
        assert config[name] == ({**config[name], **value} if name == "client" else value)


def test_settings_of_the_aws_cli_are_no_matter(
    s3_storage_options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config").write_text(
        "[profile tuned]\ns3 =\n  max_concurrent_requests = 20\n  multipart_threshold = 64MB\n"
        "  signature_version = s3v4\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    options = s3_storage_options | {"profile": "tuned", "skip_instance_cache": True}
    backend, _ = open_backend("s3://bucket/key", storage_options=options)
    assert backend.plane == "obstore"


@pytest.mark.parametrize("how", ["credential_process = /missing/program", "web identity"])
async def test_credentials_from_a_missing_file_are_no_missing_checkpoint(
    plane: Plane, how: str, s3_server: S3Server, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who starts anew where there is no checkpoint would lose what is there."""
    if how == "web identity":
        how = "role_arn = arn:aws:iam::123456789012:role/r\nweb_identity_token_file = /missing/token"
    (tmp_path / "config").write_text(
        f"[profile ferry]\nregion = us-east-1\nendpoint_url = {s3_server.endpoint}\n{how}\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    with pytest.raises(StoragePermissionError, match="no usable credentials"):
        options = {"profile": "ferry", "skip_instance_cache": True}
        backend, path = open_backend(f"{s3_url}/x.pt", storage_options=options, plane=plane)
        await run_on(backend.loop, backend.stat, path)
    if plane == "fsspec":
        with pytest.raises(StoragePermissionError, match="no usable credentials"):
            await run_on(backend.loop, backend.delete, path)


NOT_TRANSLATED: dict[str, tuple[dict[str, Any], str]] = {
    "canned acl": ({"s3_additional_kwargs": {"ACL": "bucket-owner-full-control"}}, "ACL"),
    "storage class": ({"s3_additional_kwargs": {"StorageClass": "STANDARD_IA"}}, "StorageClass"),
    "versions": ({"version_aware": True}, "version_aware"),
    "no If-Match": ({"local_expiry_check": True}, "local_expiry_check"),
    "few connections at once": ({"max_concurrency": 2}, "max_concurrency"),
    "session": ({"session": AioSession()}, "session"),
    "old signature": ({"config_kwargs": {"signature_version": "s3"}}, "signature version"),
    "accelerate": ({"config_kwargs": {"s3": {"use_accelerate_endpoint": True}}}, "use_accelerate_endpoint"),
    "fips": ({"config_kwargs": {"use_fips_endpoint": True}}, "use_fips_endpoint"),
    "client certificate": ({"config_kwargs": {"client_cert": "/cert.pem"}}, "client_cert"),
    "adaptive retries": ({"config_kwargs": {"retries": {"mode": "adaptive"}}}, "adaptive"),
    "no proxy": ({"config_kwargs": {"proxies": {}}}, "proxies"),
    "proxy for https alone": ({"config_kwargs": {"proxies": {"https": "http://127.0.0.1:1"}}}, "proxies"),
    "impatience": ({"config_kwargs": {"read_timeout": 2}}, "read_timeout"),
    "checksums asked for": ({"config_kwargs": {"request_checksum_calculation": "when_supported"}}, "checksum"),
    "what does not exist yet": ({"client_kwargs": {"api_version": "2006-03-01"}}, "api_version"),
}


@pytest.mark.parametrize("setting", NOT_TRANSLATED)
def test_setting_that_obstore_cannot_honour_falls_back_with_one_log_line(
    s3_storage_options: dict[str, Any], setting: str, caplog: pytest.LogCaptureFixture
) -> None:
    options, named = NOT_TRANSLATED[setting]
    options = s3_storage_options | options
    bridge._log_once.cache_clear()
    for _ in range(2):
        backend, _ = open_backend("s3://bucket/key", storage_options=options)
        assert backend.plane == "fsspec"
    assert [record.name for record in caplog.records] == ["torchferry.storage"]
    assert named in caplog.text
    with pytest.raises(UnsupportedOptionError, match=named):
        open_backend("s3://bucket/key", storage_options=options, plane="obstore")


def test_subclass_of_s3fs_may_do_anything_and_falls_back(s3_storage_options: dict[str, Any]) -> None:
    class Special(S3FileSystem):
        pass

    backend, _ = open_backend("s3://bucket/key", filesystem=Special(**s3_storage_options))
    assert backend.plane == "fsspec"


@pytest.mark.parametrize(
    ("url", "asked", "region", "expected"),
    [
        ("http://127.0.0.1:9000/bucket/key?X=1", "us-east-1", "us-east-1", ("http://127.0.0.1:9000", False)),
        ("https://host/prefix/bucket/key", "r", "r", ("https://host/prefix", False)),
        ("https://bucket.host/key", "r", "r", ("https://bucket.host", True)),
        (
            *("https://bucket.s3.eu-west-1.amazonaws.com/key", "eu-west-1", "eu-west-1"),
            ("https://bucket.s3.eu-west-1.amazonaws.com", True),
        ),
        (
            *("https://bucket.s3.us-east-1.amazonaws.com/key", "us-east-1", "eu-west-1"),
            ("https://bucket.s3.eu-west-1.amazonaws.com", True),
        ),
        (
            *("https://bucket.s3.amazonaws.com/key", "us-east-1", "eu-west-1"),
            ("https://bucket.s3.eu-west-1.amazonaws.com", True),
        ),
        (
            *("https://s3.us-east-1.amazonaws.com/dotted.bucket/key", "us-east-1", "us-west-2"),
            ("https://s3.us-west-2.amazonaws.com", False),
        ),
    ],
)
def test_address_is_botocores_own(url: str, asked: str, region: str, expected: tuple[str, bool]) -> None:
    bucket = "dotted.bucket" if "dotted" in url else "bucket"
    assert torchferry_s3._address(url, bucket, asked, region) == (*expected, region)


async def test_virtual_hosted_addresses_come_from_the_filesystem(s3_storage_options: dict[str, Any]) -> None:
    options = s3_storage_options | {
        "endpoint_url": "http://storage.example:9000",
        "client_kwargs": {"region_name": "moon-1"},
        "config_kwargs": {"s3": {"addressing_style": "virtual"}},
    }
    made = torchferry_s3._Bridge(S3FileSystem(**options))
    address = await run_on(made.fs.loop, made._resolve, "bucket")
    assert address == ("http://bucket.storage.example:9000", True, "moon-1")


async def round_trip(backend: Backend, path: str) -> None:
    written = await run_on(backend.loop, backend.write, path, stream(DATA, MIB), size_hint=len(DATA))
    assert await run_on(backend.loop, backend.read, path, 0, len(DATA), written) == DATA
    await run_on(backend.loop, backend.delete, path)


@pytest.mark.parametrize("protocol", ["s3", "s3a"])
async def test_both_protocols_work(
    plane: Plane, protocol: str, s3_url: str, s3_storage_options: dict[str, Any]
) -> None:
    url = s3_url.replace("s3://", f"{protocol}://")
    await round_trip(*open_backend(f"{url}/x.pt", storage_options=s3_storage_options, plane=plane))


async def test_endpoint_and_keys_from_the_environment(
    plane: Plane, s3_url: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_server.key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_server.secret)
    monkeypatch.setenv("AWS_DEFAULT_REGION", s3_server.region)
    options = {"skip_instance_cache": True}
    await round_trip(*open_backend(f"{s3_url}/x.pt", storage_options=options, plane=plane))


async def test_explicit_settings_go_before_the_environment(
    plane: Plane, s3_url: str, s3_storage_options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """obstore reads the environment by itself, where a variable could replace or mix with what was given."""
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_BUCKET"):
        monkeypatch.setenv(name, "wrong")
    for name in ("AWS_SKIP_SIGNATURE", "AWS_VIRTUAL_HOSTED_STYLE_REQUEST", "AWS_S3_EXPRESS", "AWS_REQUEST_PAYER"):
        monkeypatch.setenv(name, "true")
    options = s3_storage_options | {"skip_instance_cache": True}
    await round_trip(*open_backend(f"{s3_url}/x.pt", storage_options=options, plane=plane))


@pytest.fixture
def renewals(s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """The profile "ferry": as SSO, roles and IRSA do, a program gives keys that soon expire. Tells how often."""
    calls = tmp_path / "calls"
    answer = {
        "Version": 1,
        "AccessKeyId": s3_server.key,
        "SecretAccessKey": s3_server.secret,
        "Expiration": (datetime.now(UTC) + timedelta(minutes=2)).isoformat(),
    }
    (tmp_path / "answer.json").write_text(json.dumps(answer))
    (tmp_path / "program").write_text(f"#!/bin/sh\necho asked >> {calls}\ncat {tmp_path}/answer.json\n")
    (tmp_path / "program").chmod(0o755)
    (tmp_path / "config").write_text(
        f"[profile ferry]\nregion = us-east-1\nendpoint_url = {s3_server.endpoint}\n"
        f"credential_process = {tmp_path}/program\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    calls.touch()
    return lambda: len(calls.read_text().splitlines())


async def test_credentials_that_expire_are_asked_for_again(
    plane: Plane, s3_url: str, renewals: Callable[[], int]
) -> None:
    options = {"profile": "ferry", "skip_instance_cache": True}
    backend, path = open_backend(f"{s3_url}/x.pt", storage_options=options, plane=plane)
    await round_trip(backend, path)
    before = renewals()
    with anyio.fail_after(60):  # the client may keep them for as long as they are good, which is not long
        while renewals() == before:
            await round_trip(backend, path)


async def test_credentials_are_renewed_in_the_middle_of_an_upload(
    plane: Plane, s3_url: str, renewals: Callable[[], int]
) -> None:
    """Obstore asks for them in threads of its own then, where no event loop runs."""
    options = {"profile": "ferry", "skip_instance_cache": True}
    backend, path = open_backend(f"{s3_url}/x.pt", storage_options=options, plane=plane)
    size = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal size
        while renewals() < 6:
            size += MIB
            yield bytes(MIB)

    written = await run_on(backend.loop, backend.write, path, chunks(), size_hint=0, part_size=5 * MIB)
    assert written.size == size


def test_profile_that_does_not_exist_is_a_permission_error() -> None:
    with pytest.raises(StoragePermissionError, match="nobody"):
        open_backend("s3://bucket/key", storage_options={"profile": "nobody", "skip_instance_cache": True})


async def test_no_credentials_is_a_permission_error(plane: Plane, s3_url: str, s3_server: S3Server) -> None:
    options = {
        "endpoint_url": s3_server.endpoint,
        "client_kwargs": {"region_name": "us-east-1"},
        "skip_instance_cache": True,
    }
    backend, path = open_backend(f"{s3_url}/x.pt", storage_options=options, plane=plane)
    with pytest.raises(StoragePermissionError, match="credentials"):
        await run_on(backend.loop, backend.stat, path)


async def test_anonymous_is_refused_by_a_private_bucket(
    plane: Plane, s3_url: str, s3_storage_options: dict[str, Any]
) -> None:
    options = s3_storage_options | {"anon": True}
    backend, path = open_backend(f"{s3_url}/x.pt", storage_options=options, plane=plane)
    with pytest.raises(StoragePermissionError):
        await run_on(backend.loop, backend.stat, path)
    with pytest.raises(StoragePermissionError):
        await run_on(backend.loop, backend.write, path, stream(DATA, MIB), size_hint=len(DATA))


async def test_filesystem_made_for_its_users_loop_works(
    plane: Plane, s3_url: str, s3_storage_options: dict[str, Any]
) -> None:
    fs = S3FileSystem(
        **s3_storage_options, asynchronous=True, loop=asyncio.get_running_loop(), skip_instance_cache=True
    )
    backend, path = open_backend(f"{s3_url}/x.pt", filesystem=fs, plane=plane)
    await round_trip(backend, path)
    if fs._s3 is not None:
        await fs._s3.close()


async def test_listings_of_the_filesystem_see_what_was_saved(
    plane: Plane, s3_url: str, s3_storage_options: dict[str, Any]
) -> None:
    fs = S3FileSystem(**s3_storage_options)
    await asyncio.to_thread(fs.pipe, f"{s3_url}/first", b"1")
    assert len(await asyncio.to_thread(fs.ls, s3_url)) == 1
    backend, path = open_backend(f"{s3_url}/second", filesystem=fs, plane=plane)
    await run_on(backend.loop, backend.write, path, stream(b"12345", 5), size_hint=5)
    assert len(await asyncio.to_thread(fs.ls, s3_url)) == 2
    await run_on(backend.loop, backend.delete, path)
    assert len(await asyncio.to_thread(fs.ls, s3_url)) == 1


async def test_encryption_with_a_customers_key(
    plane: Plane, s3_url: str, s3_client: Any, s3_storage_options: dict[str, Any]
) -> None:
    key = {"SSECustomerAlgorithm": "AES256", "SSECustomerKey": "k" * 32}
    options = s3_storage_options | {"s3_additional_kwargs": key}
    backend, path = open_backend(f"{s3_url}/x.pt", storage_options=options, plane=plane)
    written = await run_on(backend.loop, backend.write, path, stream(DATA, MIB), size_hint=len(DATA))
    assert await run_on(backend.loop, backend.read, path, 5, MIB, written) == DATA[5:MIB]
    bucket, _, name = path.partition("/")
    with pytest.raises(ClientError):
        s3_client.get_object(Bucket=bucket, Key=name)


async def test_version_in_the_url_is_the_one_that_is_read(s3_client: Any, s3_server: S3Server) -> None:
    bucket = f"ferry-versions-{uuid.uuid4().hex[:8]}"
    s3_client.create_bucket(Bucket=bucket)
    s3_client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    first = s3_client.put_object(Bucket=bucket, Key="x.pt", Body=b"first")
    s3_client.put_object(Bucket=bucket, Key="x.pt", Body=b"second")
    options = s3_server.storage_options | {"version_aware": True}
    backend, path = open_backend(f"s3://{bucket}/x.pt?versionId={first['VersionId']}", storage_options=options)
    found = await run_on(backend.loop, backend.stat, path)
    assert await run_on(backend.loop, backend.read, path, 0, 5, found) == b"first"
