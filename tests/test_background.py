"""Saves in the background: what is stored is what was there at the call, whatever happens to it afterwards."""

from __future__ import annotations

import asyncio
import concurrent.futures
import copy
import gc
import io
import json
import os
import pickle
import signal
import subprocess
import textwrap
import threading
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import pytest
import torch
from fsspec.callbacks import Callback

import torchferry
from torchferry import background
from torchferry.engine.lending import Loans, lend, reading
from torchferry.engine.memory import SNAPSHOTS
from torchferry.engine.types import MIB
from torchferry.formats.changes import Changes
from torchferry.formats.snapshot import Snapshots
from torchferry.formats.torch_stream import fills_crc32s
from torchferry.storage import local
from torchferry.storage.body import RequestBody
from torchferry.storage.local import LocalBackend
from torchferry.testing.faultproxy import Fault
from torchferry.testing.forkserver import python

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conftest import FaultyS3


@pytest.fixture(params=["local", "memory", "s3"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """Where to save, and how to get there."""
    kind: str = request.param
    if kind == "local":
        return {"url": str(tmp_path / "checkpoint.pt")}
    if kind == "memory":
        return {"url": f"memory://{tmp_path.name}/checkpoint.pt"}
    url = request.getfixturevalue("s3_url") + "/checkpoint.pt"
    options = request.getfixturevalue("s3_storage_options")
    return {"url": url, "storage_options": options}


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """No test leaves a save, or room that it takes, to the next."""
    yield
    assert SNAPSHOTS.held == 0
    assert not background._under_way
    background._failed.clear()
    background.free_snapshots()


class Gate(Callback):
    """A callback that stops a save when it has moved some bytes, until :meth:`open`."""

    def __init__(self) -> None:
        super().__init__()
        self.reached = threading.Event()
        self._opened = threading.Event()

    def relative_update(self, inc: int = 1) -> None:  # noqa: ARG002 - fsspec calls it so
        self.reached.set()
        self._opened.wait(60)

    def open(self) -> None:
        self._opened.set()


class Model:
    """Some large tensors, an optimizer that has stepped once, and gradients for the next step."""

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(0)
        self.module = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024) for _ in range(6)])
        self.optimizer = torch.optim.Adam(self.module.parameters(), lr=0.1, **options)
        for parameter in self.module.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()

    @property
    def checkpoint(self) -> dict[str, Any]:
        return {"model": self.module.state_dict(), "optimizer": self.optimizer.state_dict(), "epoch": 3}


def stored(target: dict[str, Any]) -> bytes:
    with fsspec.open(target["url"], **target.get("storage_options", {})) as file:
        data: bytes = file.read()
    return data


def torch_saved(obj: Any) -> bytes:
    file = io.BytesIO()
    torch.save(obj, file)
    return file.getvalue()


def run_python(script: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*python(), "-c", textwrap.dedent(script), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        **options,
    )


# --- the snapshot


def test_what_is_stored_is_what_was_there_at_the_call(target: dict[str, Any]) -> None:
    model = Model()
    large = torch.randn(3 * MIB)
    obj = {
        **model.checkpoint,
        "views": [large[5:9], large.view(3, -1).T, large[::7]],
        "storage": torch.arange(9).untyped_storage(),
        "empty": [torch.empty(0), torch.empty(0, dtype=torch.int64), torch.empty(2, device="meta")],
        "sparse": torch.eye(300).to_sparse(),
        "module": torch.nn.Linear(3, 3),
        "parameter": torch.nn.Parameter(torch.ones(5, dtype=torch.bfloat16)),
        "list": [1, 2],
    }
    expected = torch_saved(obj)
    save = torchferry.save_in_background(obj, **target)
    model.optimizer.step()
    large.zero_()
    obj["list"].append(3)  # type: ignore[attr-defined]
    stat = save.result()
    assert stored(target) == expected
    assert (stat.size, save.done(), save.exception()) == (len(expected), True, None)


def test_storages_that_tensors_share_are_copied_once(tmp_path: Path) -> None:
    base = torch.randn(2 * MIB)
    save = torchferry.save_in_background([base, base[1:], base.view(2, -1).T], tmp_path / "x.pt")
    save.result()
    assert save.copied_bytes == base.nbytes


def test_memory_is_reused_without_the_garbage_collector(tmp_path: Path) -> None:
    obj = [torch.randn(2 * MIB), torch.randn(3)]
    gc.disable()
    try:
        torchferry.save_in_background(obj, tmp_path / "x.pt").result()
        first = background._snapshots._kept
        assert first is not None
        torchferry.save_in_background(obj, "memory://x/x.pt").result()
        assert background._snapshots._kept is first
    finally:
        gc.enable()


def test_snapshots_keep_one_piece_of_memory() -> None:
    snapshots = Snapshots()
    large, small = torch.arange(MIB), torch.arange(1000)
    addresses = set()
    for tensor in (small, large, small, large):
        (made,) = snapshots.copy([tensor.untyped_storage()])
        assert torch.equal(torch.empty(0, dtype=tensor.dtype).set_(made), tensor)
        addresses.add(made.data_ptr())
        size = snapshots.open(0)._memory.size if tensor is small else 0  # another, while the first is in use
        del made
    assert size <= 2 * MIB
    assert len(addresses) <= 2, "it grew once"
    snapshots.free()
    assert snapshots._kept is None


def test_a_second_save_waits_for_room(tmp_path: Path) -> None:
    gate = Gate()
    obj = [torch.randn(2 * MIB)]
    first = torchferry.save_in_background(obj, tmp_path / "first.pt", callback=gate)
    gate.reached.wait(60)
    done_when_second_begins: list[bool] = []

    def save_second() -> None:
        second = torchferry.save_in_background(obj, tmp_path / "second.pt")
        done_when_second_begins.append(first.done() or not background._under_way.keys() - {second._work})
        second.result()

    thread = threading.Thread(target=save_second)
    thread.start()
    gate.open()
    thread.join(60)
    assert done_when_second_begins == [True]
    assert (tmp_path / "second.pt").exists()


def test_a_second_save_is_refused_where_the_caller_says_so(tmp_path: Path) -> None:
    gate = Gate()
    obj = [torch.randn(2 * MIB)]
    first = torchferry.save_in_background(obj, tmp_path / "first.pt", callback=gate)
    with pytest.raises(torchferry.SaveUnderWayError, match=r"first\.pt"):
        torchferry.save_in_background(obj, tmp_path / "second.pt", when_busy="refuse")
    gate.open()
    first.result()
    torchferry.save_in_background(obj, tmp_path / "second.pt", when_busy="refuse").result()


def test_an_object_that_cannot_be_pickled_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(AttributeError, match="local object"):
        torchferry.save_in_background([torch.zeros(MIB), lambda: None], tmp_path / "x.pt")


def test_modes_of_the_caller_hold(tmp_path: Path) -> None:
    obj = [torch.ones(2 * MIB), torch.ones(3)]
    with torch.serialization.skip_data():
        expected = torch_saved(obj)
        save = torchferry.save_in_background(obj, tmp_path / "x.pt")
    save.result()
    assert len(expected) == (tmp_path / "x.pt").stat().st_size
    with torch.inference_mode(), torch.device("meta"):
        torchferry.save_in_background(obj, tmp_path / "x.pt").result()
    assert (tmp_path / "x.pt").read_bytes() == torch_saved(obj)


def test_the_report_counts_the_snapshot(tmp_path: Path) -> None:
    reports: list[Any] = []
    torchferry.save_in_background([torch.zeros(MIB)], tmp_path / "x.pt", report=reports.append).result()
    assert reports[0].peak_memory >= 4 * MIB


# --- the handle


async def test_a_save_can_be_awaited(target: dict[str, Any]) -> None:
    stat = await torchferry.save_in_background({"x": torch.ones(MIB)}, **target)
    assert stat.size == len(stored(target))


async def test_who_stops_waiting_does_not_stop_the_save(tmp_path: Path) -> None:
    gate = Gate()
    save = torchferry.save_in_background([torch.ones(MIB)], tmp_path / "x.pt", callback=gate)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await save
    with pytest.raises(TimeoutError):
        save.result(0)
    gate.open()
    assert (await save).size > 4 * MIB


def test_a_cancelled_save_publishes_nothing(faulty_s3: Callable[..., FaultyS3], s3_url: str, s3_client: Any) -> None:
    bucket, _, prefix = s3_url.removeprefix("s3://").partition("/")
    s3 = faulty_s3(Fault(method="PUT", target="partNumber=2", hang=True))
    save = torchferry.save_in_background(
        [torch.ones(12 * MIB)], f"{s3_url}/x.pt", storage_options=s3.storage_options, part_size=8 * MIB
    )
    s3.proxy.wait_for("PUT", "partNumber=2")
    assert save.cancel()
    with pytest.raises(concurrent.futures.CancelledError):
        save.result(30)
    assert (save.cancelled(), save.cancel(), "cancelled" in repr(save)) == (True, False, True)
    assert not s3_client.list_objects_v2(Bucket=bucket, Prefix=prefix).get("Contents")
    while s3_client.list_multipart_uploads(Bucket=bucket, Prefix=prefix).get("Uploads"):  # else this times out
        threading.Event().wait(0.1)
    torchferry.save_in_background([1], f"{s3_url}/x.pt", storage_options=s3.storage_options).result()


def test_it_calls_back_when_it_is_over(tmp_path: Path) -> None:
    called: list[torchferry.BackgroundSave] = []
    event = threading.Event()
    save = torchferry.save_in_background([1], tmp_path / "x.pt")
    save.add_done_callback(called.append)
    save.add_done_callback(lambda _: event.set())
    assert event.wait(30)
    assert called == [save]


def test_an_error_that_nobody_looked_at_is_raised_by_the_next_save(tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    failed = torchferry.save_in_background([1], tmp_path / "directory")
    concurrent.futures.wait([failed._work.future])
    with pytest.raises(torchferry.StorageError, match="directory") as caught:
        torchferry.save_in_background([2], tmp_path / "x.pt")
    assert "was not begun" in caught.value.__notes__[0]
    assert not (tmp_path / "x.pt").exists()
    torchferry.save_in_background([2], tmp_path / "x.pt").result()


def test_the_error_of_a_save_that_another_waits_for_is_raised_by_that(tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    held = SNAPSHOTS.claim(1)
    raised: list[Exception] = []

    def save() -> None:
        try:
            torchferry.save_in_background([2], tmp_path / "x.pt")
        except torchferry.StorageError as error:
            raised.append(error)

    thread = threading.Thread(target=save)
    failing = background._Work("file:///x.pt", held, "finish", 0, None, threading.Event())
    thread.start()
    failing.future.set_exception(torchferry.StorageError("the disk is full"))
    background._failed[failing] = None
    held.close()
    thread.join(60)
    assert [str(error) for error in raised] == ["the disk is full"]
    assert not (tmp_path / "x.pt").exists()


def test_an_error_that_somebody_looked_at_is_not_raised_again(tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    failed = torchferry.save_in_background([1], tmp_path / "directory")
    assert isinstance(failed.exception(), torchferry.StorageError)
    with pytest.raises(torchferry.StorageError):
        failed.result()
    torchferry.save_in_background([2], tmp_path / "x.pt").result()


def test_a_failed_save_gives_its_memory_back(tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    gc.disable()
    try:
        failed = torchferry.save_in_background([torch.ones(MIB)], tmp_path / "directory")
        assert failed.exception() is not None
        while background._snapshots._kept is None:  # the thread that pickled lets go in a moment; else this times out
            threading.Event().wait(0.01)
    finally:
        gc.enable()


def test_a_synchronous_wait_on_the_loop_that_saves_is_refused(tmp_path: Path) -> None:
    from fsspec.asyn import get_loop

    async def call() -> None:
        torchferry.save_in_background([1], tmp_path / "x.pt")

    with pytest.raises(RuntimeError, match="wait for itself"):
        asyncio.run_coroutine_threadsafe(call(), get_loop()).result(30)


# --- the end of the process, signals, forks


def test_the_interpreter_finishes_saves_when_it_ends(tmp_path: Path) -> None:
    ended = run_python(
        """
        import sys, torch, torchferry
        torchferry.save_in_background([torch.arange(4 << 20)], sys.argv[1])
        """,
        str(tmp_path / "x.pt"),
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert torchferry.load(tmp_path / "x.pt")[0][-1] == (4 << 20) - 1


BEGUN_WHERE = {
    "in a daemon thread": "thread = threading.Thread(target=save, daemon=True); thread.start(); thread.join()",
    "in a function of atexit": "atexit.register(save)",
}


@pytest.mark.parametrize("begin", BEGUN_WHERE.values(), ids=BEGUN_WHERE)
def test_the_interpreter_finishes_saves_wherever_they_began(tmp_path: Path, begin: str) -> None:
    ended = run_python(
        f"""
        import atexit, sys, threading, torch, torchferry

        def save():
            torchferry.save_in_background([torch.arange(4 << 20)], sys.argv[1])

        {begin}
        """,
        str(tmp_path / "x.pt"),
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert torchferry.load(tmp_path / "x.pt")[0][-1] == (4 << 20) - 1


def test_ctrl_c_cancels_a_save_that_began_at_exit(tmp_path: Path) -> None:
    script = """
        import asyncio, atexit, signal, sys, torch, torchferry
        from torchferry.storage.local import LocalBackend

        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored

        async def write(*args, **options):
            print("writing", flush=True)
            await asyncio.Event().wait()

        LocalBackend.write = write
        atexit.register(torchferry.save_in_background, [1], sys.argv[1])
    """
    command = [*python(), "-c", textwrap.dedent(script), str(tmp_path / "x.pt")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        while process.poll() is None:
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(3)
    assert list(tmp_path.iterdir()) == []


CANCELLED_AT_EXIT = """
    import sys, threading, torch, torchferry
    from fsspec.callbacks import Callback

    class Slow(Callback):
        def relative_update(self, inc=1):
            reached.set()
            threading.Event().wait(0.5)  # longer than what is left of the main thread

    reached = threading.Event()
    torchferry.save_in_background([torch.arange(32 << 20)], sys.argv[1], at_exit="cancel", callback=Slow())
    reached.wait()
"""


def test_the_interpreter_cancels_saves_where_it_was_told_to(tmp_path: Path) -> None:
    ended = run_python(CANCELLED_AT_EXIT, str(tmp_path / "x.pt"))
    assert (ended.returncode, ended.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []


def test_an_error_that_nobody_looked_at_is_printed_at_exit(tmp_path: Path) -> None:
    ended = run_python(
        """
        import sys, torchferry
        torchferry.save_in_background([1], sys.argv[1])
        """,
        str(tmp_path),
    )
    assert "a save in the background to" in ended.stderr
    assert "is a directory" in ended.stderr


def test_a_second_ctrl_c_at_exit_cancels_what_the_first_let_finish(
    faulty_s3: Callable[..., FaultyS3], s3_url: str, s3_client: Any
) -> None:
    s3 = faulty_s3(Fault(method="PUT", target="partNumber=2", hang=True, times=None))
    script = """
        import json, signal, sys, threading, torch, torchferry
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored
        options = json.loads(sys.argv[2])
        torchferry.save_in_background([torch.ones(4 << 20)], sys.argv[1], storage_options=options, part_size=8 << 20)
        print("training", flush=True)
        while True:  # a signal that another thread gets does not end one long wait
            threading.Event().wait(0.1)
    """
    command = [*python(), "-c", textwrap.dedent(script), f"{s3_url}/x.pt", json.dumps(s3.storage_options)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "training\n"
        s3.proxy.wait_for("PUT", "partNumber=2")
        process.send_signal(signal.SIGINT)
        while process.stderr.readline() != "KeyboardInterrupt\n":
            pass
        while process.poll() is None:  # it waits for the save, until it is told again
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(3)
    bucket, _, prefix = s3_url.removeprefix("s3://").partition("/")
    assert not s3_client.list_objects_v2(Bucket=bucket, Prefix=prefix).get("Contents")
    assert not s3_client.list_multipart_uploads(Bucket=bucket, Prefix=prefix).get("Uploads")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_in_between_is_safe(tmp_path: Path) -> None:
    """The child has no running saves, errors of its own, and memory of its own; the parent's save is whole."""
    ended = run_python(
        """
        import os, sys, threading, torch, torchferry, warnings
        from fsspec.callbacks import Callback
        from torchferry import background

        class Gate(Callback):
            def relative_update(self, inc=1):
                reached.set()
                opened.wait()

        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of any fork beside threads
        reached, opened = threading.Event(), threading.Event()
        torch.set_num_threads(1)
        tensor = torch.arange(2 << 20)
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(3))])
        torchferry.save_in_background([tensor], f"{sys.argv[1]}/0.pt").result()
        save = torchferry.save_in_background([tensor], f"{sys.argv[1]}/1.pt", callback=Gate())
        reached.wait()
        if not os.fork():
            assert save.done() and "forked" in str(save.exception())
            assert not background._under_way and background._snapshots._kept is None
            optimizer.step()
            torchferry.save_in_background([3], f"{sys.argv[1]}/child.pt", until=optimizer, when_busy="refuse").result()
            print("child", torchferry.load(f"{sys.argv[1]}/child.pt"), flush=True)
            os._exit(0)
        os.wait()
        opened.set()
        save.result()
        print("parent", torch.equal(torchferry.load(f"{sys.argv[1]}/1.pt")[0], tensor))
        """,
        str(tmp_path),
    )
    assert (ended.stdout, ended.stderr) == ("child [3]\nparent True\n", "")


# --- until the optimizer steps

lends = pytest.mark.skipif(not fills_crc32s(), reason="this torch reads storages itself: all is copied at once")


@lends
def test_until_the_optimizer_steps_nothing_is_copied(tmp_path: Path) -> None:
    model = Model()
    expected = torch_saved(model.checkpoint)
    save = torchferry.save_in_background(model.checkpoint, tmp_path / "x.pt", until=model.optimizer)
    save.result()
    model.optimizer.step()
    assert save.copied_bytes < MIB
    assert (tmp_path / "x.pt").read_bytes() == expected


@lends
def test_before_the_step_only_what_was_not_sent_is_copied(target: dict[str, Any]) -> None:
    model = Model()
    expected = torch_saved(model.checkpoint)
    gate = Gate()
    save = torchferry.save_in_background(model.checkpoint, **target, until=model.optimizer, callback=gate)
    gate.reached.wait(60)
    model.optimizer.step()
    model.optimizer.step()
    gate.open()
    save.result()
    assert stored(target) == expected
    assert MIB < save.copied_bytes < len(expected)


@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
def test_a_step_before_anything_was_sent_copies_all(options: dict[str, Any], tmp_path: Path) -> None:
    model = Model(**options)
    expected = torch_saved(model.checkpoint)
    save = torchferry.save_in_background(model.checkpoint, tmp_path / "x.pt", until=[model.optimizer])
    model.optimizer.step()
    save.result()
    assert (tmp_path / "x.pt").read_bytes() == expected


def test_requests_that_are_repeated_after_the_step_send_the_copy(
    faulty_s3: Callable[..., FaultyS3], s3_url: str, s3_storage_options: dict[str, Any]
) -> None:
    """By the engine, and where that fails twice, by the filesystem's own client."""
    s3 = faulty_s3(Fault(method="PUT", target="partNumber=1", status=503, times=2, headers={"Retry-After": "1"}))
    model = Model()
    expected = torch_saved(model.checkpoint)
    reports: list[Any] = []
    save = torchferry.save_in_background(
        model.checkpoint,
        f"{s3_url}/x.pt",
        storage_options=s3.storage_options,
        until=model.optimizer,
        report=reports.append,
    )
    s3.proxy.wait_for("PUT", "partNumber=1")
    model.optimizer.step()
    save.result()
    assert stored({"url": f"{s3_url}/x.pt", "storage_options": s3_storage_options}) == expected
    assert reports[0].client_bytes > 0


def test_parts_under_way_go_on_from_the_copy(
    faulty_s3: Callable[..., FaultyS3], s3_url: str, s3_storage_options: dict[str, Any]
) -> None:
    s3 = faulty_s3()
    model = Model()
    expected = torch_saved(model.checkpoint)
    with s3.proxy.outage("silence"):
        save = torchferry.save_in_background(
            model.checkpoint, f"{s3_url}/x.pt", storage_options=s3.storage_options, until=model.optimizer
        )
        model.optimizer.step()  # waits for nobody
        assert not save.done()
    save.result()
    assert stored({"url": f"{s3_url}/x.pt", "storage_options": s3_storage_options}) == expected


def test_the_first_of_several_optimizers_has_the_rest_copied(tmp_path: Path) -> None:
    one, other = Model(), Model(foreach=True)
    obj = [one.checkpoint, other.checkpoint]
    expected = torch_saved(obj)
    gate = Gate()
    save = torchferry.save_in_background(obj, tmp_path / "x.pt", until=(one.optimizer, other.optimizer), callback=gate)
    other.optimizer.step()
    one.optimizer.step()
    gate.open()
    save.result()
    assert (tmp_path / "x.pt").read_bytes() == expected


def test_averaged_weights_count_as_an_optimizer(tmp_path: Path) -> None:
    model = Model()
    averaged = torch.optim.swa_utils.AveragedModel(model.module)
    averaged.update_parameters(model.module)
    obj = averaged.state_dict()
    expected = torch_saved(obj)
    gate = Gate()
    save = torchferry.save_in_background(obj, tmp_path / "x.pt", until=[model.optimizer, averaged], callback=gate)
    with torch.no_grad():
        model.module[0].weight.add_(1)
    averaged.update_parameters(model.module)
    gate.open()
    save.result()
    assert (tmp_path / "x.pt").read_bytes() == expected
    for other in (copy.deepcopy(averaged), pickle.loads(pickle.dumps(averaged))):
        other.update_parameters(model.module)
        assert (int(averaged.n_averaged), int(other.n_averaged)) == (2, 3)


def test_an_optimizer_has_one_hook_however_many_saves() -> None:
    model = Model()
    for _ in range(3):
        torchferry.save_in_background(model.checkpoint, "memory://x/x.pt", until=model.optimizer).result()
    assert len(model.optimizer._optimizer_step_pre_hooks) == 1
    torchferry.save_in_background(copy.deepcopy(model.optimizer).state_dict(), "memory://x/x.pt").result()


def test_misspelt_choices_are_refused() -> None:
    for choice in ({"when_busy": "waits"}, {"at_exit": "kill"}):
        with pytest.raises(ValueError, match=next(iter(choice))):
            torchferry.save_in_background([1], "memory://x/x.pt", **choice)  # type: ignore[arg-type]


@pytest.mark.parametrize("until", ["adam", torch.optim.SGD, torch.optim.swa_utils.AveragedModel], ids=repr)
def test_what_cannot_announce_changes_is_refused(until: Any) -> None:
    for _ in range(2):
        with pytest.raises(TypeError, match=r"register_step_pre_hook.*copy_rest\(\)"):
            torchferry.save_in_background([1], "memory://x/x.pt", until=[until])


@lends
def test_a_change_that_nobody_announced_is_an_error(target: dict[str, Any]) -> None:
    model = Model()
    torchferry.save([0], **target)
    gate = Gate()
    save = torchferry.save_in_background(model.checkpoint, **target, until=model.optimizer, callback=gate)
    with torch.no_grad():
        model.module[0].weight.mul_(2)
    gate.open()
    with pytest.raises(torchferry.ChangedWhileSavingError, match=r"checkpoint\.pt.*save_in_background"):
        save.result()
    assert torchferry.load(**target) == [0]


@lends
def test_a_change_that_nobody_announced_before_the_step_is_an_error(tmp_path: Path) -> None:
    model = Model()
    gate = Gate()
    save = torchferry.save_in_background(model.checkpoint, tmp_path / "x.pt", until=model.optimizer, callback=gate)
    model.module[5].weight.data.fill_(3)  # past torch's count of versions
    model.optimizer.step()  # trains on
    gate.open()
    with pytest.raises(torchferry.ChangedWhileSavingError):
        save.result()
    assert not (tmp_path / "x.pt").exists()


@pytest.mark.parametrize("size", [0, 64 * MIB])
def test_a_storage_that_was_freed_is_a_change_and_never_read(size: int) -> None:
    """As FSDP frees parameters between two layers."""
    storage = torch.ones(16 * MIB).untyped_storage()  # so large that the system takes it back
    changes = Changes("memory://x")
    changes.watch([], [storage])
    changes.check()
    storage.resize_(size)
    with pytest.raises(torchferry.ChangedWhileSavingError, match="memory://x"):
        changes.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
def test_a_change_of_a_whole_tensor_past_torchs_count_is_noticed(dtype: torch.dtype) -> None:
    """Zeros become ones: in float32 the two lowest bytes of each number stay the same."""
    tensor = torch.zeros(1 << 19, dtype=dtype)
    changes = Changes("memory://x")
    changes.watch([tensor], [tensor.untyped_storage()])
    tensor.data.fill_(1)
    with pytest.raises(torchferry.ChangedWhileSavingError):
        changes.check()


def test_a_change_can_be_announced_by_hand(tmp_path: Path) -> None:
    model = Model()
    expected = torch_saved(model.checkpoint)
    gate = Gate()
    save = torchferry.save_in_background(model.checkpoint, tmp_path / "x.pt", until=model.optimizer, callback=gate)
    save.copy_rest()
    model.module.load_state_dict(Model(weight_decay=1).module.state_dict())
    gate.open()
    save.result()
    assert (tmp_path / "x.pt").read_bytes() == expected


@lends
def test_a_module_that_is_loaded_meanwhile_is_an_error_and_an_optimizer_is_right(tmp_path: Path) -> None:
    model, other = Model(), Model(weight_decay=1)
    expected = torch_saved(model.checkpoint)
    gate = Gate()
    save = torchferry.save_in_background(model.checkpoint, tmp_path / "x.pt", until=model.optimizer, callback=gate)
    model.optimizer.load_state_dict(other.optimizer.state_dict())
    model.optimizer.step()
    gate.open()
    save.result()
    assert (tmp_path / "x.pt").read_bytes() == expected
    gate = Gate()
    save = torchferry.save_in_background(model.checkpoint, tmp_path / "x.pt", until=model.optimizer, callback=gate)
    model.module.load_state_dict(other.module.state_dict())
    gate.open()
    with pytest.raises(torchferry.ChangedWhileSavingError):
        save.result()
    assert (tmp_path / "x.pt").read_bytes() == expected


def test_storages_that_overlap_are_copied_at_once(tmp_path: Path) -> None:
    memory = bytearray(8 * MIB)
    obj = [torch.frombuffer(memory, dtype=torch.uint8), torch.frombuffer(memory, dtype=torch.uint8, offset=4 * MIB)]
    expected = torch_saved(obj)
    save = torchferry.save_in_background(obj, tmp_path / "x.pt", until=Model().optimizer)
    save.result()
    assert save.copied_bytes == 12 * MIB
    assert (tmp_path / "x.pt").read_bytes() == expected


def test_a_store_that_does_not_know_of_loans_gets_copies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(LocalBackend, "reads_loans", False)
    monkeypatch.setattr(local, "reading", nullcontext)
    model = Model()
    expected = torch_saved(model.checkpoint)
    save = torchferry.save_in_background(model.checkpoint, tmp_path / "x.pt", until=model.optimizer)
    model.optimizer.step()
    save.result()
    assert save.copied_bytes > 20 * MIB
    assert (tmp_path / "x.pt").read_bytes() == expected


# --- loans


def lent_bytes(data: bytearray) -> tuple[Loans, memoryview]:
    tensor = torch.frombuffer(data, dtype=torch.uint8)
    loans = Loans([(tensor.data_ptr(), len(data))])
    return loans, lend(memoryview(data), tensor, loans)


def test_what_came_back_is_not_copied() -> None:
    data = bytearray(range(100))
    loans, view = lent_bytes(data)
    loans.came_back(view[10:20])
    loans.came_back(view[0:10])
    loans.came_back(view[50:60])
    copied: list[int] = []

    def copy_ranges(ranges: Any) -> Any:
        copied.extend(stop - start for start, stop in ranges)
        base = loans._memories[0][0]
        return [memoryview(bytes(data[start - base : stop - base])) for start, stop in ranges]

    loans.recall(copy_ranges)
    assert copied == [30, 40]
    data[:] = bytes(100)
    with reading(view[25:30]) as memory:
        assert bytes(memory) == bytes(range(25, 30))
    with reading(view[60:]) as memory:
        assert bytes(memory) == bytes(range(60, 100))


def test_the_owner_waits_for_who_reads() -> None:
    data = bytearray(range(100))
    loans, view = lent_bytes(data)
    recalled = threading.Event()

    def recall() -> None:
        loans.recall(lambda ranges: [memoryview(bytes(data)) for _ in ranges])
        recalled.set()

    with reading(view) as memory:
        thread = threading.Thread(target=recall)
        thread.start()
        assert not recalled.is_set()
        assert bytes(memory) == bytes(range(100))
    thread.join(30)
    assert recalled.is_set()


def test_readers_get_the_error_of_a_copy_that_failed() -> None:
    loans, view = lent_bytes(bytearray(100))

    def fail(_: Any) -> Any:
        raise OSError("no memory")

    with pytest.raises(OSError, match="no memory"):
        loans.recall(fail)
    with pytest.raises(OSError, match="no memory"), reading(view):
        pass


def test_clients_get_copies_of_what_is_lent() -> None:
    data = bytearray(range(100))
    _, view = lent_bytes(data)
    body = RequestBody([view])
    read = body.read(50)
    data[:] = bytes(100)
    assert bytes(read) == bytes(range(50))
