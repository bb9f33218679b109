from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import os
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest
import trustme
from adlfs import AzureBlobFileSystem
from azure.core import MatchConditions
from azure.core.exceptions import HttpResponseError, ResourceModifiedError
from azure.storage.blob import (
    AccountSasPermissions,
    BlobBlock,
    ContentSettings,
    ResourceTypes,
    generate_account_sas,
)
from azure.storage.blob import BlobServiceClient as SyncBlobServiceClient
from azure.storage.blob.aio import BlobServiceClient

import torchferry
import torchferry_azure
from torchferry.engine.loops import run_on
from torchferry.engine.writer import PartSizes, part_size_for
from torchferry.errors import StorageError, StorageUnavailableError, UnsupportedOptionError
from torchferry.storage.base import MIB, Backend, Chunk, Plane
from torchferry.storage.registry import open_backend
from torchferry.testing import CloudConformance, StoreUnderTest
from torchferry.testing.azure import AzureServer, azurite, connection_string_for
from torchferry.testing.conformance import SourceError, cancel_at_the_end, stream
from torchferry.testing.faultproxy import Fault, FaultProxy
from torchferry.testing.tokens import TokenServer

if TYPE_CHECKING:
    from collections.abc import Callable

DATA = bytes(range(256)) * (12 * 4096)  # 12 MiB: three parts of 5 MiB
PLANES: tuple[Plane, ...] = ("fsspec", "obstore")
WRONG_KEY = base64.b64encode(b"wrong").decode()


class AzureStore(StoreUnderTest):
    keeps_metadata = True
    losers_fail = True

    def __init__(self, client: Any, url: str, storage_options: dict[str, Any], plane: Plane) -> None:
        self.options = {"storage_options": storage_options, "plane": plane}
        self.backend, self._prefix = open_backend(url, **self.options)
        self._client = client

    def path(self, name: str) -> str:
        return f"{self._prefix}/{name}"

    def raw_write(self, path: str, data: bytes) -> None:
        self.raw_blob(path).upload_blob(data, overwrite=True)

    def raw_read(self, path: str) -> bytes:
        data: bytes = self.raw_blob(path).download_blob().readall()
        return data

    def raw_exists(self, path: str) -> bool:
        found: bool = self.raw_blob(path).exists()
        return found

    def leftovers(self) -> list[str]:
        """Blobs that are nothing but uncommitted blocks: those of a blob that exists stay, where nobody sees them."""
        return [name for name in self.staged() if not self.raw_exists(name)]

    def staged(self) -> list[str]:
        container, _, prefix = self._prefix.partition("/")
        blobs = self._client.get_container_client(container).list_blobs(prefix, include=["uncommittedblobs"])
        paths = [f"{container}/{blob.name}" for blob in blobs]
        return [path for path in paths if self.raw_blob(path).get_block_list("uncommitted")[1]]

    def raw_blob(self, path: str) -> Any:
        container, _, key = path.partition("/")
        return self._client.get_blob_client(container, key)


class AzureConformance(CloudConformance):
    plane: Plane

    @pytest.fixture
    def store(self, azure_client: Any, azure_url: str, azure_storage_options: dict[str, Any]) -> AzureStore:
        return AzureStore(azure_client, azure_url, azure_storage_options, self.plane)

    @pytest.fixture
    def path_in_missing_container(self) -> str:
        return "ferry-nowhere/checkpoint.pt"

    @pytest.fixture
    def unauthorized(self, azure_url: str, azure_server: AzureServer) -> Backend:
        connection = connection_string_for(
            azure_server.endpoint, AccountName=azure_server.account_name, AccountKey=WRONG_KEY
        )
        return open_backend(azure_url, storage_options={"connection_string": connection}, plane=self.plane)[0]


class TestAzureThroughAdlfs(AzureConformance):
    plane = "fsspec"


class TestAzureThroughObstore(AzureConformance):
    plane = "obstore"


# --- what Azure is peculiar about


@pytest.fixture(params=PLANES)
def store(
    request: pytest.FixtureRequest, azure_client: Any, azure_url: str, azure_storage_options: dict[str, Any]
) -> AzureStore:
    return AzureStore(azure_client, azure_url, azure_storage_options, request.param)


@pytest.fixture
def through_adlfs(azure_client: Any, azure_url: str, azure_storage_options: dict[str, Any]) -> AzureStore:
    return AzureStore(azure_client, azure_url, azure_storage_options, "fsspec")


async def interrupted_write(store: AzureStore, path: str, ending: str = "failure") -> None:
    """A write that fails or is cancelled when some of its blocks are staged."""
    loop, staged = asyncio.get_running_loop(), asyncio.Event()

    async def chunks() -> AsyncIterator[Chunk]:
        async for chunk in stream(DATA, MIB):
            yield chunk
        with anyio.fail_after(60):
            while not await anyio.to_thread.run_sync(store.staged):
                pass
        if ending == "failure":
            raise SourceError
        loop.call_soon_threadsafe(staged.set)
        await anyio.sleep_forever()

    task = asyncio.create_task(store.write(path, chunks()))
    if ending == "cancel":
        await staged.wait()
        task.cancel()
    with pytest.raises((SourceError, asyncio.CancelledError)):
        await task


@pytest.mark.parametrize("ending", ["failure", "cancel"])
@pytest.mark.parametrize("form", ["put whole", "made of blocks"])
async def test_interrupted_write_leaves_a_blob_that_exists_as_it_is_and_its_blocks_go_with_the_next_one(
    store: AzureStore, form: str, ending: str
) -> None:
    path = store.path("checkpoint.pt")
    blob = store.raw_blob(path)
    described: dict[str, Any] = {"metadata": {"step": "1"}, "content_settings": ContentSettings("application/x-old")}
    if form == "put whole":
        blob.upload_blob(b"old", **described)
    else:
        blob.stage_block("block", b"old")
        blob.commit_block_list([BlobBlock("block")], **described)
    blob.set_standard_blob_tier("Cool")
    before = blob.get_blob_properties(), blob.get_block_list("committed")
    await interrupted_write(store, path, ending)
    after = blob.get_blob_properties(), blob.get_block_list("committed")
    assert [str(found) for found in after] == [str(found) for found in before]
    assert store.raw_read(path) == b"old"
    assert store.staged() == [path]
    await store.write(path, stream(DATA, MIB))
    assert store.staged() == []
    assert store.raw_read(path) == DATA


@pytest.mark.parametrize("form", ["put whole", "made of blocks"])
def test_why_staged_blocks_are_left_beside_a_blob_that_exists(through_adlfs: AzureStore, form: str) -> None:
    """Nothing discards them but what makes another version of the blob, or even empties it."""
    blob = through_adlfs.raw_blob(through_adlfs.path("checkpoint.pt"))
    if form == "put whole":
        blob.upload_blob(b"old")
    else:
        blob.stage_block("block", b"old")
        blob.commit_block_list([BlobBlock("block")])
    blob.stage_block("stage", b"new")
    version = blob.get_blob_properties().etag
    with pytest.raises(ResourceModifiedError):
        blob.commit_block_list([], etag='"none"', match_condition=MatchConditions.IfNotModified)
    with pytest.raises(HttpResponseError, match="block list"):
        blob.commit_block_list([BlobBlock("other")])
    blob.create_snapshot()
    blob.delete_blob(delete_snapshots="only")
    assert blob.get_blob_properties().etag == version
    assert len(blob.get_block_list("uncommitted")[1]) == 1
    blob.commit_block_list(blob.get_block_list("committed")[0])
    assert blob.get_block_list("uncommitted")[1] == []
    assert blob.get_blob_properties().etag != version
    assert blob.download_blob().readall() == (b"" if form == "put whole" else b"old")


async def test_failed_upload_leaves_the_blocks_of_another_one(store: AzureStore) -> None:
    path = store.path("checkpoint.pt")
    loop, go_on, staged = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()

    async def slow_chunks() -> AsyncIterator[Chunk]:
        async for chunk in stream(DATA, MIB):
            yield chunk
        while not await anyio.to_thread.run_sync(store.staged):
            pass
        loop.call_soon_threadsafe(staged.set)
        await run_on(loop, go_on.wait)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(store.write, path, slow_chunks())
        await staged.wait()
        await interrupted_write(store, path)
        go_on.set()
    assert store.raw_read(path) == DATA


@pytest.mark.parametrize("other", [DATA + b"the other one's", DATA[::-1]], ids=["longer", "of the same size"])
async def test_who_loses_against_another_writer_is_told(store: AzureStore, other: bytes) -> None:
    path = store.path("checkpoint.pt")

    async def chunks() -> AsyncIterator[Chunk]:
        async for chunk in stream(DATA, MIB):
            yield chunk
        while not await anyio.to_thread.run_sync(store.staged):
            pass
        await run_on(loop, store.write, path, stream(other, MIB))

    loop = asyncio.get_running_loop()
    with pytest.raises(StorageError, match="another writer"):
        await store.write(path, chunks())
    assert store.raw_read(path) == other


@pytest.mark.parametrize("size", [10, len(DATA)], ids=["small", "blocks"])
async def test_metadata_is_kept_under_names_that_azure_takes(store: AzureStore, size: int) -> None:
    path = store.path("checkpoint.pt")
    metadata = {"flyte-execution-project": "p", "flyte-execution-launchplan": "", "1st": " x  y ", "Step": "1"}
    written = await store.write(path, stream(DATA[:size], MIB), metadata=metadata)
    kept = store.raw_blob(path).get_blob_properties().metadata
    assert written.metadata == (await store.stat(path)).metadata == kept
    assert {name.lower(): value for name, value in kept.items()} == {
        "flyte_execution_project": "p",
        "flyte_execution_launchplan": "",
        "_1st": "x  y",
        "step": "1",
    }


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ({"a-b": "1", "a.b": "2"}, "'a-b' and 'a.b'"),
        ({"_1": "1", "1": "2"}, "'_1' and '1'"),
        ({"Step": "1", "step": "2"}, "'Step' and 'step'"),
        ({"author": "Grüße"}, "'author': 'Grüße'"),
    ],
)
async def test_metadata_that_azure_would_lose_is_refused_before_anything_is_sent(
    faulty: Callable[..., Any], plane: Plane, metadata: dict[str, str], named: str
) -> None:
    store, proxy = faulty(plane)
    with pytest.raises(UnsupportedOptionError, match=named):
        await store.write(store.path("checkpoint.pt"), stream(DATA, MIB), metadata=metadata)
    assert proxy.log == []


@pytest.mark.parametrize("plane", PLANES)
async def test_copy_from_s3_takes_flytes_metadata_along(
    plane: Plane, azure_url: str, azure_storage_options: dict[str, Any], s3_url: str, s3_storage_options: dict[str, Any]
) -> None:
    source, target = f"{s3_url}/checkpoint.pt", f"{azure_url}/checkpoint.pt"
    metadata = {"flyte-execution-project": "p"}
    await torchferry.save_async([1], source, storage_options=s3_storage_options, metadata=metadata)
    copied = await torchferry.copy_async(
        source,
        target,
        source_storage_options=s3_storage_options,
        target_storage_options=azure_storage_options,
        plane=plane,
    )
    assert copied.metadata == {"flyte_execution_project": "p"}
    assert await torchferry.load_async(target, storage_options=azure_storage_options) == [1]


async def test_blob_above_a_single_put_and_below_a_part_is_one_block(through_adlfs: AzureStore) -> None:
    path = through_adlfs.path("checkpoint.pt")
    written = await through_adlfs.write(path, stream(DATA, MIB), part_size=16 * MIB, metadata={"step": "1"})
    assert written.size == len(DATA)
    assert await through_adlfs.stat(path) == written
    assert through_adlfs.raw_read(path) == DATA


def test_50_000_blocks_hold_190_tebibytes() -> None:
    limits = {"maximum": torchferry_azure._LARGEST_BLOCK, "max_parts": torchferry_azure._MOST_BLOCKS}
    sizes = PartSizes(part_size_for(0, minimum=torchferry_azure._SMALLEST_BLOCK, **limits), **limits)
    assert max(sizes[index] for index in range(50_000)) <= 4000 * MIB
    for size in (1 << 30, 1 << 40, 100 << 40):
        part = part_size_for(size, minimum=torchferry_azure._SMALLEST_BLOCK, **limits)
        assert part <= 4000 * MIB
        assert part * 50_000 >= size


# --- faults


@pytest.fixture
def faulty(
    azure_server: AzureServer, azure_client: Any, azure_url: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., tuple[AzureStore, FaultProxy]]]:
    """Makes the store as seen through a proxy with these faults."""
    # The client library waits 15 seconds before its first retry.
    monkeypatch.setattr("azure.storage.blob._shared.policies_async.ExponentialRetry.get_backoff_time", lambda *_: 0.1)
    with ExitStack() as stack:

        def make(plane: Plane, *faults: Fault) -> tuple[AzureStore, FaultProxy]:
            proxy = stack.enter_context(FaultProxy(azure_server.port, *faults))
            connection = connection_string_for(
                f"{proxy.endpoint}/{azure_server.account_name}",
                AccountName=azure_server.account_name,
                AccountKey=azure_server.account_key,
            )
            return AzureStore(azure_client, azure_url, {"connection_string": connection}, plane), proxy

        yield make


SURVIVABLE = {
    "block refused": Fault(method="PUT", target="comp=block&", status=503, code="ServerBusy"),
    "block reset in the middle": Fault(method="PUT", target="comp=block&", reset_upload_after=MIB),
    "block stored but the reply lost": Fault(method="PUT", target="comp=block&", lose_reply=True),
    "commit refused": Fault(method="PUT", target="comp=blocklist", status=503, code="ServerBusy"),
    "committed but the reply lost": Fault(method="PUT", target="comp=blocklist", lose_reply=True),
    "read reset in the middle": Fault(method="GET", reset_download_after=MIB),
    "read cut short": Fault(method="GET", truncate_after=MIB),
}


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("fault", SURVIVABLE)
async def test_survives(faulty: Callable[..., Any], plane: Plane, fault: str) -> None:
    store, proxy = faulty(plane, dataclasses.replace(SURVIVABLE[fault]))
    path = store.path("checkpoint.pt")
    written = await store.write(path, stream(DATA, MIB), size_hint=len(DATA))
    assert await store.read(path, 0, len(DATA), written) == DATA
    assert any(request.fault for request in proxy.log)
    assert store.leftovers() == []


@pytest.mark.parametrize("plane", PLANES)
async def test_store_that_goes_on_refusing_is_unavailable(faulty: Callable[..., Any], plane: Plane) -> None:
    fault = Fault(method="PUT", target="comp=block&", status=503, code="ServerBusy", times=None)
    store, _ = faulty(plane, fault)
    with pytest.raises(StorageUnavailableError):
        await store.write(store.path("checkpoint.pt"), stream(DATA, MIB))
    assert store.leftovers() == []


@pytest.mark.parametrize("plane", PLANES)
async def test_cancel_while_a_block_hangs_leaves_nothing(
    faulty: Callable[..., Any], plane: Plane, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("torchferry.storage.obstore._ABORT_SECONDS", 2.0)
    store, proxy = faulty(plane, Fault(method="PUT", target="comp=block&", skip=1, hang=True, times=None))
    path = store.path("checkpoint.pt")
    await cancel_at_the_end(store, path, DATA, partial(proxy.wait_for, "PUT", "comp=block&", count=3))
    assert store.leftovers() == []
    assert "may still be there" not in caplog.text


# --- settings and credentials


@pytest.mark.parametrize("protocol", ["az", "abfs", "abfss"])
def test_every_form_of_url_leads_to_the_blob(protocol: str, azure_storage_options: dict[str, Any]) -> None:
    for url in (f"{protocol}://container/a/b.pt", f"{protocol}://container@ferrytest.dfs.core.windows.net/a/b.pt"):
        backend, path = open_backend(url, storage_options=azure_storage_options)
        assert path == "container/a/b.pt"
        assert backend.plane == "obstore"
        assert backend.url(path) == "abfs://container/a/b.pt"


def test_account_of_the_url_is_the_account_that_is_asked() -> None:
    url = "abfs://container@myaccount.dfs.core.windows.net/a/b.pt"
    backend, _ = open_backend(url, storage_options={"anon": True}, plane="fsspec")
    assert isinstance(backend, torchferry_azure.AzureBackend)
    assert backend.blob("container/a/b.pt").url == "https://myaccount.blob.core.windows.net/container/a/b.pt"


@pytest.mark.parametrize("plane", PLANES)
async def test_shared_access_signature_is_enough(
    plane: Plane, azure_client: Any, azure_url: str, azure_server: AzureServer
) -> None:
    signature = generate_account_sas(
        azure_server.account_name,
        azure_server.account_key,
        ResourceTypes(container=True, object=True),
        AccountSasPermissions(read=True, write=True, delete=True, list=True, create=True),
        datetime.now(UTC) + timedelta(hours=1),
    )
    connection = connection_string_for(azure_server.endpoint, SharedAccessSignature=signature)
    store = AzureStore(azure_client, azure_url, {"connection_string": connection}, plane)
    path = store.path("checkpoint.pt")
    written = await store.write(path, stream(DATA, MIB))
    assert await store.read(path, 0, len(DATA), written) == DATA
    await store.delete(path)
    assert not store.raw_exists(path)


@pytest.mark.parametrize("plane", PLANES)
async def test_public_container_is_read_anonymously(plane: Plane, azure_client: Any, azure_server: AzureServer) -> None:
    container = f"public-{uuid.uuid4().hex[:12]}"
    azure_client.create_container(container, public_access="container")
    fs = AzureBlobFileSystem(account_name=azure_server.account_name, anon=True, skip_instance_cache=True)
    # adlfs speaks https to accounts; Azurite here does not.
    fs.service_client = BlobServiceClient(azure_server.endpoint)
    backend, path = open_backend(f"abfs://{container}/checkpoint.pt", filesystem=fs, plane=plane)
    azure_client.get_blob_client(container, "checkpoint.pt").upload_blob(DATA)

    async def read() -> bytes:
        return bytes(await backend.read(path, 5, 100, await backend.stat(path)))

    assert await run_on(backend.loop, read) == DATA[5:100]
    with pytest.raises(StorageError):
        await run_on(backend.loop, backend.write, path, stream(DATA, MIB), size_hint=len(DATA))
    assert azure_client.get_blob_client(container, "checkpoint.pt").download_blob().readall() == DATA


UNTRANSLATABLE = [
    {"version_aware": True},
    {"max_concurrency": 2},
    {"timeout": 5},
    {"location_mode": "secondary"},
    {"something_new": 1},
]


@pytest.mark.parametrize("options", UNTRANSLATABLE, ids=lambda options: next(iter(options)))
def test_what_obstore_cannot_honour_goes_through_adlfs(options: dict[str, Any]) -> None:
    storage_options = {"account_name": "ferrytest", "account_key": WRONG_KEY, **options}
    assert open_backend("abfs://container/key", storage_options=storage_options)[0].plane == "fsspec"
    with pytest.raises(UnsupportedOptionError, match=next(iter(options)).replace("_", ".")):
        open_backend("abfs://container/key", storage_options=storage_options, plane="obstore")


@pytest.mark.parametrize("plane", PLANES)
async def test_filesystem_made_for_its_users_loop_works(
    plane: Plane,
    azure_client: Any,
    azure_url: str,
    azure_storage_options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("weakref.finalize", lambda *_: None)  # at exit adlfs would look for this test's event loop
        fs = AzureBlobFileSystem(**azure_storage_options, asynchronous=True, skip_instance_cache=True)
    backend, path = open_backend(f"{azure_url}/checkpoint.pt", filesystem=fs, plane=plane)
    assert backend.loop is None
    written = await backend.write(path, stream(DATA, MIB), size_hint=len(DATA), part_size=5 * MIB)
    assert bytes(await backend.read(path, 0, 10, written)) == DATA[:10]
    container, _, key = path.partition("/")
    assert azure_client.get_blob_client(container, key).download_blob().readall() == DATA
    await fs.service_client.close()


async def test_adlfs_sees_what_was_written(store: AzureStore, azure_storage_options: dict[str, Any]) -> None:
    fs = AzureBlobFileSystem(**azure_storage_options)
    url = f"abfs://{store.path('directory/checkpoint.pt')}"
    backend, path = open_backend(url, filesystem=fs, plane=store.backend.plane)
    store.raw_write(store.path("directory/other.pt"), b"1")
    assert len(fs.ls(fs._parent(path))) == 1
    await run_on(backend.loop, backend.write, path, stream(b"12345", 2), size_hint=5)
    assert path in fs.ls(fs._parent(path))


# --- over TLS, which adlfs insists on for everything but connection strings


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    """Who issues certificates for 127.0.0.1."""
    return trustme.CA(key_type=trustme.KeyType.ECDSA)


def write_certificate(stem: Path, authority: trustme.CA) -> tuple[Path, Path]:
    """Writes a certificate for 127.0.0.1; returns its file and its key's."""
    issued = authority.issue_cert("127.0.0.1", key_type=trustme.KeyType.ECDSA)
    files = stem.with_suffix(".pem"), stem.with_suffix(".key")
    files[0].write_bytes(issued.cert_chain_pems[0].bytes())
    files[1].write_bytes(issued.private_key_pem.bytes())
    return files


@pytest.fixture(scope="session")
def tls_server(
    azurite_program: Path, authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[AzureServer, Path]]:
    """Azurite over TLS, where it also takes bearer tokens; and the certificate of who issued its own."""
    directory = tmp_path_factory.mktemp("azurite-tls")
    trusted = directory / "authority.pem"
    trusted.write_bytes(authority.cert_pem.bytes())
    with azurite(
        directory, program=azurite_program, certificate=write_certificate(directory / "server", authority)
    ) as server:
        yield server, trusted


class TokenIssuer(TokenServer):
    """What Microsoft Entra ID is to service principals: over TLS, gives out tokens for their secret.

    https://learn.microsoft.com/entra/identity-platform/v2-oauth2-client-creds-grant-flow
    """

    tenant = "ferry-tenant"
    secret = "ferry-secret"

    def __init__(self, certificate: tuple[Path, Path]) -> None:
        super().__init__(certificate)
        self.served: list[str] = []  # the ids of those who got a token

    def answer(self, path: str, **form: str) -> tuple[int, dict[str, Any]]:
        assert path == f"/{self.tenant}/oauth2/v2.0/token"
        assert form["grant_type"] == "client_credentials"
        assert form["scope"] == "https://storage.azure.com/.default"
        if form["client_secret"] != self.secret:
            return 401, {"error": "invalid_client", "error_description": "AADSTS7000215: Invalid client secret."}
        self.served.append(form["client_id"])
        return 200, {"access_token": bearer_token(), "expires_in": 3600, "token_type": "Bearer"}


@pytest.fixture
def token_issuer(authority: trustme.CA, tmp_path: Path) -> Iterator[TokenIssuer]:
    with TokenIssuer(write_certificate(tmp_path / "issuer", authority)) as issuer:
        yield issuer


def bearer_token() -> str:
    """Azurite checks who issued it, for whom and until when, and not who signed it."""
    now = int(datetime.now(UTC).timestamp())
    claims = {
        "aud": "https://storage.azure.com",
        "iss": "https://sts.windows.net/ab1f708d-50f6-404c-a006-d71b2ac7a606/",
        "iat": now - 60,
        "nbf": now - 60,
        "exp": now + 3600,
    }
    parts = [{"alg": "none", "typ": "JWT"}, claims]
    encoded = [base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts]
    return ".".join([*encoded, "c2lnbmF0dXJl"])


CREDENTIALS = {  # how a filesystem is told, and who is given a token then
    "account key": ('{"account_key": server["account_key"]}', []),
    "shared access signature": ('{"sas_token": server["signature"]}', []),
    "service principal": (
        '{"tenant_id": "ferry-tenant", "client_id": "principal", "client_secret": "ferry-secret"}',
        ["principal"],
    ),
    "default credential": ('{"anon": False}', ["of the environment"]),
    "credential": (
        '{"credential": ClientSecretCredential("ferry-tenant", "of the user", "ferry-secret")}',
        ["of the user"],
    ),
}

CONNECT = """
import json, sys
import torch, torchferry
from adlfs import AzureBlobFileSystem
from azure.identity.aio import ClientSecretCredential

server = json.loads(sys.argv[1])
fs = AzureBlobFileSystem(account_name="ferrytest", account_host=server["host"], **{credentials})
"""

ROUND_TRIP = """
from torchferry.engine.transport import DirectReader

read_into = DirectReader.read_into

async def noting(*arguments):
    read_directly.append(await read_into(*arguments))
    return read_directly[-1]

DirectReader.read_into = noting
tensors = [torch.arange(1 << 21), torch.arange(1 << 21)]
for plane in ("fsspec", "obstore"):
    url = f"abfs://{server['container']}/{plane}.pt"
    read_directly = []
    torchferry.save(tensors, url, filesystem=fs, plane=plane, part_size=5 << 20)
    loaded = torchferry.load(url, filesystem=fs, plane=plane)
    assert read_directly and all(read_directly), read_directly
    assert all(map(torch.equal, loaded, tensors))
    print(plane)
"""

REFUSED = """
from azure.storage.blob._shared.policies_async import ExponentialRetry

ExponentialRetry.get_backoff_time = lambda *_: 0.1  # it asks four times, in 86 seconds
for plane in ("fsspec", "obstore"):
    url = f"abfs://{server['container']}/{plane}.pt"
    try:
        torchferry.save(torch.arange(10), url, filesystem=fs, plane=plane)
    except torchferry.StoragePermissionError as error:
        assert "Invalid client secret" in str(error), error
        print(plane)
"""


@pytest.fixture
def tls_run(
    tls_server: tuple[AzureServer, Path], token_issuer: TokenIssuer
) -> Callable[[str], subprocess.CompletedProcess[str]]:
    """Runs a program in a process of its own, which trusts the certificates from its start."""
    server, certificate = tls_server
    signature = generate_account_sas(
        server.account_name,
        server.account_key,
        ResourceTypes(container=True, object=True),
        AccountSasPermissions(read=True, write=True, delete=True, list=True, create=True),
        datetime.now(UTC) + timedelta(hours=1),
    )
    container = f"ferry-{uuid.uuid4().hex[:12]}"
    connection = connection_string_for(server.endpoint, AccountName=server.account_name, AccountKey=server.account_key)
    with SyncBlobServiceClient.from_connection_string(connection, connection_verify=str(certificate)) as client:
        client.create_container(container)
    known = {
        "host": server.endpoint.removeprefix("https://"),
        "account_key": server.account_key,
        "signature": signature,
        "container": container,
    }
    environment = {
        "SSL_CERT_FILE": str(certificate),
        "AZURE_AUTHORITY_HOST": f"127.0.0.1:{token_issuer.port}",
        "AZURE_TENANT_ID": TokenIssuer.tenant,
        "AZURE_CLIENT_ID": "of the environment",
        "AZURE_CLIENT_SECRET": TokenIssuer.secret,
    }

    def run(program: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", program, json.dumps(known)],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    return run


@pytest.mark.parametrize("kind", CREDENTIALS)
def test_credentials_of_the_filesystem_serve_both_planes(
    tls_run: Callable[[str], subprocess.CompletedProcess[str]], token_issuer: TokenIssuer, kind: str
) -> None:
    """With azure-identity's own credentials; one token, got over TLS, serves both planes, and what is read directly."""
    credentials, served = CREDENTIALS[kind]
    done = tls_run(CONNECT.format(credentials=credentials) + ROUND_TRIP)
    assert done.stdout == "fsspec\nobstore\n", done.stderr
    assert token_issuer.served == served


def test_service_principal_that_is_refused_a_token_is_a_permission_error(
    tls_run: Callable[[str], subprocess.CompletedProcess[str]], token_issuer: TokenIssuer
) -> None:
    credentials = '{"tenant_id": "ferry-tenant", "client_id": "principal", "client_secret": "wrong"}'
    done = tls_run(CONNECT.format(credentials=credentials) + REFUSED)
    assert done.stdout == "fsspec\nobstore\n", done.stderr
    assert token_issuer.served == []
