"""Lets what must not be cut in half run to its end when the caller is cancelled."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
from anyio import to_thread

from torchferry.errors import InterpreterEndedError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = [
    "ThreadPool",
    "clean_up",
    "in_thread",
    "refuse_threads",
    "require_running_interpreter",
    "run_shielded",
    "stops_as_errors",
    "wait_in_thread",
    "wait_shielded",
]

T = TypeVar("T")

_refusing = False


class ThreadPool:
    """Threads of the process, which the interpreter waits for when it ends; a child forked from it has its own.

    Args:
        size: How many there may be.
        name: What the names of the threads begin with.

    Attributes:
        executor: What to submit work to; another one after a fork. It raises a RuntimeError once the main thread has
            ended.
    """

    def __init__(self, size: int, name: str) -> None:
        self._size = size
        self._name = name
        self._renew()
        if hasattr(os, "register_at_fork"):  # not on Windows
            os.register_at_fork(after_in_child=self._renew)  # threads do not survive a fork

    def _renew(self) -> None:
        self.executor = ThreadPoolExecutor(self._size, self._name)


_pool = ThreadPool(128, "torchferry")  # four large saves at once leave none to others: each has 32 parts under way


async def run_shielded(
    func: Callable[..., Awaitable[T]], /, *args: object, patience: float | Callable[[], float | None] | None = None
) -> T:
    """Awaits ``func(*args)`` to its end even when the caller is cancelled meanwhile; then the cancellation goes on.

    A shielded scope alone would not do: it holds off anyio's scopes, but not :meth:`asyncio.Task.cancel`, which
    is what ``asyncio.timeout``, a closing event loop and most callers use.

    Args:
        func: What to run.
        *args: Its arguments.
        patience: How many seconds it may take after a cancellation, before it is cancelled too; or what tells that,
            asked when the cancellation comes. None for no limit.
    """
    _require_asyncio()
    task = asyncio.ensure_future(func(*args))
    try:
        await asyncio.wait([task])
    except asyncio.CancelledError:
        await wait_shielded(task, patience() if callable(patience) else patience)
        if not task.cancelled():
            task.exception()  # looked at, so that asyncio does not log it as forgotten
        raise
    return task.result()


def _require_asyncio() -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        raise RuntimeError(
            "torchferry's asynchronous functions need asyncio. Under trio, call the synchronous ones in a thread: "
            "trio.to_thread.run_sync(torchferry.load, url)."
        ) from None


async def wait_shielded(task: asyncio.Future[T], patience: float | None = None) -> None:
    """Waits until ``task`` is done, whatever cancels the caller meanwhile, and however often.

    Args:
        task: What to wait for.
        patience: How many seconds it may take, before it is cancelled too; None for no limit.
    """
    with anyio.CancelScope(shield=True):  # against anyio's cancellations; the except is for asyncio's
        while not task.done():
            try:
                _, pending = await asyncio.wait([task], timeout=patience)
            except asyncio.CancelledError:
                continue
            if pending:
                task.cancel()
                patience = None


async def in_thread(
    func: Callable[..., T], /, *args: object, interrupt: Callable[[], float | None] = lambda: None
) -> T:
    """Runs ``func(*args)`` in a worker thread, and does not return before the thread is done with it.

    A cancelled ``anyio.to_thread.run_sync`` can leave its thread working, on a file that its caller then closes. And
    it starts a thread for each call that is made in a plain asyncio task.

    A StopIteration is raised as a RuntimeError: no future takes it, and who awaits one would wait for ever.

    Args:
        func: What to run, in a copy of the caller's context.
        *args: Its arguments.
        interrupt: Called when the caller is cancelled: to make ``func`` end soon. It returns how many seconds to wait
            for that, or None to wait for it in any case.
    """
    return await run_shielded(_submit, func, *args, patience=interrupt)


async def wait_in_thread(func: Callable[..., T], /, *args: object, interrupt: Callable[[], object] = lambda: None) -> T:
    """Runs ``func(*args)``, which may wait long for others, in a thread of its own: no worker of theirs is taken.

    Args:
        func: What to run.
        *args: Its arguments.
        interrupt: Called when the caller is cancelled: to make ``func`` end soon.
    """

    async def wait() -> T:
        return await to_thread.run_sync(partial(func, *args), limiter=anyio.CapacityLimiter(1))

    def patience() -> None:
        interrupt()

    return await run_shielded(wait, patience=patience)


async def clean_up(func: Callable[[], object]) -> None:
    """Runs ``func()`` as :func:`in_thread` does; or right here, where the interpreter ends and there are no threads."""
    try:
        await in_thread(func)
    except RuntimeError:
        if not _refusing:
            raise
        func()


def stops_as_errors(func: Callable[..., T], /, *args: object) -> T:
    """Calls ``func(*args)``; a StopIteration or StopAsyncIteration of it comes out as the cause of a RuntimeError.

    As it does out of a generator (PEP 479), and for the same reason: the caller's own loop would end without an error.
    """
    try:
        return func(*args)
    except (StopIteration, StopAsyncIteration) as error:
        raise RuntimeError(f"{type(error).__name__} was raised") from error


def refuse_threads() -> None:
    """Makes :func:`in_thread` raise a RuntimeError from now on, once the interpreter has shut the pool down.

    Called when the interpreter has joined all threads but daemons: what still runs fails at its next step.
    """
    global _refusing  # noqa: PLW0603 - there is one pool
    _refusing = True


class _ThreadForEach(ThreadPoolExecutor):
    """Runs each call in a thread of its own: for when the interpreter, about to end, has shut all pools down."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:  # noqa: BLE001 - it goes on from the future
                future.set_exception(error)

        threading.Thread(target=run, name="torchferry", daemon=True).start()
        return future


def require_running_interpreter() -> None:
    """Raises an InterpreterEndedError where the interpreter ends, and threads start and run no more."""
    if sys.is_finalizing():
        raise InterpreterEndedError(
            "The interpreter is ending, and its threads have ended: nothing can be saved or loaded any more, as in "
            "__del__. Do it before, for example in a function registered with atexit."
        )


def _submit(func: Callable[..., T], *args: object) -> asyncio.Future[T]:
    require_running_interpreter()
    loop = asyncio.get_running_loop()
    call = partial(copy_context().run, stops_as_errors, func, *args)
    try:
        return loop.run_in_executor(_pool.executor, call)
    except RuntimeError:  # the interpreter has shut the pool down: it ends, when the threads of the user have ended
        if _refusing:
            raise InterpreterEndedError(
                "The interpreter is ending, and has waited for the threads that work for torchferry: nothing can be "
                "saved or loaded any more. A function registered with atexit after torchferry was imported still can."
            ) from None
        last = _ThreadForEach(1)
        loop.set_default_executor(last)  # aiohttp looks names up in it
        return loop.run_in_executor(last, call)
