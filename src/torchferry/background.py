"""Saves that go on while training does.

``save_in_background`` pickles the object and copies its tensors, and returns; the copy is sent by the same code that
``save`` is made of. A thread waits for each save, so that the interpreter does not end before it.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import os
import sys
import threading
import traceback
from contextlib import suppress
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal

import torch

from torchferry.announcing import announcers_of
from torchferry.engine.collector import collector_paused
from torchferry.engine.loops import Call, refuse_own_loop, wait_for
from torchferry.engine.memory import SNAPSHOTS, Claim
from torchferry.errors import SaveUnderWayError, TorchferryError, mask
from torchferry.formats.partial import parts_allowed
from torchferry.formats.snapshot import LentStorages, Snapshots, size_of_copies
from torchferry.formats.torch_hooks import TorchModes
from torchferry.formats.torch_pickle import Pickled, pickle_object
from torchferry.formats.torch_stream import LENT_FROM, fills_crc32s
from torchferry.saving import save_async

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator, Mapping, Sequence

    from fsspec import AbstractFileSystem
    from fsspec.callbacks import Callback

    from torchferry.announcing import Announcer
    from torchferry.engine.transfer import TransferReport
    from torchferry.engine.types import ObjectStat

__all__ = ["BackgroundSave", "begin_save", "free_snapshots", "save_in_background"]

_EXIT_TICK = 0.2  # seconds between two looks whether the main thread has ended
_RELEASE_SECONDS = 1.0  # that the threads of a save that is over may take to let go of what they have sent
_CANCEL_SECONDS = 15.0  # that the interpreter waits for cancelled saves when it ends: as for others

_snapshots = Snapshots()


class BackgroundSave:
    """A save that is under way, or over. Await it, or ask for its :meth:`result`.

    An error that nobody asks for is raised by the next :func:`save_in_background`, and printed when the interpreter
    ends.

    Attributes:
        url: Where to, without secrets.
    """

    def __init__(self, work: _Work) -> None:
        self.url = work.url
        self._work = work

    @property
    def copied_bytes(self) -> int:
        """How many bytes of tensors were copied for this save, so far."""
        return self._work.copied

    def copy_rest(self) -> None:
        """Copies what has not been sent yet. The object may be changed when this returns.

        For what changes tensors and is not named by ``until=``; without ``until=``, and where everything was sent or
        copied already, it returns at once.
        """
        self._work.copy_rest()

    def done(self) -> bool:
        """Whether the save is over, in whichever way."""
        return self._work.future.done()

    def cancelled(self) -> bool:
        """Whether the save was cancelled. The object was not published."""
        return self._work.future.cancelled()

    def result(self, timeout: float | None = None) -> ObjectStat:
        """Waits until the save is over; returns what is at the URL now.

        Args:
            timeout: The most seconds to wait; the save goes on.

        Raises:
            TimeoutError: it is still under way.
            concurrent.futures.CancelledError: it was cancelled.
            Exception: what :func:`torchferry.save` raises.
        """
        error = self.exception(timeout)
        if error is not None:
            raise error
        return self._work.future.result()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Waits until the save is over; returns its error, or None where there was none.

        Raises:
            TimeoutError: it is still under way after ``timeout`` seconds.
            concurrent.futures.CancelledError: it was cancelled.
        """
        wait_for(self._work.future, timeout)
        error = self._work.future.exception(0)
        _failed.pop(self._work, None)
        return error

    def cancel(self) -> bool:
        """Cancels the save: it is over within a second, and publishes nothing.

        Where the request that publishes was sent already, its answer is awaited, and :meth:`result` tells the outcome.

        Returns:
            False where the save was over already.
        """
        return self._work.cancel()

    def add_done_callback(self, func: Callable[[BackgroundSave], object]) -> None:
        """Calls ``func(self)`` when the save is over, in another thread; at once where it is over already."""
        self._work.future.add_done_callback(lambda _: func(self))

    def __await__(self) -> Generator[Any, None, ObjectStat]:
        """Waits for the result. A cancel of the task that waits does not cancel the save."""
        return self._wait().__await__()

    def __repr__(self) -> str:
        future = self._work.future
        if not future.done():
            state = "under way"
        elif future.cancelled():
            state = "cancelled"
        else:
            state = "done" if future.exception() is None else "failed"
        return f"<BackgroundSave {self.url}: {state}>"

    async def _wait(self) -> ObjectStat:
        try:
            return await asyncio.shield(asyncio.wrap_future(self._work.future))
        finally:
            if self.done():
                _failed.pop(self._work, None)


class _Work:
    """A save that is under way, and what waits for it.

    Attributes:
        url: Where to, without secrets.
        future: Its outcome.
    """

    def __init__(
        self, url: str, claim: Claim, at_exit: str, copied: int, lent: LentStorages | None, released: threading.Event
    ) -> None:
        self.url = url
        self.future: concurrent.futures.Future[ObjectStat] = concurrent.futures.Future()
        self._claim = claim
        self._at_exit = at_exit
        self._copied = copied
        self._lent = lent
        self._released = released
        self._announcers: list[Announcer] = []
        self._ended = threading.Event()
        self._call: Call[ObjectStat] | None = None

    @property
    def copied(self) -> int:
        """Bytes of tensors that were copied."""
        return self._copied + (self._lent.copied if self._lent is not None else 0)

    def copy_rest(self) -> None:
        """Copies what has not been sent. Where that fails, the save does, and nobody else."""
        if self._lent is not None:
            with suppress(TorchferryError, OSError):
                self._lent.recall()

    def listen_to(self, announcers: Sequence[Announcer]) -> None:
        """Calls :meth:`copy_rest` each time one of them announces a change, until the save is over."""
        self._announcers = list(announcers)
        for announcer in announcers:
            announcer.listeners.add(self.copy_rest)

    def start(self, func: Callable[[], Coroutine[Any, Any, ObjectStat]]) -> None:
        """Starts ``func()`` on fsspec's event loop, and a thread that waits for it."""
        self._call = call = Call(func, self._ended.set)
        _under_way[self] = None
        try:
            # No daemon, even if the thread that saves is one: the interpreter waits for it.
            threading.Thread(target=self._wait, args=(call,), name="torchferry-background", daemon=False).start()
            call.start()  # last: once the loop is busy, this thread waits 5 ms for each turn
        except BaseException:
            call.cancel()
            self._end()
            raise

    def cancel(self) -> bool:
        """Cancels it, unless it is over."""
        call = self._call
        if call is not None:
            call.cancel()
        return call is not None

    def leave_behind(self) -> None:
        """In a forked child, which has none of the threads that work on it."""
        self._call = None
        self._lent = None
        self.future = concurrent.futures.Future()
        self.future.set_exception(
            TorchferryError(f"The save to {self.url} goes on in the process that this one was forked from.")
        )

    def _wait(self, call: Call[ObjectStat]) -> None:
        """In a thread of its own, which the interpreter waits for when it ends."""
        while not self._ended.wait(_EXIT_TICK if self._at_exit == "cancel" else None):
            if not threading.main_thread().is_alive():
                call.cancel()
                self._ended.wait()
        cancelled = False
        result, error = None, None
        try:
            result = call.result()
        except asyncio.CancelledError:
            cancelled = True
        except BaseException as failure:  # noqa: BLE001 - it goes on from the future
            error = failure
            _let_go(error)
            _failed[self] = None
        if self._lent is not None:
            self._lent.end()
        self._released.wait(_RELEASE_SECONDS)  # so that the next save has its memory
        self._end()
        if cancelled:
            self.future.cancel()
            self.future.set_running_or_notify_cancel()
        elif error is not None:
            self.future.set_exception(error)
        else:
            self.future.set_result(result)  # type: ignore[arg-type]  # there is one

    def _end(self) -> None:
        self._call = None
        for announcer in self._announcers:
            announcer.listeners.discard(self.copy_rest)
        if self._lent is not None:
            self._lent.end()
        self._claim.close()
        _under_way.pop(self, None)


_under_way: dict[_Work, None] = {}
_failed: dict[_Work, None] = {}  # those whose error nobody has looked at


def save_in_background(
    obj: Any,
    url: str | os.PathLike[str],
    *,
    until: Any = None,
    when_busy: Literal["wait", "refuse"] = "wait",
    at_exit: Literal["finish", "cancel"] = "finish",
    storage_options: Mapping[str, Any] | None = None,
    filesystem: AbstractFileSystem | None = None,
    part_size: int | None = None,
    metadata: Mapping[str, str] | None = None,
    give_up_after: float | None = None,
    shards: bool = False,
    callback: Callback | None = None,
    report: Callable[[TransferReport], object] | None = None,
) -> BackgroundSave:
    """Saves ``obj`` to ``url`` while the caller goes on; returns as soon as ``obj`` may be changed.

    What is stored is what :func:`torchferry.save` would have stored at the time of the call. The object is pickled, and
    its tensors are copied into host memory that is reused from save to save; storages that tensors share are copied
    once. From an accelerator, they are copied into pinned memory.

    With ``until=``, CPU tensors of 1 MiB and more are not copied at first: they are sent from their own memory, as by
    :func:`torchferry.save`. Before the optimizer changes anything, what has not been sent yet is copied, and only that.
    Who changes them in another way and does not say so (:meth:`BackgroundSave.copy_rest`) makes the save fail with a
    :class:`~torchferry.ChangedWhileSavingError`.

    In a function that is registered with ``atexit`` it returns when the save is over.

    One snapshot is in memory at a time, or as many as fit the MiB that ``TORCHFERRY_SNAPSHOTS`` says. The memory is
    kept for the next one; :func:`torchferry.background.free_snapshots` gives it back.

    Args:
        obj: Anything that ``torch.save`` takes.
        url: An fsspec URL or a local path.
        until: Who changes the tensors next: an optimizer, or several in a list. Beside optimizers, all that has
            ``register_step_pre_hook``, or ``update_parameters`` as ``torch.optim.swa_utils.AveragedModel`` has.
        when_busy: What to do while there is no room for another snapshot: "wait" until a save is over, or "refuse" with
            a :class:`~torchferry.SaveUnderWayError`.
        at_exit: What the interpreter does with the save when it ends: waits for it ("finish"), or "cancel".
        storage_options: As for :func:`torchferry.save`, and so the others.
        filesystem: The same.
        part_size: The same.
        metadata: The same.
        give_up_after: The same.
        shards: The same.
        callback: The same.
        report: The same; called in another thread.

    Returns:
        The save that is under way. Errors of the store are raised by its ``result()``.

    Raises:
        SaveUnderWayError: there is no room for another snapshot, and this one was not to wait.
        TypeError: ``until=`` cannot say when it changes tensors.
        CheckpointValueError: a tensor is a part of a larger one, and ``shards`` is not set.
        Exception: whatever ``torch.save`` raises for an object that cannot be pickled; and the error of an earlier save
            in the background that nobody has asked for. This save has then not begun.
    """
    if when_busy not in {"wait", "refuse"}:
        raise ValueError(f'when_busy= is "wait" or "refuse", not {when_busy!r}.')
    return begin_save(
        obj,
        url,
        until=until,
        abandoned=lambda: when_busy == "refuse",
        at_exit=at_exit,
        storage_options=storage_options,
        filesystem=filesystem,
        part_size=part_size,
        metadata=metadata,
        give_up_after=give_up_after,
        shards=shards,
        callback=callback,
        report=report,
    )


def begin_save(
    obj: Any,
    url: str | os.PathLike[str],
    *,
    abandoned: Callable[[], bool],
    first: Callable[[], Coroutine[Any, Any, object]] | None = None,
    until: Any = None,
    at_exit: Literal["finish", "cancel"] = "finish",
    shards: bool = False,
    **saving: Any,
) -> BackgroundSave:
    """:func:`save_in_background` for who may stop waiting for room, or has something to do before.

    Args:
        obj: As there, and so all that is not named here.
        url: The same.
        abandoned: Asked while there is no room for another snapshot: whether not to wait for it. After a change, call
            ``SNAPSHOTS.wake()``.
        first: What to await before anything is sent.
        until: The same.
        at_exit: The same.
        shards: The same.
        **saving: The arguments of :func:`torchferry.save_async`.

    Raises:
        SaveUnderWayError: it was abandoned.
        Exception: as there.
    """
    if at_exit not in {"finish", "cancel"}:
        raise ValueError(f'at_exit= is "finish" or "cancel", not {at_exit!r}.')
    refuse_own_loop()
    _raise_unseen(os.fspath(url))
    announcers = announcers_of(until) if until is not None else []
    with parts_allowed(shards), collector_paused():
        pickled = pickle_object(obj)
    claim = _claim(size_of_copies(pickled.storages), abandoned)
    try:
        _raise_unseen(os.fspath(url))  # of the save that this one has waited for
        snapshot, released = _snapshot(pickled, mask(os.fspath(url)), lends=until is not None and _may_lend())
        del pickled
        work = _Work(mask(os.fspath(url)), claim, at_exit, snapshot.copied, snapshot.lent, released)
        work.listen_to(announcers)
        save = partial(_save_after, first, snapshot, url, **saving)
        del snapshot
        with TorchModes.carried():
            work.start(save)
    except BaseException:
        claim.close()
        raise
    if threading.current_thread() is threading.main_thread() and not threading.main_thread().is_alive():
        wait_for(work.future)  # in a function of atexit: the interpreter has waited for threads, and does not again
    return BackgroundSave(work)


async def _save_after(
    first: Callable[[], Coroutine[Any, Any, object]] | None,
    snapshot: Pickled,
    url: str | os.PathLike[str],
    **saving: Any,
) -> ObjectStat:
    if first is not None:
        await first()
    return await save_async(snapshot, url, **saving)


def free_snapshots() -> None:
    """Gives back the memory that is kept for the next snapshot."""
    _snapshots.free()


@collector_paused()
def _snapshot(pickled: Pickled, url: str, *, lends: bool) -> tuple[Pickled, threading.Event]:
    """The same with copies of the storages; or, where it ``lends``, of those that are not worth lending.

    Returns:
        It, and what is set when nobody has its copies any more.
    """
    snapshot = _snapshots.open(size_of_copies(pickled.storages))
    lent = _lendable(pickled.storages) if lends else {}
    copied = [storage for number, storage in enumerate(pickled.storages) if number not in lent]
    copies = iter(snapshot.copy(copied))
    made = Pickled(
        pickled.data,
        [lent[number] if number in lent else next(copies) for number in range(len(pickled.storages))],
        lent=LentStorages(list(lent.values()), pickled.tensors, snapshot, url) if lent else None,
        copied=sum(storage.nbytes() for storage in copied),
    )
    return made, snapshot.released


def _may_lend() -> bool:
    """Whether torch leaves the memory of storages alone while it writes them."""
    return fills_crc32s() or not torch.serialization.get_crc32_options()


def _lendable(storages: Sequence[torch.UntypedStorage]) -> dict[int, torch.UntypedStorage]:
    """The storages, by number, that ``save`` would send from their own memory; without those that overlap others."""
    places = sorted(
        (storage.data_ptr(), storage.nbytes(), number)
        for number, storage in enumerate(storages)
        if storage.device.type == "cpu"
    )
    found: dict[int, torch.UntypedStorage] = {}
    end = 0
    last = -1
    for address, nbytes, number in places:
        if not nbytes:
            continue
        overlaps = address < end
        if overlaps:
            found.pop(last, None)
        elif nbytes >= LENT_FROM:
            found[number] = storages[number]
        if address + nbytes > end:
            end, last = address + nbytes, number
    return found


def _claim(nbytes: int, abandoned: Callable[[], bool]) -> Claim:
    try:
        return SNAPSHOTS.claim(nbytes, abandoned=abandoned)
    except InterruptedError:
        busy = ", ".join(sorted(work.url for work in _under_way))
        raise SaveUnderWayError(
            f"There is no room for another snapshot while a save in the background is under way: {busy}."
        ) from None


def _raise_unseen(url: str) -> None:
    for work in list(_failed):
        del _failed[work]
        error = work.future.exception()
        assert error is not None  # noqa: S101 - it failed
        error.add_note(
            f"This is the error of a save in the background to {work.url}, for whose result nobody had asked. "
            f"The save to {mask(url)} was not begun."
        )
        raise error


def _let_go(error: BaseException) -> None:
    """Lets go of what the frames of an error hold, which may be the snapshot: it may be kept for long."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        found = waiting.pop()
        if found is not None and id(found) not in seen:
            seen.add(id(found))
            traceback.clear_frames(found.__traceback__)
            waiting += [found.__cause__, found.__context__]


@atexit.register
def _at_exit() -> None:
    """Ends what still runs, where the user did not want to wait for it (Ctrl-C), and prints errors."""
    for work in list(_under_way):
        work.cancel()
    deadline = monotonic() + _CANCEL_SECONDS
    for work in list(_under_way):
        concurrent.futures.wait([work.future], max(0.0, deadline - monotonic()))
    for work in _failed:
        error = work.future.exception()
        lines = traceback.format_exception_only if isinstance(error, TorchferryError) else traceback.format_exception
        print(f"torchferry: a save in the background to {work.url} failed:", file=sys.stderr)  # noqa: T201
        print("".join(lines(error)), file=sys.stderr)  # noqa: T201


def _after_fork() -> None:
    for work in [*_under_way, *_failed]:
        work.leave_behind()
    _under_way.clear()
    _failed.clear()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)
