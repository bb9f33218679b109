"""S3: what holds of any store, what a user can configure in s3fs, and what stores answer."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import inspect
import json
import logging
import subprocess
import textwrap
import uuid
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import pytest
import torch
import trustme
from aiobotocore.session import AioSession
from botocore.exceptions import ClientError
from s3fs import S3FileSystem

import torchferry
from torchferry import TransferReport
from torchferry.engine.loops import run_on
from torchferry.engine.types import MIB, Chunk, ObjectStat
from torchferry.errors import CheckpointChangedError, StorageError, StoragePermissionError
from torchferry.storage.base import Backend
from torchferry.storage.registry import open_backend
from torchferry.testing import CloudConformance
from torchferry.testing.conformance import READS, Reads, stream
from torchferry.testing.faultproxy import FaultProxy
from torchferry.testing.forkserver import python
from torchferry.testing.s3 import S3Store
from torchferry.testing.servers import S3Server, seaweedfs, storage_options_for
from torchferry_s3 import S3Backend
from torchferry_s3.upload import _etag_of

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import FaultyS3

PART = 5 * MIB
DATA = bytes(range(256)) * (12 * 4096)  # 12 MiB: three parts of 5 MiB
SIGNED = "X-Amz-Signature="  # in the targets of what the engine sends


class S3Conformance(CloudConformance):
    @pytest.fixture
    def path_in_missing_container(self) -> str:
        return "ferry-nowhere/checkpoint.pt"

    @pytest.fixture
    def unauthorized(self, s3_url: str, store: S3Store) -> Backend:
        assert store.options is not None
        options = store.options["storage_options"] | {"secret": "wrong"}
        return open_backend(s3_url, storage_options=options)[0]


class TestS3(S3Conformance):
    @pytest.fixture
    def store(self, s3_client: Any, s3_url: str, s3_storage_options: dict[str, Any]) -> S3Store:
        return S3Store(s3_client, s3_url, s3_storage_options)


@pytest.fixture(scope="module")
def authority_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, tuple[Path, Path]]:
    """The certificate of an authority, and the files of a certificate that it issued and its key."""
    directory = tmp_path_factory.mktemp("certificates")
    authority = trustme.CA(key_type=trustme.KeyType.ECDSA)
    issued = authority.issue_cert("127.0.0.1", key_type=trustme.KeyType.ECDSA)
    certificate, key = directory / "server.pem", directory / "server.key"
    issued.cert_chain_pems[0].write_to_path(certificate)
    issued.private_key_pem.write_to_path(key)
    authority.cert_pem.write_to_path(directory / "ca.pem")
    return str(directory / "ca.pem"), (certificate, key)


@pytest.fixture(scope="module")
def open_server(authority_file: tuple[str, tuple[Path, Path]]) -> Iterator[S3Server]:
    """A store that speaks https, and asks nobody for a signature."""
    with seaweedfs(anonymous=True, certificate=authority_file[1]) as server:
        yield server


@pytest.fixture(scope="module")
def open_client(open_server: S3Server) -> Iterator[Any]:
    import botocore.session

    client = botocore.session.get_session().create_client(
        "s3",
        endpoint_url=open_server.endpoint,
        region_name=open_server.region,
        aws_access_key_id=open_server.key,
        aws_secret_access_key=open_server.secret,
    )
    client.create_bucket(Bucket="ferry-open")
    yield client
    client.close()


@pytest.fixture
def https_options(
    open_server: S3Server, open_client: Any, authority_file: tuple[str, tuple[Path, Path]]
) -> dict[str, Any]:
    """What s3fs takes to reach the bucket "ferry-open" by https."""
    assert open_client
    options = storage_options_for(open_server.https_endpoint, open_server.key, open_server.secret, open_server.region)
    options["client_kwargs"]["verify"] = authority_file[0]
    return options


@pytest.fixture
def open_url() -> str:
    return f"s3://ferry-open/{uuid.uuid4().hex}"


class TestS3OverHttps(S3Conformance):
    @pytest.fixture
    def store(self, open_client: Any, open_url: str, https_options: dict[str, Any]) -> S3Store:
        return S3Store(open_client, open_url, https_options)


@pytest.fixture
def through(
    s3_client: Any, s3_url: str, faulty_s3: Callable[..., FaultyS3]
) -> Callable[..., tuple[S3Store, FaultProxy]]:
    """Makes the store as seen through a proxy that logs requests."""

    def make(**options: Any) -> tuple[S3Store, FaultProxy]:
        faulty = faulty_s3()
        return S3Store(s3_client, s3_url, faulty.storage_options | options), faulty.proxy

    return make


async def round_trip(backend: Backend, path: str, data: bytes = DATA) -> None:
    plan = backend.upload_plan(len(data), PART)
    written = await run_on(backend.loop, backend.write, path, stream(data, MIB), plan=plan)
    assert await run_on(backend.loop, backend.read, path, 0, len(data), written) == data
    await run_on(backend.loop, backend.delete, path)


# --- which way the bytes go


async def test_all_bodies_go_through_the_engine_signed_with_version_4(through: Any) -> None:
    store, proxy = through()
    path = store.path("checkpoint.pt")
    written = await store.write(path, stream(DATA, MIB))
    await store.read(path, 0, 100, written)
    await store.write(path, stream(b"small", 5))
    bodies = [r for r in proxy.log if r.method == "PUT" or (r.method == "GET" and "checkpoint" in r.target)]
    assert len(bodies) == 5
    assert all("X-Amz-Algorithm=AWS4-HMAC-SHA256" in request.target for request in bodies)
    fs = store.backend._fs
    url = await run_on(fs.loop, fs._url, path)  # the URLs of the client's other users stay as they are
    assert "AWSAccessKeyId=" in url


async def test_only_the_bytes_asked_for_travel(through: Any) -> None:
    store, proxy = through()
    path = store.path("checkpoint.pt")
    store.raw_write(path, DATA)
    found = await store.stat(path)
    await store.read(path, 0, 100, found)
    assert [request.method for request in proxy.log if "checkpoint" in request.target] == ["HEAD", "GET"]


class Special(S3FileSystem):
    """A subclass may do anything."""


CLIENTS: dict[str, tuple[dict[str, Any], str]] = {
    "session": ({"session": AioSession()}, "the filesystem has a session of the user's"),
    "client certificate": ({"config_kwargs": {"client_cert": "/cert.pem"}}, "there is a client certificate"),
    "checksum": ({"s3_additional_kwargs": {"ChecksumAlgorithm": "SHA256"}}, "s3_additional_kwargs choose a checksum"),
    "certificates in a directory": ({"client_kwargs": {"verify": "/etc/ssl/certs"}}, "are not one file"),
}


@pytest.mark.parametrize("setting", CLIENTS)
async def test_what_only_the_client_can_honour_goes_through_it_and_the_engine_says_why(
    s3_storage_options: dict[str, Any], setting: str
) -> None:
    options, reason = CLIENTS[setting]
    options = s3_storage_options | options
    options["client_kwargs"] = s3_storage_options["client_kwargs"] | options["client_kwargs"]
    backend, _ = open_backend("s3://bucket/key", storage_options=options)
    assert isinstance(backend, S3Backend)
    engine = await run_on(backend.loop, backend.engine)
    assert reason in engine.why_client(1)


def test_the_report_says_how_many_bytes_went_through_the_client_and_why(
    s3_url: str, s3_storage_options: dict[str, Any]
) -> None:
    reports: list[TransferReport] = []
    tensors = [torch.ones(2 * MIB) for _ in range(3)]
    for filesystem in (S3FileSystem(**s3_storage_options), Special(**s3_storage_options)):
        url = f"{s3_url}/x.pt"
        stat = torchferry.save(tensors, url, filesystem=filesystem, part_size=PART, report=reports.append)
        torchferry.load(url, filesystem=filesystem, report=reports.append)
    through_engine, through_client = reports[:2], reports[2:]
    assert [(r.verb, r.nbytes, r.client_bytes, r.client_reasons) for r in through_engine] == [
        ("save", stat.size, 0, ()),
        ("load", through_engine[1].nbytes, 0, ()),
    ]
    assert [r.parts for r in reports] == [5, 0, 5, 0]
    for report in through_client:
        assert report.client_bytes == report.nbytes > 0
        assert report.client_reasons == ("Special is a subclass of S3FileSystem",)
        assert "by the filesystem's client (Special is a subclass of S3FileSystem)" in str(report)


async def test_a_proxy_gets_everything(s3_server: S3Server, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    reports: list[TransferReport] = []
    with FaultProxy(s3_server.port) as proxy:
        for how in ("environment", "settings"):
            options = s3_server.storage_options | {"skip_instance_cache": True}
            if how == "environment":
                monkeypatch.setenv("http_proxy", proxy.endpoint)
            else:
                monkeypatch.delenv("http_proxy")
                options["config_kwargs"] = {"proxies": {"http": proxy.endpoint}}
            before = len(proxy.log)
            url = f"{s3_url}/{how}.pt"
            await torchferry.save_async([torch.ones(MIB)], url, storage_options=options, report=reports.append)
            await torchferry.load_async(url, storage_options=options, report=reports.append)
            assert all(request.target.startswith("http://") for request in proxy.log[before:])
    assert all(report.client_bytes == report.nbytes for report in reports)
    assert {reason for report in reports for reason in report.client_reasons} <= {
        "there is a proxy",
        "the engine rests after odd answers",
    }


# --- settings


ADDITIONAL = {
    "ACL": "bucket-owner-full-control",
    "StorageClass": "STANDARD_IA",
    "Tagging": "team=ferry",
    "Metadata": {"owner": "me"},
}


async def test_additional_arguments_of_the_filesystem_arrive_with_what_the_engine_sends(through: Any) -> None:
    store, proxy = through(s3_additional_kwargs=ADDITIONAL, requester_pays=True)
    path = store.path("checkpoint.pt")
    for size in (1000, len(DATA)):
        await store.write(path, stream(DATA[:size], MIB), metadata={"step": "1"})
    put = next(r for r in proxy.requests("PUT", "checkpoint") if "partNumber" not in r.target)
    create = next(r for r in proxy.requests("POST") if "uploads" in r.target)
    for request in (put, create):
        assert request.headers["x-amz-acl"] == "bucket-owner-full-control"
        assert request.headers["x-amz-storage-class"] == "STANDARD_IA"
        assert request.headers["x-amz-tagging"] == "team=ferry"
        assert request.headers["x-amz-meta-owner"] == "me"
        assert request.headers["x-amz-meta-step"] == "1"
    assert SIGNED in put.target
    found = await store.stat(path)
    await store.read(path, 0, 5, found)
    assert found.metadata == {"owner": "me", "step": "1"}
    objects = [r for r in proxy.log if "checkpoint" in r.target]
    assert {r.method for r in objects} == {"PUT", "POST", "GET", "HEAD"}
    assert all(r.headers["x-amz-request-payer"] == "requester" for r in objects)


async def test_encryption_with_a_customers_key(s3_client: Any, through: Any) -> None:
    key = {"SSECustomerAlgorithm": "AES256", "SSECustomerKey": "k" * 32}
    store, proxy = through(s3_additional_kwargs=key)
    path = store.path("checkpoint.pt")
    written = await store.write(path, stream(DATA, MIB))
    assert await store.read(path, 5, MIB, written) == DATA[5:MIB]
    with pytest.raises(ClientError):
        s3_client.get_object(**store.address(path))
    parts_and_reads = proxy.requests("PUT") + proxy.requests("GET", "checkpoint")
    assert len(parts_and_reads) == 4
    for request in parts_and_reads:
        assert SIGNED in request.target
        assert request.headers["x-amz-server-side-encryption-customer-key"] == base64.b64encode(b"k" * 32).decode()


async def test_anonymous_requests_carry_no_signature(open_server: S3Server, open_client: Any, open_url: str) -> None:
    assert open_client
    with FaultProxy(open_server.port) as proxy:
        options = storage_options_for(proxy.endpoint, open_server.key, open_server.secret) | {"anon": True}
        store = S3Store(open_client, open_url, options)
        path = store.path("checkpoint.pt")
        written = await store.write(path, stream(DATA, MIB))
        assert await store.read(path, 0, len(DATA), written) == DATA
        assert store.raw_read(path) == DATA
        assert len(proxy.requests("PUT", "partNumber")) == 3
        assert not any(request.secrets for request in proxy.log)


async def test_anonymous_is_refused_by_a_private_bucket(s3_url: str, s3_storage_options: dict[str, Any]) -> None:
    store = S3Store(None, s3_url, s3_storage_options | {"anon": True})
    with pytest.raises(StoragePermissionError):
        await store.stat(store.path("x.pt"))
    for size in (1, len(DATA)):
        with pytest.raises(StoragePermissionError):
            await store.write(store.path("x.pt"), stream(DATA[:size], MIB))


@pytest.mark.parametrize(
    ("options", "algorithms"),
    [
        ({}, {"crc32"}),
        ({"config_kwargs": {"request_checksum_calculation": "when_required"}}, set()),
        ({"s3_additional_kwargs": {"ChecksumAlgorithm": "SHA256"}}, {"sha256"}),
    ],
    ids=["by default", "only when required", "another algorithm"],
)
@pytest.mark.parametrize("way", ["engine", "client"])
async def test_bodies_carry_the_checksum_that_the_filesystem_is_configured_for(
    s3_client: Any, s3_url: str, faulty_s3: Any, options: dict[str, Any], algorithms: set[str], way: str
) -> None:
    faulty = faulty_s3()
    kind = Special if way == "client" else S3FileSystem
    fs = kind(**faulty.storage_options, **options)
    backend, path = open_backend(f"{s3_url}/x.pt", filesystem=fs)
    for size in (1000, len(DATA)):
        plan = backend.upload_plan(size, PART)
        await run_on(backend.loop, backend.write, path, stream(DATA[:size], MIB), plan=plan)
    bodies = faulty.proxy.requests("PUT")
    pieces = [DATA[:1000], *(DATA[at : at + PART] for at in range(0, len(DATA), PART))]
    assert len(bodies) == 4
    found = []
    for request in bodies:
        prefix = "x-amz-checksum-"
        checksums = {name.removeprefix(prefix): v for name, v in request.headers.items() if prefix in name}
        assert set(checksums) == algorithms
        found += [checksums["crc32"]] if "crc32" in algorithms else []
    if found:
        assert sorted(found) == sorted(base64.b64encode(zlib.crc32(p).to_bytes(4, "big")).decode() for p in pieces)
        whole = s3_client.head_object(**S3Store.address(path), ChecksumMode="ENABLED")
        assert whole["ChecksumCRC32"] == base64.b64encode(zlib.crc32(DATA).to_bytes(4, "big")).decode()


def test_max_concurrency_of_the_filesystem_holds(s3_storage_options: dict[str, Any]) -> None:
    for options, in_flight in (({}, 32), ({"max_concurrency": 3}, 3)):
        backend, _ = open_backend("s3://bucket/key", storage_options=s3_storage_options | options)
        assert backend.upload_plan(1 << 30).in_flight == in_flight


async def test_read_timeout_of_the_filesystem_holds(s3_storage_options: dict[str, Any]) -> None:
    for options, silence in (({}, 30.0), ({"config_kwargs": {"read_timeout": 7}}, 7)):
        backend, _ = open_backend("s3://bucket/key", storage_options=s3_storage_options | options)
        assert isinstance(backend, S3Backend)
        engine = await run_on(backend.loop, backend.engine)
        assert engine.transport is not None
        assert engine.transport.silence == silence


async def test_a_certificate_that_verify_names_is_trusted_by_the_engine(
    https_options: dict[str, Any], open_url: str
) -> None:
    reports: list[TransferReport] = []
    await torchferry.save_async(
        [torch.ones(4 * MIB)], f"{open_url}/x.pt", storage_options=https_options, report=reports.append
    )
    await torchferry.load_async(f"{open_url}/x.pt", storage_options=https_options, report=reports.append)
    assert [report.client_bytes for report in reports] == [0, 0]


@pytest.mark.parametrize("how", ["verify is False", "AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"])
async def test_other_ways_to_say_whom_to_trust_hold(
    https_options: dict[str, Any], open_url: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = https_options["client_kwargs"]
    authority = settings.pop("verify")
    if how == "verify is False":
        settings["verify"] = False
    else:
        monkeypatch.setenv(how, authority)
    reports: list[TransferReport] = []
    options = https_options | {"skip_instance_cache": True}
    await torchferry.save_async(
        [torch.ones(4 * MIB)], f"{open_url}/x.pt", storage_options=options, report=reports.append
    )
    assert [report.client_bytes for report in reports] == [0]


async def test_a_certificate_of_nobody_known_is_refused_at_once(https_options: dict[str, Any], open_url: str) -> None:
    del https_options["client_kwargs"]["verify"]
    store = S3Store(None, open_url, https_options)
    with anyio.fail_after(30):
        with pytest.raises(StorageError, match="certificate verify failed"):
            await store.stat(store.path("x.pt"))
        for size in (1, len(DATA)):
            with pytest.raises(StorageError, match="certificate verify failed"):
                await store.write(store.path("x.pt"), stream(DATA[:size], MIB))


@pytest.mark.parametrize("protocol", ["s3", "s3a"])
async def test_both_protocols_work(protocol: str, s3_url: str, s3_storage_options: dict[str, Any]) -> None:
    url = s3_url.replace("s3://", f"{protocol}://")
    await round_trip(*open_backend(f"{url}/x.pt", storage_options=s3_storage_options))


async def test_endpoint_and_keys_from_the_environment(
    s3_url: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_server.key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_server.secret)
    monkeypatch.setenv("AWS_DEFAULT_REGION", s3_server.region)
    await round_trip(*open_backend(f"{s3_url}/x.pt", storage_options={"skip_instance_cache": True}))


async def test_explicit_settings_go_before_the_environment(
    s3_url: str, s3_storage_options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_BUCKET"):
        monkeypatch.setenv(name, "wrong")
    options = s3_storage_options | {"skip_instance_cache": True}
    await round_trip(*open_backend(f"{s3_url}/x.pt", storage_options=options))


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


async def test_credentials_that_expire_are_asked_for_again(s3_url: str, renewals: Callable[[], int]) -> None:
    options = {"profile": "ferry", "skip_instance_cache": True}
    backend, path = open_backend(f"{s3_url}/x.pt", storage_options=options)
    await round_trip(backend, path)
    before = renewals()
    with anyio.fail_after(60):  # the client may keep them for as long as they are good, which is not long
        while renewals() == before:
            await round_trip(backend, path, b"small")


async def test_credentials_are_renewed_in_the_middle_of_an_upload(s3_url: str, renewals: Callable[[], int]) -> None:
    options = {"profile": "ferry", "skip_instance_cache": True}
    backend, path = open_backend(f"{s3_url}/x.pt", storage_options=options)
    size = 0

    async def chunks() -> AsyncIterator[Chunk]:
        nonlocal size
        while renewals() < 6:
            size += MIB
            yield Chunk(bytes(MIB))

    written = await run_on(backend.loop, backend.write, path, chunks(), plan=backend.upload_plan(0, PART))
    assert written.size == size


@pytest.mark.parametrize("how", ["credential_process = /missing/program", "web identity"])
async def test_credentials_from_a_missing_file_are_no_missing_checkpoint(
    how: str, s3_server: S3Server, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who starts anew where there is no checkpoint would lose what is there."""
    if how == "web identity":
        how = "role_arn = arn:aws:iam::123456789012:role/r\nweb_identity_token_file = /missing/token"
    (tmp_path / "config").write_text(
        f"[profile ferry]\nregion = us-east-1\nendpoint_url = {s3_server.endpoint}\n{how}\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    store = S3Store(None, s3_url, {"profile": "ferry", "skip_instance_cache": True})
    path = store.path("x.pt")
    with pytest.raises(StoragePermissionError, match="no usable credentials"):
        await store.stat(path)
    with pytest.raises(StoragePermissionError, match="no usable credentials"):
        await store.delete(path)
    with pytest.raises(StoragePermissionError, match="no usable credentials"):
        await store.read(path, 0, 5, ObjectStat("", 5, '"x"'))
    for size in (1, len(DATA)):
        with pytest.raises(StoragePermissionError, match="no usable credentials"):
            await store.write(path, stream(DATA[:size], MIB))


async def test_profile_that_does_not_exist_is_a_permission_error() -> None:
    options = {"profile": "nobody", "skip_instance_cache": True}
    with pytest.raises(StoragePermissionError, match="nobody"):
        await torchferry.load_async("s3://bucket/key", storage_options=options)


async def test_no_credentials_is_a_permission_error(s3_url: str, s3_server: S3Server) -> None:
    options = {
        "endpoint_url": s3_server.endpoint,
        "client_kwargs": {"region_name": "us-east-1"},
        "skip_instance_cache": True,
    }
    store = S3Store(None, s3_url, options)
    with pytest.raises(StoragePermissionError, match="credentials"):
        await store.stat(store.path("x.pt"))


async def test_filesystem_made_for_its_users_loop_works(s3_url: str, s3_storage_options: dict[str, Any]) -> None:
    fs = S3FileSystem(
        **s3_storage_options, asynchronous=True, loop=asyncio.get_running_loop(), skip_instance_cache=True
    )
    await round_trip(*open_backend(f"{s3_url}/x.pt", filesystem=fs))
    await fs._s3.close()


async def test_listings_of_the_filesystem_see_what_was_saved(s3_url: str, s3_storage_options: dict[str, Any]) -> None:
    fs = S3FileSystem(**s3_storage_options)
    await asyncio.to_thread(fs.pipe, f"{s3_url}/first", b"1")
    assert len(await asyncio.to_thread(fs.ls, s3_url)) == 1
    backend, path = open_backend(f"{s3_url}/second", filesystem=fs)
    await run_on(backend.loop, backend.write, path, stream(b"12345", 5), plan=backend.upload_plan(5))
    assert len(await asyncio.to_thread(fs.ls, s3_url)) == 2
    await run_on(backend.loop, backend.delete, path)
    assert len(await asyncio.to_thread(fs.ls, s3_url)) == 1


# --- names and versions


async def test_path_without_a_key_is_refused_and_makes_no_bucket(
    s3_client: Any, s3_storage_options: dict[str, Any]
) -> None:
    name = f"ferry-{uuid.uuid4().hex[:12]}"
    backend, path = open_backend(f"s3://{name}", storage_options=s3_storage_options)
    with pytest.raises(StorageError, match=f"s3://{name}"):
        await run_on(backend.loop, backend.write, path, stream(b"x", 1), plan=backend.upload_plan(1))
    assert name not in [bucket["Name"] for bucket in s3_client.list_buckets()["Buckets"]]


@pytest.mark.parametrize("key", ["a//b", "a\nb"])
async def test_odd_keys_are_taken_literally(s3_url: str, s3_storage_options: dict[str, Any], key: str) -> None:
    url = f"{s3_url}/{uuid.uuid4().hex}/{key}"
    for tensors in ([torch.ones(1)], [torch.ones(MIB)] * 6):
        await torchferry.save_async({"a": tensors}, url, storage_options=s3_storage_options, part_size=PART)
        loaded = await torchferry.load_async(url, storage_options=s3_storage_options)
        assert len(loaded["a"]) == len(tensors)


@pytest.mark.parametrize(
    "bucket", ["arn:aws:s3:us-east-1:123456789012:accesspoint/checkpoints", "checkpoints--use1-az4--x-s3"]
)
def test_access_points_and_directory_buckets_are_buckets(s3_storage_options: dict[str, Any], bucket: str) -> None:
    fs = S3FileSystem(**s3_storage_options)  # older versions of fsspec do not take an ARN in a URL without one
    backend, path = open_backend(f"s3://{bucket}/a/b.pt", filesystem=fs)
    assert isinstance(backend, S3Backend)
    assert path == f"{bucket}/a/b.pt"
    assert backend.address(path) == {"Bucket": bucket, "Key": "a/b.pt"}


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


@pytest.mark.skipif(
    "local_expiry_check" not in inspect.signature(S3FileSystem.__init__).parameters,
    reason="this s3fs has no such option",
)
async def test_the_version_is_looked_at_where_the_store_is_not_asked_for_it(through: Any) -> None:
    store, proxy = through(local_expiry_check=True)
    path = store.path("checkpoint.pt")
    store.raw_write(path, DATA)
    stat = await store.stat(path)
    assert await store.read(path, 0, 10, stat) == DATA[:10]
    store.raw_write(path, DATA[::-1])
    with pytest.raises(CheckpointChangedError):
        await store.read(path, 0, 10, stat)
    assert not any("if-match" in request.headers for request in proxy.log)


async def test_a_thousand_objects_and_one_are_listed(
    s3_client: Any, s3_url: str, s3_storage_options: dict[str, Any]
) -> None:
    store = S3Store(s3_client, s3_url, s3_storage_options)
    paths = [store.path(f"step-{number}.pt") for number in range(1001)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(partial(store.raw_write, data=b""), paths))
    assert sorted(found.path for found in await store.list(store.path(""))) == sorted(paths)


# --- what stores answer


@contextlib.asynccontextmanager
async def store_that_answers(answer: str, etag: str, **options: Any) -> AsyncIterator[S3Store]:
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
        yield await asyncio.to_thread(S3Store, None, "s3://bucket/x", options)


@READS
@pytest.mark.parametrize(
    "answer",
    [
        "206 OK\r\nContent-Range: bytes 0-3/8\r\nContent-Length: 4\r\n\r\nwron",
        "206 OK\r\nContent-Range: bytes 4-7/8\r\nContent-Length: 5\r\n\r\nlonge",
        "200 OK\r\nContent-Length: 4\r\n\r\nwron",
        "200 OK\r\nContent-Length: 8\r\n\r\nwronwron",
        "200 OK\r\nContent-Range: bytes 4-7/8\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nlonge\r\n0\r\n\r\n",
    ],
    ids=["another range", "longer", "no range", "whole", "chunked"],
)
async def test_store_that_sends_other_bytes_is_not_believed(answer: str, reads: Reads) -> None:
    async with store_that_answers(answer, "x") as store:
        with pytest.raises(StorageError, match="s3://bucket/x"):
            read = await getattr(store, reads)("bucket/x", 4, 8, ObjectStat("s3://bucket/x", 8, '"x"'))
            assert read == b"long"  # who sends more than it was asked for, may have sent that first
            raise StorageError("s3://bucket/x")


@READS
async def test_store_that_ignores_conditions_does_not_mix_versions(reads: Reads) -> None:
    answer = "206 OK\r\nContent-Range: bytes 0-3/4\r\nContent-Length: 4\r\n\r\ndata"
    async with store_that_answers(answer, "new") as store:
        read = partial(getattr(store, reads), "bucket/x", 0, 4)
        assert await read(ObjectStat("", 4, '"new"')) == b"data"
        with pytest.raises(CheckpointChangedError, match="s3://bucket/x was replaced"):
            await read(ObjectStat("", 4, '"old"'))


def test_parts_without_md5_digests_do_not_tell_the_etag_of_the_object() -> None:
    md5 = {"ETag": '"d41d8cd98f00b204e9800998ecf8427e"'}
    assert _etag_of([md5, md5]) == "5873dd45edd01f09c1ef2e7819369e8e-2"
    for other in ('"d41d8cd98f00b204e9800998ecf8427e-3"', '"0x8DC"', '"ünïcode"'):
        assert _etag_of([md5, {"ETag": other}]) is None


# --- the process


def test_forked_child_of_a_process_that_has_saved_and_loaded_does_both(
    s3_url: str, s3_storage_options: dict[str, Any]
) -> None:
    program = """
        import os, sys, torch, torchferry
        url, options = sys.argv[1], eval(sys.argv[2])
        data = {"a": torch.ones(3 << 20)}
        torchferry.save(data, url, storage_options=options)
        torchferry.load(url, storage_options=options)
        if child := os.fork():
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            torchferry.load(url, storage_options=options)
            sys.exit(status)
        assert torchferry.load(url, storage_options=options)["a"][-1].item() == 1  # OpenMP does not survive a fork
        torchferry.save(data, url + ".child", storage_options=options)
        os._exit(0)
    """
    command = [*python(), "-c", textwrap.dedent(program), f"{s3_url}/x", repr(s3_storage_options)]
    subprocess.run(command, check=True, timeout=100)


def test_a_new_filesystem_for_each_call_leaves_no_descriptor_and_no_filesystem(
    s3_url: str, s3_storage_options: dict[str, Any]
) -> None:
    program = """
        import gc, os, sys, weakref, torch, torchferry
        from s3fs import S3FileSystem
        url, options = sys.argv[1], eval(sys.argv[2])
        data = {"a": torch.ones(3 << 20)}
        made = []

        def work(count):
            for _ in range(count):
                fs = S3FileSystem(**options, skip_instance_cache=True)
                made.append(weakref.ref(fs))
                torchferry.save(data, url, filesystem=fs)
                torchferry.load(url, filesystem=fs)
                del fs
            gc.collect()
            return len(os.listdir("/proc/self/fd"))

        before = work(2)
        after = work(8)
        assert after <= before + 3, (before, after)
        assert sum(ref() is not None for ref in made) <= 1
    """
    command = [*python(), "-c", textwrap.dedent(program), f"{s3_url}/x", repr(s3_storage_options)]
    subprocess.run(command, check=True, timeout=200)


async def test_no_signature_and_no_token_is_logged(through: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "torchferry")
    store, proxy = through(token="session-token")
    with pytest.raises(StorageError):
        await store.write(store.path("x.pt"), stream(DATA, MIB))
    with pytest.raises(StorageError):
        await store.read(store.path("x.pt"), 0, 5, ObjectStat("", 5, '"x"'))
    assert proxy.log
    assert "session-token" not in caplog.text
    assert SIGNED not in caplog.text
