"""What every backend must hold, as test classes for pytest with pytest-asyncio.

A backend's tests subclass :class:`BackendConformance`, or :class:`CloudConformance` for a store with containers and
credentials, and give it a fixture ``store``::

    class TestMyBackend(BackendConformance):
        @pytest.fixture
        def store(self, tmp_path):
            return MyStoreUnderTest(tmp_path)

The suite looks at the store around the backend: what it wrote is read back by :class:`StoreUnderTest`'s own means.
"""

from __future__ import annotations

import asyncio
import random
import sys
import threading
import time
from abc import ABC, abstractmethod
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import anyio
import pytest

from torchferry.engine.collector import collector_paused
from torchferry.engine.loops import run_on
from torchferry.engine.types import MIB, Chunk, ObjectStat
from torchferry.errors import (
    CheckpointChangedError,
    CheckpointNotFoundError,
    StorageError,
    StoragePermissionError,
)
from torchferry.storage.base import Backend, Leftover, ListedObject
from torchferry.testing.peak import peak_of_save

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator, Callable, Mapping, Sequence

__all__ = ["BackendConformance", "CloudConformance", "StoreUnderTest"]

PART = 5 * MIB
"""The part size that the suite asks for: S3's minimum."""

MOST_CPU_SECONDS_PER_STEP = 0.05

AWKWARD_NAMES = (
    "with space.pt",
    "ünïcode-日本語.pt",
    "hash#tag.pt",
    "question?mark.pt",
    "percent%20sign%.pt",
    "plus+sign.pt",
    "amp&er=sand;semi:colon,comma@at.pt",
    "[brackets]-{braces}-(parens)-*star!.pt",
    "'quotes'-~tilde-$dollar.pt",
    "a/deep/er/path.pt",
)


class StoreUnderTest(ABC):
    """A store, and the way around the backend under test.

    Attributes:
        backend: The backend under test.
        keeps_metadata: Whether ``stat`` returns the metadata that ``write`` was given.
        losers_fail: Whether, of several who write one object at the same time, all but one may get an error.
        options: What :func:`torchferry.save` takes to get here from another process; None where there is no way.
    """

    backend: Backend
    keeps_metadata: bool = False
    losers_fail: bool = False
    options: Mapping[str, Any] | None = None

    @abstractmethod
    def path(self, name: str) -> str:
        """The path of an object of this name, where no other test puts anything."""

    @abstractmethod
    def raw_write(self, path: str, data: bytes) -> None:
        """Puts an object; a new version, even with the same bytes."""

    @abstractmethod
    def raw_read(self, path: str) -> bytes:
        """An object's bytes."""

    @abstractmethod
    def raw_exists(self, path: str) -> bool:
        """Whether there is an object."""

    @abstractmethod
    def leftovers(self) -> Sequence[str]:
        """What is staged and not published: uploads, parts, components, temporary files."""

    def staged(self) -> Sequence[str]:
        """What an upload under way shows; more than :meth:`leftovers` where the store itself removes some of it."""
        return self.leftovers()

    # The verbs, run where the backend wants them run.

    async def write(
        self,
        path: str,
        chunks: AsyncIterable[Chunk],
        *,
        size_hint: int = 0,
        part_size: int | None = PART,
        metadata: Mapping[str, str] | None = None,
    ) -> ObjectStat:
        return await run_on(
            self.backend.loop,
            self.backend.write,
            path,
            chunks,
            plan=self.backend.upload_plan(size_hint, part_size),
            metadata=metadata,
        )

    async def stat(self, path: str) -> ObjectStat:
        return await run_on(self.backend.loop, self.backend.stat, path)

    async def read(self, path: str, start: int, stop: int, stat: ObjectStat) -> bytes:
        return bytes(await run_on(self.backend.loop, self.backend.read, path, start, stop, stat))

    async def read_into(self, path: str, start: int, stop: int, stat: ObjectStat) -> bytes:
        buffer = bytearray(stop - start)
        view, cut = memoryview(buffer), len(buffer) // 3
        pieces = [view[:cut], view[cut:cut], view[cut:]]
        await run_on(self.backend.loop, self.backend.read_into, path, start, pieces, stat)
        return bytes(buffer)

    async def list(self, prefix: str) -> Sequence[ListedObject]:
        async def collect() -> Sequence[ListedObject]:
            return [found async for found in self.backend.list(prefix)]

        return await run_on(self.backend.loop, collect)

    async def backend_leftovers(self, prefix: str) -> Sequence[Leftover]:
        async def collect() -> Sequence[Leftover]:
            return [found async for found in self.backend.leftovers(prefix)]

        return await run_on(self.backend.loop, collect)

    async def delete(self, path: str) -> None:
        await run_on(self.backend.loop, self.backend.delete, path)


class SourceError(Exception):
    """What a stream of chunks raises in these tests."""


@cache
def _random_bytes(size: int) -> bytes:
    # Repeats with a period that no part size divides: a part in the wrong place shows.
    period = random.Random(size).randbytes(min(size, 9_999_991))  # noqa: S311 - reproducible, not secret
    return (period * (size // max(1, len(period)) + 1))[:size]


async def stream(data: bytes, piece: int, *, then: Callable[[], Any] | None = None) -> AsyncIterator[Chunk]:
    """``data`` in chunks of ``piece`` bytes, as views of its memory; at the end calls ``then``."""
    view = memoryview(data)
    for start in range(0, len(data), piece):
        yield Chunk(view[start : start + piece])
    if then is not None:
        then()


async def cancel_at_the_end(store: StoreUnderTest, path: str, data: bytes, under_way: Callable[[], object]) -> None:
    """Cancels a write of ``data`` when the backend has taken all of it and ``under_way()`` has returned.

    Before it has taken all, obstore still asks for more, and has another way to end.
    """
    taken = threading.Event()
    task = asyncio.create_task(store.write(path, stream(data, MIB, then=taken.set)))
    await asyncio.to_thread(under_way)
    assert await asyncio.to_thread(taken.wait, 30.0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def nothing_is_left(store: StoreUnderTest) -> None:
    """Waits until nothing is staged: a cancel waits for an abort for 0.7 s, then it goes on by itself."""
    with anyio.fail_after(60):
        while await anyio.to_thread.run_sync(store.leftovers):
            pass


def _raise_source_error() -> None:
    raise SourceError


Reads: TypeAlias = Literal["read", "read_into"]
READS = pytest.mark.parametrize("reads", get_args(Reads))
"""Both verbs that read."""


class BackendConformance(ABC):
    """What holds for any store."""

    @pytest.fixture
    @abstractmethod
    def store(self) -> StoreUnderTest:
        """The store under test; a fresh place in it for every test."""

    # --- what is written is what is there

    @pytest.mark.parametrize("size", [0, 1, PART - 1, PART, PART + 1, 3 * PART, 37_000_003])
    async def test_object_of_any_size_arrives_whole(self, store: StoreUnderTest, size: int) -> None:
        path, data = store.path("checkpoint.pt"), _random_bytes(size)
        written = await store.write(path, stream(data, 1_234_567), size_hint=size)
        assert store.raw_read(path) == data
        assert written.size == size
        assert written.url == store.backend.url(path)
        assert store.leftovers() == []

    async def test_100_megabytes_in_odd_chunks_arrive_whole(self, store: StoreUnderTest) -> None:
        path, data = store.path("checkpoint.pt"), _random_bytes(100_000_007)  # more parts than go up at once
        await store.write(path, stream(data, 7_654_321), size_hint=len(data))
        assert store.raw_read(path) == data
        assert store.leftovers() == []

    @pytest.mark.parametrize("size_hint", [0, 1, 1 << 40], ids=["none", "short", "long"])
    async def test_size_hint_may_be_wrong(self, store: StoreUnderTest, size_hint: int) -> None:
        path, data = store.path("checkpoint.pt"), _random_bytes(2 * PART + 17)
        written = await store.write(path, stream(data, MIB), size_hint=size_hint)
        assert store.raw_read(path) == data
        assert written.size == len(data)

    async def test_chunks_may_be_empty_tiny_or_larger_than_a_part(self, store: StoreUnderTest) -> None:
        path, data = store.path("checkpoint.pt"), _random_bytes(4 * PART + 3)

        async def chunks() -> AsyncIterator[Chunk]:
            yield Chunk(b"")
            yield Chunk(data[:1])
            yield Chunk(bytearray(data[1:3]))
            yield Chunk(memoryview(b""))
            for start in range(3, 1003):
                yield Chunk(data[start : start + 1])
            yield Chunk(memoryview(data)[1003 : 3 * PART + 5])
            yield Chunk(b"")
            yield Chunk(data[3 * PART + 5 :])
            yield Chunk(b"")

        await store.write(path, chunks(), size_hint=len(data))
        assert store.raw_read(path) == data

    async def test_nothing_but_empty_chunks_is_an_empty_object(self, store: StoreUnderTest) -> None:
        path = store.path("checkpoint.pt")

        async def chunks() -> AsyncIterator[Chunk]:
            yield Chunk(b"")
            yield Chunk(b"")

        assert (await store.write(path, chunks())).size == 0
        assert store.raw_read(path) == b""

    @pytest.mark.parametrize("name", AWKWARD_NAMES)
    async def test_names_are_taken_literally(self, store: StoreUnderTest, name: str) -> None:
        path, data = store.path(name), _random_bytes(PART + 1)
        await store.write(path, stream(data, MIB))
        assert store.raw_read(path) == data
        found = await store.stat(path)
        assert await store.read(path, 5, 100, found) == data[5:100]
        await store.delete(path)
        assert not store.raw_exists(path)
        assert store.leftovers() == []

    async def test_metadata_is_returned_and_kept_where_the_store_can(self, store: StoreUnderTest) -> None:
        path, metadata = store.path("checkpoint.pt"), {"framework": "torch", "step": "1000"}
        assert store.backend.keeps_metadata == store.keeps_metadata
        for size in (1, PART + 1):
            written = await store.write(path, stream(_random_bytes(size), MIB), metadata=metadata)
            assert written.metadata == metadata
            assert (await store.stat(path)).metadata == (metadata if store.keeps_metadata else {})

    # --- all or nothing

    @pytest.mark.parametrize("size", [10, 3 * PART + 1], ids=["small", "parts"])
    async def test_overwrite_replaces_all(self, store: StoreUnderTest, size: int) -> None:
        path, data = store.path("checkpoint.pt"), _random_bytes(size)
        store.raw_write(path, _random_bytes(2 * PART + 5))
        written = await store.write(path, stream(data, MIB))
        assert store.raw_read(path) == data
        assert await store.stat(path) == written
        assert store.leftovers() == []

    @pytest.mark.parametrize("size", [10, 3 * PART + 1], ids=["small", "parts"])
    async def test_nothing_is_visible_before_the_end(self, store: StoreUnderTest, size: int) -> None:
        path, data = store.path("checkpoint.pt"), _random_bytes(size)
        seen: list[bool] = []
        await store.write(path, stream(data, MIB, then=lambda: seen.append(store.raw_exists(path))))
        assert seen == [False]

    @pytest.mark.parametrize("size", [10, 3 * PART + 1], ids=["small", "parts"])
    async def test_old_object_stays_until_the_end(self, store: StoreUnderTest, size: int) -> None:
        path, data = store.path("checkpoint.pt"), _random_bytes(size)
        store.raw_write(path, b"old")
        seen: list[bytes] = []
        await store.write(path, stream(data, MIB, then=lambda: seen.append(store.raw_read(path))))
        assert seen == [b"old"]

    @pytest.mark.parametrize("sent", [0, MIB, PART, PART + 1, 3 * PART + 7])
    @pytest.mark.parametrize("old", [None, b"old"], ids=["new", "overwrite"])
    async def test_failing_source_leaves_everything_as_it_was(
        self, store: StoreUnderTest, sent: int, old: bytes | None
    ) -> None:
        path = store.path("checkpoint.pt")
        if old is not None:
            store.raw_write(path, old)
        with pytest.raises(SourceError):
            await store.write(path, stream(_random_bytes(sent), MIB, then=_raise_source_error), size_hint=20 * PART)
        assert (store.raw_read(path) if store.raw_exists(path) else None) == old
        assert store.leftovers() == []

    @pytest.mark.parametrize("sent", [0, MIB, PART, PART + 1, 3 * PART + 7])
    @pytest.mark.parametrize("old", [None, b"old"], ids=["new", "overwrite"])
    async def test_cancel_while_waiting_for_chunks_leaves_everything_as_it_was(
        self, store: StoreUnderTest, sent: int, old: bytes | None
    ) -> None:
        path = store.path("checkpoint.pt")
        if old is not None:
            store.raw_write(path, old)
        loop, waiting = asyncio.get_running_loop(), asyncio.Event()

        async def chunks() -> AsyncIterator[Chunk]:
            async for chunk in stream(_random_bytes(sent), MIB):
                yield chunk
            loop.call_soon_threadsafe(waiting.set)
            await anyio.sleep_forever()

        task = asyncio.create_task(store.write(path, chunks(), size_hint=20 * PART))
        await waiting.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (store.raw_read(path) if store.raw_exists(path) else None) == old
        await nothing_is_left(store)

    @pytest.mark.parametrize("ending", ["failure", "cancel"])
    @pytest.mark.parametrize("old", [None, b"old"], ids=["new", "overwrite"])
    async def test_what_is_staged_already_is_removed(
        self, store: StoreUnderTest, old: bytes | None, ending: str
    ) -> None:
        path = store.path("checkpoint.pt")
        if old is not None:
            store.raw_write(path, old)
        loop, staged = asyncio.get_running_loop(), asyncio.Event()

        async def chunks() -> AsyncIterator[Chunk]:
            async for chunk in stream(_random_bytes(3 * PART + 7), MIB):
                yield chunk
            with anyio.fail_after(60):
                while not await anyio.to_thread.run_sync(store.staged):
                    pass
            if ending == "failure":
                raise SourceError
            loop.call_soon_threadsafe(staged.set)
            await anyio.sleep_forever()

        task = asyncio.create_task(store.write(path, chunks(), size_hint=20 * PART))
        if ending == "cancel":
            await staged.wait()
            task.cancel()
        with pytest.raises((SourceError, asyncio.CancelledError)):
            await task
        assert (store.raw_read(path) if store.raw_exists(path) else None) == old
        await nothing_is_left(store)

    @pytest.mark.parametrize("size", [10, 2 * PART + 1], ids=["small", "parts"])
    async def test_cancel_leaves_the_old_object_until_the_request_that_publishes_is_sent(
        self, store: StoreUnderTest, size: int
    ) -> None:
        path, before = store.path("checkpoint.pt"), b"old"
        store.raw_write(path, before)
        steps = 1
        cancelled = True
        while cancelled:
            data = steps.to_bytes(8, "big") + _random_bytes(size)
            all_taken = threading.Event()
            task = asyncio.create_task(store.write(path, stream(data, MIB, then=all_taken.set), size_hint=size))
            for _ in range(steps):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            cancelled = task.cancelled()
            after = store.raw_read(path)
            assert after == before or (all_taken.is_set() and after == data)
            await nothing_is_left(store)
            assert store.raw_read(path) == after
            before = after
            steps = steps * 3 // 2 + 1
        assert store.raw_read(path) == data

    async def test_cancel_from_an_anyio_scope_leaves_nothing(self, store: StoreUnderTest) -> None:
        path = store.path("checkpoint.pt")

        async def chunks(scope: anyio.CancelScope) -> AsyncIterator[Chunk]:
            async for chunk in stream(_random_bytes(2 * PART), MIB):
                yield chunk
            scope.cancel()
            await anyio.sleep_forever()

        async def write() -> bool:
            with anyio.CancelScope() as scope:
                await store.backend.write(path, chunks(scope), plan=store.backend.upload_plan(20 * PART, PART))
            return scope.cancelled_caught

        assert await run_on(store.backend.loop, write)
        assert not store.raw_exists(path)
        await nothing_is_left(store)

    async def test_concurrent_writers_leave_one_whole_winner(self, store: StoreUnderTest) -> None:
        path = store.path("checkpoint.pt")
        contents = [bytes([writer]) * (2 * PART + writer) for writer in range(4)]
        written: list[bytes] = []

        async def write(data: bytes) -> None:
            try:
                await store.write(path, stream(data, MIB))
            except StorageError:
                if not store.losers_fail:
                    raise
            else:
                written.append(data)

        async with anyio.create_task_group() as tasks:
            for data in contents:
                tasks.start_soon(write, data)
        assert store.raw_read(path) in written
        assert store.leftovers() == []

    # --- looking up and reading

    async def test_stat_of_what_others_wrote(self, store: StoreUnderTest) -> None:
        path = store.path("checkpoint.pt")
        store.raw_write(path, b"12345")
        found = await store.stat(path)
        assert found.url == store.backend.url(path)
        assert found.size == 5
        assert found == await store.stat(path)

    async def test_stat_sees_a_new_version_at_once(self, store: StoreUnderTest) -> None:
        path = store.path("checkpoint.pt")
        store.raw_write(path, b"12345")
        before = await store.stat(path)
        store.raw_write(path, b"1234567")
        after = await store.stat(path)
        assert after.size == 7
        assert after != before

    @READS
    async def test_ranges_are_exact(self, store: StoreUnderTest, reads: Reads) -> None:
        path, data = store.path("checkpoint.pt"), _random_bytes(PART + 17)
        store.raw_write(path, data)
        found = await store.stat(path)
        size = len(data)
        ranges = [(0, 1), (0, size), (size - 1, size), (1, 2), (PART - 1, PART + 1), (4097, MIB), (7, 7), (0, 0)]
        results: dict[tuple[int, int], bytes] = {}

        async def read(start: int, stop: int) -> None:
            results[start, stop] = await getattr(store, reads)(path, start, stop, found)

        async with anyio.create_task_group() as tasks:
            for start, stop in ranges:
                tasks.start_soon(read, start, stop)
        assert all(results[start, stop] == data[start:stop] for start, stop in ranges)

    @READS
    async def test_what_was_written_can_be_read_with_what_write_returned(
        self, store: StoreUnderTest, reads: Reads
    ) -> None:
        path, data = store.path("checkpoint.pt"), _random_bytes(PART + 17)
        written = await store.write(path, stream(data, MIB))
        assert await getattr(store, reads)(path, 0, len(data), written) == data

    @READS
    async def test_range_beyond_the_end_is_an_error(self, store: StoreUnderTest, reads: Reads) -> None:
        path = store.path("checkpoint.pt")
        store.raw_write(path, b"12345")
        found = await store.stat(path)
        for start, stop in ((0, 6), (4, 100), (5, 6), (50, 60)):
            with pytest.raises(StorageError):
                await getattr(store, reads)(path, start, stop, found)

    @READS
    async def test_reading_a_replaced_version_is_an_error(self, store: StoreUnderTest, reads: Reads) -> None:
        path = store.path("checkpoint.pt")
        store.raw_write(path, b"version 1")
        found = await store.stat(path)
        store.raw_write(path, b"version 2")
        with pytest.raises(CheckpointChangedError, match="replaced"):
            await getattr(store, reads)(path, 0, 9, found)

    @READS
    async def test_missing_object_is_not_found(self, store: StoreUnderTest, reads: Reads) -> None:
        path = store.path("missing.pt")
        with pytest.raises(CheckpointNotFoundError) as caught:
            await store.stat(path)
        assert store.backend.url(path) in str(caught.value)
        with pytest.raises(CheckpointNotFoundError) as caught:
            await getattr(store, reads)(path, 0, 5, ObjectStat(store.backend.url(path), 5))
        assert store.backend.url(path) in str(caught.value)

    async def test_delete_removes_the_object(self, store: StoreUnderTest) -> None:
        path = store.path("checkpoint.pt")
        store.raw_write(path, b"12345")
        await store.delete(path)
        assert not store.raw_exists(path)
        with pytest.raises(CheckpointNotFoundError):
            await store.stat(path)

    async def test_deleting_what_is_not_there_is_no_error(self, store: StoreUnderTest) -> None:
        await store.delete(store.path("missing.pt"))

    @pytest.mark.parametrize("size", [10, 3 * PART + 1], ids=["small", "parts"])
    async def test_copy_within_the_store_replaces_all_or_does_nothing(self, store: StoreUnderTest, size: int) -> None:
        source, target, data = store.path("from/a b.pt"), store.path("to/a b.pt"), _random_bytes(size)
        store.raw_write(source, data)
        store.raw_write(target, b"old")
        copied = await run_on(store.backend.loop, store.backend.copy, source, target, size)
        assert store.raw_read(target) == (data if copied else b"old")
        assert store.raw_read(source) == data
        assert store.leftovers() == []

    # --- what is there

    async def test_list_finds_all_objects_below_a_prefix(self, store: StoreUnderTest) -> None:
        paths = [store.path(f"run/step-{number:03}.pt") for number in range(12)]
        for number, path in enumerate(paths):
            store.raw_write(path, bytes(number + 1))
        store.raw_write(store.path("other/step-000.pt"), b"x")
        found = await store.list(paths[0].removesuffix("step-000.pt"))
        assert {each.path: each.size for each in found} == {path: n + 1 for n, path in enumerate(paths)}
        assert all(each.url == store.backend.url(each.path) for each in found)
        assert [each.path for each in await store.list(paths[3])] == [paths[3]]
        assert await store.list(paths[0].removesuffix("step-000.pt") + "nothing-like-this") == []

    async def test_leftovers_shows_what_a_write_under_way_has_staged(self, store: StoreUnderTest) -> None:
        path = store.path("run/checkpoint.pt")
        prefix = path.removesuffix("checkpoint.pt")
        loop, staged = asyncio.get_running_loop(), asyncio.Event()

        async def chunks() -> AsyncIterator[Chunk]:
            async for chunk in stream(_random_bytes(3 * PART + 7), MIB):
                yield chunk
            with anyio.fail_after(60):
                while not await anyio.to_thread.run_sync(store.staged):
                    pass
            loop.call_soon_threadsafe(staged.set)
            await anyio.sleep_forever()

        task = asyncio.create_task(store.write(path, chunks(), size_hint=20 * PART))
        await staged.wait()
        found = await store.backend_leftovers(prefix)
        task.cancel()
        await asyncio.wait([task])
        assert found
        assert await store.list(prefix) == []
        await nothing_is_left(store)
        assert await store.backend_leftovers(prefix) == []

    # --- being a good neighbour

    async def test_event_loop_is_not_blocked(self, store: StoreUnderTest) -> None:
        """Counts the processor time of the loop's thread, which a busy machine does not falsify."""
        path, data = store.path("checkpoint.pt"), _random_bytes(40_000_003)

        async def run() -> float:
            longest = 0.0
            done = False

            async def watch() -> None:
                nonlocal longest
                before = time.thread_time()
                while not done:
                    await asyncio.sleep(0.001)
                    now = time.thread_time()
                    longest, before = max(longest, now - before), now

            watching = asyncio.create_task(watch())
            written = await store.backend.write(path, stream(data, 8 * MIB), plan=store.backend.upload_plan(len(data)))
            await store.backend.read(path, 0, 8 * MIB, written)
            done = True
            await watching
            return longest

        await store.delete(path)  # connects, which may import libraries
        with collector_paused():  # one pass over all that other tests have made takes as long
            assert await run_on(store.backend.loop, run) < MOST_CPU_SECONDS_PER_STEP

    @pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux tells the peak")
    def test_saving_256_mib_takes_at_most_96_mib(self, store: StoreUnderTest) -> None:
        if store.options is None:
            pytest.skip("no other process reaches this store")
        url = store.backend.url(store.path("checkpoint.pt"))
        assert peak_of_save(256 * MIB, url, **store.options) <= 96 * MIB

    def test_upload_plan_has_room_for_the_size(self, store: StoreUnderTest) -> None:
        for size, part_size in ((0, None), (1 << 40, None), (1 << 30, 64 * MIB), (5 << 40, 1)):
            plan = store.backend.upload_plan(size, part_size)
            assert plan.part_size * plan.limits.most_parts * 4 // 5 >= min(size, 4 << 40)
            assert plan.limits.smallest_part <= plan.part_size <= plan.limits.largest_part
            assert plan.memory >= 0


class CloudConformance(BackendConformance):
    """What also holds for a store with containers (buckets) and credentials."""

    @pytest.fixture
    @abstractmethod
    def path_in_missing_container(self) -> str:
        """A path in a container that does not exist."""

    @pytest.fixture
    @abstractmethod
    def unauthorized(self) -> Backend:
        """A backend for the same store whose credentials are wrong."""

    async def test_missing_container_is_not_found_and_named(
        self, store: StoreUnderTest, path_in_missing_container: str
    ) -> None:
        path = path_in_missing_container
        for size in (1, 2 * PART):
            with pytest.raises(CheckpointNotFoundError, match=r"bucket|container"):
                await store.write(path, stream(_random_bytes(size), MIB))
        with pytest.raises(CheckpointNotFoundError, match=r"bucket|container"):
            await store.stat(path)
        with pytest.raises(CheckpointNotFoundError, match=r"bucket|container"):
            await store.read(path, 0, 5, ObjectStat(store.backend.url(path), 5))

    async def test_container_itself_is_no_place_for_an_object(self, store: StoreUnderTest) -> None:
        for path in (store.path("x").partition("/")[0], store.path("x").partition("/")[0] + "/", ""):
            for size in (1, 2 * PART):
                with pytest.raises(StorageError, match="names a bucket or container"):
                    await store.write(path, stream(_random_bytes(size), MIB))
            with pytest.raises(StorageError, match="names a bucket or container"):
                await store.stat(path)
            with pytest.raises(StorageError, match="names a bucket or container"):
                await store.read(path, 0, 5, ObjectStat(store.backend.url(path), 5))
            with pytest.raises(StorageError, match="names a bucket or container"):
                await store.delete(path)

    async def test_wrong_credentials_are_a_permission_error(self, store: StoreUnderTest, unauthorized: Backend) -> None:
        path = store.path("checkpoint.pt")
        store.raw_write(path, b"12345")
        found = await store.stat(path)
        loop = unauthorized.loop
        for size in (1, 2 * PART):
            plan = unauthorized.upload_plan(size, PART)
            with pytest.raises(StoragePermissionError):
                await run_on(loop, unauthorized.write, path, stream(_random_bytes(size), MIB), plan=plan)
        with pytest.raises(StoragePermissionError):
            await run_on(loop, unauthorized.stat, path)
        with pytest.raises(StoragePermissionError):
            await run_on(loop, unauthorized.read, path, 0, 5, found)
        with pytest.raises(StoragePermissionError):
            await run_on(loop, unauthorized.delete, path)
        assert store.raw_read(path) == b"12345"
        assert store.leftovers() == []
