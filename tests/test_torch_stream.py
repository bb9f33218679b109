"""``torch.save`` as a stream: the same bytes, no copies, bounded memory, no thread left behind."""

from __future__ import annotations

import collections
import gc
import io
import subprocess
import textwrap
import threading
import types
import weakref
from collections.abc import Iterator
from typing import Any

import anyio
import pytest
import torch
from isal import isal_zlib
from torch.utils.serialization import config

from torchferry.engine import memory
from torchferry.engine.collector import collector_paused
from torchferry.engine.memory import CPU_SAVES, EVERYTHING_ELSE, Claim, Ledger, address_of
from torchferry.engine.types import MIB, Chunk
from torchferry.engine.writer import Limits, UploadPlan
from torchferry.formats import torch_stream as stream_module
from torchferry.formats.checksum import UnknownLayoutError
from torchferry.formats.torch_hooks import crc32_option_is_of_the_context
from torchferry.formats.torch_stream import TorchStream
from torchferry.testing.forkserver import python


@pytest.fixture(autouse=True)
def _ledgers() -> None:
    """What errors of other tests still hold is not counted."""
    CPU_SAVES.reset()
    EVERYTHING_ELSE.reset()


async def chunks_of(obj: Any) -> list[bytes]:
    stream = TorchStream(obj)
    # The consumer lets go of copied chunks as it goes, as a store does: keep a copy of those.
    async with stream.running():
        return [bytes(chunk.data) async for chunk in stream]


async def drain(stream: TorchStream) -> None:
    async with stream.running():
        async for _ in stream:
            pass


def torch_saved(obj: Any) -> bytes:
    file = io.BytesIO()
    torch.save(obj, file)
    return file.getvalue()


def shared_and_views() -> Any:
    base = torch.randn(1500, 1000)
    return {"base": base, "row": base[3], "column": base[:, 7], "transposed": base.t(), "strided": base[::2, ::3]}


def low_precision() -> Any:
    values = torch.randn(1200, 1024)
    return [values.to(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)]


class Tagged(torch.Tensor):
    pass


class Settings:
    def __init__(self) -> None:
        self.weights = torch.randn(600, 600)


def adam() -> Any:
    module = torch.nn.Sequential(torch.nn.Linear(700, 700), torch.nn.BatchNorm1d(700))
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.randn(4, 700)).sum().backward()
    optimizer.step()
    return {"module_state_dict": module.state_dict(), "optimizer_state_dict": optimizer.state_dict(), "epoch": 3}


OBJECTS = {
    "adam": adam,
    "nested": lambda: {"a": [({"b": torch.randn(3)}, (torch.randn(700, 700),))], "c": collections.OrderedDict(x=1)},
    "shared storages and views": shared_and_views,
    "low precision": low_precision,
    "complex and bool": lambda: (torch.randn(400, 400, dtype=torch.complex64), torch.rand(2000, 1000) > 0.5),
    "zero-size": lambda: [torch.empty(0), torch.empty(3, 0, 5)],
    "scalar": lambda: torch.tensor(3.0),
    "meta": lambda: {"m": torch.empty(1000, 1000, device="meta"), "real": torch.ones(5)},
    "sparse": lambda: [torch.eye(900).to_sparse(), torch.eye(900).to_sparse_csr()],
    "subclass": lambda: torch.randn(600, 600).as_subclass(Tagged),
    "parameter": lambda: torch.nn.Parameter(torch.randn(600, 600)),
    "untyped storage": lambda: torch.randn(600, 600).untyped_storage(),
    "lazy module": lambda: torch.nn.LazyLinear(3),
    "custom class": Settings,
    "no tensors": lambda: {"lr": 0.1, "name": "x"},
    "none": lambda: None,
    "large bytes": lambda: b"ab" * (5 * MIB),
    "many small": lambda: [torch.full((1024,), float(i)) for i in range(3000)],
    "exactly one block": lambda: torch.zeros(4 * MIB, dtype=torch.uint8),
    "large": lambda: torch.arange(5 * MIB, dtype=torch.int64),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
@pytest.mark.parametrize("kind", OBJECTS)
async def test_the_stream_is_byte_for_byte_what_torch_save_writes(kind: str) -> None:
    obj = OBJECTS[kind]()
    assert b"".join(await chunks_of(obj)) == torch_saved(obj)


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions.*:UserWarning")
async def test_a_quantized_tensor_is_saved_as_torch_does() -> None:
    obj = torch.quantize_per_channel(torch.randn(40, 9), torch.rand(40) + 0.1, torch.zeros(40), 0, torch.qint8)
    assert b"".join(await chunks_of(obj)) == torch_saved(obj)


@pytest.mark.skipif(not crc32_option_is_of_the_context(), reason="this torch computes its own")
async def test_torch_computes_no_crc32_of_what_torchferry_fills_in() -> None:
    """It would be the slowest part of a save, and hold back the first byte of a storage until its last is read."""
    tensors = [torch.full((3 * MIB,), 7, dtype=torch.uint8), torch.ones(3)]
    expected = torch_saved(tensors)
    assert stream_module.fills_crc32s()
    answers: list[bool] = []
    option = torch.serialization.get_crc32_options

    def asked() -> bool:
        answers.append(option())
        return answers[-1]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.serialization, "get_crc32_options", asked)
        assert b"".join(await chunks_of(tensors)) == expected
    assert answers == [True, False]  # torchferry asks what the user wants; torch, what to do
    assert option()


@pytest.fixture
def asked_anew() -> Iterator[None]:
    """Whether this torch is known is asked again in the test, and after it."""
    stream_module._knows_layout.cache_clear()
    yield
    stream_module._knows_layout.cache_clear()


@pytest.mark.usefixtures("asked_anew")
def test_a_torch_that_writes_otherwise_computes_its_own_crc32s(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.arange(MIB)
    for broken in (lambda _, data: data, lambda _, data: bytes(data)[::-1], lambda *_: 1 / 0):
        stream_module._knows_layout.cache_clear()
        with monkeypatch.context() as patched:
            patched.setattr(stream_module.Crc32Filler, "_on_header", broken)
            assert b"".join(anyio.run(chunks_of, tensor)) == torch_saved(tensor)
            assert not stream_module.fills_crc32s()


@pytest.mark.usefixtures("asked_anew")
@pytest.mark.skipif(not crc32_option_is_of_the_context(), reason="this torch computes its own")
async def test_a_later_torch_needs_no_edit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.99.0"))
    assert stream_module.fills_crc32s()


@pytest.mark.usefixtures("asked_anew")
def test_a_torch_whose_option_is_one_for_all_threads_computes_its_own_crc32s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread's torch.save would leave its CRC32s out."""
    entry = config._config["save.compute_crc32"]
    monkeypatch.setattr(entry, "user_override", None)
    monkeypatch.setattr(torch.serialization, "set_crc32_options", lambda _: pytest.fail("it was tried"))
    assert not stream_module.fills_crc32s()


@pytest.mark.skipif(not crc32_option_is_of_the_context(), reason="this torch computes its own")
async def test_after_a_surprise_torch_computes_the_crc32s(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the small archive does not show, such as a CRC32 where zeros are expected: nothing is stored, once."""
    assert stream_module.fills_crc32s()
    monkeypatch.setattr(stream_module, "_surprised", threading.Event())
    tensor = torch.arange(MIB)
    crc32s = {"PK0708": b"PK\x07\x08\x01", "PK0102": b"PK\x01\x02"}
    for start in crc32s.values():
        stream_module._surprised.clear()
        fill = stream_module.ChunkWriter.write

        def write(self: Any, data: Any, start: bytes = start, fill: Any = fill) -> int:
            if self._filler is not None and bytes(data[:4]) == start[:4]:
                data = bytearray(data)
                data[4 if start[2] == 7 else 16] = 1
            return int(fill(self, memoryview(data)))

        with monkeypatch.context() as patched:
            patched.setattr(stream_module.ChunkWriter, "write", write)
            with pytest.raises(UnknownLayoutError, match="save again"):
                await drain(TorchStream(tensor))
            assert b"".join(await chunks_of(tensor)) == torch_saved(tensor)


async def test_too_little_memory_for_a_block_is_a_memory_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though torch.save goes on to end the archive, as if the record that broke off had not been."""
    take = Claim.take

    def fail_once(_claim: Any) -> None:
        monkeypatch.setattr(Claim, "take", take)
        raise MemoryError("no room")

    monkeypatch.setattr(Claim, "take", fail_once)
    with pytest.raises(MemoryError, match="no room"):
        await drain(TorchStream([torch.ones(3)]))


async def test_crc32s_that_the_user_does_not_want_are_not_filled_in() -> None:
    tensor = torch.arange(MIB)
    with_crc32s = torch_saved(tensor)
    with config.patch("save.compute_crc32", False):
        saved = b"".join(await chunks_of(tensor))
        assert saved == torch_saved(tensor)
    assert saved != with_crc32s


class SavesItsOwn:
    """Pickles as the archive that torch.save makes of a tensor."""

    def __reduce__(self) -> Any:
        return bytes, (torch_saved(torch.arange(10)),)


async def test_what_the_object_itself_saves_has_its_crc32s() -> None:
    assert b"".join(await chunks_of(SavesItsOwn())) == torch_saved(SavesItsOwn())


async def test_data_that_looks_like_the_archives_own_structures_is_kept() -> None:
    sizes = (4, 7, 8, 16, 24, 30, 46, 2 * MIB, 20 * MIB)
    looks = [(signature * size)[:size] for signature in (b"PK\x03\x04", b"PK\x07\x08", b"PK\x01\x02") for size in sizes]
    tensors = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in (*looks, torch_saved(torch.ones(3)))]
    assert b"".join(await chunks_of(tensors)) == torch_saved(tensors)


async def test_more_records_than_16_bits_count_are_byte_for_byte_what_torch_save_writes() -> None:
    storages = [torch.UntypedStorage(4).fill_(7) for _ in range(1 << 16)]  # of tensors, torch pickles far more
    assert b"".join(await chunks_of(storages)) == torch_saved(storages)


async def test_a_record_above_4_gib_is_byte_for_byte_what_torch_save_writes() -> None:
    """There the archive has its zip64 form. Nobody ever writes to the tensor, not even zeros: it takes no memory."""
    obj = [torch.empty((4 << 30) + 100, dtype=torch.uint8), torch.arange(1000)]
    hashes = [0, 0]
    stream = TorchStream(obj)
    async with stream.running():
        async for chunk in stream:
            assert chunk.crc32 is not None
            hashes[0] = isal_zlib.crc32_combine(hashes[0], chunk.crc32, len(chunk))

    def write(data: memoryview) -> int:
        hashes[1] = isal_zlib.crc32(data, hashes[1])
        return len(data)

    torch.save(obj, types.SimpleNamespace(write=write, flush=lambda: None))  # type: ignore[arg-type]
    assert hashes[0] == hashes[1]


async def test_a_large_cpu_storage_is_handed_on_without_a_copy() -> None:
    tensor = torch.zeros(20 * MIB, dtype=torch.uint8)
    stream = TorchStream(tensor)
    async with stream.running():
        large = [memoryview(chunk.data) async for chunk in stream if len(chunk) >= MIB]
    assert sum(map(len, large)) == 20 * MIB
    tensor.fill_(7)  # seen through the chunks: they are the tensor's own memory
    assert all(chunk[0] == chunk[-1] == 7 for chunk in large)


async def test_a_chunk_keeps_its_storage_alive() -> None:
    storage = torch.full((2 * MIB,), 5, dtype=torch.uint8).untyped_storage()
    gone = weakref.ref(storage)
    stream = TorchStream([storage])
    async with stream.running():
        chunk = await anext(aiter(memoryview(chunk.data)[100:200] async for chunk in stream if len(chunk) >= MIB))
    del storage, stream
    gc.collect()
    assert gone() is not None
    assert bytes(chunk) == b"\x05" * 100
    del chunk
    gc.collect()
    assert gone() is None


def _torch_save_keeps_storages() -> bool:
    storage = torch.zeros(1).untyped_storage()
    torch.save(storage, io.BytesIO())
    kept = weakref.ref(storage)
    del storage
    return kept() is not None


async def test_a_finished_stream_keeps_no_memory_even_where_the_collector_never_runs() -> None:
    storage = torch.zeros(2 * MIB, dtype=torch.uint8).untyped_storage()
    stream = TorchStream([storage, [torch.zeros(MIB // 8) for _ in range(20)]])
    with collector_paused():
        await drain(stream)
        assert not CPU_SAVES._spare
        assert not CPU_SAVES.held
        kept = weakref.ref(storage)
        del storage
        assert kept() is None or _torch_save_keeps_storages()  # torch 2.7 does, itself


async def test_copied_chunks_are_not_overwritten_while_anyone_holds_a_slice_of_them() -> None:
    tensors = [torch.full((MIB // 2,), i % 251, dtype=torch.uint8) for i in range(32)]
    expected = torch_saved(tensors)
    stream = TorchStream(tensors)  # 16 MiB of copies in a window of 32: all may be held at once
    async with stream.running():
        held = [memoryview(chunk.data)[:] async for chunk in stream]
    assert b"".join(held) == expected


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
async def test_size_hint_is_at_least_the_size_and_hardly_more() -> None:
    for make in OBJECTS.values():
        obj = make()
        size = len(torch_saved(obj))
        stream = TorchStream(obj)
        async with stream.running():
            assert size <= stream.size_hint <= size * 1.02 + 300 * 3000
            stream._close()


async def test_an_error_of_torch_save_is_raised_as_it_is() -> None:
    with pytest.raises(AttributeError, match="local object"):
        await chunks_of([torch.zeros(3 * MIB), lambda: None])


async def test_failed_saves_keep_no_tensors() -> None:
    """The traceback holds torch's file writer, and that one ours: a cycle that the collector cannot see through."""
    storages = []
    for _ in range(5):
        storage = torch.zeros(2 * MIB, dtype=torch.uint8).untyped_storage()
        storages.append(weakref.ref(storage))
        with pytest.raises(AttributeError, match="local object"):
            await chunks_of([storage, lambda: None])
        del storage
    gc.collect()
    assert sum(storage() is not None for storage in storages) <= 1  # torch may keep the last


async def test_an_error_while_torch_save_writes_never_looks_like_the_end_of_the_stream() -> None:
    stream = TorchStream(torch.zeros(30 * MIB))
    stream._chunks.put = lambda _chunk: 1 // 0  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):  # and not torch's own, from closing its zip file
        await drain(stream)


async def test_a_failing_consumer_ends_the_thread_and_its_error_goes_on() -> None:
    stream = TorchStream(torch.zeros(100 * MIB))
    ended: list[bool] = []
    torch_save = stream._torch_save

    def watched() -> None:
        try:
            torch_save()
        finally:
            ended.append(True)

    stream._torch_save = watched  # type: ignore[method-assign]
    with pytest.raises(OSError, match="the store failed"):
        async with stream.running():
            await anext(stream)
            raise OSError("the store failed")
    assert ended
    assert not CPU_SAVES.held


async def test_an_error_of_the_consumer_is_never_hidden_by_the_end_of_the_thread() -> None:
    for turns in range(50):
        with pytest.raises(PermissionError, match="refused"):
            async with TorchStream({"a": turns}).running():
                for _ in range(turns % 5):
                    await anyio.lowlevel.checkpoint()
                raise PermissionError("refused")


@pytest.mark.parametrize("size", ["large", "small"])
async def test_a_cancelled_stream_leaves_nothing_behind(size: str) -> None:
    obj = torch.zeros(50 * MIB) if size == "large" else [torch.zeros(1024) for _ in range(20_000)]
    async with anyio.create_task_group() as tasks:

        async def consume() -> None:
            async with TorchStream(obj).running() as stream:
                await anext(stream)
                started.set()
                await anyio.sleep_forever()

        started = anyio.Event()
        tasks.start_soon(consume)
        await started.wait()
        tasks.cancel_scope.cancel()
    assert not CPU_SAVES.held


async def test_a_consumer_that_holds_a_large_part_back_gets_all_of_it() -> None:
    """Parts of 40 MiB, all of it copied: the window is larger than a part, whatever its size."""
    tensors = [torch.zeros(MIB // 2, dtype=torch.uint8) for _ in range(160)]
    stream = TorchStream(tensors, part_size=40 * MIB)
    part: list[Any] = []
    async with stream.running():
        async for chunk in stream:
            part.append(chunk)
            if sum(map(len, part)) >= 40 * MIB:
                part.clear()
    del part, chunk
    assert not CPU_SAVES.held


async def test_copies_between_large_storages_do_not_use_the_blocks_up() -> None:
    """A hundred small storages between a hundred large ones: each is a chunk, and they share blocks."""
    tensors = [torch.zeros(size, dtype=torch.uint8) for size in (100 << 10, MIB)] * 100
    stream = TorchStream([tensor.clone() for tensor in tensors])
    part: list[Any] = []
    with anyio.fail_after(60):
        async with stream.running():
            async for chunk in stream:
                part.append(chunk)
                if sum(map(len, part)) >= 16 * MIB:
                    part.clear()


async def test_storages_that_begin_at_one_address_are_handed_on_without_a_copy() -> None:
    memory = bytearray(48 * MIB)
    tensors = [torch.frombuffer(memory, dtype=torch.uint8, count=size * MIB) for size in (48, 24, 36)]
    stream = TorchStream(tensors)
    held: list[Any] = []
    with anyio.fail_after(60):
        async with stream.running():
            held += [chunk async for chunk in stream]
    start = tensors[0].data_ptr()
    lent = [chunk for chunk in held if start <= address_of(chunk.data) < start + len(memory)]
    assert sum(map(len, lent)) == 108 * MIB
    assert b"".join(chunk.data for chunk in held) == torch_saved(tensors)


@pytest.fixture
def on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes streams take every storage for one on a device: such are copied, in this very way."""

    def add(storages: Any, key: str, storage: torch.UntypedStorage) -> None:
        storages._seen.add(key)
        storages.on_device = True
        storages.copied_bytes += storage.nbytes()

    monkeypatch.setattr(stream_module.Storages, "add", add)


@pytest.mark.usefixtures("on_a_device")
async def test_what_comes_from_a_device_is_held_by_many_parts_at_once() -> None:
    """A store like S3 takes 90 MB/s over one connection: two parts of 16 MiB would be all that a GPU's tensors get."""
    tensors = [torch.full((10 * MIB,), i, dtype=torch.uint8) for i in range(16)]
    stream = TorchStream(tensors)
    with anyio.fail_after(60):
        async with stream.running():
            held = [chunk async for chunk in stream]
    assert b"".join(chunk.data for chunk in held) == torch_saved(tensors)


@pytest.mark.usefixtures("on_a_device")
async def test_what_one_save_holds_beyond_its_share_is_free_for_another_in_the_end() -> None:
    for _ in range(2):
        stream = TorchStream([torch.zeros(MIB // 2, dtype=torch.uint8) for _ in range(600)])
        async with stream.running():
            held = [await anext(stream) for _ in range(30)]
            assert EVERYTHING_ELSE.held > 30 * MIB
            held.clear()
            async for _ in stream:
                pass
            assert EVERYTHING_ELSE.held < 30 * MIB
    assert not EVERYTHING_ELSE.held


async def test_padding_beyond_what_was_expected_does_not_stall_the_stream() -> None:
    tensors = [torch.zeros(MIB, dtype=torch.uint8) for _ in range(600)]
    part: list[Any] = []
    with config.patch("save.storage_alignment", 1 << 14), anyio.fail_after(60):
        async with TorchStream(tensors).running() as stream:
            async for chunk in stream:
                part.append(chunk)
                if sum(map(len, part)) >= 16 * MIB:
                    part.clear()


async def test_saves_together_hold_no_more_than_the_ledger() -> None:
    """25 at once, which copy 12 MiB each, to a store whose client takes 16 MiB more: all finish."""
    tensors = [torch.zeros(MIB // 2, dtype=torch.uint8) for _ in range(24)]
    peak = 0

    async def consume() -> None:
        nonlocal peak
        stream = TorchStream(tensors, plan_for=lambda size, part: UploadPlan.for_size(size, part, memory=16 * MIB))
        async with stream.running():
            peak = max(peak, CPU_SAVES.held)
            async for _ in stream:
                peak = max(peak, CPU_SAVES.held)

    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            for _ in range(25):
                tasks.start_soon(consume)
    assert 0 < peak <= CPU_SAVES.limit
    assert not CPU_SAVES.held


async def test_saves_that_begin_together_never_wait_for_each_others_memory() -> None:
    """Where the store's client takes memory of its own: 4 of 12 MiB fit at once, and 16 MiB more for each do not."""
    meeting = threading.Barrier(4)

    class Plan(UploadPlan):
        def __getattribute__(self, name: str) -> Any:
            if name == "memory":
                meeting.wait(30)  # whoever had claimed some before would now hold it
            return super().__getattribute__(name)

    def plan_for(size: int, part_size: int | None) -> UploadPlan:
        return Plan.for_size(size, part_size, memory=16 * MIB)

    tensors = [torch.zeros(MIB // 2, dtype=torch.uint8) for _ in range(24)]
    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            for _ in range(4):
                tasks.start_soon(drain, TorchStream(tensors, plan_for=plan_for))
    assert not CPU_SAVES.held


async def test_a_small_save_never_waits_for_a_large_one() -> None:
    tensors = [torch.zeros(MIB // 2, dtype=torch.uint8) for _ in range(600)]
    async with TorchStream(tensors).running() as large:
        held = [await anext(large) for _ in range(10)]  # and nobody takes more: it holds all that it may
        with anyio.fail_after(60):
            for _ in range(20):
                await drain(TorchStream({"step": 1}))
        held.clear()


@pytest.mark.usefixtures("on_a_device")
async def test_several_saves_from_a_device_share_the_ledger() -> None:
    tensors = [torch.zeros(MIB // 2, dtype=torch.uint8) for _ in range(600)]
    with anyio.fail_after(60):
        async with TorchStream(tensors).running() as first, TorchStream(tensors).running() as second:
            for stream in (second, first):
                async for _ in stream:
                    pass


@pytest.mark.usefixtures("on_a_device")
async def test_parts_larger_than_the_ledger_do_not_stall_a_save_from_a_device() -> None:
    """Whatever a store allows, as 64 GiB: of such a part nothing could be sent before all of it is copied."""
    tensors = [torch.zeros(MIB // 2, dtype=torch.uint8) for _ in range(600)]
    limits = Limits(largest_part=64 << 30)
    stream = TorchStream(
        tensors, part_size=64 << 30, plan_for=lambda size, part: UploadPlan.for_size(size, part, limits=limits)
    )
    part: list[Chunk] = []
    with anyio.fail_after(60):
        async with stream.running():
            assert stream.plan.part_size <= EVERYTHING_ELSE.limit // 4
            async for chunk in stream:
                part.append(chunk)
                if sum(map(len, part)) >= stream.plan.part_size:
                    part.clear()


async def test_no_chunk_crosses_the_end_of_a_part_and_each_has_its_crc32() -> None:
    tensors = [torch.randint(256, (size,), dtype=torch.uint8) for size in (100, 3 * MIB + 7, 100 << 10, 20 * MIB)]
    stream = TorchStream(tensors, part_size=5 * MIB)
    at = 0
    async with stream.running():
        async for chunk in stream:
            assert at // (5 * MIB) == (at + len(chunk) - 1) // (5 * MIB)
            assert chunk.crc32 == isal_zlib.crc32(chunk.data)
            at += len(chunk)
    assert at == len(torch_saved(tensors))


def test_a_child_forked_during_a_save_has_a_ledger_of_its_own() -> None:
    program = """
        import os, sys
        from torchferry.engine.memory import CPU_SAVES
        claim = CPU_SAVES.claim(CPU_SAVES.limit)
        if child := os.fork():
            sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        CPU_SAVES.claim(1)
    """
    subprocess.run([*python(), "-c", textwrap.dedent(program)], check=True, timeout=60)


@pytest.mark.parametrize("variable", ["TORCHFERRY_MEMORY", "TORCHFERRY_SNAPSHOTS"])
def test_a_limit_with_a_unit_is_ignored_with_a_warning_that_says_what_it_wants(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    for text in ("1GiB", "abc", "-5", "1e3", "1.5", "0x10"):
        monkeypatch.setenv(variable, text)
        with pytest.warns(UserWarning, match=f"{variable} is a whole number of MiB, .*; given: '{text}'"):
            assert memory._number_of_mib(variable, 7) == 7 * MIB
    for text, number in {"": 7, " 512 ": 512, "0": 0}.items():
        monkeypatch.setenv(variable, text)
        assert memory._number_of_mib(variable, 7) == number * MIB


async def test_memory_that_is_free_is_taken_without_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(64 * MIB)
    monkeypatch.setattr(memory, "wait_in_thread", lambda *_, **__: pytest.fail("a thread was asked for"))
    claim = await ledger.claim_async(4 * MIB)
    blocks = [await claim.take_async() for _ in range(3)]  # one is reserved, two are what it grows by
    assert ledger.held == sum(map(len, blocks)) == 12 * MIB
    del blocks
    claim.close()
    assert ledger.held == 0


def test_a_claim_that_waits_is_woken_when_it_is_abandoned() -> None:
    ledger = Ledger(64 * MIB)
    claim = ledger.claim(60 * MIB)
    abandoned = False
    outcome: list[object] = []

    def large() -> None:
        try:
            outcome.append(ledger.claim(600 * MIB, abandoned=lambda: abandoned))
        except InterruptedError as error:
            outcome.append(error)

    waiting = threading.Thread(target=large)
    waiting.start()
    abandoned = True
    ledger.wake()
    waiting.join(10)
    assert isinstance(outcome[0], InterruptedError)
    claim.close()
    more_than_there_is = ledger.claim(600 * MIB)  # has all of it to itself
    assert ledger.held == 600 * MIB
    more_than_there_is.close()
    assert not ledger.held
