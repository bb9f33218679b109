from __future__ import annotations

import asyncio
import dataclasses
import json
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import botocore.session
import gcsfs
import pytest
from botocore import UNSIGNED
from botocore.config import Config
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from gcsfs.retry import HttpError
from google.oauth2.credentials import Credentials

import torchferry_gcs
from torchferry.engine.loops import run_on
from torchferry.errors import (
    CheckpointChangedError,
    CheckpointNotFoundError,
    StorageError,
    StoragePermissionError,
    StorageUnavailableError,
    UnsupportedOptionError,
)
from torchferry.storage.base import MIB, Backend, Plane
from torchferry.storage.registry import open_backend
from torchferry.testing import CloudConformance, StoreUnderTest
from torchferry.testing.conformance import cancel_at_the_end, stream
from torchferry.testing.faultproxy import Fault, Head
from torchferry.testing.fixtures import GcsClient
from torchferry.testing.gcs import GcsServer, TokenProxy
from torchferry.testing.tokens import TokenServer

if TYPE_CHECKING:
    from collections.abc import Callable

DATA = bytes(range(256)) * (12 * 4096)  # 12 MiB: three parts of 5 MiB


def with_token(token: str, endpoint: str) -> dict[str, Any]:
    return {"endpoint_url": endpoint, "project": "ferry-test-project", "token": Credentials(token)}


class GcsStore(StoreUnderTest):
    """The JSON API."""

    keeps_metadata = True

    def __init__(self, client: GcsClient, url: str, storage_options: dict[str, Any], plane: Plane = "fsspec") -> None:
        self.options = {"storage_options": storage_options, "plane": plane}
        self.backend, self._prefix = open_backend(url, **self.options)
        self._client = client

    def path(self, name: str) -> str:
        return f"{self._prefix}/{name}"

    def raw_write(self, path: str, data: bytes) -> None:
        self._client.write(path, data)

    def raw_read(self, path: str) -> bytes:
        return self._client.read(path)

    def raw_exists(self, path: str) -> bool:
        return self._client.exists(path)

    def leftovers(self) -> list[str]:
        return [name for name in self._client.names(self._prefix) if "/.torchferry-" in name]


class TestGcsThroughGcsfs(CloudConformance):
    @pytest.fixture
    def store(self, gcs_client: GcsClient, gcs_url: str, gcs_storage_options: dict[str, Any]) -> GcsStore:
        return GcsStore(gcs_client, gcs_url, gcs_storage_options)

    @pytest.fixture
    def path_in_missing_container(self) -> str:
        return "ferry-nowhere/checkpoint.pt"

    @pytest.fixture
    def unauthorized(self, gcs_server: GcsServer, gcs_url: str) -> Iterator[Backend]:
        with TokenProxy(gcs_server.port) as proxy:
            options = with_token("ferry-powerless-token", proxy.endpoint)
            yield open_backend(gcs_url, storage_options=options, plane="fsspec")[0]


class GcsXmlStore(StoreUnderTest):
    """The XML API, which is S3's but for the names of headers: an S3 client goes around what is under test."""

    keeps_metadata = True

    def __init__(self, client: Any, url: str, storage_options: dict[str, Any]) -> None:
        self.options = {"storage_options": storage_options, "plane": "obstore"}
        self.backend, self._prefix = open_backend(url, **self.options)
        self._client = client

    def path(self, name: str) -> str:
        return f"{self._prefix}/{name}"

    def raw_write(self, path: str, data: bytes) -> None:
        self._client.put_object(**_address(path), Body=data)

    def raw_read(self, path: str) -> bytes:
        data: bytes = self._client.get_object(**_address(path))["Body"].read()
        return data

    def raw_exists(self, path: str) -> bool:
        address = _address(path)
        found = self._client.list_objects_v2(Bucket=address["Bucket"], Prefix=address["Key"])
        return any(entry["Key"] == address["Key"] for entry in found.get("Contents", []))

    def leftovers(self) -> list[str]:
        address = _address(self._prefix)
        uploads = self._client.list_multipart_uploads(Bucket=address["Bucket"], Prefix=address["Key"])
        return [upload["Key"] for upload in uploads.get("Uploads", [])]


def _address(path: str) -> dict[str, str]:
    bucket, _, key = path.partition("/")
    return {"Bucket": bucket, "Key": key}


@pytest.fixture(scope="session")
def xml_client(gcs_xml: tuple[TokenProxy, GcsServer]) -> Iterator[Any]:
    client = botocore.session.get_session().create_client(
        "s3",
        endpoint_url=gcs_xml[1].endpoint,
        region_name="us-east-1",
        config=Config(signature_version=UNSIGNED),
    )
    yield client
    client.close()


@pytest.fixture(scope="session")
def xml_bucket(xml_client: Any) -> str:
    name = f"ferry-{uuid.uuid4().hex[:12]}"
    xml_client.create_bucket(Bucket=name)
    return name


@pytest.fixture
def xml_url(xml_bucket: str) -> str:
    return f"gs://{xml_bucket}/{uuid.uuid4().hex}"


class TestGcsThroughObstore(CloudConformance):
    @pytest.fixture
    def store(self, xml_client: Any, xml_url: str, gcs_xml: tuple[TokenProxy, GcsServer]) -> GcsXmlStore:
        return GcsXmlStore(xml_client, xml_url, with_token("ferry-test-token", gcs_xml[0].endpoint))

    @pytest.fixture
    def path_in_missing_container(self) -> str:
        return "ferry-nowhere/checkpoint.pt"

    @pytest.fixture
    def unauthorized(self, xml_url: str, gcs_xml: tuple[TokenProxy, GcsServer]) -> Backend:
        options = with_token("ferry-powerless-token", gcs_xml[0].endpoint)
        return open_backend(xml_url, storage_options=options, plane="obstore")[0]


# --- generations


@pytest.fixture(params=["fsspec", "obstore"])
def pinned(
    request: pytest.FixtureRequest, gcs_server: GcsServer, gcs_client: GcsClient, gcs_url: str
) -> Iterator[tuple[GcsStore, TokenProxy]]:
    """fake-gcs-server, which has generations, and of the XML API what reads; and the proxy that the requests pass."""
    with TokenProxy(gcs_server.port) as proxy:
        yield GcsStore(gcs_client, gcs_url, with_token("ferry-test-token", proxy.endpoint), request.param), proxy


async def test_reads_are_pinned_to_the_generation(pinned: tuple[GcsStore, TokenProxy], store: GcsStore) -> None:
    reading, proxy = pinned
    path = store.path("checkpoint.pt")
    written = await store.write(path, stream(DATA, MIB))
    assert written.etag is not None
    assert written.etag.isdecimal()
    assert await reading.stat(path) == written
    before = len(proxy.log)
    assert await reading.read(path, 5, 100, written) == DATA[5:100]
    assert [f"generation={written.etag}" in request.target for request in proxy.log[before:]] == [True]


async def test_same_bytes_written_anew_are_another_version(pinned: tuple[GcsStore, TokenProxy]) -> None:
    """Their ETag, which is their MD5, is the same."""
    store, _ = pinned
    path = store.path("checkpoint.pt")
    store.raw_write(path, b"12345")
    before = await store.stat(path)
    store.raw_write(path, b"12345")
    assert await store.stat(path) != before
    with pytest.raises(CheckpointChangedError, match="replaced"):
        await store.read(path, 0, 5, before)


async def test_what_is_deleted_while_it_is_read_is_not_found(pinned: tuple[GcsStore, TokenProxy]) -> None:
    store, _ = pinned
    path = store.path("checkpoint.pt")
    store.raw_write(path, b"12345")
    found = await store.stat(path)
    await store.delete(path)
    with pytest.raises(CheckpointNotFoundError):
        await store.read(path, 0, 5, found)


@pytest.mark.parametrize("size", [5, len(DATA)], ids=["small", "parts"])
async def test_generation_that_a_write_is_answered_with_is_what_reads_are_pinned_to(
    xml_client: Any, xml_url: str, gcs_xml: tuple[TokenProxy, GcsServer], size: int
) -> None:
    with TokenProxy(gcs_xml[1].port) as proxy:
        store = GcsXmlStore(xml_client, xml_url, with_token("ferry-test-token", proxy.endpoint))
        path = store.path("checkpoint.pt")
        written = await store.write(path, stream(DATA[:size], MIB))
        assert await store.read(path, 0, 5, written) == DATA[:5]
        assert f"generation={written.etag}" in proxy.log[-1].target
        store.raw_write(path, DATA[:size])
        with pytest.raises(CheckpointChangedError, match="replaced"):
            await store.read(path, 0, 5, written)


@pytest.fixture
def hanging_part(
    xml_client: Any, xml_url: str, gcs_xml: tuple[TokenProxy, GcsServer], monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[GcsXmlStore, TokenProxy]]:
    monkeypatch.setattr("torchferry.storage.obstore._ABORT_SECONDS", 2.0)
    hanging = Fault(method="PUT", target="partNumber=2", hang=True, times=None)
    with TokenProxy(gcs_xml[1].port, hanging) as proxy:
        yield GcsXmlStore(xml_client, xml_url, with_token("ferry-test-token", proxy.endpoint)), proxy


async def test_cancel_while_a_part_hangs_says_on_the_obstore_plane_that_parts_may_be_left(
    hanging_part: tuple[GcsXmlStore, TokenProxy], caplog: pytest.LogCaptureFixture
) -> None:
    store, proxy = hanging_part
    path = store.path("checkpoint.pt")
    await cancel_at_the_end(store, path, DATA, partial(proxy.wait_for, "PUT", "partNumber=2"))
    assert not store.raw_exists(path)
    assert f"What was staged for gs://{path} may still be there" in caplog.text


async def test_cancel_while_a_part_hangs_and_more_is_to_come_leaves_nothing(
    hanging_part: tuple[GcsXmlStore, TokenProxy], caplog: pytest.LogCaptureFixture
) -> None:
    store, proxy = hanging_part

    async def unending() -> AsyncIterator[bytes]:
        yield DATA
        await asyncio.Event().wait()

    task = asyncio.create_task(store.write(store.path("checkpoint.pt"), unending()))
    await asyncio.to_thread(proxy.wait_for, "PUT", "partNumber=2")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert store.leftovers() == []
    assert caplog.text == ""


# --- components


async def test_more_components_than_one_compose_takes_are_composed_in_steps(store: GcsStore) -> None:
    path, data = store.path("checkpoint.pt"), bytes(range(251)) * (MIB // 6)
    written = await store.write(path, stream(data, 3 * MIB), part_size=MIB)
    assert written.size == len(data)
    assert store.raw_read(path) == data
    assert store.leftovers() == []


async def test_1100_components_take_three_levels(store: GcsStore) -> None:
    """Tiny ones, put directly: the sizes that writing uses would make a gigabyte of this."""
    path = store.path("checkpoint.pt")
    backend: Any = store.backend
    upload = torchferry_gcs._Composition(backend, path, {"step": "1"})

    async def put_all() -> Any:
        parts = [await upload.put_part(index, [index.to_bytes(2, "big")]) for index in range(1100)]
        return await upload.finish(parts)

    written = await run_on(backend.loop, put_all)
    assert store.raw_read(path) == b"".join(index.to_bytes(2, "big") for index in range(1100))
    assert (await store.stat(path)).metadata == written.metadata == {"step": "1"}
    assert store.leftovers() == []


@pytest.mark.parametrize("count", [33, 63, 64, 1023, 1024, 1025, 10_000, 50_000])
def test_composes_are_as_few_as_possible_and_keep_the_order(count: int) -> None:
    parts = [torchferry_gcs._Component(str(index), None) for index in range(count)]
    groups = torchferry_gcs._grouped(parts)
    assert [part for group in groups for part in group] == parts
    assert max(map(len, groups)) <= 32
    assert len(groups) == 32 if count <= 32 * 32 else len(groups) < count / 16


@pytest.fixture
def store(gcs_client: GcsClient, gcs_url: str, gcs_storage_options: dict[str, Any]) -> GcsStore:
    return GcsStore(gcs_client, gcs_url, gcs_storage_options)


# --- faults


@pytest.fixture
def through_gcsfs(
    gcs_server: GcsServer, gcs_client: GcsClient, gcs_url: str
) -> Iterator[Callable[..., tuple[GcsStore, TokenProxy]]]:
    """Makes the store as seen through a proxy with these faults."""
    with ExitStack() as stack:

        def make(*faults: Fault, **options: Any) -> tuple[GcsStore, TokenProxy]:
            proxy = stack.enter_context(TokenProxy(gcs_server.port, *faults))
            return GcsStore(gcs_client, gcs_url, with_token("ferry-test-token", proxy.endpoint) | options), proxy

        yield make


SURVIVABLE = {
    "component refused": Fault(method="POST", target="uploadType=media", status=503),
    "component reset in the middle": Fault(method="POST", target="uploadType=media", reset_upload_after=MIB),
    "component stored but the reply lost": Fault(method="POST", target="uploadType=media", lose_reply=True),
    "compose refused": Fault(method="POST", target="/compose", status=503),
    "composed but the reply lost": Fault(method="POST", target="/compose", lose_reply=True),
    "read reset in the middle": Fault(method="GET", target="alt=media", reset_download_after=MIB),
    "read cut short": Fault(method="GET", target="alt=media", truncate_after=MIB),
}


@pytest.mark.parametrize("fault", SURVIVABLE)
async def test_gcsfs_plane_survives(through_gcsfs: Callable[..., Any], fault: str) -> None:
    store, proxy = through_gcsfs(dataclasses.replace(SURVIVABLE[fault]))
    path = store.path("checkpoint.pt")
    written = await store.write(path, stream(DATA, MIB), size_hint=len(DATA))
    assert await store.read(path, 0, len(DATA), written) == DATA
    assert any(request.fault for request in proxy.log)
    assert store.leftovers() == []


async def test_damaged_component_is_noticed_and_nothing_is_published(through_gcsfs: Callable[..., Any]) -> None:
    store, _ = through_gcsfs(Fault(method="POST", target="uploadType=media", corrupt_upload_byte=MIB))
    path = store.path("checkpoint.pt")
    with pytest.raises(StorageError, match="damaged on the way"):
        await store.write(path, stream(DATA, MIB))
    assert not store.raw_exists(path)
    assert store.leftovers() == []


async def test_components_that_cannot_be_removed_are_named_in_a_warning(
    through_gcsfs: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    store, _ = through_gcsfs(Fault(method="DELETE", target="", status=403, times=None))
    path = store.path("checkpoint.pt")
    await store.write(path, stream(DATA, MIB))
    assert store.raw_read(path) == DATA
    assert "is complete, but 3 of its components" in caplog.text
    assert len(store.leftovers()) == 3


async def test_small_object_damaged_on_the_way_is_refused_by_the_store(gcs_emulator: GcsServer) -> None:
    """gcp-storage-emulator checks the CRC32C that comes with an object, as Google does."""
    client = GcsClient(gcs_emulator.endpoint)
    bucket = f"ferry-{uuid.uuid4().hex[:12]}"
    client.make_bucket(bucket)
    with TokenProxy(gcs_emulator.port, Fault(method="POST", target="/upload/", corrupt_upload_byte=400)) as proxy:
        store = GcsStore(client, f"gs://{bucket}/prefix", with_token("ferry-test-token", proxy.endpoint))
        with pytest.raises(StorageError):
            await store.write(store.path("checkpoint.pt"), stream(bytes(1000), 100))
        assert not store.raw_exists(store.path("checkpoint.pt"))
        await store.write(store.path("checkpoint.pt"), stream(bytes(1000), 100))
        assert store.raw_read(store.path("checkpoint.pt")) == bytes(1000)
    client.close()


def test_statuses_are_the_errors_that_a_caller_would_catch() -> None:
    error = torchferry_gcs._translate("Cannot write gs://x", HttpError({"code": 503, "message": "busy"}), "")
    assert isinstance(error, StorageUnavailableError)
    error = torchferry_gcs._translate("Cannot write gs://x", HttpError({"code": 401, "message": "who?"}), "")
    assert isinstance(error, StoragePermissionError)


# --- settings


async def test_kms_key_and_billed_project_are_in_every_request(through_gcsfs: Callable[..., Any]) -> None:
    store, proxy = through_gcsfs(kms_key_name="projects/p/locations/l/keyRings/r/cryptoKeys/k", requester_pays="payer")
    path = store.path("checkpoint.pt")
    await store.write(path, stream(DATA, MIB))
    await store.read(path, 0, 5, await store.stat(path))
    assert all("userProject=payer" in request.target for request in proxy.log)
    assert proxy.requests("POST")
    assert all("kmsKeyName=projects" in request.target for request in proxy.requests("POST"))


UNTRANSLATABLE = [
    {"kms_key_name": "projects/p/locations/l/keyRings/r/cryptoKeys/k"},
    {"consistency": "md5"},
    {"session_kwargs": {"trust_env": True}},
    {"version_aware": True},
    {"something_new": 1},
]


@pytest.mark.parametrize("options", UNTRANSLATABLE, ids=lambda options: next(iter(options)))
def test_what_obstore_cannot_honour_goes_through_gcsfs(options: dict[str, Any]) -> None:
    storage_options = {"token": "anon", **options}
    assert open_backend("gs://bucket/key", storage_options=storage_options)[0].plane == "fsspec"
    with pytest.raises(UnsupportedOptionError, match=next(iter(options))):
        open_backend("gs://bucket/key", storage_options=storage_options, plane="obstore")


def test_google_itself_is_reached_through_obstore_and_other_servers_through_gcsfs(gcs_server: GcsServer) -> None:
    for protocol in ("gs", "gcs"):
        url = f"{protocol}://bucket/key"
        assert open_backend(url, storage_options={"token": "anon"})[0].plane == "obstore"
        assert open_backend(url, storage_options=gcs_server.storage_options)[0].plane == "fsspec"


async def test_filesystem_made_for_its_users_loop_works(
    gcs_client: GcsClient, gcs_url: str, gcs_storage_options: dict[str, Any]
) -> None:
    fs = gcsfs.GCSFileSystem(**gcs_storage_options, asynchronous=True, skip_instance_cache=True)
    backend, path = open_backend(f"{gcs_url}/checkpoint.pt", filesystem=fs, plane="fsspec")
    assert backend.loop is None
    written = await backend.write(path, stream(DATA, MIB), size_hint=len(DATA), part_size=5 * MIB)
    assert bytes(await backend.read(path, 0, 10, written)) == DATA[:10]
    assert gcs_client.read(path) == DATA
    await fs.session.close()


async def test_gcsfs_sees_what_was_written(store: GcsStore, gcs_storage_options: dict[str, Any], gcs_url: str) -> None:
    fs = gcsfs.GCSFileSystem(**gcs_storage_options)
    assert fs.find(gcs_url) == []
    path = store.path("checkpoint.pt")
    await store.write(path, stream(b"12345", 2))
    assert fs.find(gcs_url) == [path]


# --- credentials, bridged to obstore


class RecordingProxy(TokenProxy):
    """Keeps what each request is authorized with and billed to."""

    def __init__(self, upstream_port: int) -> None:
        super().__init__(upstream_port)
        self.authorizations: list[str] = []
        self.payers: set[str] = set()

    def admit(self, head: Head) -> Head | bytes:
        self.authorizations.append(head.fields.get("authorization", ""))
        self.payers.add(head.fields.get("x-goog-user-project", ""))
        return super().admit(head) if self.authorizations[-1] else head


@pytest.fixture
def recording_proxy(gcs_xml: tuple[TokenProxy, GcsServer]) -> Iterator[RecordingProxy]:
    with RecordingProxy(gcs_xml[1].port) as proxy:
        yield proxy


async def test_anonymous_reads_carry_no_token(xml_client: Any, xml_url: str, recording_proxy: RecordingProxy) -> None:
    store = GcsXmlStore(xml_client, xml_url, {"token": "anon", "endpoint_url": recording_proxy.endpoint})
    path = store.path("checkpoint.pt")
    store.raw_write(path, DATA)
    assert await store.read(path, MIB, 2 * MIB, await store.stat(path)) == DATA[MIB : 2 * MIB]
    assert set(recording_proxy.authorizations) == {""}


async def test_anonymous_writes_go_through_gcsfs(
    gcs_client: GcsClient, gcs_url: str, gcs_storage_options: dict[str, Any]
) -> None:
    """obstore would look for credentials of its own, at the cloud's metadata address."""
    backend, path = open_backend(f"{gcs_url}/checkpoint.pt", storage_options=gcs_storage_options, plane="obstore")
    await run_on(backend.loop, backend.write, path, stream(DATA, MIB), size_hint=len(DATA))
    assert gcs_client.read(path) == DATA
    await run_on(backend.loop, backend.delete, path)
    assert not gcs_client.exists(path)


async def test_billed_project_goes_along(xml_client: Any, xml_url: str, recording_proxy: RecordingProxy) -> None:
    options = with_token("ferry-test-token", recording_proxy.endpoint)
    store = GcsXmlStore(xml_client, xml_url, options | {"requester_pays": True})
    await store.write(store.path("checkpoint.pt"), stream(b"12345", 2))
    assert recording_proxy.payers == {"ferry-test-project"}


class TokenIssuer(TokenServer):
    """An OAuth server that gives out tokens, as Google's does for a service account."""

    def __init__(self, proxy: TokenProxy, lifetime: int) -> None:
        super().__init__()
        self.issued: list[str] = []
        self._proxy = proxy
        self._lifetime = lifetime

    def answer(self, path: str, **form: str) -> tuple[int, dict[str, Any]]:
        del path, form
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
    form: str,
    xml_client: Any,
    xml_url: str,
    recording_proxy: RecordingProxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with TokenIssuer(recording_proxy, lifetime=3600) as issuer:
        account = issuer.service_account()
        file = tmp_path / "account.json"
        file.write_text(json.dumps(account | {"project_id": "p"}))
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
        token = {"file": str(file), "dict": account, "google_default": "google_default"}[form]
        store = GcsXmlStore(xml_client, xml_url, {"token": token, "endpoint_url": recording_proxy.endpoint})
        await store.write(store.path("checkpoint.pt"), stream(DATA, MIB))
        assert store.raw_read(store.path("checkpoint.pt")) == DATA
        assert set(recording_proxy.authorizations) == {"Bearer issued-0"}
        assert issuer.issued == ["issued-0"]


async def test_token_is_renewed_before_it_expires(
    xml_client: Any, xml_url: str, recording_proxy: RecordingProxy
) -> None:
    """One that lasts 3 minutes is within the last 5, in which gcsfs renews."""
    with TokenIssuer(recording_proxy, lifetime=180) as issuer:
        options = {"token": issuer.service_account(), "endpoint_url": recording_proxy.endpoint}
        store = GcsXmlStore(xml_client, xml_url, options)
        path = store.path("checkpoint.pt")
        await store.write(path, stream(b"12345", 2))
        before = len(issuer.issued)
        with anyio.fail_after(30):
            while len(issuer.issued) == before:  # for a moment obstore keeps even one that is about to expire
                await store.stat(path)
        assert recording_proxy.authorizations[-1] == f"Bearer {issuer.issued[-1]}"


async def test_credentials_that_cannot_be_renewed_are_a_permission_error(
    xml_client: Any, xml_url: str, recording_proxy: RecordingProxy
) -> None:
    expired = Credentials(None)  # no token, and nothing to get one with
    store = GcsXmlStore(xml_client, xml_url, {"token": expired, "endpoint_url": recording_proxy.endpoint})
    with pytest.raises(StoragePermissionError, match="credentials"):
        await store.stat(store.path("checkpoint.pt"))


async def test_ranges_are_read_directly_from_the_generation(
    gcs_client: GcsClient, gcs_url: str, gcs_storage_options: dict[str, Any]
) -> None:
    store = GcsStore(gcs_client, gcs_url, gcs_storage_options)
    path = store.path("a checkpoint%.pt")
    store.raw_write(path, DATA)
    stat = await store.stat(path)
    direct = store.backend.direct
    buffer = bytearray(MIB)
    assert await direct.read_into(path, 17, memoryview(buffer), stat)
    assert buffer == DATA[17 : 17 + MIB]
    store.raw_write(path, DATA)  # the same bytes, another generation
    assert not await direct.read_into(path, 17, memoryview(buffer), stat)
