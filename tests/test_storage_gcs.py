from __future__ import annotations

import asyncio
import gc
import json
import logging
import random
import re
import threading
import uuid
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import anyio
import gcsfs
import google_crc32c
import pytest
import requests
import torch
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from gcsfs.retry import HttpError
from google.oauth2.credentials import Credentials

import torchferry
from torchferry.engine.loops import run_on
from torchferry.engine.transfer import Transfer
from torchferry.engine.types import MIB, Chunk
from torchferry.errors import (
    ChangedWhileSavingError,
    CheckpointChangedError,
    CheckpointNotFoundError,
    StorageError,
    StoragePermissionError,
    StorageUnavailableError,
    UnsupportedOptionError,
)
from torchferry.storage.base import Backend, Leftover
from torchferry.storage.registry import open_backend
from torchferry.testing import CloudConformance, StoreUnderTest
from torchferry.testing.conformance import stream
from torchferry.testing.faultproxy import Fault, Head, Request
from torchferry.testing.fixtures import GcsClient
from torchferry.testing.gcs import GcsServer, TokenProxy
from torchferry.testing.peak import peak_of_save
from torchferry.testing.tokens import TokenServer
from torchferry_gcs import checksum, errors
from torchferry_gcs.metadata import storable

DATA = random.Random(1).randbytes(12 * MIB)  # three parts of 5 MiB
KMS_KEY = "projects/p/locations/l/keyRings/r/cryptoKeys/k"


def with_token(token: str, endpoint: str) -> dict[str, Any]:
    return {"endpoint_url": endpoint, "project": "ferry-test-project", "token": Credentials(token)}


class GcsStore(StoreUnderTest):
    """The stand-in for Google, which speaks both APIs, as seen through a proxy."""

    keeps_metadata = True

    def __init__(self, client: GcsClient, url: str, proxy: TokenProxy, **options: Any) -> None:
        self.options = {"storage_options": with_token("ferry-test-token", proxy.endpoint) | options}
        self.backend: Any
        self.backend, self._prefix = open_backend(url, **self.options)
        self.proxy = proxy
        self._client = client

    @property
    def url(self) -> str:
        return f"gs://{self.path('checkpoint.pt')}"

    def path(self, name: str) -> str:
        return f"{self._prefix}/{name}"

    def raw_write(self, path: str, data: bytes) -> None:
        self._client.write(path, data)

    def raw_read(self, path: str) -> bytes:
        return self._client.read(path)

    def raw_exists(self, path: str) -> bool:
        return self._client.exists(path)

    def leftovers(self) -> list[str]:
        bucket, _, prefix = self._prefix.partition("/")
        query = {"uploads": "", "prefix": prefix}
        answer = requests.get(f"{self._client._endpoint}/{bucket}", params=query, timeout=60)
        return re.findall("<UploadId>(.*?)</UploadId>", answer.text)


class JsonStore(GcsStore):
    """A server that speaks the JSON API only. No request lists its sessions: what the proxy saw tells of them."""

    def leftovers(self) -> list[str]:
        begun, ended = set(), set()
        for request in list(self.proxy.log):
            if found := re.search("upload_id=([^&]*)", request.target):
                begun.add(found.group(1))
                if request.method == "DELETE" or re.search(r"/\d+$", request.headers.get("content-range", "")):
                    ended.add(found.group(1))
        return sorted(begun - ended)


@pytest.fixture(scope="session")
def google(gcs_xml: tuple[TokenProxy, GcsServer]) -> Iterator[tuple[GcsClient, int, str]]:
    """The stand-in for Google: a plain client, its port, and a bucket."""
    client = GcsClient(gcs_xml[1].endpoint)
    bucket = f"ferry-{uuid.uuid4().hex[:12]}"
    client.make_bucket(bucket)
    yield client, gcs_xml[1].port, bucket
    client.close()


def begin_upload(google: tuple[GcsClient, int, str], path: str, part: bytes | None = None) -> str:
    """Begins a multipart upload, as a writer that is then killed; returns its id."""
    address = f"{google[0]._endpoint}/{path}"
    answer = requests.post(f"{address}?uploads", headers={"Content-Length": "0"}, timeout=60)
    (upload_id,) = re.findall("<UploadId>(.*?)</UploadId>", answer.text)
    if part is not None:
        requests.put(f"{address}?uploadId={upload_id}&partNumber=1", data=part, timeout=60)
    return str(upload_id)


@pytest.fixture
def through(google: tuple[GcsClient, int, str]) -> Iterator[Callable[..., GcsStore]]:
    """Makes the store as seen through a proxy with these faults, with these options of gcsfs."""
    client, port, bucket = google
    prefix = uuid.uuid4().hex
    with ExitStack() as stack:

        def make(*faults: Fault, bandwidth: float | None = None, **options: Any) -> GcsStore:
            proxy = stack.enter_context(TokenProxy(port, *map(replace, faults), bandwidth=bandwidth))
            return GcsStore(client, f"gs://{bucket}/{prefix}", proxy, **options)

        yield make


@pytest.fixture
def store(through: Callable[..., GcsStore]) -> GcsStore:
    return through()


@pytest.fixture
def json_through(gcs_server: GcsServer, gcs_client: GcsClient, gcs_url: str) -> Iterator[Callable[..., JsonStore]]:
    """Makes the store on fake-gcs-server as seen through a proxy with these faults."""
    with ExitStack() as stack:

        def make(*faults: Fault, **options: Any) -> JsonStore:
            proxy = stack.enter_context(TokenProxy(gcs_server.port, *map(replace, faults)))
            return JsonStore(gcs_client, gcs_url, proxy, **options)

        yield make


class TestGoogle(CloudConformance):
    @pytest.fixture
    def store(self, through: Callable[..., GcsStore]) -> GcsStore:
        return through()

    @pytest.fixture
    def path_in_missing_container(self) -> str:
        return "ferry-nowhere/checkpoint.pt"

    @pytest.fixture
    def unauthorized(self, store: GcsStore) -> Backend:
        options = with_token("ferry-powerless-token", store.proxy.endpoint)
        return open_backend(store.url, storage_options=options)[0]


class TestServerWithoutTheXmlApi(CloudConformance):
    @pytest.fixture
    def store(self, json_through: Callable[..., JsonStore]) -> JsonStore:
        return json_through()

    @pytest.fixture
    def path_in_missing_container(self) -> str:
        return "ferry-nowhere/checkpoint.pt"

    @pytest.fixture
    def unauthorized(self, store: JsonStore) -> Backend:
        options = with_token("ferry-powerless-token", store.proxy.endpoint)
        return open_backend(store.url, storage_options=options)[0]

    async def test_leftovers_shows_what_a_write_under_way_has_staged(self) -> None:  # type: ignore[override]
        pytest.skip("sessions cannot be listed")

    async def test_100_megabytes_in_odd_chunks_arrive_whole(self) -> None:  # type: ignore[override]
        pytest.skip("fake-gcs-server hashes all that it has with every chunk")

    def test_saving_256_mib_takes_at_most_96_mib(self, store: StoreUnderTest) -> None:
        """Of 128 MiB: fake-gcs-server hashes all that it has with every chunk."""
        assert store.options is not None
        assert peak_of_save(128 * MIB, f"gs://{store.path('x.pt')}", **store.options) <= 96 * MIB


# --- how objects get there


async def test_small_object_is_one_request_that_carries_its_crc32c(store: GcsStore) -> None:
    path = store.path("checkpoint.pt")
    await store.write(path, stream(DATA[:100], 10))
    assert [request.method for request in store.proxy.log] == ["POST"]
    assert "uploadType=multipart" in store.proxy.log[0].target


async def test_small_object_counts_as_its_own_bytes(store: GcsStore) -> None:
    """And not those of its description, which go along."""
    transfer = Transfer()
    with transfer.running(None):
        await store.write(store.path("checkpoint.pt"), stream(DATA[:100], 10))
    assert transfer.report().nbytes == 100


async def test_large_object_goes_up_in_parts_that_carry_their_crc32c(store: GcsStore) -> None:
    path = store.path("checkpoint.pt")
    await store.write(path, stream(DATA, MIB), size_hint=len(DATA), metadata={"step": "1"})
    parts = store.proxy.requests("PUT", "partNumber=")
    crc32cs = [
        checksum.encoded(google_crc32c.value(DATA[start : start + 5 * MIB])) for start in range(0, 12 * MIB, 5 * MIB)
    ]
    assert sorted(part.headers["x-goog-hash"] for part in parts) == sorted(f"crc32c={value}" for value in crc32cs)
    assert store.raw_read(path) == DATA


async def test_engine_sends_and_reads_all_bytes(store: GcsStore) -> None:
    transfer = Transfer()
    with transfer.running(None):
        written = await store.write(store.path("checkpoint.pt"), stream(DATA, MIB))
        assert await store.read(store.path("checkpoint.pt"), 0, len(DATA), written) == DATA
    assert transfer.report().client_bytes == 0
    assert transfer.report().parts == 3
    assert transfer.report().nbytes == 2 * len(DATA)


async def test_server_without_the_xml_api_is_asked_once(json_through: Callable[..., JsonStore]) -> None:
    store = json_through()
    for name in ("one.pt", "two.pt"):
        await store.write(store.path(name), stream(DATA, MIB))
        assert store.raw_read(store.path(name)) == DATA
    assert len(store.proxy.requests("POST", r"\?uploads")) == 1


async def test_emulator_without_the_xml_api_takes_large_objects_too(gcs_emulator: GcsServer) -> None:
    client = GcsClient(gcs_emulator.endpoint)
    bucket = f"ferry-{uuid.uuid4().hex[:12]}"
    client.make_bucket(bucket)
    lost = Fault(method="PUT", target="upload_id", status=503)
    with TokenProxy(gcs_emulator.port, lost) as proxy:
        store = JsonStore(client, f"gs://{bucket}/prefix", proxy)
        path = store.path("checkpoint.pt")
        written = await store.write(path, stream(DATA, MIB), metadata={"step": "1"})
        assert store.raw_read(path) == DATA
        assert await store.stat(path) == written
        assert (await store.stat(path)).metadata == {"step": "1"}
        await store.delete(path)
    client.close()


async def test_session_goes_to_the_endpoint_that_the_filesystem_names(json_through: Callable[..., JsonStore]) -> None:
    """fake-gcs-server answers with an address of its own."""
    store = json_through()
    await store.write(store.path("checkpoint.pt"), stream(DATA, MIB))
    assert store.proxy.requests("PUT", "upload_id=")


async def test_many_parts_become_one_object_in_order(store: GcsStore) -> None:
    path = store.path("checkpoint.pt")
    data = random.Random(2).randbytes(5 * MIB) * 21
    await store.write(path, stream(data, 3 * MIB))
    assert store.raw_read(path) == data


# --- versions


async def test_reads_are_pinned_to_the_generation(store: GcsStore) -> None:
    path = store.path("checkpoint.pt")
    written = await store.write(path, stream(DATA, MIB))
    assert written.etag is not None
    assert written.etag.isdecimal()
    assert await store.stat(path) == written
    before = len(store.proxy.log)
    assert await store.read(path, 5, 100, written) == DATA[5:100]
    assert [f"generation={written.etag}" in request.target for request in store.proxy.log[before:]] == [True]


@pytest.mark.parametrize("size", [5, len(DATA)], ids=["small", "parts"])
async def test_generation_that_a_write_is_answered_with_is_what_reads_are_pinned_to(store: GcsStore, size: int) -> None:
    path = store.path("checkpoint.pt")
    written = await store.write(path, stream(DATA[:size], MIB))
    assert await store.read(path, 0, 5, written) == DATA[:5]
    store.raw_write(path, DATA[:size])
    with pytest.raises(CheckpointChangedError, match="replaced"):
        await store.read(path, 0, 5, written)


class OtherGenerationProxy(TokenProxy):
    """Answers every read with another generation than was asked for: a server that takes no notice of it."""

    def answered(self, head: Head) -> Head:
        head = super().answered(head).without("x-goog-generation")
        return Head(head.first_line, (b"x-goog-generation: 1\r\n", *head.lines))


async def test_read_of_another_generation_than_was_asked_for_is_an_error(
    google: tuple[GcsClient, int, str], store: GcsStore
) -> None:
    path = store.path("checkpoint.pt")
    written = await store.write(path, stream(DATA, MIB))
    with OtherGenerationProxy(google[1]) as proxy:
        other = GcsStore(google[0], store.url, proxy)
        with pytest.raises(CheckpointChangedError, match="replaced"):
            await other.read(path, 0, 5, written)


@pytest.mark.parametrize("kind", ["through", "json_through"])
async def test_same_bytes_written_anew_are_another_version(request: pytest.FixtureRequest, kind: str) -> None:
    """Their ETag, which is their MD5, is the same."""
    store: GcsStore = request.getfixturevalue(kind)()
    path = store.path("checkpoint.pt")
    store.raw_write(path, b"12345")
    before = await store.stat(path)
    store.raw_write(path, b"12345")
    assert await store.stat(path) != before
    with pytest.raises(CheckpointChangedError, match="replaced"):
        await store.read(path, 0, 5, before)


@pytest.mark.parametrize("kind", ["through", "json_through"])
async def test_what_is_deleted_while_it_is_read_is_not_found(request: pytest.FixtureRequest, kind: str) -> None:
    store: GcsStore = request.getfixturevalue(kind)()
    path = store.path("checkpoint.pt")
    store.raw_write(path, b"12345")
    found = await store.stat(path)
    await store.delete(path)
    with pytest.raises(CheckpointNotFoundError):
        await store.read(path, 0, 5, found)


async def test_generation_in_a_path_counts_only_where_the_filesystem_is_version_aware(
    through: Callable[..., GcsStore],
) -> None:
    store = through()
    path = store.path("checkpoint.pt")
    written = await store.write(path, stream(b"12345", 2))
    assert (await through(version_aware=True).stat(f"{path}#{written.etag}")).size == 5
    with pytest.raises(CheckpointNotFoundError):
        await store.stat(f"{path}#{written.etag}")


@pytest.mark.parametrize("name", ["a?generation=5", "a#5", "a::b", "%2e%2e%2fa", "a//b", "a b+c", "{0}", "ä/./x"])
@pytest.mark.parametrize("size", [5, len(DATA)], ids=["small", "parts"])
async def test_names_that_look_like_something_else_are_names(store: GcsStore, name: str, size: int) -> None:
    path = store.path(name)
    written = await store.write(path, stream(DATA[:size], MIB))
    assert store.raw_read(path) == DATA[:size]
    assert await store.stat(path) == written
    assert [found.path for found in await store.list(store.path(""))] == [path]
    await store.delete(path)
    assert not store.raw_exists(path)


# --- faults

SMALL = 1000
SURVIVABLE = {
    "small refused": (SMALL, Fault(method="POST", target="uploadType=multipart", status=503)),
    "small reset in the middle": (SMALL, Fault(method="POST", target="uploadType=multipart", reset_upload_after=500)),
    "small stored but the reply lost": (SMALL, Fault(method="POST", target="uploadType=multipart", lose_reply=True)),
    "small damaged": (SMALL, Fault(method="POST", target="uploadType=multipart", corrupt_upload_byte=600)),
    "start refused": (None, Fault(method="POST", target=r"\?uploads", status=503, times=2)),
    "started but the reply lost": (None, Fault(method="POST", target=r"\?uploads", lose_reply=True)),
    "part refused": (None, Fault(method="PUT", target="partNumber=2", status=503)),
    "part refused, too many": (None, Fault(method="PUT", target="partNumber=2", status=429)),
    "part reset in the middle": (None, Fault(method="PUT", target="partNumber=2", reset_upload_after=MIB)),
    "part stored but the reply lost": (None, Fault(method="PUT", target="partNumber=2", lose_reply=True)),
    "part damaged": (None, Fault(method="PUT", target="partNumber=2", corrupt_upload_byte=MIB)),
    "part damaged twice": (None, Fault(method="PUT", target="partNumber=2", corrupt_upload_byte=MIB, times=2)),
    "part redirected": (
        None,
        Fault(method="PUT", target="partNumber=2", status=307, headers={"Location": "http://x/"}),
    ),
    "completion refused": (None, Fault(method="POST", target="uploadId", status=503)),
    "completed but the reply lost": (None, Fault(method="POST", target="uploadId", lose_reply=True)),
    "read refused": (None, Fault(method="GET", target="alt=media", status=503)),
    "read reset in the middle": (None, Fault(method="GET", target="alt=media", reset_download_after=MIB)),
    "read cut short": (None, Fault(method="GET", target="alt=media", truncate_after=MIB)),
    "look-up refused": (None, Fault(method="GET", target="/o/[^?]*$", status=429)),
}


@pytest.mark.parametrize("fault", SURVIVABLE)
async def test_write_and_read_survive(through: Callable[..., GcsStore], fault: str) -> None:
    size, happens = SURVIVABLE[fault]
    store = through(happens)
    path, data = store.path("checkpoint.pt"), DATA[:size]
    written = await store.write(path, stream(data, MIB), size_hint=len(data))
    assert await store.read(path, 0, len(data), written) == data
    assert await store.stat(path) == written
    assert any(request.fault for request in store.proxy.log)
    assert store.leftovers() == []


JSON_SURVIVABLE = {
    "start refused": Fault(method="POST", target="uploadType=resumable", status=503),
    "chunk refused": Fault(method="PUT", target="upload_id", status=503, skip=1),
    "chunk reset in the middle": Fault(method="PUT", target="upload_id", reset_upload_after=MIB),
    "last chunk refused": Fault(method="PUT", target="upload_id", status=503, skip=3),
    "published but the reply lost": Fault(method="PUT", target="upload_id", lose_reply=True, skip=3),
    "read reset in the middle": Fault(method="GET", target="alt=media", reset_download_after=MIB),
    "read cut short": Fault(method="GET", target="alt=media", truncate_after=MIB),
}


@pytest.mark.parametrize("fault", JSON_SURVIVABLE)
async def test_server_without_the_xml_api_survives(json_through: Callable[..., JsonStore], fault: str) -> None:
    store = json_through(JSON_SURVIVABLE[fault])
    path = store.path("checkpoint.pt")
    written = await store.write(path, stream(DATA, MIB), size_hint=len(DATA))
    assert await store.read(path, 0, len(DATA), written) == DATA
    assert any(request.fault for request in store.proxy.log)
    assert store.leftovers() == []


@pytest.mark.parametrize("action", ["corrupt_upload_byte", "lose_reply"])
async def test_chunk_that_the_server_has_otherwise_than_it_was_sent_is_noticed_and_nothing_is_published(
    json_through: Callable[..., JsonStore], action: str
) -> None:
    store = json_through(Fault(method="PUT", target="upload_id", **{action: 1000}))  # fake-gcs-server adds it twice
    path = store.path("checkpoint.pt")
    with pytest.raises(StorageError, match="other bytes than were sent"):
        await store.write(path, stream(DATA, MIB))
    assert not store.raw_exists(path)
    assert store.leftovers() == []


async def test_small_object_that_a_server_took_damaged_is_sent_again(json_through: Callable[..., JsonStore]) -> None:
    store = json_through(Fault(method="POST", target="uploadType=multipart", corrupt_upload_byte=600))
    await store.write(store.path("checkpoint.pt"), stream(DATA[:SMALL], 100))
    assert store.raw_read(store.path("checkpoint.pt")) == DATA[:SMALL]


async def test_small_object_that_a_server_keeps_taking_damaged_is_an_error(
    json_through: Callable[..., JsonStore],
) -> None:
    store = json_through(Fault(method="POST", target="uploadType=multipart", corrupt_upload_byte=600, times=None))
    with pytest.raises(StorageError, match="damaged"):
        await store.write(store.path("checkpoint.pt"), stream(DATA[:SMALL], 100))


async def test_small_object_damaged_on_the_way_is_refused_by_the_emulator_and_sent_again(
    gcs_emulator: GcsServer,
) -> None:
    client = GcsClient(gcs_emulator.endpoint)
    bucket = f"ferry-{uuid.uuid4().hex[:12]}"
    client.make_bucket(bucket)
    with TokenProxy(gcs_emulator.port, Fault(method="POST", target="/upload/", corrupt_upload_byte=600)) as proxy:
        store = JsonStore(client, f"gs://{bucket}/prefix", proxy)
        await store.write(store.path("checkpoint.pt"), stream(bytes(1000), 100))
        assert store.raw_read(store.path("checkpoint.pt")) == bytes(1000)
        assert len(proxy.requests("POST", "/upload/")) == 2
    client.close()


@pytest.mark.parametrize("size", [SMALL, 5 * MIB + 1], ids=["small", "parts"])
async def test_tensor_that_changes_while_it_is_sent_is_an_error(store: GcsStore, size: int) -> None:
    """What is sent is not what its checksum was computed of."""
    data = bytearray(DATA[:size])
    path = store.path("checkpoint.pt")
    original = checksum.crc32c

    async def chunks() -> AsyncIterator[Chunk]:
        yield Chunk(memoryview(data))

    def crc32c_and_change(buffers: Any, value: int = 0) -> int:
        found = original(buffers, value)
        if sum(map(len, buffers)) > 1:  # not by the last part, which is one byte: it may come first
            data[len(data) // 2] = DATA[len(data) // 2] ^ 1
        return found

    with pytest.MonkeyPatch.context() as patch:
        for module in ("upload", "multipart"):
            patch.setattr(f"torchferry_gcs.{module}.crc32c", crc32c_and_change)
        with pytest.raises(ChangedWhileSavingError):
            await store.write(path, chunks())
    assert not store.raw_exists(path)
    assert store.leftovers() == []


class ForgetfulProxy(TokenProxy):
    """Answers a completion without what tells of the object, as servers may."""

    def answered(self, head: Head) -> Head:
        return super().answered(head).without("x-goog-generation").without("x-goog-hash")


async def test_generation_that_a_completion_does_not_tell_is_looked_up(
    google: tuple[GcsClient, int, str],
) -> None:
    with ForgetfulProxy(google[1]) as proxy:
        store = GcsStore(google[0], f"gs://{google[2]}/{uuid.uuid4().hex}", proxy)
        path = store.path("checkpoint.pt")
        written = await store.write(path, stream(DATA, MIB))
        assert written.etag is not None
        assert await store.stat(path) == written


class LyingProxy(TokenProxy):
    """Says of every object that it has another CRC32C."""

    def answered(self, head: Head) -> Head:
        head = super().answered(head).without("x-goog-hash")
        return Head(head.first_line, (b"x-goog-hash: crc32c=AAAAAA==\r\n", *head.lines))


async def test_whole_object_that_the_store_says_has_another_crc32c_is_an_error(
    google: tuple[GcsClient, int, str],
) -> None:
    with LyingProxy(google[1]) as proxy:
        store = GcsStore(google[0], f"gs://{google[2]}/{uuid.uuid4().hex}", proxy)
        with pytest.raises(StorageError, match="CRC32C AAAAAA== instead of"):
            await store.write(store.path("checkpoint.pt"), stream(DATA, MIB))


async def test_completion_of_an_upload_that_is_gone_says_so(through: Callable[..., GcsStore]) -> None:
    store = through(Fault(method="POST", target="uploadId", status=404, code="NoSuchUpload", times=None))
    store.raw_write(store.path("checkpoint.pt"), b"another object")
    with pytest.raises(StorageUnavailableError, match="the upload is gone"):
        await store.write(store.path("checkpoint.pt"), stream(DATA, MIB))
    assert store.raw_read(store.path("checkpoint.pt")) == b"another object"
    assert store.leftovers() == []


# --- retries


class Retries(logging.Handler):
    """Waits for a number of repetitions, which are logged."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self._left = count
        self.reached = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self._left -= "Trying again" in record.getMessage()
        if self._left <= 0:
            self.reached.set()


@pytest.fixture
def retries() -> Iterator[Retries]:
    handler = Retries(6)
    logging.getLogger("torchferry.engine").addHandler(handler)
    yield handler
    logging.getLogger("torchferry.engine").removeHandler(handler)


@pytest.mark.parametrize("kind", ["refuse", 503, 429])
@pytest.mark.parametrize("begins", ["at once", "in the middle"])
async def test_outage_is_survived(store: GcsStore, retries: Retries, kind: Any, begins: str) -> None:
    path = store.path("checkpoint.pt")
    begun = threading.Event()

    def outage() -> None:
        if begins == "in the middle":
            store.proxy.wait_for("PUT", "partNumber=1")
        with store.proxy.outage(kind):
            begun.set()
            assert retries.reached.wait(60.0)

    breaking = asyncio.create_task(asyncio.to_thread(outage))
    if begins == "at once":
        await asyncio.to_thread(begun.wait)
    written = await store.write(path, stream(DATA * 4, MIB))
    await breaking
    assert await store.read(path, 0, len(DATA), written) == DATA
    assert store.leftovers() == []


async def test_retry_after_is_obeyed(through: Callable[..., GcsStore], caplog: pytest.LogCaptureFixture) -> None:
    refused = Fault(status=429, headers={"Retry-After": "1"})
    for happens in (replace(refused, target="partNumber=2"), replace(refused, target=r"\?uploads")):
        store = through(happens)
        caplog.clear()
        await store.write(store.path("checkpoint.pt"), stream(DATA, MIB))
        assert "Trying again in 1.0 s." in caplog.text


async def test_attempts_of_gcsfs_and_of_the_engine_do_not_multiply(through: Callable[..., GcsStore]) -> None:
    store = through(Fault(method="GET", target="/o/", status=503, times=3))
    store.raw_write(store.path("checkpoint.pt"), b"12345")
    transfer = Transfer()
    with transfer.running(None):
        await store.stat(store.path("checkpoint.pt"))
    assert len(store.proxy.log) == transfer.report().requests == 4
    assert transfer.report().retries == 3


async def test_store_that_takes_a_part_and_refuses_it_each_time_is_given_up(through: Callable[..., GcsStore]) -> None:
    store = through(Fault(method="PUT", target="partNumber=2", status=503, times=None))
    with (
        Transfer(give_up_after=1.0).running(None),
        pytest.raises(StorageUnavailableError, match="503"),
    ):
        await store.write(store.path("checkpoint.pt"), stream(DATA, MIB))
    assert store.leftovers() == []


async def test_part_that_is_never_answered_is_given_up(
    through: Callable[..., GcsStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchferry.storage.body._SILENCE", 0.3)
    store = through(Fault(method="PUT", target="partNumber=2", hang=True, times=None))
    (await store.backend.engine()).transport.silence = 0.3
    with Transfer(give_up_after=1.0).running(None), pytest.raises(StorageUnavailableError, match="no answer"):
        await store.write(store.path("checkpoint.pt"), stream(DATA, MIB))
    assert store.leftovers() == []


async def test_server_that_never_answers_is_given_up_and_nothing_is_said_to_be_left(
    through: Callable[..., GcsStore], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("torchferry.storage.body._SILENCE", 0.2)
    store = through(Fault(hang=True, times=None))
    (await store.backend.engine()).transport.silence = 0.2
    with Transfer(give_up_after=0.5).running(None), pytest.raises(StorageUnavailableError) as caught:
        await store.write(store.path("checkpoint.pt"), stream(DATA[:SMALL], MIB))
    assert not hasattr(caught.value, "__notes__")
    assert "could not be removed" not in caplog.text


async def test_what_an_abort_cannot_remove_is_named_with_the_reason(
    through: Callable[..., GcsStore], caplog: pytest.LogCaptureFixture
) -> None:
    store = through(
        Fault(method="PUT", target="partNumber=2", status=412, times=None),
        Fault(method="DELETE", status=403, times=None),
    )
    with pytest.raises(StorageError) as caught:
        await store.write(store.path("checkpoint.pt"), stream(DATA, MIB))
    assert not isinstance(caught.value, StoragePermissionError)
    (note,) = caught.value.__notes__
    (left,) = store.leftovers()
    assert "could not be removed" in note
    assert left in note
    assert note in caplog.text


# --- cancels


async def cancel_when(store: GcsStore, path: str, under_way: Callable[[], object], chunks: Any = None) -> None:
    task = asyncio.create_task(store.write(path, chunks or stream(DATA, MIB)))
    await asyncio.to_thread(under_way)
    task.cancel()
    with anyio.fail_after(5), pytest.raises(asyncio.CancelledError):
        await task


HANGING = {
    "start": ("POST", r"\?uploads"),
    "part": ("PUT", "partNumber=2"),
}


@pytest.mark.parametrize("hangs", HANGING)
async def test_cancel_while_a_request_hangs_leaves_nothing(
    through: Callable[..., GcsStore], caplog: pytest.LogCaptureFixture, hangs: str
) -> None:
    method, target = HANGING[hangs]
    store = through(Fault(method=method, target=target, hang=True, times=None))
    path = store.path("checkpoint.pt")
    store.raw_write(path, b"old")
    await cancel_when(store, path, partial(store.proxy.wait_for, method, target))
    assert store.raw_read(path) == b"old"
    assert store.leftovers() == []
    assert "could not be removed" not in caplog.text


async def test_cancel_while_a_part_hangs_and_more_is_to_come_leaves_nothing(
    through: Callable[..., GcsStore], caplog: pytest.LogCaptureFixture
) -> None:
    store = through(Fault(method="PUT", target="partNumber=2", hang=True, times=None))

    async def unending() -> AsyncIterator[Chunk]:
        yield Chunk(DATA)
        await anyio.sleep_forever()

    path = store.path("checkpoint.pt")
    await cancel_when(store, path, partial(store.proxy.wait_for, "PUT", "partNumber=2"), unending())
    assert store.leftovers() == []
    assert "could not be removed" not in caplog.text


async def test_upload_whose_creation_was_not_answered_is_found_and_aborted(through: Callable[..., GcsStore]) -> None:
    store = through(Fault(method="POST", target=r"\?uploads", lose_reply=True, times=None))
    path = store.path("checkpoint.pt")
    with Transfer(give_up_after=0.5).running(None), pytest.raises(StorageUnavailableError):
        await store.write(path, stream(DATA, MIB))
    assert store.proxy.requests("POST", r"\?uploads")
    assert store.leftovers() == []


async def test_uploads_of_others_to_the_same_object_are_not_aborted(
    through: Callable[..., GcsStore], google: tuple[GcsClient, int, str]
) -> None:
    """They were begun earlier, or have parts."""
    store = through(Fault(method="POST", target=r"\?uploads", lose_reply=True))
    path = store.path("checkpoint.pt")
    theirs = begin_upload(google, path, DATA[: 5 * MIB])
    await store.write(path, stream(DATA, MIB))
    assert store.leftovers() == [theirs]


async def test_cancels_at_any_moment_publish_nothing_and_leave_nothing(through: Callable[..., GcsStore]) -> None:
    """At every request of a write but the one that publishes: when it comes in, over a link of 40 MB/s."""
    store = through(bandwidth=40e6)
    await store.write(store.path("whole.pt"), stream(DATA, MIB))
    requests_of_a_write = len([r for r in store.proxy.log if r.method != "GET"])
    assert requests_of_a_write == 5  # start, three parts, completion
    for number in range(1, requests_of_a_write):
        path = store.path(f"{number}.pt")
        before = len(store.proxy.log)
        await cancel_when(store, path, partial(store.proxy.wait_for, count=before + number))
        assert not store.raw_exists(path)
        assert store.leftovers() == []


async def test_cancel_while_the_completion_is_answered_is_exact(through: Callable[..., GcsStore]) -> None:
    store = through()
    path = store.path("checkpoint.pt")
    store.raw_write(path, b"old")
    await cancel_when(store, path, partial(store.proxy.wait_for, "POST", "uploadId"))
    assert store.raw_read(path) in {b"old", DATA}
    after = store.raw_read(path)
    assert store.leftovers() == []
    assert store.raw_read(path) == after


async def test_cancel_between_two_attempts_to_complete_publishes_nothing(through: Callable[..., GcsStore]) -> None:
    store = through(Fault(method="POST", target="uploadId", status=503, headers={"Retry-After": "1"}))
    path = store.path("checkpoint.pt")
    store.raw_write(path, b"old")
    await cancel_when(store, path, partial(store.proxy.wait_for, "POST", "uploadId"))
    with anyio.fail_after(5):
        while store.leftovers():  # noqa: ASYNC110 - the store has no event
            await anyio.sleep(0.01)
    assert store.raw_read(path) == b"old"
    assert len(store.proxy.requests("POST", "uploadId")) == 1


async def test_cancelled_resumable_upload_deletes_its_session(json_through: Callable[..., JsonStore]) -> None:
    store = json_through(Fault(method="PUT", target="upload_id", hang=True, skip=1, times=None))
    path = store.path("checkpoint.pt")
    await cancel_when(store, path, partial(store.proxy.wait_for, "PUT", "upload_id", count=2))
    assert not store.raw_exists(path)
    assert store.proxy.requests("DELETE", "upload_id")
    assert store.leftovers() == []


# --- what killed writers left


async def test_discard_removes_what_a_killed_writer_left(store: GcsStore, google: tuple[GcsClient, int, str]) -> None:
    path = store.path("run/checkpoint.pt")
    begin_upload(google, path)
    (left,) = await store.backend_leftovers(store.path("run/"))
    assert (left.path, left.url, left.kind) == (path, f"gs://{path}", "multipart upload")
    assert left.modified is not None
    assert left.modified.tzinfo is not None
    assert await run_on(store.backend.loop, store.backend.discard, left)
    assert store.leftovers() == []
    assert await run_on(store.backend.loop, store.backend.discard, left)  # nothing there is no error


async def test_list_and_leftovers_of_a_missing_bucket_are_not_found(
    store: GcsStore, json_through: Callable[..., JsonStore]
) -> None:
    for each in (store, json_through()):
        with pytest.raises(CheckpointNotFoundError, match="bucket"):
            await each.list("ferry-nowhere/x")
        with pytest.raises(CheckpointNotFoundError, match="bucket"):
            await each.backend_leftovers("ferry-nowhere/x")


async def test_a_time_out_of_the_client_is_named(through: Callable[..., GcsStore]) -> None:
    store = through(Fault(hang=True, times=None), requests_timeout=0.2)
    with Transfer(give_up_after=0.0).running(None), pytest.raises(StorageUnavailableError, match="Timeout"):
        await store.stat(store.path("checkpoint.pt"))


async def test_a_listing_that_is_no_json_is_an_error_of_the_store(through: Callable[..., GcsStore]) -> None:
    """As the page on which a network asks its guests to log in."""
    store = through(Fault(method="GET", target=r"/o\?", status=200))
    with pytest.raises(StorageError, match="Cannot list"):
        await store.list(store.path(""))


async def test_list_and_leftovers_come_in_pages(google: tuple[GcsClient, int, str]) -> None:
    class PagingProxy(TokenProxy):
        """Asks for pages of 3, whatever the client asks for."""

        def admit(self, head: Head) -> Head | bytes:
            first = head.first_line.replace("?uploads", "?max-uploads=3&uploads").replace("/o?", "/o?maxResults=3&")
            return super().admit(Head(first, head.lines))

    with PagingProxy(google[1]) as proxy:
        store = GcsStore(google[0], f"gs://{google[2]}/{uuid.uuid4().hex}", proxy)
        paths = [store.path(f"{number:04}.pt") for number in range(7)]
        for path in paths:
            store.raw_write(path, b"x")
            begin_upload(google, path)
        found = await store.list(store.path(""))
        assert [each.path for each in found] == paths
        assert all(each.etag and each.modified and each.modified.tzinfo for each in found)
        assert [each.path for each in await store.backend_leftovers(store.path(""))] == paths
        assert len(proxy.requests("GET", "pageToken")) == len(proxy.requests("GET", "key-marker")) == 2


# --- metadata

BAD_METADATA = {
    "not ASCII": {"author": "Jürgen"},
    "spaces at the ends": {"author": " J "},
    "90 entries": {f"key-{number}": "x" for number in range(90)},
    "more than 8 KiB": {"notes": "x" * (8 << 10)},
    "names that differ in case only": {"step": "1", "Step": "2"},
}


@pytest.mark.parametrize("bad", BAD_METADATA)
async def test_metadata_that_would_not_come_back_is_refused_before_the_first_byte(store: GcsStore, bad: str) -> None:
    taken = []
    for size in (SMALL, len(DATA)):
        with pytest.raises(UnsupportedOptionError):
            await store.write(
                store.path("x.pt"), stream(DATA[:size], MIB, then=lambda: taken.append(1)), metadata=BAD_METADATA[bad]
            )
    assert taken == []
    assert store.proxy.log == []


@pytest.mark.parametrize("size", [SMALL, 5 * MIB + 1], ids=["small", "parts"])
@pytest.mark.parametrize(
    "metadata", [{f"Key-{n}": "x" * 100 for n in range(64)}, {"a": "", "b": "1 2", "c": '"<&>"\\'}], ids=["many", "odd"]
)
async def test_metadata_that_is_not_refused_comes_back_with_what_is_read(
    store: GcsStore, size: int, metadata: dict[str, str]
) -> None:
    path = store.path("checkpoint.pt")
    written = await store.write(path, stream(DATA[:size], MIB), metadata=metadata)
    found = await store.stat(path)
    assert found.metadata == written.metadata == storable("gs://x", metadata)
    transfer = Transfer()
    with transfer.running(None):
        assert await store.read(path, 0, size, found) == DATA[:size]
    assert transfer.report().client_bytes == 0


# --- settings


@pytest.mark.parametrize("kind", ["through", "json_through"])
async def test_kms_key_and_billed_project_are_in_every_request(request: pytest.FixtureRequest, kind: str) -> None:
    store: GcsStore = request.getfixturevalue(kind)(kms_key_name=KMS_KEY, requester_pays="payer")
    path = store.path("checkpoint.pt")
    for size in (SMALL, len(DATA)):
        await store.write(path, stream(DATA[:size], MIB))
    await store.read(path, 0, 5, await store.stat(path))

    def pays(request: Request) -> bool:
        return "userProject=payer" in request.target or request.headers.get("x-goog-user-project") == "payer"

    def encrypts(request: Request) -> bool:
        named = request.headers.get("x-goog-encryption-kms-key-name") == KMS_KEY
        return "kmsKeyName=projects" in request.target or named

    assert all(pays(request) for request in store.proxy.log if "upload_id=" not in request.target)
    assert all(encrypts(request) for request in store.proxy.requests("POST", r"uploadType=|\?uploads"))


class MySubclass(gcsfs.GCSFileSystem):
    """A user's own; makes requests its own way."""

    calls = 0

    async def _call(self, *args: Any, **kwargs: Any) -> Any:
        type(self).calls += 1
        return await super()._call(*args, **kwargs)


@pytest.mark.parametrize("kind", ["through", "json_through"])
async def test_subclass_of_the_users_is_used_for_every_request(request: pytest.FixtureRequest, kind: str) -> None:
    store: GcsStore = request.getfixturevalue(kind)()
    fs = MySubclass(**store.options["storage_options"], skip_instance_cache=True)
    store.backend, _ = open_backend(store.url, filesystem=fs)
    path = store.path("checkpoint.pt")
    transfer = Transfer()
    before = MySubclass.calls
    with transfer.running(None):
        written = await store.write(path, stream(DATA, MIB), metadata={"step": "1"})
        assert await store.read(path, 5, MIB, written) == DATA[5:MIB]
    assert (await store.stat(path)).metadata == {"step": "1"}
    assert [found.path for found in await store.list(store.path(""))] == [path]
    assert transfer.report().client_bytes == len(DATA) + MIB - 5
    with pytest.raises(CheckpointNotFoundError, match="bucket"):
        await store.write("ferry-nowhere/x", stream(DATA, MIB))
    await store.delete(path)
    with pytest.raises(CheckpointNotFoundError):
        await store.stat(path)
    assert MySubclass.calls - before == len(store.proxy.log)
    assert store.leftovers() == []


async def test_session_settings_of_the_users_go_through_the_client(through: Callable[..., GcsStore]) -> None:
    store = through(session_kwargs={"headers": {"x-goog-custom-audit-job": "7"}})
    path = store.path("checkpoint.pt")
    transfer = Transfer()
    with transfer.running(None):
        written = await store.write(path, stream(DATA, MIB))
        assert await store.read(path, 5, MIB, written) == DATA[5:MIB]
    assert all(request.headers["x-goog-custom-audit-job"] == "7" for request in store.proxy.log)
    assert transfer.report().client_reasons == ("the filesystem has session_kwargs",)


def test_filesystem_that_gcsfs_registers_itself_goes_through_the_engine() -> None:
    kinds = [gcsfs.core.GCSFileSystem]
    if find_spec("gcsfs.extended_gcsfs") is not None:  # newer gcsfs has it
        kinds.append(import_module("gcsfs.extended_gcsfs").ExtendedGcsFileSystem)
    for kind in kinds:
        fs = kind(token="anon", skip_instance_cache=True)
        backend: Any = open_backend("gs://bucket/key", filesystem=fs)[0]
        assert backend.client.why_not_engine == ""


@pytest.mark.parametrize("protocol", ["gs", "gcs"])
def test_both_protocols_lead_here(protocol: str, gcs_server: GcsServer) -> None:
    backend, path = open_backend(f"{protocol}://bucket/key", storage_options=gcs_server.storage_options)
    assert type(backend).__name__ == "GcsBackend"
    assert path == "bucket/key"


@pytest.mark.parametrize("kind", ["through", "json_through"])
async def test_filesystem_made_for_its_users_loop_works(request: pytest.FixtureRequest, kind: str) -> None:
    store: GcsStore = request.getfixturevalue(kind)()
    fs = gcsfs.GCSFileSystem(**store.options["storage_options"], asynchronous=True, skip_instance_cache=True)
    store.backend, path = open_backend(store.url, filesystem=fs)
    assert store.backend.loop is None
    written = await store.write(path, stream(DATA, MIB))
    assert await store.read(path, 0, 10, written) == DATA[:10]
    assert store.raw_read(path) == DATA
    await fs.session.close()


async def test_gcsfs_sees_what_was_written(store: GcsStore) -> None:
    fs = gcsfs.GCSFileSystem(**store.options["storage_options"])
    parent = store.path("")[:-1]
    assert await asyncio.to_thread(fs.find, parent) == []
    for size in (SMALL, len(DATA)):
        path = store.path(f"{size}.pt")
        await store.write(path, stream(DATA[:size], MIB))
        assert path in await asyncio.to_thread(fs.find, parent)


async def test_filesystems_are_freed(store: GcsStore) -> None:
    seen = []
    for _ in range(3):
        fs = gcsfs.GCSFileSystem(**store.options["storage_options"], skip_instance_cache=True)
        seen.append(weakref.ref(fs))
        backend, path = open_backend(store.url, filesystem=fs)
        written = await run_on(
            backend.loop, partial(backend.write, path, stream(DATA, MIB), plan=backend.upload_plan(1))
        )
        await run_on(backend.loop, backend.read, path, 0, 5, written)
        del fs, backend
    gc.collect()
    assert [ref() for ref in seen[:-1]] == [None, None]


async def test_idle_connections_stay_open_for_the_last_eight_filesystems(store: GcsStore) -> None:
    made = []
    for _ in range(10):
        fs = gcsfs.GCSFileSystem(**store.options["storage_options"], skip_instance_cache=True)
        backend, path = open_backend(store.url, filesystem=fs)
        await run_on(backend.loop, partial(backend.write, path, stream(DATA, MIB), plan=backend.upload_plan(1)))
        await run_on(backend.loop, fs._info, path)  # over gcsfs's own connection
        made.append(fs)

    async def idle() -> list[int]:
        return [sum(map(len, fs._session.connector._conns.values())) for fs in made]

    counts = await run_on(made[0].loop, idle)
    assert counts[:2] == [0, 0]
    assert all(counts[2:])


def test_checkpoint_goes_there_and_back(store: GcsStore) -> None:
    state = {"weights": torch.arange(4 * MIB, dtype=torch.float32), "step": 3}
    torchferry.save(state, store.url, storage_options=store.options["storage_options"], part_size=5 * MIB)
    loaded = torchferry.load(store.url, storage_options=store.options["storage_options"])
    assert torch.equal(loaded["weights"], state["weights"])
    assert loaded["step"] == 3


# --- what gcsfs does, which client.py relies on


async def test_request_carries_what_gcsfs_itself_sends(through: Callable[..., GcsStore]) -> None:
    """Where this fails, look at ``GCSFileSystem._request``: the client module makes requests as it does."""
    store = through(requester_pays=True)
    path = store.path("checkpoint.pt")
    store.raw_write(path, b"12345")
    fs = gcsfs.GCSFileSystem(**store.options["storage_options"])
    await asyncio.to_thread(fs.info, path)
    theirs = store.proxy.requests("GET", "/o/")[-1]
    await store.stat(path)
    ours = store.proxy.log[-1]
    assert ours.target == theirs.target
    names = {"authorization", "user-agent", "accept", "x-goog-user-project"}
    sent = [{name: value for name, value in each.headers.items() if name in names} for each in (ours, theirs)]
    assert sent[0].items() >= sent[1].items()


def test_google_crc32c_has_the_c_function() -> None:
    """Where this fails, checksums are computed of copies: see ``native_crc32c``."""
    assert google_crc32c.implementation == "c"
    assert checksum.native_crc32c() is not None


# --- redirects


class Elsewhere:
    """Another host, which keeps the requests that come to it."""

    def __init__(self) -> None:
        self.seen: list[set[str]] = []
        seen = self.seen

        class Handler(BaseHTTPRequestHandler):
            def handle_any(self) -> None:
                seen.append({name.lower() for name in self.headers})
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_GET = do_POST = do_PUT = do_DELETE = handle_any  # noqa: N815

            def log_message(self, *args: object) -> None:
                """Nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/there"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def elsewhere() -> Iterator[Elsewhere]:
    host = Elsewhere()
    yield host
    host.close()


@pytest.mark.parametrize("status", [302, 307, 308])
async def test_redirect_carries_no_token_to_another_host(
    through: Callable[..., GcsStore], elsewhere: Elsewhere, status: int
) -> None:
    plain = through()
    path = plain.path("checkpoint.pt")
    written = await plain.write(path, stream(b"12345", 2))
    keys = {"headers": {"x-goog-encryption-key": "secret"}}
    for options in ({}, {"session_kwargs": keys}):
        store = through(Fault(status=status, headers={"Location": elsewhere.url}, times=None), **options)
        loop, backend = store.backend.loop, store.backend
        for attempt in (
            partial(store.stat, path),
            partial(store.read, path, 0, 5, written),
            partial(store.write, path, stream(DATA[:SMALL], MIB)),
            partial(store.write, path, stream(DATA, MIB)),
            partial(store.delete, path),
            partial(store.list, path),
            partial(run_on, loop, backend.discard, Leftover(path, plain.url, "multipart upload", "id")),
        ):
            with pytest.raises(StorageError, match="redirects to another host"):
                await attempt()
    assert elsewhere.seen == []


async def test_redirect_that_gcsfs_itself_follows_carries_no_token(
    through: Callable[..., GcsStore], elsewhere: Elsewhere
) -> None:
    """A subclass of the user's makes its requests itself: aiohttp takes the token off."""
    store = through(Fault(status=307, headers={"Location": elsewhere.url}, times=None))
    fs = MySubclass(**store.options["storage_options"], skip_instance_cache=True)
    store.backend, path = open_backend(store.url, filesystem=fs)
    with pytest.raises(StorageError):
        await store.stat(path)
    assert elsewhere.seen
    assert not any("authorization" in names for names in elsewhere.seen)


async def test_redirect_within_a_host_is_followed(through: Callable[..., GcsStore]) -> None:
    plain = through()
    path = plain.path("checkpoint.pt")
    written = await plain.write(path, stream(DATA, MIB))
    target = f"/storage/v1/b/{path.replace('/', '/o/', 1).replace('/checkpoint', '%2Fcheckpoint')}"
    store = through(Fault(method="GET", status=307, headers={"Location": target}))
    assert await store.stat(path) == written


async def test_endpoint_with_a_path_works(through: Callable[..., GcsStore]) -> None:
    store = through()

    class PrefixProxy(TokenProxy):
        def admit(self, head: Head) -> Head | bytes:
            assert " /gateway/" in head.first_line
            return super().admit(Head(head.first_line.replace(" /gateway/", " /", 1), head.lines))

    with PrefixProxy(store.proxy._upstream_port) as proxy:
        store.backend, _ = open_backend(
            store.url, storage_options=with_token("ferry-test-token", f"{proxy.endpoint}/gateway/")
        )
        transfer = Transfer()
        with transfer.running(None):
            written = await store.write(store.path("checkpoint.pt"), stream(DATA, MIB))
            assert await store.read(store.path("checkpoint.pt"), 0, 9, written) == DATA[:9]
        assert transfer.report().client_bytes == 0


async def test_proxy_in_the_environment_is_the_clients_business(
    store: GcsStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    transfer = Transfer()
    with transfer.running(None):
        written = await store.write(store.path("checkpoint.pt"), stream(DATA, MIB))
        assert await store.read(store.path("checkpoint.pt"), 0, 9, written) == DATA[:9]
    assert "there is a proxy" in transfer.report().client_reasons


# --- credentials


async def test_anonymous_requests_carry_no_token(google: tuple[GcsClient, int, str], store: GcsStore) -> None:
    class OpenProxy(TokenProxy):
        def admit(self, head: Head) -> Head | bytes:
            return head

    with OpenProxy(google[1]) as proxy:
        store.backend, _ = open_backend(
            store.url, storage_options={"token": "anon", "endpoint_url": proxy.endpoint, "project": "p"}
        )
        path = store.path("checkpoint.pt")
        written = await store.write(path, stream(DATA, MIB))
        assert await store.read(path, MIB, 2 * MIB, written) == DATA[MIB : 2 * MIB]
        await store.delete(path)
        assert all("authorization" not in request.headers for request in proxy.log)
        assert proxy.log


class TokenIssuer(TokenServer):
    """An OAuth server that gives out tokens, as Google's does for a service account."""

    def __init__(self, proxy: TokenProxy, lifetime: int, status: int = 200) -> None:
        super().__init__()
        self.issued: list[str] = []
        self._proxy = proxy
        self._lifetime = lifetime
        self.status = status

    def answer(self, path: str, **form: str) -> tuple[int, dict[str, Any]]:
        del path, form
        if self.status != 200:
            return self.status, {"error": "invalid_grant"}
        self.issued.append(f"issued-{len(self.issued)}")
        self._proxy.tokens.add(self.issued[-1])
        return 200, {"access_token": self.issued[-1], "expires_in": self._lifetime, "token_type": "Bearer"}

    def service_account(self) -> dict[str, str]:
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return {
            "type": "service_account",
            "client_email": "ferry@test.iam.gserviceaccount.com",
            "private_key": pem.decode(),
            "private_key_id": "1",
            "token_uri": f"http://127.0.0.1:{self.port}/token",
        }


@pytest.mark.parametrize("form", ["file", "dict", "google_default"])
async def test_service_account_gets_a_token_once(
    form: str, store: GcsStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with TokenIssuer(store.proxy, lifetime=3600) as issuer:
        account = issuer.service_account()
        file = tmp_path / "account.json"
        file.write_text(json.dumps(account | {"project_id": "p"}))
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
        token = {"file": str(file), "dict": account, "google_default": "google_default"}[form]
        options = {"token": token, "endpoint_url": store.proxy.endpoint}
        store.backend, _ = open_backend(store.url, storage_options=options)
        await store.write(store.path("checkpoint.pt"), stream(DATA, MIB))
        assert store.raw_read(store.path("checkpoint.pt")) == DATA
        assert {request.headers["authorization"] for request in store.proxy.log} == {"Bearer issued-0"}
        assert issuer.issued == ["issued-0"]


async def test_token_is_renewed_before_it_expires(store: GcsStore) -> None:
    """One that lasts 3 minutes is within the last 5, in which newer gcsfs renews."""
    with TokenIssuer(store.proxy, lifetime=180) as issuer:
        options = {"token": issuer.service_account(), "endpoint_url": store.proxy.endpoint}
        store.backend, _ = open_backend(store.url, storage_options=options)
        path = store.path("checkpoint.pt")
        await store.write(path, stream(b"12345", 2))
        await store.stat(path)
        assert len(issuer.issued) > 1
        assert store.proxy.log[-1].headers["authorization"] == f"Bearer {issuer.issued[-1]}"


async def test_credentials_that_cannot_be_renewed_are_a_permission_error_at_once(store: GcsStore) -> None:
    with TokenIssuer(store.proxy, lifetime=180, status=400) as issuer:
        for token in (Credentials(None), issuer.service_account()):  # nothing to get a token with; refused
            options = {"token": token, "endpoint_url": store.proxy.endpoint}
            store.backend, path = open_backend(store.url, storage_options=options)
            transfer = Transfer()
            with transfer.running(None), pytest.raises(StoragePermissionError, match="credentials"):
                await store.stat(path)
            assert transfer.report().retries == 0


@pytest.mark.parametrize("status", [401, 403])
async def test_refused_token_is_a_permission_error_and_leaves_nothing(
    through: Callable[..., GcsStore], status: int
) -> None:
    store = through(Fault(method="PUT", target="partNumber=2", status=status, code="AccessDenied", times=None))
    with pytest.raises(StoragePermissionError, match="AccessDenied"):
        await store.write(store.path("checkpoint.pt"), stream(DATA, MIB))
    assert store.leftovers() == []


# --- errors


def test_statuses_are_the_errors_that_a_caller_would_catch() -> None:
    for error, kind in (
        (HttpError({"code": 503, "message": "busy"}), StorageUnavailableError),
        (HttpError({"code": 401, "message": "who?"}), StoragePermissionError),
        (OSError("Forbidden: x"), StoragePermissionError),
        (FileNotFoundError("x"), CheckpointNotFoundError),
        (errors.GcsAnswerError(503, {}, b""), StorageUnavailableError),
        (errors.GcsAnswerError(403, {}, b'{"error": {"message": "no"}}'), StoragePermissionError),
        (errors.GcsAnswerError(404, {}, b""), CheckpointNotFoundError),
        (errors.GcsAnswerError(400, {}, b"<Error><Code>InvalidArgument</Code></Error>"), StorageError),
    ):
        assert isinstance(errors.translate("Cannot write gs://x", error), kind)


def test_what_the_store_says_is_in_the_message() -> None:
    body = b"<Error><Code>InvalidArgument</Code><Message>Invalid argument.</Message><Details>too odd</Details></Error>"
    error = errors.GcsAnswerError(400, {}, body)
    assert error.code == "InvalidArgument"
    assert "Invalid argument. too odd" in str(errors.translate("Cannot write gs://x", error))
    assert "no such thing" in str(errors.GcsAnswerError(400, {}, b'{"error": {"message": "no such thing"}}'))


# --- CRC32C


@pytest.mark.parametrize("native", [True, False])
def test_crc32c_is_that_of_the_buffers_one_after_the_other(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr(checksum, "native_crc32c", lambda: None)
    data = DATA[: 3 * MIB + 7]
    pieces = [data[:5], memoryview(data)[5:MIB], b"", bytearray(data[MIB:])]
    assert checksum.crc32c(pieces) == google_crc32c.value(data)
    assert checksum.crc32c([b"56789"], checksum.crc32c([b"1234"])) == 0xE3069283  # RFC 3720's check value
    assert checksum.encoded(0xE3069283) == "4waSgw=="


@pytest.mark.parametrize("length", [0, 1, 2, 255, 5 * MIB, 5 * MIB + 1])
def test_combined_crc32c_is_that_of_the_whole(length: int) -> None:
    first, second = DATA[:1000], DATA[1000 : 1000 + length]
    combined = checksum.combine(google_crc32c.value(first), google_crc32c.value(second), len(second))
    assert combined == google_crc32c.value(first + second)


def test_crc32c_of_terabytes_is_combined_as_it_is_added_up() -> None:
    once = google_crc32c.value(DATA)
    total, length = once, len(DATA)
    for _ in range(20):
        total, length = checksum.combine(total, total, length), 2 * length
    again = once
    for _ in range(2**10 - 1):
        again = checksum.combine(again, once, len(DATA))
    thousand = again
    for _ in range(2**10 - 1):
        again = checksum.combine(again, thousand, len(DATA) * 2**10)
    assert total == again
