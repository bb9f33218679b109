"""The checkpoint manager: what is kept, what is chosen, and what becomes of a series when things go wrong."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import logging
import os
import random
import signal
import subprocess
import textwrap
import threading
import uuid
import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

import torchferry
from torchferry import CheckpointManager
from torchferry import manager as manager_module
from torchferry.background import begin_save
from torchferry.engine.memory import SNAPSHOTS
from torchferry.series.retention import Best, Retention
from torchferry.series.steps import url_of
from torchferry.storage.local import LocalBackend
from torchferry.testing import victims
from torchferry.testing.faultproxy import Fault
from torchferry.testing.forkserver import python

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conftest import FaultyS3

STORES = ("memory", "local", "s3", "gcs", "azure")


@pytest.fixture(params=["memory", "local"])
def place(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """The URL of a series that no other test uses, and how to get there."""
    return _place(request)


def _place(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    kind: str = request.param
    if kind == "memory":
        return f"memory://{uuid.uuid4().hex}/run", {}
    if kind == "local":
        return str(request.getfixturevalue("tmp_path") / "run"), {}
    return request.getfixturevalue(f"{kind}_url"), {
        "storage_options": request.getfixturevalue(f"{kind}_storage_options")
    }


anywhere = pytest.mark.parametrize("place", STORES, indirect=True)


def state(step: int, size: int = 10) -> dict[str, Any]:
    return {"weight": torch.full((size,), step), "step": step}


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") // 2] ^= 1
    path.write_bytes(data)


# --- a series, on every kind of store


@anywhere
@pytest.mark.parametrize("background", [True, False], ids=["background", "foreground"])
def test_series_is_saved_listed_and_restored_on_every_store(
    place: tuple[str, dict[str, Any]], background: bool
) -> None:
    url, store = place
    with CheckpointManager(url, save_interval_steps=10, max_to_keep=2, background=background, **store) as manager:
        assert manager.latest_step() is None
        assert manager.all_steps() == []
        with pytest.raises(torchferry.CheckpointNotFoundError, match="no checkpoint"):
            manager.restore()
        saved = [step for step in range(41) if manager.save(step, state(step), {"loss": 1 / (step + 1)})]
        assert saved == [0, 10, 20, 30, 40]
        manager.wait_until_finished()
        assert manager.all_steps() == [30, 40]
        assert manager.metrics(40) == {"loss": 1 / 41}
    again = CheckpointManager(url, **store)
    assert again.latest_step() == 40
    assert torch.equal(again.restore()["weight"], state(40)["weight"])
    assert again.restored_step == 40
    assert again.restore(30, keys=["step"]) == {"step": 30}
    assert again.metrics(30) == {"loss": 1 / 31}
    again.delete(40)
    assert again.all_steps() == [30]
    with pytest.raises(torchferry.CheckpointNotFoundError, match="step 40"):
        again.restore(40)
    with pytest.raises(torchferry.CheckpointNotFoundError, match="step 40"):
        again.metrics(40)


async def test_every_method_has_an_asynchronous_twin(place: tuple[str, dict[str, Any]]) -> None:
    url, store = place
    for background in (False, True):
        async with CheckpointManager(url, best=("loss", "min"), background=background, **store) as manager:
            first = 2 * background
            assert await manager.should_save_async(10 * first + 10)
            assert await manager.save_async(10 * first + 10, state(1), {"loss": 2.0 + first})
            assert await manager.save_async(10 * first + 20, state(2), {"loss": 1.0 + first})
            await manager.wait_until_finished_async()
    assert await manager.all_steps_async() == [10, 20, 30, 40]
    assert await manager.latest_step_async() == 40
    assert await manager.best_step_async() == 20
    assert await manager.metrics_async(10) == {"loss": 2.0}
    assert (await manager.restore_async())["step"] == 2
    await manager.delete_async(40)
    assert await manager.all_steps_async() == [10, 20, 30]
    await manager.close_async()


def test_checkpoints_are_what_torch_save_writes_and_names_sort_by_step(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        for step in (1, 9, 10, 100, 1_000_000_000):
            manager.save(step, state(step))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert [torch.load(tmp_path / name)["step"] for name in names] == [1, 9, 10, 100, 1_000_000_000]
    for wrong in (-1, 10**10, 1.5, True, "1"):
        with pytest.raises(ValueError, match="A step is a whole number"):
            manager.save(wrong, state(1))  # type: ignore[arg-type]


# --- what is saved


def test_save_saves_the_interval_and_never_a_step_before_the_latest(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, save_interval_steps=5) as manager:
        assert [step for step in range(12) if manager.should_save(step)] == [0, 5, 10]
        assert manager.save(10, state(10))
        assert not manager.should_save(10)
        assert not manager.save(10, state(10))
        with pytest.warns(UserWarning, match="step 5 is not saved, because step 10 is there"):
            assert not manager.save(5, state(5))
        assert manager.save(7, state(7), force=True)
        manager.wait_until_finished()
        assert manager.all_steps() == [7, 10]
    assert not CheckpointManager(tmp_path).should_save(9), "it looks at what is there"


def test_error_of_a_background_save_is_raised_by_the_next_save_and_its_step_can_be_saved_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "run" / "step-0000000001.pt"
    blocked.mkdir(parents=True)
    manager = CheckpointManager(tmp_path / "run")
    with caplog.at_level(logging.ERROR, "torchferry"):
        assert manager.save(1, state(1))
        with pytest.raises(torchferry.StorageError, match="directory"):
            manager.wait_until_finished()
    assert "Step 1" in caplog.text
    assert manager.save(1, state(1))
    manager._under_way[0].exception()
    with pytest.raises(torchferry.StorageError, match="directory"):
        manager.save(2, state(2))
    blocked.rmdir()
    assert manager.save(1, state(1))
    manager.close()
    assert manager.all_steps() == [1]


@pytest.mark.parametrize("background", [True, False], ids=["background", "foreground"])
async def test_step_whose_save_failed_at_once_can_be_saved_again(tmp_path: Path, background: bool) -> None:
    blocked = tmp_path / "step-0000000001.pt"
    blocked.mkdir()
    obj, metrics = ({"unpicklable": lambda: 0}, {}) if background else (state(1), {})
    with CheckpointManager(tmp_path, background=background) as manager:
        for save in (manager.save_async, partial(asyncio.to_thread, manager.save)):
            with pytest.raises(ValueError, match="A metric is"):
                await save(1, state(1), {"loss": object()})
            with pytest.raises((AttributeError, torchferry.StorageError)):
                await save(1, obj, metrics)
        blocked.rmdir()
        assert manager.save(1, state(1))
    assert CheckpointManager(tmp_path).all_steps() == [1]


@pytest.mark.parametrize("background", [True, False], ids=["background", "foreground"])
def test_sharded_save_that_cannot_begin_is_an_error_and_nothing_waits_for_it(tmp_path: Path, background: bool) -> None:
    with CheckpointManager(tmp_path, sharded=True, background=background) as manager:
        with pytest.raises((AttributeError, TypeError)):
            manager.save(1, ["no state dict"])
        assert manager.save(1, state(1))
    assert CheckpointManager(tmp_path).all_steps() == [1]


async def test_a_cancel_ends_the_wait_for_a_save_and_not_the_save() -> None:
    store = Held()
    manager = CheckpointManager(f"memory://{uuid.uuid4().hex}", filesystem=store)
    await manager.save_async(1, state(1))
    await asyncio.to_thread(store.begun.wait)
    waiting = asyncio.create_task(manager.wait_until_finished_async())
    await asyncio.sleep(0)
    waiting.cancel()
    try:
        done, _ = await asyncio.wait([waiting], timeout=10)
        assert done
        assert waiting.cancelled()
    finally:
        store.may_end.set()
    await manager.close_async()
    assert await manager.all_steps_async() == [1]


async def test_a_cancel_while_a_save_waits_for_room_begins_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = threading.Event()

    def begin(*args: Any, abandoned: Callable[[], bool], **options: Any) -> Any:
        def asked() -> bool:
            waits.set()
            return abandoned()

        return begin_save(*args, abandoned=asked, **options)

    monkeypatch.setattr(manager_module, "begin_save", begin)
    manager = CheckpointManager(tmp_path)
    room = SNAPSHOTS.claim(1)
    try:
        saving = asyncio.create_task(manager.save_async(1, state(1)))
        await asyncio.to_thread(waits.wait)
        saving.cancel()
        done, _ = await asyncio.wait([saving], timeout=10)
        assert done
        assert saving.cancelled()
    finally:
        room.close()
    await manager.close_async()
    assert await manager.all_steps_async() == []


async def test_a_save_that_had_begun_when_its_caller_was_cancelled_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may_return = threading.Event(), threading.Event()

    def begin(*args: Any, **options: Any) -> Any:
        saving = begin_save(*args, **options)
        begun.set()
        may_return.wait()
        return saving

    monkeypatch.setattr(manager_module, "begin_save", begin)
    manager = CheckpointManager(tmp_path)
    saving = asyncio.create_task(manager.save_async(1, state(1), {"loss": 1}))
    await asyncio.to_thread(begun.wait)
    saving.cancel()
    may_return.set()
    with pytest.raises(asyncio.CancelledError):
        await saving
    await manager.close_async()
    assert await manager.metrics_async(1) == {"loss": 1}


class Held(MemoryFileSystem):
    """Publishes nothing until :attr:`may_end` is set; then fails, where it is to."""

    cachable = False

    def __init__(self, *, fails: bool = False) -> None:
        super().__init__()
        self.fails = fails
        self.begun, self.may_end = threading.Event(), threading.Event()

    def cp_file(self, path1: str, path2: str, **options: Any) -> None:
        self.begun.set()
        self.may_end.wait()
        if self.fails:
            raise OSError(f"no room for {path2}")
        super().cp_file(path1, path2, **options)


@pytest.mark.parametrize("fails", [False, True])
def test_who_is_interrupted_while_waiting_can_wait_again(fails: bool) -> None:
    class Interrupt(BaseException):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupt

    store = Held(fails=fails)
    manager = CheckpointManager(f"memory://{uuid.uuid4().hex}", filesystem=store)
    manager.save(1, state(1))
    store.begun.wait()
    before = signal.signal(signal.SIGUSR1, interrupt)
    thread = threading.Thread(target=lambda: signal.pthread_kill(threading.get_ident(), signal.SIGUSR1))
    try:
        with pytest.raises(Interrupt):
            thread.start()
            manager.wait_until_finished()
    finally:
        signal.signal(signal.SIGUSR1, before)
        store.may_end.set()
    with pytest.raises(torchferry.StorageError, match="no room") if fails else nullcontext():
        manager.close()
    assert manager.all_steps() == ([] if fails else [1])


@pytest.mark.parametrize("asynchronous", [False, True])
def test_close_waits_for_every_save_and_raises_all_their_errors(
    monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    monkeypatch.setattr(SNAPSHOTS, "limit", 16 << 20)
    store = Held(fails=True)
    manager = CheckpointManager(f"memory://{uuid.uuid4().hex}", filesystem=store)
    manager.save(1, state(1))
    manager.save(2, state(2))
    store.may_end.set()
    with pytest.raises(torchferry.StorageError, match=r"no room for .*0001\.pt") as caught:
        if asynchronous:
            asyncio.run(manager.close_async())
        else:
            manager.close()
    assert [note for note in caught.value.__notes__ if "0002.pt" in note]
    manager.close()


def test_error_of_the_block_is_not_hidden_by_that_of_the_last_save(tmp_path: Path) -> None:
    (tmp_path / "step-0000000001.pt").mkdir()
    with pytest.raises(RuntimeError, match="of the training") as caught, CheckpointManager(tmp_path) as manager:
        manager.save(1, state(1))
        raise RuntimeError("of the training")
    assert "The last save failed, too" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_to_keep": 0},
        {"max_to_keep": 1.5},
        {"max_to_keep": "3"},
        {"save_interval_steps": 0},
        {"save_interval_steps": float("nan")},
        {"save_interval_steps": None},
        {"keep_period": -1},
        {"keep_period": True},
        {"best": ("loss", "least")},
        {"best": ("loss",)},
        {"best": "loss"},
        {"best": (3, "min")},
        {"part_size": "5MiB"},
        {"give_up_after": -1},
    ],
    ids=str,
)
def test_nonsense_is_refused_at_once(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        CheckpointManager("memory://x", **arguments)


def test_an_empty_url_is_refused_and_never_means_the_root() -> None:
    with pytest.raises(ValueError, match="The URL of a series is empty"):
        CheckpointManager("")
    with pytest.raises(TypeError, match="A URL is a string or a path: not None"):
        CheckpointManager(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["run", "run-2026-11-28T10:00", "a~b"])
@pytest.mark.parametrize("kind", [str, Path])
def test_relative_url_means_one_directory_wherever_the_process_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Callable[[str], str | Path], name: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)
    with CheckpointManager(kind(name), max_to_keep=1) as manager:
        manager.save(1, state(1))
        monkeypatch.chdir(elsewhere)
        manager.save(2, state(2))
        manager.wait_until_finished()
        assert manager.all_steps() == [2]
    assert [path.name for path in (tmp_path / name).iterdir()] == ["step-0000000002.pt"]
    assert not list(elsewhere.iterdir())


def test_protocol_without_slashes_is_refused_and_no_local_directory() -> None:
    manager = CheckpointManager("s3:bucket/run")
    with pytest.raises(torchferry.UnsupportedURLError, match="use s3://bucket/run"):
        manager.all_steps()


@pytest.mark.parametrize(
    ("directory", "place"),
    [
        ("run", "run/NAME"),
        ("/", "/NAME"),
        ("s3://bucket", "s3://bucket/NAME"),
        ("s3://bucket/run/", "s3://bucket/run/NAME"),
        ("s3://bucket/run::7", "s3://bucket/run::7/NAME"),
        ("memory://", "memory://NAME"),
        ("memory:///", "memory:///NAME"),
        ("dir://run::file:///d", "dir://run/NAME::file:///d"),
        ("simplecache::file:///d", "simplecache::file:///d/NAME"),
        ("simplecache::dir://run::file:///d", "simplecache::dir://run/NAME::file:///d"),
    ],
)
def test_name_goes_into_the_directory_that_a_url_names(directory: str, place: str) -> None:
    assert url_of(directory, "NAME") == place


@pytest.mark.parametrize("url", ["dir://run::file://{}", "simplecache::file://{}/run", "dir://run::memory://{}"])
def test_series_in_a_chain_is_listed_restored_and_deleted(tmp_path: Path, url: str) -> None:
    with CheckpointManager(url.format(tmp_path), max_to_keep=2) as manager:
        for step in (1, 2, 3):
            manager.save(step, state(step), {"loss": step})
        manager.wait_until_finished()
        assert manager.all_steps() == [2, 3]
        assert manager.restore()["step"] == 3
        assert manager.metrics(2) == {"loss": 2}
        manager.delete(3)
        assert manager.all_steps() == [2]


@pytest.mark.parametrize("step", [np.int64(5), np.uint8(5), torch.tensor(5)], ids=repr)
def test_whole_numbers_of_numpy_and_torch_are_steps(tmp_path: Path, step: Any) -> None:
    with CheckpointManager(tmp_path, max_to_keep=np.int64(1)) as manager:
        assert manager.should_save(step)
        assert manager.save(step, state(5), {"loss": 1})
        manager.wait_until_finished()
        assert manager.metrics(step) == {"loss": 1}
        assert manager.restore(step)["step"] == 5
        assert (manager.restored_step, type(manager.restored_step)) == (5, int)
        manager.delete(step)
        assert manager.all_steps() == []


@pytest.mark.parametrize("step", [5.0, "5", True, None, -1, 10**10, torch.ones(2), torch.tensor(5.0)], ids=repr)
def test_what_is_no_step_is_refused_by_every_method(tmp_path: Path, step: Any) -> None:
    with CheckpointManager(tmp_path) as manager:
        for method in (manager.should_save, partial(manager.save, obj=state(1)), manager.metrics, manager.delete):
            with pytest.raises(ValueError, match="A step is a whole number from 0 to"):
                method(step)
        assert manager.all_steps() == []


@pytest.mark.parametrize("metrics", [0.5, "loss", [1, 2], {("a", 1): 2}, {1: 2}], ids=str)
def test_metrics_that_are_no_dict_of_names_are_refused_and_the_step_can_be_saved_again(
    tmp_path: Path, metrics: Any
) -> None:
    with CheckpointManager(tmp_path) as manager:
        with pytest.raises(ValueError, match="Metrics are a dict of names and numbers"):
            manager.save(1, state(1), metrics)
        assert manager.save(1, state(1), {"loss": 1})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_forked_child_never_waits_for_what_its_parent_saves() -> None:
    program = """
        import os, threading, torch, warnings
        from fsspec.implementations.memory import MemoryFileSystem
        from torchferry import CheckpointManager, TorchferryError

        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of any fork beside threads

        class Held(MemoryFileSystem):
            cachable = False
            held = True

            def cp_file(self, *args, **options):
                begun.set()
                if self.held:
                    may_end.wait()
                super().cp_file(*args, **options)

        begun, may_end, store = threading.Event(), threading.Event(), Held()
        torch.set_num_threads(1)
        manager = CheckpointManager("memory://x", filesystem=store, max_to_keep=1)
        manager.save(1, [1])
        begun.wait()
        if not os.fork():
            store.held = False
            try:
                manager.wait_until_finished()
            except TorchferryError as error:
                print(error)
            print("child", manager.save(2, [2]), manager.close(), manager.all_steps(), flush=True)
            os._exit(0)
        os.wait()
        may_end.set()
        manager.close()
        print("parent", manager.all_steps())
    """
    ended = subprocess.run(
        [*python(), "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False, timeout=60
    )
    forked = "The save to memory://x goes on in the process that this one was forked from."
    assert (ended.stdout, ended.stderr) == (f"{forked}\nchild True None [2]\nparent [1]\n", "")


# --- what is kept


def test_max_to_keep_and_keep_period(place: tuple[str, dict[str, Any]]) -> None:
    url, store = place
    with CheckpointManager(url, max_to_keep=2, keep_period=4, **store) as manager:
        for step in range(11):
            manager.save(step, state(step))
        manager.wait_until_finished()
        assert manager.all_steps() == [0, 4, 8, 9, 10]


def test_best_are_kept_and_the_latest_in_any_case(place: tuple[str, dict[str, Any]]) -> None:
    url, store = place
    losses: list[float | None] = [5.0, 1.0, 4.0, float("nan"), 2.0, None, 3.0, 9.0]
    with CheckpointManager(url, max_to_keep=2, best=("loss", "min"), **store) as manager:
        for step, loss in enumerate(losses):
            manager.save(step, state(step), None if loss is None else {"loss": torch.tensor(loss)})
        manager.wait_until_finished()
        assert manager.all_steps() == [1, 4, 7]
        assert manager.best_step() == 1
        assert [manager.metrics(step) for step in (1, 4, 7)] == [{"loss": 1.0}, {"loss": 2.0}, {"loss": 9.0}]
    assert CheckpointManager(url, best=("loss", "max"), **store).best_step() == 7
    with pytest.raises(ValueError, match="What is best"):
        CheckpointManager(url, **store).best_step()


def test_a_metric_that_best_does_not_find_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with CheckpointManager(tmp_path, max_to_keep=2, best=("loss", "min")) as manager:
        for step in range(3):
            manager.save(step, state(step), {"los": 1.0})
    said = [record.message for record in caplog.records if "by which best=" in record.message]
    assert said == [
        "Step 0 has no metric 'loss', by which best= chooses; given: 'los'. It is worse than all that have it."
    ]


def test_retention_keeps_what_it_says_whatever_is_there() -> None:
    randomly = random.Random(1)
    for _ in range(500):
        steps = randomly.sample(range(50), randomly.randrange(20))
        metrics = {step: {"a": randomly.choice([1, 2, float("nan")])} for step in steps if randomly.random() < 0.7}
        most, period = randomly.choice([None, 1, 2, 5]), randomly.choice([None, 1, 7])
        best = randomly.choice([None, Best("a", "min"), Best("a", "max")])
        gone = Retention(most, period, best).superfluous(steps, metrics)
        left = set(steps) - set(gone)
        assert not steps or max(steps) in left
        assert most is not None or not gone
        counted = [step for step in left if not (period and step % period == 0)]
        if most is not None:
            assert len(counted) <= most + 1
            assert len(counted) >= min(most, len([step for step in steps if not (period and step % period == 0)]))


def test_what_the_manager_did_not_write_is_never_deleted(place: tuple[str, dict[str, Any]]) -> None:
    url, store = place
    names = ["step-1.pt", "step-0000000001.pth", "x-step-0000000001.pt", "best.pt", "deep/step-0000000001.pt"]
    for name in names:
        torchferry.save(state(0), f"{url}/{name}")
    with CheckpointManager(url, max_to_keep=1, **store) as manager:
        for step in range(5):
            manager.save(step, state(step), {"loss": 1.0})
        manager.wait_until_finished()
        assert manager.all_steps() == [4]
    for name in names:
        assert torchferry.load(f"{url}/{name}")["step"] == 0


def test_metrics_of_deleted_checkpoints_go_too(tmp_path: Path) -> None:
    (tmp_path / "step-0000000000.metrics.json").write_text("{}")  # of a checkpoint that was deleted before a crash
    with CheckpointManager(tmp_path, max_to_keep=1) as manager:
        for step in range(1, 4):
            manager.save(step, state(step), {"loss": 1.0})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-0000000003.metrics.json", "step-0000000003.pt"]


def test_deletion_comes_after_the_new_checkpoint_and_no_save_waits_for_it(
    faulty_s3: Callable[..., FaultyS3], s3_url: str
) -> None:
    """The first deletion is never answered: saves go on, and what is superfluous goes after the next ones."""
    s3 = faulty_s3(Fault(method="DELETE", hang=True))
    manager = CheckpointManager(
        s3_url, max_to_keep=1, background=False, give_up_after=1, storage_options=s3.storage_options
    )
    for step in range(4):
        assert manager.save(step, state(step))
    s3.proxy.wait_for(method="DELETE")
    requests = [(r.method, r.target.partition("?")[0].rpartition("/")[2]) for r in list(s3.proxy.log)]
    assert requests.index(("PUT", "step-0000000001.pt")) < requests.index(("DELETE", "step-0000000000.pt"))
    assert manager.save(4, state(4))


@pytest.mark.parametrize("size", [10, 4_000], ids=["metadata", "object"])
def test_metrics_travel_with_the_object_or_beside_it(
    s3_url: str, s3_storage_options: dict[str, Any], size: int
) -> None:
    metrics = {"loss": 0.5, "note": "ü" * size}
    with CheckpointManager(s3_url, storage_options=s3_storage_options) as manager:
        manager.save(1, state(1), metrics)
        manager.wait_until_finished()
        assert manager.metrics(1) == metrics
    assert CheckpointManager(s3_url, storage_options=s3_storage_options).metrics(1) == metrics
    with pytest.raises(ValueError, match="A metric is a number or text"):
        manager.save(2, state(2), {"loss": torch.ones(3)})


DAMAGED_METRICS = {
    "no JSON": b"{",
    "no UTF-8": b"\xff\xfe\x00",
    "deep": b"[" * 200_000,
    "null": b"null",
    "a list": b"[]",
}


@pytest.mark.parametrize("data", DAMAGED_METRICS.values(), ids=DAMAGED_METRICS)
def test_damaged_metrics_count_as_none_and_never_stop_retention(
    tmp_path: Path, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with CheckpointManager(tmp_path, max_to_keep=2, best=("loss", "min")) as manager:
        for step in (1, 2):
            manager.save(step, state(step), {"loss": step})
    (tmp_path / "step-0000000001.metrics.json").write_bytes(data)
    with CheckpointManager(tmp_path, max_to_keep=2, best=("loss", "min")) as manager:
        assert manager.metrics(1) == {}
        assert f"The metrics of step 1 in {tmp_path} are damaged" in caplog.text
        assert manager.best_step() == 2
        manager.save(3, state(3), {"loss": 3})
        manager.wait_until_finished()
        assert manager.all_steps() == [2, 3]
    assert not (tmp_path / "step-0000000001.metrics.json").exists()


@pytest.mark.parametrize("change", [{"metrics": 5}, {"metrics": None}, {"metrics": [1]}, {"etag": 1}], ids=str)
def test_metrics_that_are_none_or_of_no_version_count_as_none(tmp_path: Path, change: dict[str, Any]) -> None:
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, state(1), {"loss": 1})
    path = tmp_path / "step-0000000001.metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert CheckpointManager(tmp_path).metrics(1) == {}


@pytest.mark.parametrize("background", [True, False])
def test_metrics_that_cannot_be_stored_are_an_error_that_says_that_the_checkpoint_is_there(
    background: bool, caplog: pytest.LogCaptureFixture
) -> None:
    class NoMetrics(MemoryFileSystem):
        cachable = False
        fails = True

        def cp_file(self, path1: str, path2: str, **options: Any) -> None:
            if self.fails and path2.endswith(".json"):
                raise OSError("no metrics today")
            super().cp_file(path1, path2, **options)

    store = NoMetrics()
    url = f"memory://{uuid.uuid4().hex}"
    with CheckpointManager(url, filesystem=store, background=background) as manager:
        with pytest.raises(torchferry.TorchferryError, match="no metrics today") as caught:
            manager.save(1, state(1), {"loss": 1})
            manager.wait_until_finished()
        said = "The checkpoint of step 1 is there, without its metrics: save it with force=True to have both."
        assert caught.value.__notes__ == [said]
        assert "Step 1 " not in caplog.text
        assert manager.all_steps() == [1]
        store.fails = False
        assert manager.save(1, state(1), {"loss": 1}, force=True)
        manager.wait_until_finished()
        assert manager.metrics(1) == {"loss": 1}


def test_metrics_that_are_told_are_a_copy(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, state(1), {"loss": {"train": 1}})
        manager.wait_until_finished()
        manager.metrics(1)["loss"]["train"] = 2
        assert manager.metrics(1) == {"loss": {"train": 1}}


def test_metrics_larger_than_any_float_are_compared(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, max_to_keep=1, best=("count", "max")) as manager:
        for step, count in enumerate([1, 10**400, float("inf"), 2]):
            manager.save(step, state(step), {"count": count})
            manager.wait_until_finished()
        assert manager.best_step() == 2
        assert manager.all_steps() == [2, 3]


def test_metrics_of_another_version_of_a_checkpoint_are_not_taken_for_its_own(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, state(1), {"loss": 0.5})
        manager.save(1, state(1), force=True)  # without metrics
        manager.wait_until_finished()
        assert manager.metrics(1) == {}


@pytest.mark.parametrize("after", [{"loss": 9.0}, {"loss": 9.0, "note": "x" * 2000}, None], ids=["short", "long", "no"])
@pytest.mark.parametrize("before", [{"loss": 0.1}, {"loss": 0.1, "note": "y" * 2000}], ids=["short", "long"])
def test_metrics_of_a_checkpoint_of_the_same_content_are_replaced_with_it(
    s3_url: str, s3_storage_options: dict[str, Any], before: dict[str, Any], after: dict[str, Any] | None
) -> None:
    """On S3 the same content is the same version."""
    with CheckpointManager(s3_url, storage_options=s3_storage_options) as manager:
        manager.save(1, state(1), before)
        manager.wait_until_finished()
        assert manager.metrics(1) == before
        manager.save(1, state(1), after, force=True)
        manager.wait_until_finished()
        assert manager.metrics(1) == (after or {})
    assert CheckpointManager(s3_url, storage_options=s3_storage_options).metrics(1) == (after or {})


def test_metrics_of_a_replaced_checkpoint_go_with_it(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, state(1), {"loss": 1})
        manager.save(1, state(1), force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000000001.pt"]


@pytest.mark.parametrize("background", [True, False], ids=["background", "foreground"])
def test_what_ends_between_a_checkpoint_and_its_metrics_loses_none(background: bool) -> None:
    class EndsBetween(MemoryFileSystem):
        cachable = False

        def cp_file(self, path1: str, path2: str, **options: Any) -> None:
            if path2.endswith(".json") and self.exists(path2.replace(".metrics.json", ".pt")):
                raise OSError("the end")
            super().cp_file(path1, path2, **options)

    url, store = f"memory://{uuid.uuid4().hex}", EndsBetween()
    manager = CheckpointManager(url, filesystem=store, background=background)
    with pytest.raises(torchferry.StorageError, match="the end"):
        manager.save(1, state(1), {"loss": 1})
        manager.wait_until_finished()
    assert CheckpointManager(url, filesystem=store).metrics(1) == {"loss": 1}


def test_metrics_of_a_checkpoint_that_was_never_stored_are_not_those_of_the_next_one(tmp_path: Path) -> None:
    left = tmp_path / "step-0000000001.metrics.json"
    left.write_text('{"etag": null, "size": null, "metrics": {"loss": 9}}')
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, state(1))
        manager.wait_until_finished()
        assert manager.metrics(1) == {}
    assert not left.exists()


def test_metrics_that_are_written_again_while_they_are_read_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, state(1), {"loss": 1})
    changes = [torchferry.CheckpointChangedError("written again")]
    read = LocalBackend.read

    async def read_changed(*arguments: Any) -> Any:
        if changes:
            raise changes.pop()
        return await read(*arguments)

    monkeypatch.setattr(LocalBackend, "read", read_changed)
    assert CheckpointManager(tmp_path).metrics(1) == {"loss": 1}
    assert not changes


# --- a step that is there twice


@pytest.mark.parametrize("sharded", [True, False], ids=["to sharded", "to plain"])
def test_forced_save_replaces_a_checkpoint_of_the_other_kind(place: tuple[str, dict[str, Any]], sharded: bool) -> None:
    url, store = place
    with CheckpointManager(url, sharded=not sharded, **store) as manager:
        manager.save(1, state(1), {"loss": 1})
    with CheckpointManager(url, sharded=sharded, **store) as manager:
        manager.save(1, state(2), {"loss": 2}, force=True)
        manager.wait_until_finished()
        assert manager.restore(1)["step"] == 2
        assert manager.metrics(1) == {"loss": 2}
        manager.delete(1)
        assert manager.all_steps() == []


@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "plain"])
def test_later_of_two_checkpoints_of_one_step_counts_and_both_are_deleted(tmp_path: Path, sharded: bool) -> None:
    for kind in (True, False):
        with CheckpointManager(tmp_path / str(kind), sharded=kind) as manager:
            manager.save(1, state(kind))
    (tmp_path / "False" / "step-0000000001.pt").rename(tmp_path / "True" / "step-0000000001.pt")
    os.utime(tmp_path / "True" / "step-0000000001.pt", (0, 0) if sharded else None)
    os.utime(tmp_path / "True" / "step-0000000001" / ".metadata", None if sharded else (0, 0))
    manager = CheckpointManager(tmp_path / "True")
    assert manager.all_steps() == [1]
    assert manager.restore()["step"] == sharded
    manager.delete(1)
    assert list((tmp_path / "True").iterdir()) == []


def test_digits_of_other_scripts_make_no_checkpoint(tmp_path: Path) -> None:
    foreign = tmp_path / f"step-{chr(0xFF10) * 9}{chr(0xFF11)}.pt"
    foreign.write_bytes(b"x")
    with CheckpointManager(tmp_path, max_to_keep=1) as manager:
        assert manager.all_steps() == []
        manager.save(2, state(2))
    assert foreign.exists()


# --- what is restored


def test_restore_falls_back_to_the_checkpoint_before_with_a_warning_that_names_both(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, max_to_keep=3) as manager:
        for step in range(3):
            manager.save(step, state(step, 1000))
    damage(tmp_path / "step-0000000002.pt")
    manager = CheckpointManager(tmp_path, max_to_keep=3)
    with pytest.warns(UserWarning, match=r"(?s)step-0000000002.*Restored .*step-0000000001.pt instead of .*0002.pt"):
        assert manager.restore()["step"] == 1
    assert manager.restored_step == 1
    assert manager.latest_step() == 1
    assert manager.all_steps() == [0, 1]
    with warnings.catch_warnings(), pytest.raises(torchferry.CheckpointCorruptError):
        manager.restore(2)
    assert manager.save(2, state(2)), "the damaged one is replaced"
    manager.close()
    assert CheckpointManager(tmp_path).restore()["step"] == 2


def test_restore_raises_the_error_of_the_latest_where_all_are_damaged(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        for step in (1, 2):
            manager.save(step, state(step, 1000))
    for step in (1, 2):
        damage(tmp_path / f"step-000000000{step}.pt")
    with pytest.raises(torchferry.CheckpointCorruptError, match="0002") as caught:
        manager.restore()
    assert "0001" in caught.value.__notes__[-1]


def test_all_that_are_damaged_are_an_error_each_time_and_never_an_empty_series(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path / "before") as before:
        before.save(5, state(5))
    with CheckpointManager(tmp_path / "now") as manager:
        manager.save(1, state(1, 1000))
    damage(tmp_path / "now" / "step-0000000001.pt")
    manager = CheckpointManager(tmp_path / "now", start_from=tmp_path / "before")
    for _ in range(2):
        with pytest.raises(torchferry.CheckpointCorruptError, match="0001"):
            manager.resume()
    assert manager.latest_step() is None


def test_damaged_checkpoint_stays_damaged_where_the_save_that_replaces_it_fails(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        for step in (1, 2):
            manager.save(step, state(step, 1000))
    damage(tmp_path / "step-0000000002.pt")
    manager = CheckpointManager(tmp_path, max_to_keep=1)
    with pytest.warns(UserWarning, match="instead of"):
        manager.resume()
    with pytest.raises(AttributeError):
        manager.save(2, {"unpicklable": lambda: 0})
    assert manager.all_steps() == [1]
    assert manager.should_save(2)


def test_damaged_checkpoints_never_count_among_those_that_are_kept(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        for step in (1, 2):
            manager.save(step, state(step, 1000))
    damage(tmp_path / "step-0000000002.pt")
    with CheckpointManager(tmp_path, max_to_keep=2) as manager:
        with pytest.warns(UserWarning, match="instead of"):
            manager.restore()
        manager.save(3, state(3))
        manager.wait_until_finished()
        assert manager.all_steps() == [1, 3]


def test_only_whole_checkpoints_are_listed(tmp_path: Path) -> None:
    (tmp_path / "step-0000000007.pt").touch()  # as Azure shows for a moment
    (tmp_path / "step-0000000008").mkdir()
    (tmp_path / "step-0000000008" / "__0_0.distcp").write_bytes(b"a shard")
    (tmp_path / "step-0000000009").mkdir()
    (tmp_path / "step-0000000009" / ".metadata").write_bytes(b"of a whole one")
    victim = victims.start(victims.stage_until_killed, str(tmp_path / "step-0000000010.pt"))
    victim.join()
    assert CheckpointManager(tmp_path).all_steps() == [9]


def test_sharded_checkpoints_are_listed_and_deleted_with_their_shards_and_nothing_else(tmp_path: Path) -> None:
    for step in (1, 2):
        directory = tmp_path / f"step-000000000{step}"
        directory.mkdir()
        for name in (".metadata", "__0_0.distcp", "__1_0.distcp"):
            (directory / name).write_bytes(b"x")
    (tmp_path / "step-0000000001" / "mine.txt").write_text("x")
    with CheckpointManager(tmp_path, max_to_keep=1) as manager:
        manager.save(3, state(3))
        manager.wait_until_finished()
        assert manager.all_steps() == [3]
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "step-0000000001",
        "step-0000000001/mine.txt",
        "step-0000000003.pt",
    ]


def test_restore_fills_a_module_in_place_and_takes_keys_at_any_depth(place: tuple[str, dict[str, Any]]) -> None:
    url, store = place
    module, other = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    with CheckpointManager(url, **store) as manager:
        manager.save(1, {"model": module.state_dict(), "step": 1})
        assert not manager.restore(into={"model": other}, keys=["model"]).missing_keys
        assert torch.equal(other.weight, module.weight)
        assert list(manager.restore(keys=["model.bias"])["model"]) == ["bias"]


def test_restore_starts_from_another_series_while_this_one_is_empty(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path / "before") as before:
        before.save(5, state(5))
    manager = CheckpointManager(tmp_path / "now", start_from=tmp_path / "before", max_to_keep=1)
    assert manager.latest_step() == 5
    assert manager.restore()["step"] == 5
    assert manager.all_steps() == []
    manager.save(6, state(6))
    manager.close()
    assert manager.restore()["step"] == 6
    assert before.all_steps() == [5]


# --- several writers, and the end


def test_two_managers_on_one_url_end_with_one_whole_checkpoint_a_step(
    s3_url: str, s3_storage_options: dict[str, Any]
) -> None:
    managers = [CheckpointManager(s3_url, max_to_keep=3, storage_options=s3_storage_options) for _ in range(2)]

    def train(number: int) -> None:
        for step in range(8):
            managers[number].save(step, {"step": step, "writer": torch.full((1000,), number)}, {"writer": number})
        managers[number].close()

    threads = [threading.Thread(target=train, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reader = CheckpointManager(s3_url, storage_options=s3_storage_options)
    assert reader.all_steps() == [5, 6, 7]
    for step in reader.all_steps():
        found = reader.restore(step)
        assert found["step"] == step
        assert len(found["writer"].unique()) == 1
        assert reader.metrics(step) == {"writer": int(found["writer"][0])}, "nothing is mixed"


def test_sigterm_saves_the_next_step_and_is_told_and_previous_handlers_are_kept(tmp_path: Path) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    try:
        handler = signal.getsignal(signal.SIGTERM)
        with CheckpointManager(tmp_path, save_interval_steps=100, handle_preemption=True) as manager:
            assert not manager.save(7, state(7))
            assert not manager.reached_preemption()
            os.kill(os.getpid(), signal.SIGTERM)
            assert manager.reached_preemption()
            assert manager.should_save(8)
            assert manager.save(8, state(8))
            assert manager.all_steps() == [8], "save has waited for it"
        assert seen == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.fixture
def sigterm() -> Iterator[list[int]]:
    """The handler of SIGTERM is that of a user, who notes here what comes; afterwards it is what it was."""
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    yield seen
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_handler_of_the_user_is_back_in_whichever_order_managers_are_closed(
    tmp_path: Path, sigterm: list[int], order: tuple[int, ...]
) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    managers = [CheckpointManager(tmp_path / str(number), handle_preemption=True) for number in range(3)]
    for closed, number in enumerate(order):
        os.kill(os.getpid(), signal.SIGTERM)
        assert len(sigterm) == closed + 1
        managers[number].close()
    assert signal.getsignal(signal.SIGTERM) is handler


def test_manager_that_is_closed_hears_no_sigterm_and_the_one_below_it_does(tmp_path: Path, sigterm: list[int]) -> None:
    one, other = (CheckpointManager(tmp_path / name, handle_preemption=True) for name in "ab")
    thread = threading.Thread(target=other.close)
    thread.start()
    thread.join()
    os.kill(os.getpid(), signal.SIGTERM)
    assert (one.reached_preemption(), other.reached_preemption()) == (True, False)
    one.close()
    assert len(sigterm) == 1


def test_manager_that_is_dropped_puts_the_handler_back(tmp_path: Path, sigterm: list[int]) -> None:  # noqa: ARG001
    handler = signal.getsignal(signal.SIGTERM)
    manager = CheckpointManager(tmp_path, handle_preemption=True)
    assert signal.getsignal(signal.SIGTERM) is not handler
    del manager
    gc.collect()
    assert signal.getsignal(signal.SIGTERM) is handler


async def test_manager_that_handles_preemption_is_made_in_the_main_thread(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="make the manager there"):
        await asyncio.to_thread(CheckpointManager, tmp_path, handle_preemption=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_sigterm_ends_a_forked_child_and_one_with_a_manager_of_its_own_goes_on(tmp_path: Path) -> None:
    program = """
        import os, signal, sys, warnings
        from torchferry import CheckpointManager

        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of any fork beside threads

        def end_of_child(act):
            child = os.fork()
            if not child:
                act()
                os._exit(7)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

        def get_sigterm():
            os.kill(os.getpid(), signal.SIGTERM)

        def get_sigterm_with_a_manager():
            with CheckpointManager(sys.argv[1], handle_preemption=True) as own:
                get_sigterm()
                assert own.reached_preemption()

        def get_sigterm_after_a_manager():
            get_sigterm_with_a_manager()
            get_sigterm()

        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        managers = [CheckpointManager(sys.argv[1], handle_preemption=True) for _ in range(2)]
        managers[0].close()
        for act in (get_sigterm, get_sigterm_with_a_manager, get_sigterm_after_a_manager):
            print(end_of_child(act))
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with CheckpointManager(sys.argv[1], handle_preemption=True):
            print(end_of_child(get_sigterm))
    """
    command = [*python(), "-c", textwrap.dedent(program), str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (ended.stdout.split(), ended.stderr) == ([str(-signal.SIGTERM), "7", str(-signal.SIGTERM), "7"], "")


@pytest.mark.parametrize("moment", ["before the question", "before the save", "after the save"])
def test_loop_that_sigterm_ends_has_saved_its_last_step(tmp_path: Path, sigterm: list[int], moment: str) -> None:
    def comes(now: str) -> None:
        if now == moment and step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with CheckpointManager(tmp_path, save_interval_steps=100, handle_preemption=True) as manager:
        step, ends = 0, False
        while step < 50 and not ends:
            step += 1
            comes("before the question")
            ends = manager.reached_preemption()
            comes("before the save")
            manager.save(step, state(step))
            comes("after the save")
        assert sigterm
        assert manager.restore()["step"] == step < 5


async def test_sigterm_is_listened_to_until_an_asynchronous_block_ends(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    async with CheckpointManager(tmp_path, handle_preemption=True) as manager:
        assert signal.getsignal(signal.SIGTERM) is not before
        await manager.save_async(1, state(1))
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_is_not_listened_to_unless_asked_for(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with CheckpointManager(tmp_path) as manager:
        assert signal.getsignal(signal.SIGTERM) is before
        assert not manager.reached_preemption()


def test_long_series_keeps_memory_and_descriptors_flat() -> None:
    url = f"memory://{uuid.uuid4().hex}"
    fs = fsspec.filesystem("memory")
    with CheckpointManager(url, max_to_keep=3, best=("loss", "min")) as manager:
        for step in range(60):
            manager.save(step, state(step), {"loss": -step})
        manager.wait_until_finished()
        assert manager.all_steps() == [57, 58, 59]
        assert len(manager._metrics) <= 4
        assert len(fs.find(url.removeprefix("memory:/"))) == 6


def test_first_of_several_ranks_decides_and_an_error_of_one_is_raised_on_all(tmp_path: Path) -> None:
    script = Path(__file__).with_name("manager_ranks.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    commands = [[*python(), str(script), str(rank), str(tmp_path)] for rank in range(2)]
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) for command in commands]
    first, second = (json.loads(rank.communicate(timeout=120)[0]) for rank in ranks)
    for seen in (first, second):
        assert seen.pop("failed on rank 1") in {"RuntimeError", "RankFailedError"}
    assert first == second
    assert first == {
        "nothing yet": None,
        "saved": [False, True, False, True, False, True],
        "restored": {"step": 6, "rank": 0},
        "step": 6,
        "steps": [4, 6],
        "not there": "CheckpointNotFoundError",
        "failed on rank 0": "StorageError",
        "began": True,
        "failed in the background": "StorageError",
        "before SIGTERM": [False, False],
        "after SIGTERM": [True, True],
        "preempted": [8],
    }


def test_what_a_sharded_manager_cannot_fill_is_said_and_no_damage(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        manager.save(2, {"a": torch.ones(3)})
    with CheckpointManager(tmp_path, sharded=True) as manager:
        with pytest.raises(torchferry.CheckpointValueError, match="is one object"):
            manager.restore(into={"a": torch.zeros(3)})
        assert manager.latest_step() == 2
        for given in ({"into": torch.nn.Linear(1, 1)}, {"into": {"a": torch.zeros(3)}, "keys": "a"}):
            with pytest.raises(TypeError, match="into= of a sharded manager"):
                manager.restore(**given)
