"""What S3 stores and the way to them do wrong, and what saves, loads and copies make of it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
import re
import signal
import socket
import subprocess
import textwrap
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import Any
from urllib.parse import parse_qs, urlsplit

import anyio
import pytest
import torch
from fsspec.callbacks import Callback
from s3fs import S3FileSystem

import torchferry
from torchferry import TransferReport
from torchferry.engine.retry import Transient, retrying
from torchferry.engine.transfer import Transfer
from torchferry.engine.types import MIB, Chunk, ObjectStat
from torchferry.errors import (
    ChangedWhileSavingError,
    CheckpointNotFoundError,
    StorageError,
    StoragePermissionError,
    StorageUnavailableError,
)
from torchferry.storage import http
from torchferry.storage.http import Engine
from torchferry.testing.conformance import READS, Reads, cancel_at_the_end, nothing_is_left, stream
from torchferry.testing.faultproxy import Fault, FaultProxy
from torchferry.testing.forkserver import python
from torchferry.testing.s3 import Exchange, Front, S3Store
from torchferry.testing.servers import S3Server, storage_options_for

PART = 5 * MIB
DATA = bytes(range(256)) * (12 * 4096)  # 12 MiB: three parts of 5 MiB
TENSORS = {"a": [torch.full((MIB,), float(n)) for n in range(6)]}  # 24 MiB: five parts
SLOW = 20e6  # bytes a second
CREATION = r"\?uploads"
COMPLETION = "uploadId="


class Special(S3FileSystem):
    """Has the client move everything."""


class Through:
    """Makes proxies to the store."""

    def __init__(self, server: S3Server, client: Any, url: str, stack: contextlib.ExitStack) -> None:
        self._server = server
        self._client = client
        self._stack = stack
        self.url = url

    def __call__(self, *faults: Fault, bandwidth: float | None = None, **options: Any) -> tuple[S3Store, FaultProxy]:
        fresh = (dataclasses.replace(fault) for fault in faults)  # a fault counts what it does
        proxy = self._stack.enter_context(FaultProxy(self._server.port, *fresh, bandwidth=bandwidth))
        made = storage_options_for(proxy.endpoint, self._server.key, self._server.secret, self._server.region)
        return S3Store(self._client, self.url, made | options), proxy

    def front(self, **hooks: Any) -> tuple[S3Store, Front]:
        front = self._stack.enter_context(Front(self._server, **hooks))
        return S3Store(self._client, self.url, front.storage_options), front


@pytest.fixture
def through(s3_server: S3Server, s3_client: Any, s3_url: str) -> Iterator[Through]:
    with contextlib.ExitStack() as stack:
        yield Through(s3_server, s3_client, s3_url, stack)


def whole(store: S3Store, path: str) -> bool:
    """Whether an object is what TENSORS are saved as, as far as its size tells; False where it is the old one."""
    return len(store.raw_read(path)) > 24 * MIB


# --- outages


SURVIVABLE_WRITES = {
    "upload not started at once": Fault(method="POST", target=CREATION, status=503),
    "parts refused": Fault(method="PUT", target="partNumber=", status=503, times=3),
    "part answered with an internal error": Fault(
        method="PUT", target="partNumber=2", status=500, code="InternalError"
    ),
    "part reset in the middle": Fault(method="PUT", target="partNumber=2", reset_upload_after=MIB),
    "part stored but the reply lost": Fault(method="PUT", target="partNumber=3", lose_reply=True),
    "part's reply cut": Fault(method="PUT", target="partNumber=3", reset_download_after=0),
    "completion refused": Fault(method="POST", target=COMPLETION, status=503),
    "completion done but the reply lost": Fault(method="POST", target=COMPLETION, lose_reply=True),
    "creation done but the reply lost": Fault(method="POST", target=CREATION, lose_reply=True),
}


@pytest.mark.parametrize("fault", SURVIVABLE_WRITES)
async def test_upload_survives(through: Through, fault: str) -> None:
    store, proxy = through(SURVIVABLE_WRITES[fault])
    path = store.path("checkpoint.pt")
    written = await store.write(path, stream(DATA, MIB), metadata={"step": "1"})
    assert store.raw_read(path) == DATA
    assert await store.stat(path) == written
    assert any(request.fault for request in proxy.log)
    assert store.leftovers() == []


@pytest.mark.parametrize(
    "fault",
    [
        Fault(method="PUT", status=503),
        Fault(method="PUT", status=429, headers={"Retry-After": "0"}),
        Fault(method="PUT", reset_upload_after=100_000),
        Fault(method="PUT", lose_reply=True),
        Fault(method="PUT", status=503, times=5),
    ],
    ids=["refused", "too many", "reset", "reply lost", "refused five times"],
)
async def test_small_upload_survives(through: Through, fault: Fault) -> None:
    store, proxy = through(fault)
    path = store.path("checkpoint.pt")
    await store.write(path, stream(DATA[:MIB], 4096))
    assert store.raw_read(path) == DATA[:MIB]
    assert proxy.log[0].fault


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
        Fault(method="GET", status=403, code="AccessDenied", target="X-Amz-Signature="),
    ],
    ids=[
        *("refused", "internal error", "reset", "reset at once", "truncated", "truncated at once", "reply lost"),
        *("truncated three times", "signed URLs forbidden"),
    ],
)
@READS
async def test_download_survives_with_the_right_bytes(through: Through, reads: Reads, fault: Fault) -> None:
    store, proxy = through(fault)
    path = store.path("checkpoint.pt")
    store.raw_write(path, DATA)
    found = await store.stat(path)
    assert await getattr(store, reads)(path, 5, 3 * MIB, found) == DATA[5 : 3 * MIB]
    assert len(proxy.requests("GET")) > 1


@pytest.mark.parametrize("kind", [503, 429, "refuse"])
async def test_an_outage_is_survived_with_the_pauses_that_the_store_asks_for(
    through: Through, kind: Any, caplog: pytest.LogCaptureFixture
) -> None:
    store, proxy = through()
    url = store.backend.url(store.path("x.pt"))
    target = store.backend.url(store.path("y.pt"))
    reports: list[TransferReport] = []
    works = (
        partial(torchferry.save_async, TENSORS, url, part_size=PART, **store.options),
        partial(torchferry.load_async, url, **store.options),
        partial(
            torchferry.copy_async,
            url,
            target,
            part_size=PART,
            source_storage_options=store.options["storage_options"],
            target_storage_options=store.options["storage_options"],
        ),
    )
    for work in works:
        with proxy.outage(kind, retry_after=0.7):
            before = len(proxy.log)
            task = asyncio.create_task(work(report=reports.append))
            if kind == "refuse":
                while "Trying again" not in caplog.text:  # noqa: ASYNC110 - a logger has no event
                    await asyncio.sleep(0.01)
            else:
                await asyncio.to_thread(proxy.wait_for, count=before + 2)
            assert not task.done()
        await task
        if kind == "refuse":
            caplog.clear()
    assert whole(store, store.path("x.pt"))
    assert store.raw_read(store.path("x.pt")) == store.raw_read(store.path("y.pt"))
    assert all(report.retries for report in reports)
    if kind != "refuse":
        assert "Trying again in 0.7 s" in caplog.text


async def test_silence_is_survived(through: Through) -> None:
    store, proxy = through(
        Fault(method="PUT", target="partNumber=2", hang=True),
        Fault(method="POST", target=COMPLETION, hang=True),
        Fault(method="GET", target="checkpoint", hang=True),
        Fault(method="HEAD", target="checkpoint", hang=True),
        config_kwargs={"read_timeout": 1},
    )
    path = store.path("checkpoint.pt")
    await store.write(path, stream(DATA, MIB))
    assert await store.read(path, 0, len(DATA), await store.stat(path)) == DATA
    assert len(proxy.requests("PUT", "partNumber=2")) == 2
    assert store.leftovers() == []


async def test_a_link_so_slow_that_a_part_takes_longer_than_silence_may_is_no_failure(through: Through) -> None:
    """Megabytes wait in the system's queue, and nothing is heard of the store meanwhile."""
    store, _ = through(bandwidth=3e6, config_kwargs={"read_timeout": 1})
    path = store.path("checkpoint.pt")
    reports: list[TransferReport] = []
    with Transfer().running(reports.append):
        await store.write(path, stream(DATA, MIB))
    assert store.raw_read(path) == DATA
    assert (reports[0].retries, reports[0].client_bytes) == (0, 0)


@READS
async def test_download_that_is_always_cut_is_an_error_and_never_data(through: Through, reads: Reads) -> None:
    store, _ = through(Fault(method="GET", truncate_after=1000, times=None))
    path = store.path("checkpoint.pt")
    store.raw_write(path, DATA)
    with pytest.raises(StorageUnavailableError, match=r"checkpoint\.pt"), impatient():
        await getattr(store, reads)(path, 0, 3 * MIB, await store.stat(path))


async def test_part_that_is_never_taken_is_unavailable_and_leaves_nothing(through: Through) -> None:
    store, _ = through(Fault(method="PUT", target="partNumber=2", status=503, times=None))
    path = store.path("checkpoint.pt")
    store.raw_write(path, b"old")
    with pytest.raises(StorageUnavailableError, match=r"checkpoint\.pt"), impatient():
        await store.write(path, stream(DATA, MIB))
    assert store.raw_read(path) == b"old"
    assert store.leftovers() == []


@contextlib.contextmanager
def impatient(seconds: float = 0.5) -> Iterator[None]:
    """In here, requests are repeated for half a second without progress."""
    with Transfer(give_up_after=seconds).running(None):
        yield


async def test_server_that_is_not_there_is_unavailable(s3_url: str) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # and not listened on, so that nobody else gets it
        options = storage_options_for(f"http://127.0.0.1:{held.getsockname()[1]}", "key", "secret")
        store = S3Store(None, s3_url, options)
        path = store.path("checkpoint.pt")
        with pytest.raises(StorageUnavailableError, match=s3_url), impatient():
            await store.stat(path)
        for size in (1, len(DATA)):
            with pytest.raises(StorageUnavailableError, match=s3_url), impatient():
                await store.write(path, stream(DATA[:size], MIB))
        with pytest.raises(StorageUnavailableError, match=s3_url), impatient():
            await store.read(path, 0, 5, ObjectStat("", 5, '"x"'))


async def test_what_fails_is_tried_again_as_long_as_it_is_said_and_not_shorter() -> None:
    tried: list[float] = []

    async def fail() -> None:
        tried.append(time.monotonic())
        raise ConnectionError("not today")

    begun = time.monotonic()
    with impatient(0.3), pytest.raises(ConnectionError):
        await retrying(fail, lambda _: Transient(), "Cannot try")
    assert tried[-1] - begun >= 0.3
    tried.clear()
    with impatient(0.3), pytest.raises(ConnectionError):
        await retrying(fail, lambda _: Transient(after=60.0), "Cannot try")
    assert len(tried) == 1  # the store asks for more patience than there is


# --- cancels


MOMENTS: dict[str, tuple[str, str, int]] = {
    "creating": ("POST", CREATION, 1),
    "first part": ("PUT", "partNumber=", 1),
    "fourth part": ("PUT", "partNumber=4", 1),
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("how", ["task.cancel", "asyncio.timeout", "anyio"])
@pytest.mark.parametrize("verb", ["save", "copy"])
async def test_a_cancel_over_a_slow_link_is_over_soon_and_leaves_the_old_object(
    through: Through, moment: str, how: str, verb: str, s3_storage_options: dict[str, Any]
) -> None:
    store, proxy = through(bandwidth=SLOW)
    path = store.path("checkpoint.pt")
    url, source = store.backend.url(path), store.backend.url(store.path("source.pt"))
    if verb == "copy":
        await torchferry.save_async(TENSORS, source, storage_options=s3_storage_options)
    store.raw_write(path, b"old")

    async def work() -> None:
        if verb == "save":
            await torchferry.save_async(TENSORS, url, part_size=PART, **store.options)
        else:
            options = store.options["storage_options"]
            await torchferry.copy_async(
                *(source, url), part_size=PART, source_storage_options=options, target_storage_options=options
            )

    async def limited() -> None:
        loop = asyncio.get_running_loop()
        if how == "anyio":
            with anyio.CancelScope() as scope:
                stop.append(lambda: loop.call_soon_threadsafe(scope.cancel))
                await work()
            if scope.cancelled_caught:
                raise TimeoutError
        elif how == "asyncio.timeout":
            async with asyncio.timeout(None) as timeout:
                stop.append(lambda: loop.call_soon_threadsafe(timeout.reschedule, loop.time()))
                await work()
        else:
            await work()

    stop: list[Callable[[], object]] = []
    task = asyncio.create_task(limited())
    method, target, count = MOMENTS[moment]
    await asyncio.to_thread(proxy.wait_for, method, target, count=count)
    begun = time.monotonic()
    if stop:
        stop[0]()
    else:
        task.cancel()
    with pytest.raises((asyncio.CancelledError, TimeoutError)):
        await task
    assert time.monotonic() - begun < 5  # it took 11 to 30 s
    await nothing_is_left(store)
    assert store.raw_read(path) == b"old"


PROGRAM = """
    import sys, torch, torchferry
    url, options = sys.argv[1], eval(sys.argv[2])
    tensors = {"a": [torch.full((1 << 20,), float(n)) for n in range(20)]}
    torchferry.save(tensors, url, storage_options=options, part_size=5 << 20)
"""


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c_over_a_slow_link_is_over_soon_and_leaves_the_old_object(
    through: Through, moment: str, times: int
) -> None:
    store, proxy = through(bandwidth=SLOW)
    path = store.path("checkpoint.pt")
    store.raw_write(path, b"old")
    command = [*python(), "-c", textwrap.dedent(PROGRAM), store.backend.url(path)]
    with subprocess.Popen([*command, repr(store.options["storage_options"])], stderr=subprocess.PIPE) as process:
        method, target, count = MOMENTS[moment]
        proxy.wait_for(method, target, count=count, timeout=100)
        begun = time.monotonic()
        for _ in range(times):
            process.send_signal(signal.SIGINT)
            time.sleep(0.05)
        _, said = process.communicate(timeout=60)
    assert time.monotonic() - begun < 10  # a loaded machine takes seconds to end an interpreter
    assert b"KeyboardInterrupt" in said
    assert process.returncode != 0
    assert store.raw_read(path) == b"old"
    assert store.leftovers() == []


HANGING_PART = Fault(method="PUT", target="partNumber=2", hang=True, times=None)


async def test_cancel_while_a_part_hangs_leaves_nothing_but_the_uploads_of_others(
    through: Through, s3_client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    store, proxy = through(HANGING_PART)
    path = store.path("checkpoint.pt")
    others = [store.address(f"{path}.other"), store.address(path)]
    for other in others:
        s3_client.create_multipart_upload(**other)
    await cancel_at_the_end(store, path, DATA, partial(proxy.wait_for, "PUT", "partNumber=2"))
    assert not store.raw_exists(path)
    assert sorted(store.leftovers()) == sorted(other["Key"] for other in others)
    assert caplog.text == ""


async def test_cancel_that_comes_again_and_again_leaves_nothing(through: Through) -> None:
    store, proxy = through()

    async def unending() -> AsyncIterator[Chunk]:
        yield Chunk(DATA * 3)
        await asyncio.Event().wait()

    task = asyncio.create_task(store.write(store.path("checkpoint.pt"), unending()))
    await asyncio.to_thread(proxy.wait_for, "PUT", "partNumber=1")
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await task
    await nothing_is_left(store)


async def test_cancel_while_the_completion_gets_no_answer_waits_no_longer_than_ten_seconds(
    through: Through, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert http._PUBLISH_PATIENCE == 10
    monkeypatch.setattr(http, "_PUBLISH_PATIENCE", 0.3)
    store, proxy = through(Fault(method="POST", target=COMPLETION, hang=True, times=None))
    path = store.path("checkpoint.pt")
    store.raw_write(path, b"old")
    await cancel_at_the_end(store, path, DATA, partial(proxy.wait_for, "POST", COMPLETION))
    await nothing_is_left(store)
    assert store.raw_read(path) == b"old"


async def test_cancel_between_two_attempts_to_complete_publishes_nothing(through: Through) -> None:
    store, proxy = through(Fault(method="POST", target=COMPLETION, status=503, headers={"Retry-After": "1"}))
    path = store.path("checkpoint.pt")
    store.raw_write(path, b"old")
    await cancel_at_the_end(store, path, DATA, partial(proxy.wait_for, "POST", COMPLETION))
    await nothing_is_left(store)
    assert store.raw_read(path) == b"old"
    assert len(proxy.requests("POST", COMPLETION)) == 1


async def test_a_completion_that_fails_is_the_reason_also_where_the_store_cannot_be_asked_for_the_object(
    through: Through,
) -> None:
    store, proxy = through(
        Fault(method="POST", target=COMPLETION, status=503, times=None), Fault(method="HEAD", status=500, times=None)
    )
    with pytest.raises(StorageUnavailableError, match="Cannot write"), impatient():
        await store.write(store.path("checkpoint.pt"), stream(DATA, MIB))
    assert len(proxy.requests("HEAD")) == 1


async def test_a_completion_that_is_refused_after_one_that_was_not_answered_is_a_success(through: Through) -> None:
    store, _ = through(
        Fault(method="POST", target=COMPLETION, lose_reply=True),
        Fault(method="POST", target=COMPLETION, status=403, code="AccessDenied", times=None),
    )
    path = store.path("checkpoint.pt")
    stat = await store.write(path, stream(DATA, MIB))
    assert stat.size == len(DATA)
    assert store.raw_read(path) == DATA
    assert store.leftovers() == []


async def test_cancel_while_the_completion_is_answered_publishes_the_whole_object(through: Through) -> None:
    completing, answer = threading.Event(), threading.Event()

    def hold(exchange: Exchange) -> None:
        if exchange.method == "POST" and "uploadId=" in exchange.target:
            completing.set()
            answer.wait()

    store, _ = through.front(before=hold)
    path = store.path("checkpoint.pt")
    task = asyncio.create_task(store.write(path, stream(DATA, MIB)))
    await asyncio.to_thread(completing.wait)
    task.cancel()
    await asyncio.sleep(0.1)
    assert not task.done()
    answer.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert store.raw_read(path) == DATA
    assert store.leftovers() == []


async def test_cancel_while_the_creation_gets_no_answer_finds_the_upload_and_aborts_it(through: Through) -> None:
    created, ended = threading.Event(), threading.Event()

    def hold(exchange: Exchange) -> None:
        if exchange.method == "POST" and exchange.target.endswith("uploads"):
            created.set()
            ended.wait()

    store, _ = through.front(after=hold)
    task = asyncio.create_task(store.write(store.path("checkpoint.pt"), stream(DATA, MIB)))
    await asyncio.to_thread(created.wait)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await nothing_is_left(store)
    ended.set()


# --- uploads whose creation or completion was not answered


async def test_upload_whose_creation_got_no_answer_is_found_and_aborted(through: Through, s3_client: Any) -> None:
    store, _ = through(Fault(method="POST", target=CREATION, lose_reply=True, times=2))
    path = store.path("checkpoint.pt")
    s3_client.create_multipart_upload(**store.address(f"{path}.other"))
    await store.write(path, stream(DATA, MIB))
    assert store.raw_read(path) == DATA
    assert store.leftovers() == [store.address(f"{path}.other")["Key"]]


async def test_upload_whose_creation_got_no_answer_is_aborted_where_a_cancel_comes_while_it_is_looked_for(
    through: Through,
) -> None:
    looking, ended = threading.Event(), threading.Event()
    lost: list[str] = []

    def hold(exchange: Exchange) -> None:
        if exchange.method == "POST" and exchange.target.endswith("uploads") and not lost:
            lost.append(exchange.target)
            raise ConnectionAbortedError
        if exchange.method == "GET" and "uploads" in exchange.target and not looking.is_set():
            looking.set()
            ended.wait()

    store, _ = through.front(after=hold)
    task = asyncio.create_task(store.write(store.path("checkpoint.pt"), stream(DATA, MIB)))
    await asyncio.to_thread(looking.wait)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    ended.set()
    await nothing_is_left(store)


async def test_uploads_that_were_never_asked_for_are_not_looked_for(
    through: Through, caplog: pytest.LogCaptureFixture
) -> None:
    """Where nothing reached the store, nothing is said to stay there; nor are others' uploads taken for those."""
    nobody = {"key": None, "secret": None, "skip_instance_cache": True}
    store, proxy = through(**nobody)
    with pytest.raises(StoragePermissionError, match="no usable credentials") as caught:
        await store.write(store.path("checkpoint.pt"), stream(DATA, MIB))
    assert not hasattr(caught.value, "__notes__")
    store, proxy = through()
    path = store.path("checkpoint.pt")
    with proxy.outage("refuse"):
        task = asyncio.create_task(store.write(path, stream(DATA, MIB)))
        while "Trying again" not in caplog.text:  # noqa: ASYNC110 - a logger has no event
            await asyncio.sleep(0.01)
    await task
    assert proxy.requests("GET", "uploads") == []


async def test_uploads_stay_where_somebody_else_writes_to_the_same_key_and_the_save_goes_on(
    through: Through, s3_client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    opened: list[str] = []

    def lose_the_first(exchange: Exchange) -> None:
        if exchange.method == "POST" and exchange.target.endswith("uploads") and not opened:
            opened.append(s3_client.create_multipart_upload(**store.address(path))["UploadId"])
            raise ConnectionAbortedError

    store, _ = through.front(after=lose_the_first)
    path = store.path("checkpoint.pt")
    await store.write(path, stream(DATA, MIB))
    assert store.raw_read(path) == DATA
    assert len(store.leftovers()) == 2
    assert "2 uploads could be the 1 whose creation was not answered" in caplog.text


async def test_a_save_goes_on_where_lost_uploads_may_not_be_listed(
    through: Through, caplog: pytest.LogCaptureFixture
) -> None:
    store, _ = through(
        Fault(method="POST", target=CREATION, lose_reply=True),
        Fault(method="GET", target="uploads", status=403, code="AccessDenied", times=None),
    )
    path = store.path("checkpoint.pt")
    await store.write(path, stream(DATA, MIB))
    assert store.raw_read(path) == DATA
    assert "an upload whose creation was not answered may stay" in caplog.text


async def test_completion_that_is_refused_leaves_nothing(through: Through) -> None:
    store, _ = through(Fault(method="POST", target=COMPLETION, status=400, code="InvalidRequest", times=None))
    path = store.path("checkpoint.pt")
    with pytest.raises(StorageError, match=r"checkpoint\.pt"):
        await store.write(path, stream(DATA, MIB))
    assert not store.raw_exists(path)
    assert store.leftovers() == []


@pytest.mark.parametrize(
    "fault",
    [
        Fault(method="POST", target=COMPLETION, reset_upload_after=0, times=None),
        Fault(method="POST", target=COMPLETION, status=404, code="NoSuchUpload", times=None),
    ],
    ids=["reset", "no such upload"],
)
async def test_completion_that_never_came_about_is_an_error_where_the_last_checkpoint_has_the_same_size(
    through: Through, fault: Fault
) -> None:
    store, _ = through(fault)
    path, old = store.path("checkpoint.pt"), DATA[::-1]
    store.raw_write(path, old)
    with pytest.raises(StorageError, match=r"checkpoint\.pt"), impatient():
        await store.write(path, stream(DATA, MIB))
    assert store.raw_read(path) == old
    assert store.leftovers() == []


async def test_upload_that_somebody_aborted_is_unavailable_because_saving_again_helps(through: Through) -> None:
    store, _ = through(Fault(method="POST", target=COMPLETION, status=404, code="NoSuchUpload", times=None))
    path = store.path("checkpoint.pt")
    with pytest.raises(StorageUnavailableError, match=r"checkpoint\.pt: the upload is gone.*saving again is safe"):
        await store.write(path, stream(DATA, MIB))
    assert not store.raw_exists(path)
    assert store.leftovers() == []


async def test_completion_that_is_answered_200_with_an_error_in_it_is_tried_again(through: Through) -> None:
    answered: list[int] = []

    def spoil_the_first(exchange: Exchange) -> None:
        if exchange.method == "POST" and "uploadId=" in exchange.target and not answered:
            exchange.refuse(200, "InternalError")
            answered.append(1)

    store, _ = through.front(before=spoil_the_first)
    path = store.path("checkpoint.pt")
    await store.write(path, stream(DATA, MIB))
    assert answered
    assert store.raw_read(path) == DATA


@pytest.mark.parametrize(
    "content", [b"<ETag></ETag>", b"<ETag>&quot;&quot;</ETag>", b""], ids=["empty", "quoted", "none"]
)
async def test_an_empty_etag_at_completion_is_looked_up(through: Through, content: bytes) -> None:
    """Ceph 16.2 answers so."""

    def spoil(exchange: Exchange) -> None:
        if exchange.method == "POST" and "uploadId=" in exchange.target:
            exchange.content = re.sub(rb"<ETag>.*?</ETag>", content, exchange.content)
            exchange.answer.pop("ETag", None)

    store, _ = through.front(after=spoil)
    path = store.path("checkpoint.pt")
    written = await store.write(path, stream(DATA, MIB))
    assert written.etag
    assert written == await store.stat(path)
    assert await store.read(path, 0, len(DATA), written) == DATA


# --- damage


@pytest.mark.parametrize("way", ["engine", "client"])
@pytest.mark.parametrize("verb", ["save", "copy"])
async def test_a_part_that_arrives_damaged_is_sent_again(
    through: Through, verb: str, way: str, s3_storage_options: dict[str, Any]
) -> None:
    store, proxy = through(Fault(method="PUT", target="partNumber=2", corrupt_upload_byte=1_000_000))
    kind = Special if way == "client" else S3FileSystem
    fs = kind(**store.options["storage_options"])
    path = store.path("checkpoint.pt")
    url, source = store.backend.url(path), store.backend.url(store.path("source.pt"))
    await torchferry.save_async(TENSORS, source, storage_options=s3_storage_options)
    reports: list[TransferReport] = []
    if verb == "save":
        await torchferry.save_async(TENSORS, url, part_size=PART, filesystem=fs, report=reports.append)
    else:
        await torchferry.copy_async(
            source, url, part_size=PART, source_filesystem=fs, target_filesystem=fs, report=reports.append
        )
    assert len(proxy.requests("PUT", "partNumber=2")) == 2
    assert store.raw_read(path) == store.raw_read(store.path("source.pt"))
    assert reports[0].retries == 1
    assert reports[0].nbytes == len(store.raw_read(path))


async def test_a_small_object_that_arrives_damaged_is_sent_again(through: Through) -> None:
    store, proxy = through(Fault(method="PUT", corrupt_upload_byte=1000))
    path = store.path("checkpoint.pt")
    await store.write(path, stream(DATA[:MIB], 4096))
    assert store.raw_read(path) == DATA[:MIB]
    assert len(proxy.requests("PUT")) == 2


async def test_a_store_that_got_other_bytes_and_does_not_mind_is_sent_them_again(through: Through) -> None:
    """It tells the CRC32 of what it got."""

    def believe(exchange: Exchange) -> None:
        if exchange.method == "PUT" and len(lies) < 2:
            lies.append(exchange.answer.get("x-amz-checksum-crc32", ""))
            exchange.answer = {name: v for name, v in exchange.answer.items() if name.lower() != "x-amz-checksum-crc32"}
            exchange.answer["x-amz-checksum-crc32"] = "AAAAAA=="

    lies: list[str] = []
    store, front = through.front(after=believe)
    path = store.path("checkpoint.pt")
    transfer = Transfer("save")
    with transfer.running(None):
        await store.write(path, stream(DATA[:MIB], 4096))
    assert len([each for each in front.log if each.method == "PUT"]) == 3
    assert transfer.report().nbytes == MIB


@pytest.mark.parametrize("way", ["engine", "client"])
@pytest.mark.parametrize("size", [MIB, len(DATA)])
async def test_a_tensor_that_is_changed_while_it_is_sent_is_an_error_and_nothing_is_stored(
    through: Through, size: int, way: str
) -> None:
    store, _ = through()
    if way == "client":
        vars(store.backend._fs)["_torchferry_engine"] = Engine(None, "the test wants the client")  # type: ignore[attr-defined]
    path = store.path("checkpoint.pt")
    store.raw_write(path, b"old")

    async def chunks() -> AsyncIterator[Chunk]:
        for at in range(0, size, PART):
            yield Chunk(DATA[at : min(at + PART, size)], crc32=0)

    with pytest.raises(ChangedWhileSavingError, match=r"checkpoint\.pt"):
        await store.write(path, chunks())
    assert store.raw_read(path) == b"old"
    assert store.leftovers() == []


async def test_a_part_that_is_refused_for_good_is_not_sent_without_its_checksum(through: Through) -> None:
    """Once by the engine, and once by the client, which may sign in another way."""

    def refuse(exchange: Exchange) -> None:
        if "partNumber=1" in exchange.target:
            exchange.refuse(403, "AccessDenied")

    store, front = through.front(before=refuse)
    with pytest.raises(StoragePermissionError):
        await store.write(store.path("checkpoint.pt"), stream(DATA, PART))
    assert len([exchange for exchange in front.log if "partNumber=1" in exchange.target]) == 2
    assert store.leftovers() == []


async def test_all_pages_of_the_uploads_under_way_are_read(through: Through) -> None:
    """A store that lists one upload a page."""
    store, client = through()[0], through._client
    path = store.path("checkpoint.pt")
    ids = [client.create_multipart_upload(**store.address(path))["UploadId"] for _ in range(3)]

    def list_one(exchange: Exchange) -> None:
        query = parse_qs(urlsplit(exchange.target).query, keep_blank_values=True)
        if exchange.method != "GET" or "uploads" not in query:
            return
        every = sorted(store.uploads(), key=lambda upload: str(upload["UploadId"]))
        after = query.get("upload-id-marker", [""])[0]
        first, *more = [upload for upload in every if upload["UploadId"] > after]
        begun = first["Initiated"].strftime("%Y-%m-%dT%H:%M:%SZ")
        exchange.status, exchange.answer = 200, {"Content-Type": "application/xml"}
        exchange.content = (
            "<ListMultipartUploadsResult>"
            f"<IsTruncated>{'true' if more else 'false'}</IsTruncated><NextKeyMarker>{first['Key']}</NextKeyMarker>"
            f"<NextUploadIdMarker>{first['UploadId']}</NextUploadIdMarker><Upload><Key>{first['Key']}</Key>"
            f"<UploadId>{first['UploadId']}</UploadId><Initiated>{begun}</Initiated></Upload>"
            "</ListMultipartUploadsResult>"
        ).encode()

    paged, _ = through.front(before=list_one)
    assert {leftover.id async for leftover in paged.backend.leftovers(path)} == set(ids)
    for upload_id in ids:
        client.abort_multipart_upload(**store.address(path), UploadId=upload_id)


FLIPS = {"head": (0, 300), "tail": (1, 64 * 1024 - 2_000), "tensor": (2, 5)}  # GETs before it; the byte of its body


@pytest.mark.parametrize("times", [1, None])
@pytest.mark.parametrize("where", FLIPS)
async def test_what_is_damaged_on_its_way_is_read_again_once(through: Through, where: str, times: int | None) -> None:
    skip, byte = FLIPS[where]
    store, _ = through()
    url = store.backend.url(store.path("x.pt"))
    await torchferry.save_async(TENSORS, url, **store.options)
    tensors = TENSORS["a"]

    async def loads(**options: Any) -> None:
        loaded = await torchferry.load_async(url, **options)
        assert all(map(torch.equal, loaded["a"], tensors))

    async def fills(**options: Any) -> None:
        target = {f"a.{number}": torch.empty(MIB) for number in range(len(tensors))}
        await torchferry.load_async(url, into=target, **options)
        assert all(map(torch.equal, target.values(), tensors))

    async def verifies(**options: Any) -> None:
        await torchferry.verify_async(url, **options)

    for read in (loads, fills, verifies):
        fault = Fault(method="GET", target="x.pt", skip=skip, times=times, corrupt_download_byte=byte)
        faulty, proxy = through(fault)
        reports: list[torchferry.TransferReport] = []
        if times is None:
            with pytest.raises(torchferry.CheckpointCorruptError):
                await read(**faulty.options)
            continue
        await read(report=reports.append, **faulty.options)
        assert len([warning for warning in reports[0].warnings if "Reading it again" in warning]) == 1
        assert any(request.fault for request in proxy.requests("GET"))


async def test_a_list_that_does_not_say_where_it_goes_on_is_an_error(through: Through) -> None:
    def forget_marker(exchange: Exchange) -> None:
        if "list-type=2" in exchange.target:
            exchange.content = b"<ListBucketResult><IsTruncated>true</IsTruncated></ListBucketResult>"

    store, _ = through.front(after=forget_marker)
    with pytest.raises(StorageError, match="there is more, and not where"):
        [found async for found in store.backend.list(store.path("run/"))]


async def test_the_crc32_of_the_whole_object_is_compared(through: Through) -> None:
    def lie(exchange: Exchange) -> None:
        if exchange.method == "POST" and "uploadId=" in exchange.target:
            lied = re.sub(rb"<ChecksumCRC32>.*?<", b"<ChecksumCRC32>AAAAAA==<", exchange.content)
            assert lied != exchange.content
            exchange.content = lied

    store, _ = through.front(after=lie)
    with pytest.raises(StorageError, match=r"has the CRC32 AAAAAA==, not .*it is damaged"):
        await store.write(store.path("checkpoint.pt"), stream(DATA, MIB))


async def test_a_store_that_finds_the_whole_object_damaged_is_not_asked_again(through: Through) -> None:
    store, proxy = through(Fault(method="POST", target=COMPLETION, status=400, code="BadDigest", times=None))
    with pytest.raises(StorageError, match="does not have the CRC32 of the whole"):
        await store.write(store.path("checkpoint.pt"), stream(DATA, MIB))
    assert len(proxy.requests("POST", COMPLETION)) == 1
    assert store.leftovers() == []


CHECKSUM_HEADERS = ("x-amz-checksum-", "x-amz-sdk-checksum-algorithm")


@pytest.mark.parametrize(
    ("status", "code", "refused"),
    [
        (400, "InvalidRequest", "POST PUT"),
        (501, "NotImplemented", "POST PUT"),
        (400, "InvalidArgument", "PUT"),
        (403, "SignatureDoesNotMatch", "PUT"),
    ],
)
async def test_a_store_that_refuses_checksums_is_remembered_and_gets_its_parts_without(
    through: Through, status: int, code: str, refused: str
) -> None:
    def is_checked(exchange: Exchange) -> bool:
        return any(name.startswith(CHECKSUM_HEADERS) for name in exchange.request)

    def refuse(exchange: Exchange) -> None:
        part_or_whole = "uploads" in exchange.target or exchange.method == "PUT"
        if exchange.method in refused and part_or_whole and is_checked(exchange):
            exchange.refuse(status, code)

    store, front = through.front(before=refuse)
    path = store.path("checkpoint.pt")
    for size in (len(DATA), MIB):
        await store.write(path, stream(DATA[:size], MIB))
        assert store.raw_read(path) == DATA[:size]
        assert store.leftovers() == []
    small = [each for each in front.log if each.method == "PUT" and "partNumber" not in each.target]
    assert [is_checked(each) for each in small] == [False]
    assert len([each for each in front.log if each.status == status]) <= 3


async def test_credentials_that_expired_do_not_make_a_store_one_that_refuses_checksums(through: Through) -> None:
    store, proxy = through(Fault(status=400, code="ExpiredToken", times=6))
    path = store.path("checkpoint.pt")
    with pytest.raises(StoragePermissionError):
        await store.write(path, stream(DATA, MIB))
    while proxy.log[-1].fault:
        with contextlib.suppress(StoragePermissionError):
            await store.stat(path)
        with contextlib.suppress(CheckpointNotFoundError):
            await store.stat(path)
    await store.write(path, stream(DATA, MIB))
    assert all("x-amz-checksum-crc32" in request.headers for request in proxy.requests("PUT") if not request.fault)


async def test_a_400_of_another_reason_does_not_make_a_store_one_that_refuses_checksums(through: Through) -> None:
    store, proxy = through(
        Fault(method="POST", target=CREATION, status=400, code="ExpiredToken"),
        Fault(method="PUT", target="partNumber=2", status=400, code="RequestTimeout"),
    )
    path = store.path("checkpoint.pt")
    with pytest.raises(StoragePermissionError, match="ExpiredToken"):
        await store.write(path, stream(DATA, MIB))
    await store.write(path, stream(DATA, MIB))
    assert store.raw_read(path) == DATA
    parts = proxy.requests("PUT", "partNumber=")
    assert all("x-amz-checksum-crc32" in request.headers for request in parts)
    assert len([request for request in parts if request.fault]) == 1


async def test_parts_that_are_there_after_an_abort_are_named(through: Through) -> None:
    """S3 says that those which were under way may arrive after it."""

    def go_on(exchange: Exchange) -> None:
        if exchange.method == "PUT" and "partNumber=2" in exchange.target:
            exchange.refuse(400, "EntityTooLarge")
        if exchange.method == "GET" and "uploadId=" in exchange.target:
            exchange.status, exchange.answer = 200, {"Content-Type": "application/xml"}
            exchange.content = (
                b"<ListPartsResult><Part><PartNumber>2</PartNumber><ETag>x</ETag><Size>1</Size></Part>"
                b"</ListPartsResult>"
            )

    store, front = through.front(before=go_on)
    with pytest.raises(StorageError, match="EntityTooLarge") as caught:
        await store.write(store.path("checkpoint.pt"), stream(DATA, MIB))
    (note,) = caught.value.__notes__
    assert "could not be removed" in note
    assert "3 aborts" in note
    assert len([each for each in front.log if each.method == "DELETE"]) == 3


# --- refusals


@pytest.mark.parametrize("code", ["ExpiredToken", "InvalidToken", "TokenRefreshRequired"])
async def test_an_expired_token_that_is_answered_400_is_a_permission_error(through: Through, code: str) -> None:
    store, _ = through(Fault(status=400, code=code, times=None))
    path = store.path("checkpoint.pt")
    with pytest.raises(StoragePermissionError, match=code):
        await store.stat(path)
    with pytest.raises(StoragePermissionError, match=code):
        await store.read(path, 0, 5, ObjectStat("", 5, '"x"'))
    for size in (MIB, len(DATA)):
        with pytest.raises(StoragePermissionError, match=code):
            await store.write(path, stream(DATA[:size], MIB))
    with pytest.raises(StoragePermissionError, match=code):
        await store.delete(path)


async def test_a_token_that_expires_in_the_middle_of_an_upload_is_a_permission_error(through: Through) -> None:
    store, _ = through(Fault(method="PUT", target="partNumber=2", status=400, code="ExpiredToken", times=None))
    with pytest.raises(StoragePermissionError, match="ExpiredToken"):
        await store.write(store.path("checkpoint.pt"), stream(DATA, MIB))
    assert store.leftovers() == []


@pytest.mark.parametrize("ending", ["failure", "cancel"])
async def test_an_abort_that_is_refused_keeps_the_reason_and_a_note_names_the_upload_that_stays(
    through: Through, ending: str, caplog: pytest.LogCaptureFixture
) -> None:
    part = (
        Fault(method="PUT", target="partNumber=2", status=400, code="EntityTooLarge", times=None)
        if ending == "failure"
        else HANGING_PART
    )
    store, proxy = through(part, Fault(method="DELETE", status=403, code="AccessDenied", times=None))
    path = store.path("checkpoint.pt")
    if ending == "failure":
        with pytest.raises(StorageError, match="EntityTooLarge") as caught:
            await store.write(path, stream(DATA, MIB))
        said = "\n".join(caught.value.__notes__)
    else:
        await cancel_at_the_end(store, path, DATA, partial(proxy.wait_for, "PUT", "partNumber=2"))
        with anyio.fail_after(30):
            while not caplog.text:  # noqa: ASYNC110 - a logger has no event
                await asyncio.sleep(0.01)
        said = caplog.text
    (upload,) = store.uploads()
    assert f"the multipart upload {upload['UploadId']} of s3://{path}" in said
    assert "AccessDenied" in said


@pytest.mark.parametrize("status", [301, 302, 307, 308])
@pytest.mark.parametrize("way", ["engine", "client"])
async def test_a_redirect_to_another_host_gets_no_token_no_key_and_no_signature(
    through: Through, status: int, way: str, s3_server: S3Server
) -> None:
    with FaultProxy(s3_server.port) as other:
        moved = Fault(status=status, times=None, code="Moved", headers={"Location": f"{other.endpoint}/bucket/key"})
        key = {"SSECustomerAlgorithm": "AES256", "SSECustomerKey": "k" * 32}
        store, proxy = through(moved, token="session-token", s3_additional_kwargs=key)
        kind = Special if way == "client" else S3FileSystem
        fs = kind(**store.options["storage_options"])
        backend, path = torchferry.storage.registry.open_backend(f"{through.url}/x.pt", filesystem=fs)
        store.backend = backend
        with impatient():
            with pytest.raises(StorageError):
                await store.stat(path)
            with pytest.raises(StorageError):
                await store.read(path, 0, 5, ObjectStat("", 5, '"x"'))
            for size in (MIB, len(DATA)):
                with pytest.raises(StorageError):
                    await store.write(path, stream(DATA[:size], MIB))
        assert {request.method for request in proxy.log} >= {"HEAD", "GET", "PUT", "POST"}
        assert [request for request in other.log if request.secrets] == []


# --- progress


class Noting(Callback):
    """Notes when it was told of how many bytes, and whether the object was there then."""

    def __init__(self, is_there: Callable[[], bool]) -> None:
        super().__init__()
        self.told: list[tuple[float, int, bool | None]] = []
        self._is_there = is_there

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        self._note()

    def set_size(self, size: int) -> None:
        super().set_size(size)
        self._note()

    def _note(self) -> None:
        full = self.value >= self.size
        self.told.append((time.monotonic(), self.value, self._is_there() if full else None))

    def share_of_time(self, share: float, begun: float) -> float:
        """The share of the time after which so much of the bytes had been told."""
        assert self.size
        at = next(when for when, value, _ in self.told if value >= share * self.size)
        return (at - begun) / (self.told[-1][0] - begun)


async def test_progress_of_a_save_is_even_over_a_slow_link_and_ends_when_the_object_is_there(
    through: Through,
) -> None:
    store, _ = through(bandwidth=SLOW)
    path = store.path("checkpoint.pt")
    callback = Noting(lambda: store.raw_exists(path))
    tensors = [torch.full((4 * MIB,), float(n)) for n in range(4)]  # 64 MiB: 3.4 s
    begun = time.monotonic()
    stat = await torchferry.save_async(tensors, store.backend.url(path), callback=callback, **store.options)
    assert 0.1 < callback.share_of_time(0.5, begun) < 0.9  # not at once, and not at the end
    assert {there for _, _, there in callback.told} == {None, True}
    assert callback.value == callback.size == stat.size


async def test_progress_of_a_load_is_even_over_a_slow_link(
    through: Through, s3_storage_options: dict[str, Any]
) -> None:
    store, _ = through(bandwidth=SLOW)
    path = store.path("checkpoint.pt")
    url = store.backend.url(path)
    tensors = [torch.full((4 * MIB,), float(n)) for n in range(4)]  # 64 MiB: 3.4 s
    await torchferry.save_async(tensors, url, storage_options=s3_storage_options)
    callback = Noting(lambda: True)
    await store.stat(path)  # connects
    begun = time.monotonic()
    await torchferry.load_async(url, callback=callback, **store.options)
    assert 0.1 < callback.share_of_time(0.5, begun) < 0.9
    assert callback.value == callback.size


async def test_progress_goes_back_to_nothing_that_was_not_stored(through: Through) -> None:
    store, _ = through(Fault(method="PUT", target="partNumber=2", reset_upload_after=4 * MIB, times=2))
    path = store.path("checkpoint.pt")
    callback = Noting(lambda: store.raw_exists(path))
    reports: list[TransferReport] = []
    stat = await torchferry.save_async(
        TENSORS, store.backend.url(path), part_size=PART, callback=callback, report=reports.append, **store.options
    )
    assert callback.value == callback.size == stat.size == reports[0].nbytes


async def test_the_report_counts_parts_requests_and_retries(through: Through) -> None:
    store, proxy = through(Fault(method="PUT", target="partNumber=2", status=503, times=2))
    url = store.backend.url(store.path("checkpoint.pt"))
    reports: list[TransferReport] = []
    await torchferry.save_async(TENSORS, url, part_size=PART, report=reports.append, **store.options)
    (report,) = reports
    assert (report.verb, report.parts, report.retries) == ("save", 5, 2)
    assert report.requests == len(proxy.log)
    # The third attempt of a part is the client's.
    assert report.client_bytes == PART
    assert report.client_reasons == ("the engine failed twice",)


# --- odd stores


@pytest.mark.parametrize("seed", range(3))
async def test_a_store_that_does_everything_wrong_now_and_then_gets_the_right_bytes(
    through: Through, seed: int
) -> None:
    dice = random.Random(seed)
    faults = []
    for _ in range(12):
        method = dice.choice(["PUT", "POST", "GET", "HEAD"])
        fault = Fault(method=method, skip=dice.randrange(4))
        kind = dice.choice(["status", "reset_upload_after", "reset_download_after", "lose_reply"])
        at = 0 if method == "HEAD" else dice.randrange(MIB)
        setattr(fault, kind, {"status": 503, "lose_reply": True}.get(kind, at))
        faults.append(fault)
    store, _ = through(*faults)
    path = store.path("checkpoint.pt")
    for _ in range(3):
        written = await store.write(path, stream(DATA, MIB))
        assert await store.read(path, 0, len(DATA), written) == DATA
    assert store.raw_read(path) == DATA
    assert store.leftovers() == []
