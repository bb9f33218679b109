"""Runs the async API from synchronous code, and a coroutine on the loop it belongs to.

Synchronous calls run on fsspec's own event loop, which lives in a daemon thread as long as the process:
filesystems bind themselves to a loop, and one that ends takes their connections with it.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import os
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager, nullcontext
from functools import partial, wraps
from time import monotonic
from typing import Any, Generic, ParamSpec, TypeVar

from fsspec.asyn import get_loop, reset_lock

from torchferry.engine.cancellation import refuse_threads, require_running_interpreter, wait_shielded
from torchferry.engine.tasks import unwrapping_exits, wrapping_exits
from torchferry.errors import TorchferryError, forget_frames, shows_frames

__all__ = ["Call", "keep_running", "own_loop", "refuse_own_loop", "run", "run_on", "synchronous", "wait_for"]

P = ParamSpec("P")
T = TypeVar("T")

_EXIT_SECONDS = 2.0
_SIGNAL_SECONDS = 0.1
_INTERRUPTED_SECONDS = 15.0  # enough for the slowest clean-up: 10 s for the answer of a request that publishes

_kept: set[asyncio.Future[Any]] = set()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=reset_lock)  # fsspec's loop stays behind; of late it does this itself


def run(func: Callable[..., Coroutine[Any, Any, T]], /, *args: Any, **kwargs: Any) -> T:
    """Runs ``func(*args, **kwargs)`` to its end and returns its result.

    Works with or without a running event loop in the calling thread; a running one stands still meanwhile.
    When the wait is interrupted (Ctrl-C), the coroutine is cancelled, and has cleaned up before the
    interrupt goes on.

    Raises:
        RuntimeError: called on the loop that would have to run it.
        InterpreterEndedError: the interpreter ends, and threads run no more.
    """
    require_running_interpreter()
    refuse_own_loop()
    done = threading.Event()
    call = Call(partial(func, *args, **kwargs), done.set)
    try:
        call.start()
        _wait(done)
    except BaseException:
        call.cancel()
        _wait_through_interrupts(done)
        raise
    return call.result()


def refuse_own_loop() -> None:
    """Raises a RuntimeError on the event loop of synchronous calls: one that waits there would wait for itself."""
    if get_loop() is _running_loop():
        raise RuntimeError(
            "A synchronous torchferry call on fsspec's event loop would wait for itself: await the async one."
        )


def wait_for(future: concurrent.futures.Future[Any], timeout: float | None = None) -> None:
    """Waits until it is done, at most ``timeout`` seconds; the main thread looks for signals, as in :func:`run`."""
    deadline = None if timeout is None else monotonic() + timeout
    while not future.done() and (deadline is None or monotonic() < deadline):
        waits = [_signal_seconds(), None if deadline is None else deadline - monotonic()]
        concurrent.futures.wait([future], min((seconds for seconds in waits if seconds is not None), default=None))


def _wait(done: threading.Event) -> None:
    """Waits; the main thread looks for signals: one that the system hands to another thread does not end its wait."""
    while not done.wait(_signal_seconds()):
        pass


def _signal_seconds() -> float | None:
    return _SIGNAL_SECONDS if threading.current_thread() is threading.main_thread() else None


def _wait_through_interrupts(done: threading.Event) -> None:
    """Waits until the cancelled call has cleaned up. A second Ctrl-C ends the wait only after 15 s."""
    deadline: float | None = None
    while True:
        try:
            if deadline is None:
                _wait(done)
            else:
                done.wait(max(0.0, deadline - monotonic()))
        except KeyboardInterrupt:
            deadline = deadline or monotonic() + _INTERRUPTED_SECONDS
        else:
            return


def keep_running(task: asyncio.Future[Any]) -> None:
    """Lets a task run to its end though nobody awaits it; the interpreter waits for it when it ends, 15 s at most."""
    _kept.add(task)
    task.add_done_callback(_kept.discard)


def synchronous(
    func: Callable[P, Coroutine[Any, Any, T]],
    *,
    within: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Callable[P, T]:
    """The synchronous twin of ``name_async``: a function ``name`` that runs it to its end with :func:`run`.

    Args:
        func: The asynchronous function.
        within: Entered in the calling thread around the call.
    """

    @wraps(func)
    def twin(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            with within():
                return run(func, *args, **kwargs)
        except TorchferryError as error:
            if shows_frames():
                raise
            raise error.with_traceback(None)  # noqa: B904 - the same error, as of here

    twin.__name__ = func.__name__.removesuffix("_async")
    twin.__qualname__ = func.__qualname__.removesuffix("_async")
    return twin


async def run_on(
    loop: asyncio.AbstractEventLoop | None, func: Callable[..., Coroutine[Any, Any, T]], /, *args: Any, **kwargs: Any
) -> T:
    """Runs ``func(*args, **kwargs)`` on ``loop``, or right here where that is this loop or None.

    A cancellation is passed on, and waits until the coroutine has cleaned up.
    """
    here = asyncio.get_running_loop()
    if loop is None or loop is here:
        handled = sys.exception()
        try:
            return await func(*args, **kwargs)
        except TorchferryError as error:
            forget_frames(error, but=handled)
            raise
    require_running_interpreter()
    done: asyncio.Future[None] = here.create_future()
    call = Call(partial(func, *args, **kwargs), lambda: here.call_soon_threadsafe(done.set_result, None), loop=loop)
    call.start()
    try:
        await asyncio.wait([done])
    except asyncio.CancelledError:
        call.cancel()
        await wait_shielded(done)
        raise
    return call.result()


def own_loop(backend_loop: asyncio.AbstractEventLoop | None) -> asyncio.AbstractEventLoop:
    """The loop for what holds some of the process's memory budget: the backend's, or fsspec's.

    Never the caller's own: a synchronous call on that one stops it, and may wait for what is held.
    """
    return backend_loop or get_loop()


class Call(Generic[T]):
    """A coroutine that runs on an event loop of another thread, in a copy of the starting thread's context.

    Args:
        func: Returns the coroutine.
        on_done: Called on that loop when the coroutine has ended, in whichever way.
        loop: The event loop; by default fsspec's, which synchronous calls run on.
    """

    def __init__(
        self,
        func: Callable[[], Coroutine[Any, Any, T]],
        on_done: Callable[[], object],
        *,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self._loop = loop or get_loop()
        self._coroutine = func()
        self._on_done = on_done
        self._task: asyncio.Task[T] | None = None

    def start(self) -> None:
        """Starts the coroutine, once."""
        self._loop.call_soon_threadsafe(self._start)

    def _start(self) -> None:
        self._task = self._loop.create_task(wrapping_exits(lambda: self._coroutine))
        self._task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[T]) -> None:
        # Looked at: when the caller was cancelled meanwhile, nobody else does.
        error = None if task.cancelled() else task.exception()
        if isinstance(error, TorchferryError):  # here, where no exception of the user's can be its context
            forget_frames(error)
        self._coroutine.close()  # it has not begun, where the task was cancelled before its first step
        self._on_done()

    def cancel(self) -> None:
        """Cancels the coroutine, or keeps it from starting; either way ``on_done`` is called."""
        self._loop.call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        if self._task is None:  # interrupted before start() was through
            self._coroutine.close()
            self._on_done()
        else:
            keep_running(self._task)  # it cleans up, whether or not somebody still waits
            self._task.cancel()

    def result(self) -> T:
        """What the coroutine returned or raised; only when it is done."""
        if self._task is None:
            raise asyncio.CancelledError
        with unwrapping_exits():
            return self._task.result()


@atexit.register
def _wait_for_workers() -> None:
    """Lets the threads of anyio end before the interpreter does.

    Such a thread outlives its last call by a moment, in which it lets go of what it worked on. Where its event loop
    runs in a daemon thread (fsspec's, flytekit's) it is a daemon, too, for which the interpreter does not wait; and
    one that frees a tensor while the interpreter ends aborts the process (torch 2.13 takes the GIL in a destructor).
    A save that a daemon thread waits for would keep one busy: it fails at its next step.
    """
    deadline = monotonic() + _INTERRUPTED_SECONDS
    while _kept and monotonic() < deadline:
        time.sleep(0.01)
    refuse_threads()
    deadline = monotonic() + _EXIT_SECONDS
    for thread in threading.enumerate():
        if thread.daemon and thread.name == "AnyIO worker thread":
            thread.join(max(0.0, deadline - monotonic()))


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
