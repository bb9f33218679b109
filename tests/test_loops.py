"""The synchronous twins, and coroutines that belong to another loop."""

from __future__ import annotations

import asyncio
import contextvars
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import anyio
import pytest
from fsspec.asyn import get_loop

import torchferry
from torchferry.engine.loops import run, run_on, synchronous
from torchferry.testing.forkserver import python

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")


async def add_async(left: int, right: int = 1) -> int:
    """Adds."""
    await anyio.lowlevel.checkpoint()
    return left + right


add = synchronous(add_async)


def test_a_synchronous_twin_has_the_name_and_documentation_of_its_own() -> None:
    assert (add.__name__, add.__doc__) == ("add", "Adds.")
    assert not asyncio.iscoroutinefunction(add)


def test_run_works_in_a_thread_without_a_loop() -> None:
    assert add(1, right=2) == 3


async def test_run_works_where_a_loop_is_running() -> None:
    assert add(1) == 2


def test_run_raises_what_the_coroutine_raises() -> None:
    with pytest.raises(TypeError, match="can only concatenate"):
        add("one")  # type: ignore[arg-type]


@pytest.mark.timeout(20)
def test_a_wrong_argument_is_a_type_error_at_once() -> None:
    with pytest.raises(TypeError, match="bogus"):
        add(1, bogus=2)  # type: ignore[call-arg]


@pytest.mark.timeout(20)
async def test_a_wrong_argument_on_another_loop_is_a_type_error_at_once() -> None:
    with pytest.raises(TypeError, match="bogus"):
        await run_on(get_loop(), add_async, 1, bogus=2)


def test_run_carries_the_context_over() -> None:
    async def look() -> str:
        return variable.get()

    token = variable.set("mine")
    try:
        assert run(look) == "mine"
    finally:
        variable.reset(token)


def test_run_refuses_the_loop_that_would_have_to_run_it() -> None:
    async def from_inside() -> None:
        add(1)

    with pytest.raises(RuntimeError, match="await the async one"):
        run(from_inside)


async def test_run_on_another_loop_passes_a_cancel_on_and_waits_for_the_clean_up() -> None:
    started, log = threading.Event(), []

    async def work() -> None:
        try:
            started.set()
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.lowlevel.checkpoint()
                log.append(threading.current_thread().name)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run_on, get_loop(), work)
        await anyio.to_thread.run_sync(started.wait)
        tasks.cancel_scope.cancel()
    assert log == ["fsspecIO"]


async def test_run_on_another_loop_waits_for_the_clean_up_however_often_it_is_cancelled() -> None:
    started, may_end, log = threading.Event(), threading.Event(), []

    async def work() -> None:
        try:
            started.set()
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(may_end.wait)
                log.append("cleaned up")

    task = asyncio.ensure_future(run_on(get_loop(), work))
    await anyio.to_thread.run_sync(started.wait)
    for _ in range(3):
        task.cancel()
        await anyio.lowlevel.checkpoint()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert log == ["cleaned up"]


async def test_run_on_no_loop_or_this_one_stays_here() -> None:
    async def where() -> threading.Thread:
        return threading.current_thread()

    assert await run_on(None, where) is threading.current_thread()
    assert await run_on(asyncio.get_running_loop(), where) is threading.current_thread()


def test_ctrl_c_cancels_the_coroutine_and_waits_for_its_clean_up() -> None:
    program = """
        import anyio
        from torchferry.engine.loops import run

        async def work():
            try:
                print("started", flush=True)
                await anyio.sleep_forever()
            finally:
                with anyio.CancelScope(shield=True):
                    for _ in range(100):
                        await anyio.lowlevel.checkpoint()
                print("cleaned up", flush=True)

        run(work)
    """
    process = subprocess.Popen(
        [*python(), "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    os.kill(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=30)
    assert output == "cleaned up\n"
    assert "KeyboardInterrupt" in errors


def test_a_worker_thread_ends_before_the_interpreter_does() -> None:
    program = """
        import asyncio, threading, time
        from anyio import to_thread
        from fsspec.asyn import get_loop
        import torchferry.engine.loops

        begun = threading.Event()

        def work():
            begun.set()
            time.sleep(0.5)
            print("ended", flush=True)

        asyncio.run_coroutine_threadsafe(to_thread.run_sync(work), get_loop())
        begun.wait()
    """
    result = subprocess.run(
        [*python(), "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout == "ended\n"


def test_a_save_that_a_daemon_thread_waits_for_leaves_nothing_when_the_interpreter_ends(tmp_path: Path) -> None:
    """As one of a Flyte task that Ctrl-C ends."""
    program = f"""
        import threading, time
        import fsspec, torch, torchferry

        begun = threading.Event()

        class Slow(fsspec.callbacks.Callback):
            def relative_update(self, inc=1):
                super().relative_update(inc)
                if self.value > 20 << 20:
                    begun.set()
                    time.sleep(0.05)

        tensor = torch.zeros(100 << 20)  # not the thread's: torch aborts where a daemon frees one while Python ends

        def save():
            torchferry.save(tensor, {str(tmp_path / "x.pt")!r}, callback=Slow())

        threading.Thread(target=save, daemon=True).start()
        begun.wait()
    """
    subprocess.run([*python(), "-c", textwrap.dedent(program)], capture_output=True, check=True, timeout=60)
    assert list(tmp_path.iterdir()) == []


def test_at_the_end_of_the_interpreter_nothing_new_begins_in_a_thread() -> None:
    program = """
        import asyncio, atexit

        @atexit.register
        def begin():
            future = asyncio.run_coroutine_threadsafe(in_thread(print, "began"), get_loop())
            print(type(future.exception(timeout=30)))

        from fsspec.asyn import get_loop
        import torchferry.engine.loops
        from torchferry.engine.cancellation import in_thread

        get_loop()  # from Python 3.12 its thread could not be started then
    """
    result = subprocess.run(
        [*python(), "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout == "<class 'torchferry.errors.InterpreterEndedError'>\n"


@pytest.mark.parametrize("where", ["__del__", "atexit"])
def test_while_the_interpreter_ends_a_call_is_a_clear_error_at_once(where: str, tmp_path: Path) -> None:
    program = f"""
        import asyncio, atexit, sys, torchferry
        path, in_memory = {str(tmp_path / "x.pt")!r}, "memory://x.pt"

        def act(torchferry=torchferry, run=asyncio.run, path=path, in_memory=in_memory, stream=sys.stdout):
            for call in (
                lambda: torchferry.save(1, path),
                lambda: torchferry.save(1, in_memory),
                lambda: torchferry.load(path),
                lambda: torchferry.copy(path, path + "2"),
                lambda: run(torchferry.save_async(1, path)),
            ):
                try:
                    call()
                except BaseException as error:
                    print(type(error).__name__, error, file=stream, flush=True)

        class Saving:
            def __del__(self, act=act):
                act()

        if {where!r} == "atexit":
            atexit.register(act)  # before what torchferry registers, and so run after it
        torchferry.save(1, path)
        torchferry.save(1, in_memory)
        torchferry.load(path), torchferry.copy
        asyncio.run(torchferry.save_async(1, path))
        if {where!r} == "__del__":
            saving = Saving()
            saving.itself = saving  # so that it goes late
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    errors = result.stdout.splitlines()
    assert [error.partition(",")[0] for error in errors] == ["InterpreterEndedError The interpreter is ending"] * 5
    assert result.stderr == ""


def test_under_trio_an_error_says_that_asyncio_is_needed() -> None:
    """What trio does: it drives the coroutine without an event loop of asyncio's."""
    coroutine = torchferry.load_async("x.pt")
    with pytest.raises(RuntimeError, match=r"need asyncio.*trio\.to_thread"):
        coroutine.send(None)
