from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import anyio
import pytest

from torchferry.errors import StorageError, StorageUnavailableError
from torchferry.engine import writer as multipart
from torchferry.storage.base import MIB, Chunk
from torchferry.engine.cancellation import in_thread, run_shielded
from torchferry.engine.writer import MultipartUpload, PartSizes, part_size_for, upload_parts
from torchferry.testing.conformance import stream

if TYPE_CHECKING:
    from collections.abc import Sequence

TIB = 1 << 40
DATA = bytes(range(251)) * 40  # 10,040 bytes


class MemoryUpload(MultipartUpload[int, bytes]):
    """A store in memory, which notes what is asked of it."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.parts: dict[int, list[Chunk]] = {}
        self.under_way = 0
        self.most_under_way = 0

    async def put_whole(self, body: Sequence[Chunk]) -> bytes:
        self.events.append("put whole")
        return b"".join(body)

    async def start(self) -> None:
        self.events.append("start")

    async def put_part(self, index: int, body: Sequence[Chunk]) -> int:
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            for _ in range((7 * index + 3) % 5):  # parts end in another order than they began
                await anyio.lowlevel.checkpoint()
            self.parts[index] = list(body)
        finally:
            self.under_way -= 1
        return index

    async def finish(self, parts: Sequence[int]) -> bytes:
        self.events.append("finish")
        return b"".join(b"".join(self.parts[index]) for index in parts)

    async def abort(self) -> None:
        assert self.under_way == 0, "parts are stopped before the upload is aborted"
        self.events.append("abort")


# --- part sizes


@pytest.mark.parametrize(
    ("size_hint", "wanted", "expected"),
    [
        (0, None, 16 * MIB),
        (1 << 30, None, 16 * MIB),
        (8000 * 16 * MIB, None, 16 * MIB),
        (8000 * 16 * MIB + 1, None, 17 * MIB),
        (5 * TIB, None, 656 * MIB),
        (0, 1, 5 * MIB),
        (0, 32 * MIB, 32 * MIB),
        (5 * TIB, 32 * MIB, 656 * MIB),
        (0, 6 << 30, 5 << 30),
        (0, 7_000_001, 7_000_001),
    ],
)
def test_part_size_follows_the_wish_as_far_as_the_store_allows(
    size_hint: int, wanted: int | None, expected: int
) -> None:
    assert part_size_for(size_hint, wanted) == expected


@pytest.mark.parametrize("size_hint", [0, 1 << 30, 100 << 30, TIB, 5 * TIB])
@pytest.mark.parametrize("wanted", [None, 5 * MIB, 64 * MIB])
def test_ten_thousand_parts_hold_five_tebibytes_whatever_was_expected(size_hint: int, wanted: int | None) -> None:
    sizes = PartSizes(part_size_for(size_hint, wanted))
    all_sizes = [sizes[index] for index in range(10_000)]
    assert sum(all_sizes) >= 5 * TIB
    assert max(all_sizes) <= 5 << 30
    assert all_sizes == sorted(all_sizes)


@pytest.mark.parametrize("size_hint", [1, 100 << 30, 5 * TIB])
def test_parts_do_not_grow_for_a_stream_of_the_expected_size(size_hint: int) -> None:
    size = part_size_for(size_hint)
    needed = -(-size_hint // size)
    assert all(PartSizes(size)[index] == size for index in range(needed))


def test_limits_of_other_stores_hold_too() -> None:
    limits = {"minimum": 1, "maximum": 4000 * MIB, "max_parts": 50_000}
    assert part_size_for(190 * TIB, **limits) <= 4000 * MIB * 5 // 4
    assert part_size_for(10, 3, **limits) == 3
    assert part_size_for(0, None, max_parts=32) == 16 * MIB
    assert part_size_for(10 << 30, None, max_parts=32) == 410 * MIB


# --- cutting and putting together


@pytest.mark.parametrize("piece", [1, 7, 99, 100, 101, 1000, 20_000])
@pytest.mark.parametrize("size", [101, 199, 200, 201, 1000, 10_040])
async def test_parts_have_exactly_the_size_and_the_order(piece: int, size: int) -> None:
    upload = MemoryUpload()
    data = DATA[:size]
    assert await upload_parts(upload, stream(data, piece), PartSizes(100), in_flight=4) == data
    lengths = [sum(map(len, upload.parts[index])) for index in range(len(upload.parts))]
    assert lengths[:-1] == [100] * (len(lengths) - 1)
    assert 0 < lengths[-1] <= 100
    assert upload.events == ["start", "finish"]


@pytest.mark.parametrize("size", [0, 1, 99, 100])
async def test_object_of_one_part_is_put_whole(size: int) -> None:
    upload = MemoryUpload()
    assert await upload_parts(upload, stream(DATA[:size], 7), PartSizes(100), in_flight=4) == DATA[:size]
    assert upload.events == ["put whole"]


async def test_parts_grow_where_the_stream_outgrows_its_hint() -> None:
    upload = MemoryUpload()
    sizes = PartSizes(10, maximum=1000, max_parts=100)
    assert await upload_parts(upload, stream(DATA, 64), sizes, in_flight=4) == DATA
    assert len(upload.parts) <= 100


async def test_no_more_parts_than_allowed_are_held_at_once() -> None:
    upload = MemoryUpload()
    await upload_parts(upload, stream(DATA, 100), PartSizes(100), in_flight=3)
    assert upload.most_under_way <= 3


async def test_chunks_are_handed_on_without_a_copy() -> None:
    upload = MemoryUpload()
    await upload_parts(upload, stream(DATA, 77), PartSizes(100), in_flight=3)
    assert all(memoryview(buffer).obj is DATA for body in upload.parts.values() for buffer in body)


# --- failures and cancels


@pytest.mark.parametrize("stage", ["start", "put_part", "finish"])
async def test_failure_of_the_store_aborts_and_is_raised_as_it_is(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    upload = MemoryUpload()
    error = StorageError("refused")

    async def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(upload, stage, fail)
    with pytest.raises(StorageError) as caught:
        await upload_parts(upload, stream(DATA, 77), PartSizes(100), in_flight=3)
    assert caught.value is error
    assert upload.events[-1] == "abort"


async def test_failing_abort_does_not_hide_what_went_wrong(caplog: pytest.LogCaptureFixture) -> None:
    class Stubborn(MemoryUpload):
        async def abort(self) -> None:
            raise StorageUnavailableError("no answer")

        async def finish(self, parts: Sequence[int]) -> bytes:
            raise StorageError(f"refused {len(parts)} parts")

    with pytest.raises(StorageError, match="refused") as caught:
        await upload_parts(Stubborn(), stream(DATA, 77), PartSizes(100), in_flight=3)
    assert "no answer" in caught.value.__notes__[0]
    assert "no answer" in caplog.text


async def test_abort_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(MemoryUpload):
        async def abort(self) -> None:
            await anyio.sleep_forever()

        async def finish(self, parts: Sequence[int]) -> bytes:
            raise StorageError(f"refused {len(parts)} parts")

    monkeypatch.setattr(multipart, "_CLEANUP_SECONDS", 0.01)
    with pytest.raises(StorageError, match="refused") as caught:
        await upload_parts(Silent(), stream(DATA, 77), PartSizes(100), in_flight=3)
    assert "TimeoutError" in caught.value.__notes__[0]


@pytest.mark.parametrize("stage", ["start", "put_part", "finish"])
async def test_cancel_in_a_request_aborts_once_it_is_over(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request to start or finish is not cut: whether the store did it would be unknown."""
    upload = MemoryUpload()
    reached, go_on = asyncio.Event(), asyncio.Event()
    original = getattr(upload, stage)

    async def wait(*args: object) -> object:
        reached.set()
        await go_on.wait()
        return await original(*args)

    monkeypatch.setattr(upload, stage, wait)
    task = asyncio.create_task(upload_parts(upload, stream(DATA, 77), PartSizes(100), in_flight=3))
    await reached.wait()
    task.cancel()
    await anyio.lowlevel.checkpoint()
    task.cancel()  # impatient
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert upload.events[-1] == "abort"
    assert (stage in upload.events) == (stage != "put_part")


async def test_request_that_hangs_after_a_cancel_is_cut_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(MemoryUpload):
        async def start(self) -> None:
            reached.set()
            await anyio.sleep_forever()

    reached = asyncio.Event()
    upload = Silent()
    monkeypatch.setattr(multipart, "_CLEANUP_SECONDS", 0.01)
    task = asyncio.create_task(upload_parts(upload, stream(DATA, 77), PartSizes(100), in_flight=3))
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert upload.events == ["abort"]


# --- what must not be cut in half


@pytest.mark.parametrize("by", ["task", "scope"])
async def test_to_the_end_runs_to_the_end(by: str) -> None:
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


async def test_to_the_end_passes_results_and_errors_on() -> None:
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
