from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import anyio
import pytest
from isal import isal_zlib

from torchferry.engine import writer
from torchferry.engine.cancellation import in_thread, run_shielded
from torchferry.engine.types import MIB, Chunk, ObjectStat
from torchferry.engine.writer import Body, Limits, Upload, UploadPlan, upload
from torchferry.errors import StorageError, StorageUnavailableError
from torchferry.testing.conformance import stream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

TIB = 1 << 40
DATA = bytes(range(251)) * 40  # 10,040 bytes


def plan(part_size: int, in_flight: int, limits: Limits | None = None) -> UploadPlan:
    return UploadPlan(part_size, in_flight, limits or Limits(1))


class MemoryUpload(Upload[int]):
    """A store in memory, which notes what is asked of it."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.parts: dict[int, Body] = {}
        self.data = b""
        self.under_way = 0
        self.most_under_way = 0

    async def put_whole(self, body: Body) -> ObjectStat:
        self.events.append("put whole")
        return self._publish([body])

    async def start(self) -> None:
        self.events.append("start")

    async def put_part(self, index: int, body: Body) -> int:
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            for _ in range((7 * index + 3) % 5):  # parts end in another order than they began
                await anyio.lowlevel.checkpoint()
            self.parts[index] = body
        finally:
            self.under_way -= 1
        return index

    async def finish(self, parts: Sequence[int]) -> ObjectStat:
        self.events.append("finish")
        return self._publish([self.parts[index] for index in parts])

    async def abort(self) -> None:
        assert self.under_way == 0, "parts are stopped before the upload is aborted"
        self.events.append("abort")

    def _publish(self, bodies: Sequence[Body]) -> ObjectStat:
        self.data = b"".join(buffer for body in bodies for buffer in body.buffers)
        return ObjectStat("memory://x", len(self.data))


# --- part sizes


@pytest.mark.parametrize(
    ("size", "wanted", "expected"),
    [
        (0, None, 16 * MIB),
        ((1 << 30) - 1, None, 16 * MIB),
        (1 << 30, None, 32 * MIB),
        (8000 * 32 * MIB, None, 32 * MIB),
        (8000 * 32 * MIB + 1, None, 33 * MIB),
        (5 * TIB, None, 656 * MIB),
        (0, 1, 5 * MIB),
        (0, 32 * MIB, 32 * MIB),
        (5 * TIB, 32 * MIB, 656 * MIB),
        (0, 6 << 30, 5 << 30),
        (0, 7_000_001, 7_000_001),
    ],
)
def test_part_size_follows_the_wish_as_far_as_the_store_allows(size: int, wanted: int | None, expected: int) -> None:
    assert UploadPlan.for_size(size, wanted).part_size == expected


@pytest.mark.parametrize("size", [0, 1 << 30, 100 << 30, TIB, 5 * TIB])
@pytest.mark.parametrize("wanted", [None, 5 * MIB, 64 * MIB])
def test_ten_thousand_parts_hold_five_tebibytes_whatever_was_expected(size: int, wanted: int | None) -> None:
    chosen = UploadPlan.for_size(size, wanted)
    all_sizes = [chosen.part_at(index) for index in range(10_000)]
    assert sum(all_sizes) >= 5 * TIB
    assert max(all_sizes) <= 5 << 30
    assert all_sizes == sorted(all_sizes)


@pytest.mark.parametrize("size", [1, 100 << 30, 5 * TIB])
def test_parts_do_not_grow_for_a_stream_of_the_expected_size(size: int) -> None:
    chosen = UploadPlan.for_size(size)
    needed = -(-size // chosen.part_size)
    assert all(chosen.part_at(index) == chosen.part_size for index in range(needed))


def test_limits_of_other_stores_hold_too() -> None:
    limits = Limits(1, 4000 * MIB, 50_000)
    assert UploadPlan.for_size(190 * TIB, limits=limits).part_size <= 4000 * MIB * 5 // 4
    assert UploadPlan.for_size(10, 3, limits=limits).part_size == 3
    assert UploadPlan.for_size(0, limits=Limits(most_parts=32)).part_size == 16 * MIB
    assert UploadPlan.for_size(10 << 30, limits=Limits(most_parts=32)).part_size == 410 * MIB


# --- cutting and putting together


@pytest.mark.parametrize("piece", [1, 7, 99, 100, 101, 1000, 20_000])
@pytest.mark.parametrize("size", [101, 199, 200, 201, 1000, 10_040])
async def test_parts_have_exactly_the_size_and_the_order(piece: int, size: int) -> None:
    target = MemoryUpload()
    data = DATA[:size]
    await upload(target, stream(data, piece), plan(100, 4))
    assert target.data == data
    lengths = [target.parts[index].size for index in range(len(target.parts))]
    assert lengths[:-1] == [100] * (len(lengths) - 1)
    assert 0 < lengths[-1] <= 100
    assert target.events == ["start", "finish"]


@pytest.mark.parametrize("size", [0, 1, 99, 100])
async def test_object_of_one_part_is_put_whole(size: int) -> None:
    target = MemoryUpload()
    await upload(target, stream(DATA[:size], 7), plan(100, 4))
    assert target.data == DATA[:size]
    assert target.events == ["put whole"]


async def test_parts_grow_where_the_stream_outgrows_its_hint() -> None:
    target = MemoryUpload()
    await upload(target, stream(DATA, 64), plan(10, 4, Limits(1, 1000, 100)))
    assert target.data == DATA
    assert len(target.parts) <= 100


async def test_no_more_parts_than_allowed_are_held_at_once() -> None:
    target = MemoryUpload()
    await upload(target, stream(DATA, 100), plan(100, 3))
    assert target.most_under_way <= 3


async def test_chunks_are_handed_on_without_a_copy() -> None:
    target = MemoryUpload()
    await upload(target, stream(DATA, 77), plan(100, 3))
    assert all(memoryview(buffer).obj is DATA for body in target.parts.values() for buffer in body.buffers)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("piece", [7, 100, 1000])
async def test_crc32_of_a_part_is_that_of_its_bytes_whether_or_not_those_of_chunks_are_known(
    piece: int, known: bool
) -> None:
    async def chunks() -> AsyncIterator[Chunk]:
        for start in range(0, len(DATA), piece):
            data = DATA[start : start + piece]
            yield Chunk(data, isal_zlib.crc32(data) if known else None)

    target = MemoryUpload()
    await upload(target, chunks(), plan(100, 4))
    for body in target.parts.values():
        assert body.crc32 == await body.checksum() == isal_zlib.crc32(b"".join(body.buffers))


# --- failures and cancels


@pytest.mark.parametrize("stage", ["start", "put_part", "finish"])
async def test_failure_of_the_store_aborts_and_is_raised_as_it_is(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target = MemoryUpload()
    error = StorageError("refused")

    async def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(target, stage, fail)
    with pytest.raises(StorageError) as caught:
        await upload(target, stream(DATA, 77), plan(100, 3))
    assert caught.value is error
    assert target.events[-1] == "abort"


async def test_failing_abort_does_not_hide_what_went_wrong(caplog: pytest.LogCaptureFixture) -> None:
    class Stubborn(MemoryUpload):
        async def abort(self) -> None:
            raise StorageUnavailableError("no answer")

        async def finish(self, parts: Sequence[int]) -> ObjectStat:
            raise StorageError(f"refused {len(parts)} parts")

    with pytest.raises(StorageError, match="refused") as caught:
        await upload(Stubborn(), stream(DATA, 77), plan(100, 3))
    assert "no answer" in caught.value.__notes__[0]
    assert "no answer" in caplog.text


async def test_abort_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(MemoryUpload):
        async def abort(self) -> None:
            await anyio.sleep_forever()

        async def finish(self, parts: Sequence[int]) -> ObjectStat:
            raise StorageError(f"refused {len(parts)} parts")

    monkeypatch.setattr(writer, "_ABORT_SECONDS", 0.01)
    with pytest.raises(StorageError, match="refused") as caught:
        await upload(Silent(), stream(DATA, 77), plan(100, 3))
    assert "TimeoutError" in caught.value.__notes__[0]


@pytest.mark.parametrize("stage", ["start", "put_part", "finish"])
async def test_cancel_in_a_request_aborts_once_it_is_over(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request to start is not cut: whether the store did it would be unknown. To finish is the store's own matter."""
    target = MemoryUpload()
    reached, go_on = asyncio.Event(), asyncio.Event()
    original = getattr(target, stage)

    async def wait(*args: object) -> object:
        reached.set()
        await go_on.wait()
        return await original(*args)

    monkeypatch.setattr(target, stage, wait)
    task = asyncio.create_task(upload(target, stream(DATA, 77), plan(100, 3)))
    await reached.wait()
    task.cancel()
    await anyio.lowlevel.checkpoint()
    task.cancel()  # impatient
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert target.events[-1] == "abort"
    assert (stage in target.events) == (stage == "start")


async def test_a_cancelled_upload_does_not_wait_for_an_abort_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on by itself."""
    waiting, may_end, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

    class Slow(MemoryUpload):
        async def put_part(self, index: int, body: Body) -> int:
            waiting.set()
            await anyio.sleep_forever()
            return index + body.size

        async def abort(self) -> None:
            await may_end.wait()
            ended.set()

    monkeypatch.setattr(writer, "ABORT_PATIENCE", 0.01)
    task = asyncio.create_task(upload(Slow(), stream(DATA, 77), plan(100, 3)))
    await waiting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not ended.is_set()
    may_end.set()
    await ended.wait()


async def test_request_that_hangs_after_a_cancel_is_cut_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(MemoryUpload):
        async def start(self) -> None:
            reached.set()
            await anyio.sleep_forever()

    reached = asyncio.Event()
    target = Silent()
    monkeypatch.setattr(writer, "_START_PATIENCE", 0.01)
    task = asyncio.create_task(upload(target, stream(DATA, 77), plan(100, 3)))
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert target.events == ["abort"]


# --- what must not be cut in half


@pytest.mark.parametrize("by", ["task", "scope"])
async def test_what_is_shielded_runs_to_the_end(by: str) -> None:
    reached, go_on, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()
    scope = anyio.CancelScope()

    async def work() -> None:
        reached.set()
        await go_on.wait()
        ended.set()

    async def caller() -> None:
        with scope:
            await run_shielded(work)
            pytest.fail("the cancellation goes on")

    task = asyncio.create_task(caller())
    await reached.wait()
    if by == "task":
        task.cancel()
    else:
        scope.cancel()
    for _ in range(3):
        await anyio.lowlevel.checkpoint()
    assert not task.done()
    go_on.set()
    await asyncio.wait([task])
    assert ended.is_set()
    assert task.cancelled() == (by == "task")


async def test_what_is_shielded_passes_results_and_errors_on() -> None:
    async def fail() -> None:
        raise StorageError("refused")

    assert await run_shielded(anyio.to_thread.run_sync, int, "5") == 5
    with pytest.raises(StorageError, match="refused"):
        await run_shielded(fail)


@pytest.mark.timeout(60, method="thread")  # nothing less ends a test that waits for a thread
@pytest.mark.parametrize("error", [StopIteration, StopAsyncIteration])
async def test_what_ends_an_iteration_comes_out_of_a_thread_as_an_error(error: type[Exception]) -> None:
    def work() -> None:
        raise error

    with pytest.raises(RuntimeError, match=error.__name__) as caught:
        await in_thread(work)
    assert isinstance(caught.value.__cause__, error)


async def test_thread_is_done_before_its_caller_goes_on() -> None:
    import threading

    reached, go_on, done = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        reached.set()
        go_on.wait()
        done.set()

    task = asyncio.create_task(in_thread(work))
    await asyncio.to_thread(reached.wait)
    task.cancel()
    await anyio.lowlevel.checkpoint()
    assert not task.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert done.is_set()
