from __future__ import annotations

import asyncio
import dataclasses
import gc
import secrets
import weakref
import zlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Literal, TypeAlias

import anyio
import pytest
import torch
from adlfs import AzureBlobFileSystem
from azure.core import MatchConditions
from azure.core.exceptions import HttpResponseError, ResourceModifiedError
from azure.storage.blob import AccountSasPermissions, BlobBlock, ContentSettings, ResourceTypes, generate_account_sas

import torchferry
from torchferry.engine.loops import run_on
from torchferry.engine.transfer import Transfer, TransferReport
from torchferry.engine.types import MIB, Chunk, ObjectStat
from torchferry.engine.writer import Body, UploadPlan
from torchferry.errors import (
    ChangedWhileSavingError,
    StorageError,
    StoragePermissionError,
    StorageUnavailableError,
    UnsupportedOptionError,
    UnsupportedURLError,
)
from torchferry.storage.base import Backend
from torchferry.storage.http import Engine
from torchferry.storage.registry import open_backend
from torchferry.testing import CloudConformance, StoreUnderTest
from torchferry.testing.azure import AzureServer, connection_string_for
from torchferry.testing.conformance import SourceError, cancel_at_the_end, stream
from torchferry.testing.faultproxy import Fault, FaultProxy, Head
from torchferry_azure import AzureBackend
from torchferry_azure.blocks import new_block_id, newest
from torchferry_azure.letting_go import session_of
from torchferry_azure.upload import AzureUpload

Way: TypeAlias = Literal["engine", "client"]

DATA = bytes(range(256)) * (12 * 4096)  # 12 MiB: three blocks of 5 MiB
WRONG_KEY = "d3Jvbmc="
WAYS = pytest.mark.parametrize("way", ["engine", "client"])
"""Who moves the bytes: the engine, or adlfs's client, where only that honours the filesystem's settings."""


class AzureStore(StoreUnderTest):
    keeps_metadata = True
    losers_fail = True

    def __init__(self, client: Any, url: str, storage_options: dict[str, Any], way: Way = "engine") -> None:
        self.options = {"storage_options": storage_options}
        fs = AzureBlobFileSystem(**storage_options, skip_instance_cache=True)
        if way == "client":
            Engine.of(fs, lambda: Engine(None, "of the test"))
        self.backend, self._prefix = open_backend(url, filesystem=fs)
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

    def leftovers(self) -> Sequence[str]:
        """Blobs that are nothing but uncommitted blocks: those of a blob that exists stay, where nobody sees them."""
        return [name for name in self.staged() if not self.raw_exists(name)]

    def staged(self) -> Sequence[str]:
        container, _, prefix = self._prefix.partition("/")
        blobs = self._client.get_container_client(container).list_blobs(prefix, include=["uncommittedblobs"])
        paths = [f"{container}/{blob.name}" for blob in blobs]
        return [path for path in paths if self.raw_blob(path).get_block_list("uncommitted")[1]]

    def raw_blob(self, path: str) -> Any:
        container, _, key = path.partition("/")
        return self._client.get_blob_client(container, key)


class TestAzure(CloudConformance):
    @pytest.fixture
    def store(self, azure_client: Any, azure_url: str, azure_storage_options: dict[str, Any]) -> AzureStore:
        return AzureStore(azure_client, azure_url, azure_storage_options)

    @pytest.fixture
    def path_in_missing_container(self) -> str:
        return "ferry-nowhere/checkpoint.pt"

    @pytest.fixture
    def unauthorized(self, azure_url: str, azure_server: AzureServer) -> Backend:
        connection = connection_string_for(
            azure_server.endpoint, AccountName=azure_server.account_name, AccountKey=WRONG_KEY
        )
        return open_backend(azure_url, storage_options={"connection_string": connection})[0]


@pytest.fixture
def store(azure_client: Any, azure_url: str, azure_storage_options: dict[str, Any]) -> AzureStore:
    return AzureStore(azure_client, azure_url, azure_storage_options)


Faulty: TypeAlias = Callable[..., "tuple[AzureStore, FaultProxy]"]


@pytest.fixture
def faulty(azure_server: AzureServer, azure_client: Any, azure_url: str) -> Iterator[Faulty]:
    """Makes the store as seen through a proxy with these faults."""
    with ExitStack() as stack:

        def make(
            *faults: Fault, way: Way = "engine", options: Mapping[str, Any] | None = None, **credentials: str
        ) -> tuple[AzureStore, FaultProxy]:
            proxy = stack.enter_context(FaultProxy(azure_server.port, *map(dataclasses.replace, faults)))
            known = {"AccountName": azure_server.account_name, "AccountKey": azure_server.account_key}
            endpoint = f"{proxy.endpoint}/{azure_server.account_name}"
            connection = connection_string_for(endpoint, **(credentials or known))
            return AzureStore(azure_client, azure_url, {"connection_string": connection, **(options or {})}, way), proxy

        yield make


def signature_for(server: AzureServer, **permissions: bool) -> str:
    """A shared access signature for an account."""
    return generate_account_sas(
        server.account_name,
        server.account_key,
        ResourceTypes(container=True, object=True),
        AccountSasPermissions(**permissions),
        datetime.now(UTC) + timedelta(hours=1),
    )


# --- blobs and their uncommitted blocks


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
def test_why_staged_blocks_are_left_beside_a_blob_that_exists(store: AzureStore, form: str) -> None:
    """Nothing discards them but what makes another version of the blob, or even empties it."""
    blob = store.raw_blob(store.path("checkpoint.pt"))
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


async def test_block_that_arrives_after_its_upload_was_aborted_is_discarded(store: AzureStore) -> None:
    path = store.path("checkpoint.pt")
    backend = store.backend
    assert isinstance(backend, AzureBackend)
    upload = AzureUpload(backend, path, {})
    block_id = await run_on(backend.loop, upload.put_part, 0, Body([Chunk(b"12345")]))
    upload._cut_off = True
    await run_on(backend.loop, upload.abort)
    assert store.staged() == []
    store.raw_blob(path).stage_block(block_id, b"12345")
    container, _, name = path.partition("/")
    listing = store._client.get_container_client(container).list_blobs
    with anyio.fail_after(60):
        while await anyio.to_thread.run_sync(lambda: list(listing(name, include=["uncommittedblobs"]))):
            pass


async def test_lost_reply_while_blocks_are_discarded_leaves_no_empty_blob(faulty: Faulty) -> None:
    store, proxy = faulty(Fault(method="PUT", target="comp=blocklist", lose_reply=True, times=2))
    path = store.path("checkpoint.pt")
    await interrupted_write(store, path)
    assert proxy.requests("PUT", "comp=blocklist")
    assert not store.raw_exists(path)
    assert store.staged() == []


@pytest.mark.parametrize("size", [10, len(DATA)], ids=["small", "blocks"])
async def test_lease_on_the_blob_is_named_as_the_reason(store: AzureStore, size: int) -> None:
    path = store.path("checkpoint.pt")
    store.raw_write(path, b"old")
    lease = store.raw_blob(path).acquire_lease()
    with pytest.raises(StorageError, match="LeaseIdMissing"):
        await store.write(path, stream(DATA[:size], MIB))
    assert store.raw_read(path) == b"old"
    lease.release()


async def test_leftovers_tells_when_blocks_were_staged_and_discard_removes_them(store: AzureStore) -> None:
    path = store.path("run/checkpoint.pt")
    before = datetime.now(UTC) - timedelta(milliseconds=1)
    blob = store.raw_blob(path)
    for block in (new_block_id(), new_block_id()):
        blob.stage_block(block, b"left behind")
    (found,) = await store.backend_leftovers(store.path("run/"))
    assert (found.path, found.kind) == (path, "uncommitted blocks")
    assert found.modified is not None
    assert before <= found.modified <= datetime.now(UTC)
    assert await run_on(store.backend.loop, store.backend.discard, found)
    assert not store.raw_exists(path)
    assert store.staged() == []


async def test_discard_leaves_blocks_that_came_later_and_those_of_a_blob_that_exists(store: AzureStore) -> None:
    path = store.path("run/checkpoint.pt")
    blob = store.raw_blob(path)
    blob.stage_block(new_block_id(), b"left behind")
    (found,) = await store.backend_leftovers(store.path("run/"))
    blob.stage_block(new_block_id(), b"of another writer")
    assert not await run_on(store.backend.loop, store.backend.discard, found)
    assert store.staged() == [path]
    (found,) = await store.backend_leftovers(store.path("run/"))
    blob.upload_blob(b"old", overwrite=True)
    blob.stage_block(new_block_id(), b"beside it")
    assert not await run_on(store.backend.loop, store.backend.discard, found)
    assert store.raw_read(path) == b"old"
    assert await store.backend_leftovers(store.path("run/")) == []


def test_ids_of_blocks_of_others_tell_no_time() -> None:
    assert newest([BlobBlock(secrets.token_hex(6) + "4" + secrets.token_hex(10)[1:]), BlobBlock("block")]) is None


async def test_list_leaves_out_directories_of_a_hierarchical_namespace_and_uncommitted_blobs(store: AzureStore) -> None:
    store.raw_blob(store.path("run/steps")).upload_blob(b"", metadata={"hdi_isfolder": "true"})
    store.raw_blob(store.path("run/half.pt")).stage_block(new_block_id(), b"half")
    path = store.path("run/steps/checkpoint.pt")
    store.raw_write(path, b"12345")
    (found,) = await store.list(store.path("run/"))
    stat = await store.stat(path)
    assert (found.path, found.size, found.etag) == (path, stat.size, stat.etag)
    assert found.modified is not None
    assert found.modified.tzinfo is not None


async def test_list_goes_on_after_the_first_page(store: AzureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {store.path(f"run/{number}.pt") for number in range(5)}
    for path in paths:
        store.raw_write(path, b"x")
    monkeypatch.setattr("torchferry_azure.client._PAGE", 2)
    assert {found.path for found in await store.list(store.path("run/"))} == paths


def test_50_000_blocks_hold_190_tebibytes(store: AzureStore) -> None:
    plan: UploadPlan = store.backend.upload_plan(0)
    assert max(map(plan.part_at, range(50_000))) <= 4000 * MIB
    for size in (1 << 30, 1 << 40, 100 << 40):
        part = store.backend.upload_plan(size).part_size
        assert part <= 4000 * MIB
        assert part * 50_000 >= size


def test_max_concurrency_of_the_filesystem_bounds_the_blocks_under_way(azure_storage_options: dict[str, Any]) -> None:
    for limit, in_flight in ((2, 2), (None, 32), (100, 32)):
        fs = AzureBlobFileSystem(**azure_storage_options, max_concurrency=limit)
        assert open_backend("abfs://container/key", filesystem=fs)[0].upload_plan(1 << 30).in_flight == in_flight


# --- metadata


@pytest.mark.parametrize("size", [10, len(DATA)], ids=["small", "blocks"])
@WAYS
async def test_metadata_is_kept_under_names_that_azure_takes(faulty: Faulty, way: Way, size: int) -> None:
    store, _ = faulty(way=way)
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


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ({"a-b": "1", "a.b": "2"}, "'a-b' and 'a.b'"),
        ({"_1": "1", "1": "2"}, "'_1' and '1'"),
        ({"Step": "1", "step": "2"}, "'Step' and 'step'"),
        ({"author": "Grüße"}, "'author': 'Grüße'"),
        ({f"name{number}": "x" for number in range(90)}, "90 entries"),
        ({"a": "x" * 4096, "b": "y" * 4096}, "8194 bytes"),
    ],
    ids=["punctuation", "digit", "case", "not ascii", "90 entries", "8 kib"],
)
async def test_metadata_that_cannot_come_back_is_refused_before_anything_is_sent(
    faulty: Faulty, metadata: dict[str, str], named: str
) -> None:
    store, proxy = faulty()
    with pytest.raises(UnsupportedOptionError, match=named):
        await store.write(store.path("checkpoint.pt"), stream(DATA, MIB), metadata=metadata)
    assert proxy.log == []


async def test_as_much_metadata_as_is_taken_comes_back(store: AzureStore, azure_url: str) -> None:
    metadata = {f"name{number}": "x" * 100 for number in range(64)}
    url = f"{azure_url}/checkpoint.pt"
    written = await torchferry.save_async([1], url, metadata=metadata, **store.options or {})
    assert written.metadata == metadata
    reports: list[TransferReport] = []
    assert await torchferry.load_async(url, report=reports.append, **store.options or {}) == [1]
    assert reports[0].client_bytes == 0
    assert (await store.stat(store.path("checkpoint.pt"))).metadata == metadata


async def test_copy_from_s3_takes_flytes_metadata_along(
    azure_url: str, azure_storage_options: dict[str, Any], s3_url: str, s3_storage_options: dict[str, Any]
) -> None:
    source, target = f"{s3_url}/checkpoint.pt", f"{azure_url}/checkpoint.pt"
    metadata = {"flyte-execution-project": "p"}
    await torchferry.save_async([1], source, storage_options=s3_storage_options, metadata=metadata)
    copied = await torchferry.copy_async(
        source, target, source_storage_options=s3_storage_options, target_storage_options=azure_storage_options
    )
    assert copied.metadata == {"flyte_execution_project": "p"}
    assert await torchferry.load_async(target, storage_options=azure_storage_options) == [1]


# --- faults

RETRY_AFTER = {"Retry-After": "0.1"}

SURVIVABLE = {
    "block refused for now": Fault(method="PUT", target="comp=block&", status=503, code="ServerBusy"),
    "too many requests": Fault(status=429, code="TooManyRequests", headers=RETRY_AFTER, times=5),
    "block timed out": Fault(method="PUT", target="comp=block&", status=500, code="OperationTimedOut", times=4),
    "block reset in the middle": Fault(method="PUT", target="comp=block&", reset_upload_after=MIB),
    "block stored but the reply lost": Fault(method="PUT", target="comp=block&", lose_reply=True),
    "commit refused three times": Fault(method="PUT", target="comp=blocklist", status=503, code="ServerBusy", times=3),
    "commit reset": Fault(method="PUT", target="comp=blocklist", reset_upload_after=1, times=3),
    "committed but the reply lost": Fault(method="PUT", target="comp=blocklist", lose_reply=True, times=3),
    "read reset in the middle": Fault(method="GET", target="checkpoint.pt", reset_download_after=MIB),
    "read cut short": Fault(method="GET", target="checkpoint.pt", truncate_after=MIB),
    "read refused for now": Fault(method="GET", target="checkpoint.pt", status=503, code="ServerBusy", times=3),
}


@pytest.mark.parametrize("fault", SURVIVABLE)
@WAYS
async def test_survives(faulty: Faulty, way: Way, fault: str) -> None:
    store, proxy = faulty(SURVIVABLE[fault], way=way)
    path = store.path("checkpoint.pt")
    written = await store.write(path, stream(DATA, MIB), size_hint=len(DATA))
    assert await store.read(path, 0, len(DATA), written) == DATA
    assert await store.stat(path) == written
    assert any(request.fault for request in proxy.log)
    assert store.leftovers() == []


async def test_a_commit_whose_reply_was_lost_is_a_success_also_where_nothing_is_tried_again(faulty: Faulty) -> None:
    store, _ = faulty(SURVIVABLE["committed but the reply lost"])
    path = store.path("checkpoint.pt")
    with Transfer("save", give_up_after=0.0).running(None):
        written = await store.write(path, stream(DATA, MIB))
    assert await store.stat(path) == written


async def test_a_token_that_has_expired_does_not_make_a_store_one_that_refuses_checksums(faulty: Faulty) -> None:
    fault = Fault(method="PUT", target="comp=block&", status=400, code="InvalidAuthenticationInfo")
    store, proxy = faulty(fault)
    path = store.path("checkpoint.pt")
    await store.write(path, stream(DATA, MIB))
    assert store.raw_read(path) == DATA
    assert all("content-md5" in request.headers for request in proxy.requests("PUT", "comp=block&"))


async def test_cancel_between_two_attempts_to_commit_publishes_nothing(faulty: Faulty) -> None:
    headers = {"Retry-After": "1"}
    store, proxy = faulty(Fault(method="PUT", target="comp=blocklist", status=503, code="ServerBusy", headers=headers))
    path = store.path("checkpoint.pt")
    store.raw_write(path, b"old")
    await cancel_at_the_end(store, path, DATA, partial(proxy.wait_for, "PUT", "comp=blocklist"))
    assert store.raw_read(path) == b"old"


@pytest.mark.parametrize(
    "fault",
    [
        Fault(method="PUT", status=503, code="ServerBusy", times=2),
        Fault(method="PUT", reset_upload_after=100_000),
        Fault(method="PUT", lose_reply=True),
    ],
    ids=["refused for now", "reset", "reply lost"],
)
@WAYS
async def test_small_blob_survives(faulty: Faulty, way: Way, fault: Fault) -> None:
    store, proxy = faulty(fault, way=way)
    path = store.path("checkpoint.pt")
    written = await store.write(path, stream(DATA[:MIB], 4096), metadata={"step": "1"})
    assert store.raw_read(path) == DATA[:MIB]
    assert await store.stat(path) == written
    assert proxy.log[0].fault


@WAYS
async def test_requests_are_repeated_by_the_engines_policy_only(faulty: Faulty, way: Way) -> None:
    """The client library's own repetitions would wait 15 seconds before the first."""
    store, proxy = faulty(Fault(status=503, code="ServerBusy", times=None), way=way)
    path = store.path("checkpoint.pt")
    verbs: dict[str, Callable[[], Any]] = {
        "stat": lambda: store.stat(path),
        "read": lambda: store.read(path, 0, 5, ObjectStat(store.backend.url(path), 10, '"etag"')),
        "delete": lambda: store.delete(path),
        "list": lambda: store.list(path),
        "leftovers": lambda: store.backend_leftovers(path),
        "write": lambda: store.write(path, stream(DATA[:10], MIB)),
        "write blocks": lambda: store.write(path, stream(DATA, MIB)),
    }
    for verb, call in verbs.items():
        proxy.log.clear()
        transfer = Transfer("test", give_up_after=0.3)
        with transfer.running(None), pytest.raises(StorageUnavailableError):
            await call()
        assert 0 < len(proxy.log) <= transfer.report().requests, verb


async def test_store_that_goes_on_refusing_is_unavailable_and_nothing_stays(faulty: Faulty) -> None:
    store, _ = faulty(Fault(method="PUT", target="comp=block&", skip=1, status=503, code="ServerBusy", times=None))
    with Transfer("save", give_up_after=0.5).running(None), pytest.raises(StorageUnavailableError):
        await store.write(store.path("checkpoint.pt"), stream(DATA, MIB))
    assert store.staged() == []


@WAYS
async def test_block_that_is_never_answered_is_sent_again(faulty: Faulty, way: Way) -> None:
    fault = Fault(method="PUT", target="comp=block&", skip=1, hang=True)
    store, proxy = faulty(fault, way=way, options={"read_timeout": 3})
    path = store.path("checkpoint.pt")
    await store.write(path, stream(DATA, MIB))
    assert store.raw_read(path) == DATA
    assert len(proxy.requests("PUT", "comp=block&")) > 3


@WAYS
async def test_cancel_while_a_block_hangs_leaves_nothing(
    faulty: Faulty, way: Way, caplog: pytest.LogCaptureFixture
) -> None:
    store, proxy = faulty(Fault(method="PUT", target="comp=block&", skip=1, hang=True, times=None), way=way)
    path = store.path("checkpoint.pt")
    await cancel_at_the_end(store, path, DATA, partial(proxy.wait_for, "PUT", "comp=block&", count=3))
    assert store.staged() == []
    assert not store.raw_exists(path)
    assert caplog.text == ""


async def test_small_blob_that_is_not_answered_is_not_published_when_its_save_is_cancelled(
    faulty: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knows what became of a request that was sent whole: its answer is awaited for a while."""
    monkeypatch.setattr("torchferry.engine.transport._ANSWER_PATIENCE", 0.2)
    store, proxy = faulty(Fault(method="PUT", hang=True, times=None))
    path = store.path("checkpoint.pt")
    task = asyncio.create_task(store.write(path, stream(DATA[:MIB], MIB)))
    await asyncio.to_thread(proxy.wait_for, "PUT")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not store.raw_exists(path)


@pytest.mark.parametrize("times", [1, None], ids=["one", "all that follow"])
@WAYS
async def test_block_that_is_forbidden_leaves_no_blocks_of_a_new_blob(
    faulty: Faulty, way: Way, times: int | None
) -> None:
    """Where only the engine's request is forbidden, the client's may not be."""
    fault = Fault(method="PUT", target="comp=block&", skip=2, status=403, code="AuthorizationFailure", times=times)
    store, _ = faulty(fault, way=way)
    path = store.path("checkpoint.pt")
    write = store.write(path, stream(DATA, MIB), part_size=MIB)
    if way == "engine" and times == 1:
        await write
        assert store.raw_read(path) == DATA
        return
    with pytest.raises(StoragePermissionError) as caught:
        await write
    assert store.staged() == []
    assert not any("could not be removed" in note for note in getattr(caught.value, "__notes__", []))


async def test_note_and_log_say_that_blocks_stay_which_the_credentials_may_not_discard(
    faulty: Faulty, azure_server: AzureServer, caplog: pytest.LogCaptureFixture
) -> None:
    fault = Fault(method="PUT", target="comp=block&", skip=2, status=403, code="AuthorizationFailure", times=None)
    signature = signature_for(azure_server, read=True, write=True, list=True, create=True)
    store, _ = faulty(fault, SharedAccessSignature=signature)
    path = store.path("checkpoint.pt")
    with pytest.raises(StoragePermissionError) as caught:
        await store.write(path, stream(DATA, MIB), part_size=MIB)
    message = f"Uncommitted blocks of abfs://{path} stay: the credentials may not delete blobs."
    assert any(message in note for note in caught.value.__notes__)
    assert message in caplog.text
    assert store.staged() == [path]


@pytest.mark.parametrize("size", [MIB, len(DATA)], ids=["small", "blocks"])
@WAYS
async def test_body_that_is_damaged_on_the_way_is_sent_again(faulty: Faulty, way: Way, size: int) -> None:
    """Azurite compares the MD5, as Azure does."""
    store, proxy = faulty(Fault(method="PUT", target="comp=block&|pt$|sig=", corrupt_upload_byte=MIB // 2), way=way)
    path = store.path("checkpoint.pt")
    await store.write(path, stream(DATA[:size], MIB))
    assert store.raw_read(path) == DATA[:size]
    assert sum(request.fault is not None for request in proxy.log) == 1
    assert all(
        "content-md5" in request.headers for request in proxy.requests("PUT") if "blocklist" not in request.target
    )


@pytest.mark.parametrize("size", [MIB, len(DATA)], ids=["small", "blocks"])
@WAYS
async def test_tensor_that_is_changed_while_it_is_saved_is_an_error(faulty: Faulty, way: Way, size: int) -> None:
    store, _ = faulty(way=way)
    path = store.path("checkpoint.pt")
    crc32 = zlib.crc32(DATA[:size])
    changed = bytearray(DATA[:size])
    changed[-1] ^= 1

    async def chunks() -> AsyncIterator[Chunk]:
        yield Chunk(memoryview(changed), crc32)

    with pytest.raises(ChangedWhileSavingError, match="while it was being saved"):
        await store.write(path, chunks(), part_size=16 * MIB)
    assert not store.raw_exists(path)
    assert store.staged() == []


class RefusesChecksums(FaultProxy):
    """A store that knows no Content-MD5."""

    def admit(self, head: Head) -> Head | bytes:
        if "content-md5" in head.fields:
            return b"HTTP/1.1 400 Bad\r\nx-ms-error-code: UnsupportedHeader\r\nContent-Length: 0\r\n\r\n"
        return head


async def test_store_that_refuses_checksums_gets_blobs_without_and_is_remembered(
    azure_server: AzureServer, azure_client: Any, azure_url: str
) -> None:
    with RefusesChecksums(azure_server.port) as proxy:
        connection = connection_string_for(
            f"{proxy.endpoint}/{azure_server.account_name}",
            AccountName=azure_server.account_name,
            AccountKey=azure_server.account_key,
        )
        store = AzureStore(azure_client, azure_url, {"connection_string": connection})
        for name in ("first.pt", "second.pt"):
            await store.write(store.path(name), stream(DATA[:MIB], MIB))
            assert store.raw_read(store.path(name)) == DATA[:MIB]
        assert len(proxy.log) == 3


@WAYS
@pytest.mark.parametrize("kind", ["key", "signature"])
async def test_redirect_to_another_host_takes_no_credentials_along(
    faulty: Faulty, azure_server: AzureServer, way: Way, kind: str
) -> None:
    with FaultProxy(azure_server.port) as other:
        fault = Fault(status=307, code="", headers={"Location": f"{other.endpoint}/ferrytest/x"}, times=None)
        signature = signature_for(azure_server, read=True, write=True, delete=True, list=True, create=True)
        store, proxy = faulty(fault, way=way, **({"SharedAccessSignature": signature} if kind == "signature" else {}))
        path = store.path("checkpoint.pt")
        with pytest.raises(StorageError, match="redirect"):
            await store.stat(path)
        with pytest.raises(StorageError, match="redirect"):
            await store.read(path, 0, 5, ObjectStat(store.backend.url(path), 10, '"etag"'))
        for size in (10, len(DATA)):
            with pytest.raises(StorageError, match="redirect"):
                await store.write(path, stream(DATA[:size], MIB))
        assert any(request.secrets for request in proxy.log)
        assert other.log == []


# --- names, settings and the filesystem


@pytest.mark.parametrize("protocol", ["az", "abfs", "abfss"])
def test_every_form_of_url_leads_to_the_blob(protocol: str, azure_storage_options: dict[str, Any]) -> None:
    for url in (f"{protocol}://container/a/b.pt", f"{protocol}://container@ferrytest.dfs.core.windows.net/a/b.pt"):
        backend, path = open_backend(url, storage_options=azure_storage_options)
        assert path == "container/a/b.pt"
        assert isinstance(backend, AzureBackend)
        assert backend.url(path) == "abfs://container/a/b.pt"


def test_account_of_the_url_is_the_account_that_is_asked() -> None:
    url = "abfs://container@myaccount.dfs.core.windows.net/a/b.pt"
    backend, path = open_backend(url, storage_options={"anon": True})
    assert isinstance(backend, AzureBackend)
    assert backend.client.blob(path).url == "https://myaccount.blob.core.windows.net/container/a/b.pt"


@pytest.mark.parametrize("given", ["filesystem", "storage_options"])
async def test_name_with_colons_is_taken_literally(
    store: AzureStore, azure_storage_options: dict[str, Any], given: str
) -> None:
    options = {"filesystem": AzureBlobFileSystem(**azure_storage_options), "storage_options": azure_storage_options}
    path = store.path("a::b.pt")
    await torchferry.save_async([1], f"abfs://{path}", **{given: options[given]})
    assert store.raw_exists(path)
    assert await torchferry.load_async(f"abfs://{path}", **{given: options[given]}) == [1]


async def test_version_of_a_blob_can_be_read_and_not_be_replaced(
    store: AzureStore, azure_storage_options: dict[str, Any]
) -> None:
    path = store.path("checkpoint.pt")
    store.raw_write(path, b"old")
    url = f"abfs://{path}?versionid=2026-11-26T00:00:00.0000000Z"
    with pytest.raises(UnsupportedURLError, match="names a version"):
        await torchferry.save_async([1], url, storage_options=azure_storage_options)
    backend, versioned = open_backend(url, storage_options=azure_storage_options)
    with pytest.raises(UnsupportedURLError, match="names a version"):
        await run_on(backend.loop, backend.delete, versioned)
    assert store.raw_read(path) == b"old"
    assert isinstance(backend, AzureBackend)
    request = await run_on(backend.loop, backend.sign_read, versioned, ObjectStat(url, 3, '"etag"'))
    assert "/checkpoint.pt?versionid=2026-11-26T00%3A00%3A00.0000000Z&" in request.url


async def test_version_is_part_of_the_name_for_a_filesystem_that_knows_no_versions(store: AzureStore) -> None:
    path = store.path("checkpoint.pt?versionid=1")
    store.raw_write(store.path("checkpoint.pt"), b"other")
    await store.write(path, stream(b"12345", 2))
    assert store.raw_read(path) == b"12345"
    await store.delete(path)
    assert store.raw_read(store.path("checkpoint.pt")) == b"other"


class OwnFileSystem(AzureBlobFileSystem):
    """A filesystem of the user's."""


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (OwnFileSystem, "OwnFileSystem is a subclass of AzureBlobFileSystem"),
        (partial(AzureBlobFileSystem, location_mode="secondary"), "the location mode is secondary"),
    ],
    ids=["subclass", "secondary"],
)
async def test_settings_that_only_the_client_honours_go_through_it(make: Callable[..., Any], reason: str) -> None:
    fs = make(account_name="ferrytest", account_key=WRONG_KEY)
    backend, _ = open_backend("abfs://container/key", filesystem=fs)
    assert isinstance(backend, AzureBackend)
    engine = await backend.engine()
    assert engine.transport is None
    assert engine.why_client(1) == reason


async def test_filesystem_of_the_users_own_class_works_and_the_report_says_what_the_client_moved(
    store: AzureStore, azure_url: str, azure_storage_options: dict[str, Any]
) -> None:
    fs = OwnFileSystem(**azure_storage_options)
    reports: list[TransferReport] = []
    tensors = [torch.arange(1 << 21), torch.arange(10)]
    url = f"{azure_url}/checkpoint.pt"
    await torchferry.save_async(tensors, url, filesystem=fs, part_size=5 * MIB, report=reports.append)
    loaded = await torchferry.load_async(url, filesystem=fs, report=reports.append)
    assert all(map(torch.equal, loaded, tensors))
    assert [report.client_bytes > 16 * MIB for report in reports] == [True, True]
    assert reports[0].client_reasons == ("OwnFileSystem is a subclass of AzureBlobFileSystem",)
    assert store.staged() == []


async def test_a_small_save_waits_for_no_large_ones(faulty: Faulty, azure_url: str) -> None:
    """Three of them have all their parts under way, and get no answer."""
    store, proxy = faulty(Fault(method="PUT", target="comp=block&", hang=True, times=None))
    tensors = [torch.zeros(40 * MIB, dtype=torch.uint8)]
    save = partial(torchferry.save_async, part_size=MIB, **store.options)
    async with anyio.create_task_group() as tasks:
        for number in range(3):
            tasks.start_soon(save, tensors, f"{azure_url}/large-{number}.pt")
        await anyio.to_thread.run_sync(partial(proxy.wait_for, target="comp=block&", count=3 * 32))
        with anyio.fail_after(20):
            await save([1], f"{azure_url}/small.pt")
        tasks.cancel_scope.cancel()


async def test_blob_that_the_client_puts_whole_is_one_block(faulty: Faulty) -> None:
    """The client copies what it sends in one request."""
    store, _ = faulty(way="client")
    path = store.path("checkpoint.pt")
    written = await store.write(path, stream(DATA, MIB), part_size=16 * MIB, metadata={"step": "1"})
    assert written.size == len(DATA)
    assert await store.stat(path) == written
    assert store.raw_read(path) == DATA
    assert len(store.raw_blob(path).get_block_list("committed")[0]) == 1


async def test_time_limit_of_the_filesystem_is_the_servers_too(faulty: Faulty) -> None:
    store, proxy = faulty(options={"timeout": 77})
    path = store.path("checkpoint.pt")
    for size in (10, len(DATA)):
        written = await store.write(path, stream(DATA[:size], MIB))
        assert await store.read(path, 0, size, written) == DATA[:size]
    assert all("timeout=77" in request.target for request in proxy.log)


async def test_filesystem_made_for_its_users_loop_works(
    azure_client: Any, azure_url: str, azure_storage_options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("weakref.finalize", lambda *_: None)  # at exit adlfs would look for this test's event loop
        fs = AzureBlobFileSystem(**azure_storage_options, asynchronous=True, skip_instance_cache=True)
    backend, path = open_backend(f"{azure_url}/checkpoint.pt", filesystem=fs)
    assert backend.loop is None
    written = await backend.write(path, stream(DATA, MIB), plan=backend.upload_plan(len(DATA), 5 * MIB))
    assert bytes(await backend.read(path, 0, 10, written)) == DATA[:10]
    container, _, key = path.partition("/")
    assert azure_client.get_blob_client(container, key).download_blob().readall() == DATA
    await fs.service_client.close()


async def test_filesystems_are_freed(store: AzureStore, azure_storage_options: dict[str, Any]) -> None:
    """adlfs itself keeps them until the process ends. Where this fails, look at what letting_go.py replaces."""
    seen = []
    for _ in range(3):
        fs = AzureBlobFileSystem(**azure_storage_options, skip_instance_cache=True)
        seen.append(weakref.ref(fs))
        backend, path = open_backend(f"abfs://{store.path('checkpoint.pt')}", filesystem=fs)
        await run_on(backend.loop, backend.write, path, stream(b"12345", 2), plan=backend.upload_plan(5))
        del fs, backend
    gc.collect()
    assert [ref() for ref in seen[:-1]] == [None, None]


async def test_idle_connections_stay_open_for_the_last_eight_filesystems(
    store: AzureStore, azure_storage_options: dict[str, Any]
) -> None:
    made = []
    for _ in range(10):
        fs = AzureBlobFileSystem(**azure_storage_options, skip_instance_cache=True)
        backend, path = open_backend(f"abfs://{store.path('checkpoint.pt')}", filesystem=fs)
        await run_on(backend.loop, backend.write, path, stream(b"12345", 2), plan=backend.upload_plan(5))
        await run_on(backend.loop, backend.stat, path)
        made.append(fs)

    async def idle() -> list[int]:
        return [sum(map(len, session_of(fs).connector._conns.values())) for fs in made]

    counts = await run_on(made[0].loop, idle)
    assert counts[:2] == [0, 0]
    assert all(counts[2:])


async def test_adlfs_sees_what_was_written(store: AzureStore, azure_storage_options: dict[str, Any]) -> None:
    fs = AzureBlobFileSystem(**azure_storage_options)
    backend, path = open_backend(f"abfs://{store.path('directory/checkpoint.pt')}", filesystem=fs)
    store.raw_write(store.path("directory/other.pt"), b"1")
    assert len(fs.ls(fs._parent(path))) == 1
    await run_on(backend.loop, backend.write, path, stream(b"12345", 2), plan=backend.upload_plan(5))
    assert path in fs.ls(fs._parent(path))
