"""Copying a checkpoint between stores: any pair, all or nothing, checked on the way."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import fsspec
import pytest
import torch
from fsspec.callbacks import Callback

import torchferry
from torchferry.engine.memory import EVERYTHING_ELSE
from torchferry.engine.types import MIB
from torchferry.testing.faultproxy import Fault

if TYPE_CHECKING:
    from conftest import FaultyS3

KINDS = ["local", "memory", "s3"]


@pytest.fixture
def place(tmp_path: Path, s3_url: str, s3_storage_options: dict[str, Any]) -> Any:
    """Where a checkpoint of some kind of store may lie, and the storage options to get there."""

    def make(kind: str, name: str) -> tuple[str, dict[str, Any]]:
        urls = {"local": str(tmp_path / name), "memory": f"memory://{tmp_path.name}/{name}", "s3": f"{s3_url}/{name}"}
        return urls[kind], s3_storage_options if kind == "s3" else {}

    return make


def read(url: str, options: dict[str, Any]) -> bytes:
    with fsspec.open(url, **options) as file:
        data: bytes = file.read()
    return data


def write(url: str, options: dict[str, Any], data: bytes) -> None:
    with fsspec.open(url, "wb", **options) as file:
        file.write(data)


def checkpoint() -> dict[str, Any]:
    return {"large": torch.randn(11 * MIB), "small": [torch.randn(10) for _ in range(100)]}


@pytest.mark.parametrize("source_kind", KINDS)
@pytest.mark.parametrize("target_kind", KINDS)
async def test_a_copy_is_the_same_bytes_between_any_two_stores(place: Any, source_kind: str, target_kind: str) -> None:
    source, source_options = place(source_kind, "source.pt")
    target, target_options = place(target_kind, "target.pt")
    await torchferry.save_async(checkpoint(), source, storage_options=source_options)
    callback = Callback()
    stat = await torchferry.copy_async(
        source,
        target,
        source_storage_options=source_options,
        target_storage_options=target_options,
        callback=callback,
    )
    copied = read(target, target_options)
    assert copied == read(source, source_options)
    assert stat.size == len(copied) == callback.value == callback.size


async def test_a_copy_keeps_the_metadata_or_takes_new_one(place: Any) -> None:
    (source, options), (target, _) = place("s3", "source.pt"), place("s3", "target.pt")
    await torchferry.save_async([1], source, storage_options=options, metadata={"step": "7"})
    both = {"source_storage_options": options, "target_storage_options": options}
    assert (await torchferry.copy_async(source, target, **both)).metadata == {"step": "7"}
    assert (await torchferry.copy_async(source, target, metadata={"a": "b"}, **both)).metadata == {"a": "b"}


@pytest.mark.parametrize("target_kind", KINDS)
async def test_metadata_that_no_store_keeps_is_refused_and_named(place: Any, target_kind: str) -> None:
    (source, _), (target, options) = place("local", "source.pt"), place(target_kind, "target.pt")
    await torchferry.save_async([1], source)
    with pytest.raises(torchferry.UnsupportedOptionError, match="'a b'"):
        await torchferry.copy_async(source, target, target_storage_options=options, metadata={"a b": "x"})
    with pytest.raises(torchferry.CheckpointNotFoundError):
        await torchferry.load_async(target, storage_options=options)


@pytest.mark.parametrize("target_kind", KINDS)
async def test_a_damaged_checkpoint_is_not_copied(place: Any, target_kind: str) -> None:
    source, _ = place("local", "source.pt")
    target, options = place(target_kind, "target.pt")
    await torchferry.save_async(checkpoint(), source)
    damaged = bytearray(Path(source).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    Path(source).write_bytes(damaged)
    await torchferry.save_async("old", target, storage_options=options)
    with pytest.raises(torchferry.CheckpointCorruptError, match="data/0"):
        await torchferry.copy_async(source, target, target_storage_options=options)
    assert await torchferry.load_async(target, storage_options=options) == "old"
    await torchferry.copy_async(source, target, target_storage_options=options, verify=False)
    assert read(target, options) == bytes(damaged)


async def test_what_arrives_damaged_is_copied_again_where_the_store_has_it_whole(
    s3_url: str, s3_storage_options: dict[str, Any], faulty_s3: Any
) -> None:
    source, target = f"{s3_url}/source.pt", f"{s3_url}/target.pt"
    await torchferry.save_async(checkpoint(), source, storage_options=s3_storage_options)
    await torchferry.save_async("old", target, storage_options=s3_storage_options)
    reports: list[torchferry.TransferReport] = []
    for times in (None, 1):
        callback = Callback()
        fault = Fault(method="GET", target="source", skip=2, times=times, corrupt_download_byte=1_000_000)
        copying = torchferry.copy_async(
            source,
            target,
            source_storage_options=faulty_s3(fault).storage_options,
            target_storage_options=s3_storage_options,
            callback=callback,
            report=reports.append,
        )
        if times is None:
            with pytest.raises(torchferry.CheckpointCorruptError, match="data/0"):
                await copying
            assert await torchferry.load_async(target, storage_options=s3_storage_options) == "old"
        else:
            stat = await copying
    assert read(target, s3_storage_options) == read(source, s3_storage_options)
    (report,) = reports
    assert report.nbytes == callback.value == stat.size
    assert [warning for warning in report.warnings if "Reading it again" in warning]


async def test_what_is_no_checkpoint_is_copied_only_unverified(place: Any) -> None:
    source, _ = place("local", "notes.txt")
    target, options = place("s3", "notes.txt")
    Path(source).write_bytes(b"not a checkpoint at all")
    with pytest.raises(torchferry.CheckpointFormatError, match="verify=False"):
        await torchferry.copy_async(source, target, target_storage_options=options)
    await torchferry.copy_async(source, target, target_storage_options=options, verify=False)
    assert read(target, options) == b"not a checkpoint at all"


async def test_a_missing_source_is_said_to_be_missing(place: Any) -> None:
    source, options = place("s3", "nothing.pt")
    with pytest.raises(torchferry.CheckpointNotFoundError, match="nothing"):
        await torchferry.copy_async(source, place("local", "target.pt")[0], source_storage_options=options)
    assert not Path(place("local", "target.pt")[0]).exists()


@pytest.mark.timeout(60, method="thread")  # nothing less ends a test that waits for a thread
async def test_a_copy_ends_with_the_error_of_a_source_that_fails_midway(
    place: Any, faulty_s3: Callable[..., FaultyS3]
) -> None:
    source, options = place("s3", "source.pt")
    await torchferry.save_async(torch.zeros(20 * MIB), source, storage_options=options)
    faulty = faulty_s3(Fault(method="GET", target="source.pt", skip=6, status=403, code="AccessDenied", times=None))
    target = Path(place("local", "target.pt")[0])
    with pytest.raises(torchferry.StoragePermissionError, match="refused") as caught:
        await torchferry.copy_async(source, target, source_storage_options=faulty.storage_options)
    assert "InterruptedError" not in str(getattr(caught.value, "__notes__", ""))
    assert list(target.parent.iterdir()) == []
    assert not EVERYTHING_ELSE.held


@pytest.mark.parametrize("kind", [StopIteration, StopAsyncIteration])
async def test_what_ends_an_iteration_never_ends_a_copy(place: Any, kind: type[Exception]) -> None:
    error = kind()
    source, _ = place("local", "source.pt")
    target, options = place("s3", "target.pt")
    await torchferry.save_async(checkpoint(), source)

    class Raising(Callback):
        def relative_update(self, inc: int = 1) -> None:
            super().relative_update(inc)
            if self.value > 20 * MIB:
                raise error

    with pytest.raises(RuntimeError, match=kind.__name__) as caught:
        await torchferry.copy_async(source, target, target_storage_options=options, callback=Raising())
    assert caught.value.__cause__ is error
    with pytest.raises(FileNotFoundError):
        read(target, options)


@pytest.mark.timeout(60, method="thread")  # nothing less ends a test that waits for a lost event loop
@pytest.mark.parametrize("verb", ["set_size", "relative_update"])
def test_an_exit_in_the_callback_goes_on_when_the_copy_has_cleaned_up(
    place: Any, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    source, options = place("s3", "source.pt")
    torchferry.save(checkpoint(), source, storage_options=options)
    target = Path(place("local", "target.pt")[0])
    callback = Callback()
    monkeypatch.setattr(callback, verb, lambda _count: sys.exit(3))
    with pytest.raises(SystemExit) as caught:
        torchferry.copy(source, target, source_storage_options=options, callback=callback)
    assert caught.value.code == 3
    assert list(target.parent.iterdir()) == []
    assert not EVERYTHING_ELSE.held
    torchferry.copy(source, target, source_storage_options=options)


async def test_a_cancelled_copy_leaves_what_was_there(place: Any) -> None:
    source, _ = place("local", "source.pt")
    target, options = place("s3", "target.pt")
    await torchferry.save_async(checkpoint(), source)
    await torchferry.save_async("old", target, storage_options=options)
    loop = asyncio.get_running_loop()

    class Cancelling(Callback):
        def relative_update(self, inc: int = 1) -> None:
            super().relative_update(inc)
            if self.value > 20 * MIB:
                loop.call_soon_threadsafe(scope.cancel)

    with anyio.CancelScope() as scope:
        await torchferry.copy_async(source, target, target_storage_options=options, callback=Cancelling())
    assert scope.cancelled_caught
    assert await torchferry.load_async(target, storage_options=options) == "old"
    assert not EVERYTHING_ELSE.held


async def test_many_copies_at_once_share_the_budget(place: Any) -> None:
    source, options = place("s3", "source.pt")
    await torchferry.save_async(checkpoint(), source, storage_options=options)

    async def copy(name: str) -> None:
        await torchferry.copy_async(source, place("local", name)[0], source_storage_options=options)

    async with anyio.create_task_group() as tasks:
        for number in range(8):
            tasks.start_soon(copy, f"{number}.pt")
    assert not EVERYTHING_ELSE.held
    assert {Path(place("local", f"{number}.pt")[0]).stat().st_size for number in range(8)} == {
        len(read(source, options))
    }


def test_the_synchronous_copy_is_the_same(place: Any) -> None:
    source, target = place("local", "source.pt")[0], place("memory", "target.pt")[0]
    torchferry.save([1, 2], source)
    torchferry.copy(source, target)
    assert torchferry.load(target) == [1, 2]


# Several files


INDEX = "model.safetensors.index.json"


def in_shards(value: float, folder: Path, name: str = INDEX) -> dict[str, torch.Tensor]:
    tensors = {f"layer.{i}": torch.full((1 << 18,), value + i) for i in range(4)}
    torchferry.save(tensors, folder / name, max_shard_size=1 << 20)
    return tensors


def loads(url: Path, tensors: dict[str, torch.Tensor]) -> bool:
    loaded = torchferry.load(url)
    return loaded.keys() == tensors.keys() and all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Failing(Callback):  # type: ignore[misc]
    """Ends a copy after so many bytes."""

    def __init__(self, after: int, error: BaseException) -> None:
        super().__init__()
        self._after, self._error = after, error

    def call(self, *_: Any, **__: Any) -> None:
        if self.value > self._after:
            raise self._error


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt()], ids=type)
@pytest.mark.parametrize("target", ["renamed.safetensors.index.json", INDEX])
def test_a_failed_copy_within_a_folder_takes_only_its_own_files_back(
    tmp_path: Path, target: str, error: BaseException
) -> None:
    tensors = in_shards(1, tmp_path)
    before = names_in(tmp_path)
    with pytest.raises(type(error)):
        torchferry.copy(tmp_path / INDEX, tmp_path / target, callback=Failing(2 << 20, error))
    assert names_in(tmp_path) == before
    assert loads(tmp_path / INDEX, tensors)


@pytest.mark.parametrize("verify", [True, False])
def test_the_files_of_an_index_are_called_after_the_target(tmp_path: Path, verify: bool) -> None:
    """So that models of one file name each, in folders of their own, can go into one folder."""
    copies = {}
    for number in (1, 2):
        (tmp_path / f"run{number}").mkdir()
        copies[f"run{number}.safetensors.index.json"] = in_shards(number * 10, tmp_path / f"run{number}")
        target = tmp_path / "best" / f"run{number}.safetensors.index.json"
        torchferry.copy(tmp_path / f"run{number}" / INDEX, target, verify=verify)
    copies[INDEX] = in_shards(50, tmp_path / "best")
    for name in ("x.json", "y.safetensors.index.fp16.json"):
        torchferry.copy(tmp_path / "run1" / INDEX, tmp_path / "best" / name, verify=verify)
        torchferry.copy(tmp_path / "run2" / INDEX, tmp_path / "best" / name, verify=verify)
        copies[name] = copies["run2.safetensors.index.json"]
    for name, tensors in copies.items():
        assert loads(tmp_path / "best" / name, tensors)
    assert len(names_in(tmp_path / "best")) == 5 * 5


def test_a_copy_of_an_index_to_the_same_name_is_the_same_bytes(tmp_path: Path) -> None:
    in_shards(1, tmp_path)
    torchferry.copy(tmp_path / INDEX, tmp_path / "to" / INDEX)
    assert names_in(tmp_path / "to") == [name for name in names_in(tmp_path) if name != "to"]
    assert (tmp_path / "to" / INDEX).read_bytes() == (tmp_path / INDEX).read_bytes()


def test_an_index_of_other_files_is_copied_unverified_as_it_is(tmp_path: Path) -> None:
    text = '{"metadata": {}, "weight_map": {"a": "pytorch_model.bin"}}'
    (tmp_path / "x.json").write_text(text)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    torchferry.copy(tmp_path / "x.json", tmp_path / "y.json", verify=False)
    assert (tmp_path / "y.json").read_text() == text
    assert len(names_in(tmp_path)) == 3


def test_a_failed_copy_of_a_sharded_checkpoint_leaves_none_of_its_shards(tmp_path: Path) -> None:
    torchferry.save({"a": torch.ones(1 << 20)}, tmp_path / "x.pt")
    torchferry.convert(tmp_path / "x.pt", f"{tmp_path}/sharded/")
    with pytest.raises(RuntimeError):
        torchferry.copy(tmp_path / "sharded", tmp_path / "copy", callback=Failing(1 << 20, RuntimeError("x")))
    assert not list((tmp_path / "copy").rglob("*"))
