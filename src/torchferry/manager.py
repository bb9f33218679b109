"""A series of checkpoints that takes care of itself: save every so many steps, keep a few, resume from the latest.

Listing is the truth: there is no index. A checkpoint that is listed is whole, because it appears when it is complete;
``restore`` checks it as it loads. What is deleted goes after the checkpoint that replaces it is there.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar
from weakref import WeakSet, finalize

from fsspec.asyn import get_loop

from torchferry.arguments import require_nbytes, require_path, require_seconds, whole_number
from torchferry.background import BackgroundSave, begin_save
from torchferry.engine.cancellation import in_thread, wait_in_thread
from torchferry.engine.loops import keep_running, run, wait_for
from torchferry.engine.memory import SNAPSHOTS
from torchferry.engine.tasks import task_group
from torchferry.errors import (
    CheckpointNotFoundError,
    TorchferryError,
    mask,
)
from torchferry.formats.keys import KeysArgument
from torchferry.saving import save, save_async
from torchferry.series.preemption import Preemption
from torchferry.series.ranks import Ranks
from torchferry.series.restoring import Candidate, Restorer
from torchferry.series.retention import Best, Retention
from torchferry.series.steps import Series, SeriesListing, as_step, encode_metrics, name_of, url_of
from torchferry.storage.registry import begins_with_a_protocol

if TYPE_CHECKING:
    from types import TracebackType

    import torch.distributed as dist
    from fsspec import AbstractFileSystem

    from torchferry.engine.types import ObjectStat

__all__ = ["CheckpointManager"]

_OPENING_PATIENCE = 0.5  # seconds that a cancel waits for a filesystem that is being made

logger = logging.getLogger("torchferry")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _New:
    """A checkpoint that is being saved.

    Attributes:
        step: Its step.
        metrics: As JSON; None where there are none.
        replaces: Whether a checkpoint of this step may be there already.
    """

    step: int
    metrics: str | None
    replaces: bool


class CheckpointManager:
    """The checkpoints of one training, one for each step that is saved, below one URL.

    ``step-0000001000.pt`` is what :func:`torchferry.save` stores, so anything reads it. Other files in the directory
    are left alone. One thread at a time may call the methods.

    Where ``torch.distributed`` is initialized with several ranks, each of them makes a manager, and all of them call
    ``save``, ``restore``, ``resume``, ``reached_preemption``, ``wait_until_finished`` and ``close``, in the same order:
    the first rank decides, saves and deletes, and an error of one is raised on all. Other methods are not collective.

    Args:
        url: The directory: an fsspec URL or a local path.
        max_to_keep: How many checkpoints stay: the latest, or the best where there is a ``best``. The latest stays in
            any case. None for all.
        keep_period: Checkpoints whose step is a multiple of it stay for ever, and do not count.
        best: A metric and "min" or "max": what makes a checkpoint a good one. One without it is worse than all others.
        save_interval_steps: ``save`` saves the steps that are multiples of it.
        background: Whether ``save`` returns when the object has been copied (:func:`torchferry.save_in_background`), or
            when it is stored.
        handle_preemption: Whether to listen to SIGTERM: the save that is under way goes on, the next call of ``save``
            saves whatever its step is, and waits for it, and ``reached_preemption`` tells. Only for a manager that is
            made in the main thread. With several ranks each of these calls asks them all.
        sharded: Save with ``torch.distributed.checkpoint``, each rank its own part, instead of one object on the first.
        start_from: The URL of another series, which ``restore`` and ``latest_step`` look into while this one is empty.
            It is only read.
        storage_options: Arguments for the fsspec filesystem of ``url``.
        filesystem: An fsspec filesystem to use as it is, instead of ``storage_options``.
        part_size: As for :func:`torchferry.save`.
        give_up_after: The same.
        process_group: The ranks, if not all.

    Attributes:
        url: As above.
        restored_step: The step of what :meth:`restore` has returned last; None before.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        max_to_keep: int | None = None,
        keep_period: int | None = None,
        best: tuple[str, Literal["min", "max"]] | None = None,
        save_interval_steps: int = 1,
        background: bool = True,
        handle_preemption: bool = False,
        sharded: bool = False,
        start_from: str | os.PathLike[str] | None = None,
        storage_options: Mapping[str, Any] | None = None,
        filesystem: AbstractFileSystem | None = None,
        part_size: int | None = None,
        give_up_after: float | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        kept = None if max_to_keep is None else _positive("max_to_keep", max_to_keep)
        period = None if keep_period is None else _positive("keep_period", keep_period)
        if best is not None and not _says_what_is_best(best):
            raise ValueError(f'best is a metric and "min" or "max", such as ("loss", "min"); given: {best!r}.')
        require_path(url)
        require_nbytes("part_size", part_size)
        require_seconds("give_up_after", give_up_after)
        if not os.fspath(url):
            raise ValueError('The URL of a series is empty. Give a directory: "." is the current one.')
        self.url = _anchored(url) if filesystem is None else url
        self.restored_step: int | None = None
        self._retention = Retention(kept, period, Best(*best) if best else None)
        self._interval = _positive("save_interval_steps", save_interval_steps)
        self._background = background
        self._sharded = sharded
        self._start_from = _anchored(start_from) if start_from is not None and filesystem is None else start_from
        self._store: dict[str, Any] = {
            "storage_options": storage_options,
            "filesystem": filesystem,
            "give_up_after": give_up_after,
        }
        self._part_size = part_size
        self._opened: dict[str, Series] = {}
        self._opening = threading.Lock()
        self._latest: int | None = None  # the highest step that is there, or being saved
        self._knows_latest = False
        self._damaged: dict[int, str] = {}  # the versions that restore has found damaged, by step
        self._warned_of_best = False
        self._metrics: dict[int, tuple[str, dict[str, Any]]] = {}  # with the version that they are of
        self._orphans: set[int] = set()  # steps that had metrics and no checkpoint when the series was listed last
        self._under_way: list[Future[BaseException | None]] = []  # saves whose error, or None, nobody has looked at
        self._retaining: Future[None] | None = None
        self._to_retain: int | None = None  # the step after which to look again for what goes
        self._turn = threading.Lock()
        self._ends = False  # whether SIGTERM has come, to any rank, as all know
        self._warned = False
        self._group = process_group
        self._ranks = Ranks.find(process_group)
        self._preemption = Preemption() if handle_preemption else None
        if self._preemption is not None:
            finalize(self, self._preemption.close).atexit = False  # for who does not close the manager
        _managers.add(self)

    # --- saving

    def should_save(self, step: int) -> bool:
        """Whether :meth:`save` would save this step: one of the interval's, later than all that are there.

        Asks the store the first time.
        """
        return run(self.should_save_async, step)

    async def should_save_async(self, step: int) -> bool:
        """The asynchronous twin of :meth:`should_save`."""
        step = as_step(step)
        return self._wants(step, force=False) and await self._is_later(step)

    def save(
        self, step: int, obj: Any, metrics: Mapping[str, Any] | None = None, *, force: bool = False, until: Any = None
    ) -> bool:
        """Saves a checkpoint, if its step is one to save, and afterwards deletes those that are not to be kept.

        Args:
            step: The step of the training.
            obj: Anything that ``torch.save`` takes; where the manager is ``sharded``, a state dict for
                ``torch.distributed.checkpoint``.
            metrics: Numbers (or text) that are stored with it: see ``best`` and :meth:`metrics`.
            force: Save it also off the interval, and where there is one of this step already, which is replaced.
            until: As for :func:`torchferry.save_in_background`.

        Returns:
            Whether it is saved, or being saved; on all ranks the same.

        Raises:
            Exception: what :func:`torchferry.save` raises; and the error of the save before, where that went on in the
                background and nobody has waited for it. This one has then not begun.
        """
        step = as_step(step)
        if self._passes(step, force):
            return False
        if self._sharded:
            return self._save_sharded(step, obj, metrics, force)
        if self._ranks is None:
            return self._save(step, obj, metrics, force, until)
        return self._on_first_rank(lambda: self._save(step, obj, metrics, force, until))

    async def save_async(
        self, step: int, obj: Any, metrics: Mapping[str, Any] | None = None, *, force: bool = False, until: Any = None
    ) -> bool:
        """The asynchronous twin of :meth:`save`."""
        if self._ranks is not None or self._sharded:  # ranks wait for each other, each in its own thread
            return await wait_in_thread(partial(self.save, step, obj, metrics, force=force, until=until))
        step = as_step(step)
        if self._passes(step, force) or not await self._begins(step, force):
            return False
        with self._asking_again_after_a_failure():
            new = self._new(step, metrics, force)
            if self._background:
                await self._begin_async(new, obj, until)
                if self._ends:
                    await self._wait_async()
            else:
                await self._write_metrics_first(new)
                options = await in_thread(self._options, new)
                await self._finish(new, await save_async(obj, url_of(self.url, name_of(step)), **options))
        return True

    def reached_preemption(self) -> bool:
        """Whether SIGTERM has come, to this rank or another one; always False without ``handle_preemption``.

        Ask before the ``save`` of a step, and end the training after it: then that save has seen the SIGTERM.
        """
        if self._preemption is not None:
            reached = self._preemption.reached
            self._ends = self._ranks.any(reached) if self._ranks is not None else reached
        return self._ends

    def wait_until_finished(self) -> None:
        """Waits until the checkpoint that is being saved is there, and those that go are gone.

        Raises:
            Exception: what the save raises. What cannot be deleted is not an error; it is tried again after the next.
        """
        self._on_all_ranks(self._wait)

    async def wait_until_finished_async(self) -> None:
        """The asynchronous twin of :meth:`wait_until_finished`. A cancel ends the wait, and not the save."""
        if self._ranks is not None:  # they wait for each other, each in its own thread
            await wait_in_thread(self.wait_until_finished)
        else:
            await self._wait_async()

    # --- looking

    def all_steps(self) -> list[int]:
        """The steps of all whole checkpoints, in order; without those that :meth:`restore` has found damaged."""
        return run(self.all_steps_async)

    async def all_steps_async(self) -> list[int]:
        """The asynchronous twin of :meth:`all_steps`."""
        return self._good(await self._list())

    def latest_step(self) -> int | None:
        """The latest step; None where there is no checkpoint."""
        return run(self.latest_step_async)

    async def latest_step_async(self) -> int | None:
        """The asynchronous twin of :meth:`latest_step`."""
        listing = await self._list()
        start = await self._start() if not listing.steps else None
        steps = self._good(listing if start is None else await self._list(start))
        return steps[-1] if steps else None

    def best_step(self) -> int | None:
        """The step of the best checkpoint; None where there is none, or none that has the metric.

        Raises:
            ValueError: the manager was made without ``best``.
        """
        return run(self.best_step_async)

    async def best_step_async(self) -> int | None:
        """The asynchronous twin of :meth:`best_step`."""
        if self._retention.best is None:
            raise ValueError('What is best? Say it when you make the manager: best=("loss", "min").')
        listing = await self._list()
        found = self._retention.best.find(await self._metrics_of(listing, self._good(listing)))
        return found[0] if found else None

    def metrics(self, step: int) -> dict[str, Any]:
        """The metrics that a checkpoint was saved with; empty where it was saved without.

        Raises:
            CheckpointNotFoundError: there is no checkpoint of this step.
        """
        return run(self.metrics_async, step)

    async def metrics_async(self, step: int) -> dict[str, Any]:
        """The asynchronous twin of :meth:`metrics`."""
        step = as_step(step)
        listing = await self._list()
        if step not in listing.steps:
            raise CheckpointNotFoundError(f"{self._said()} has no checkpoint of step {step}.")
        return copy.deepcopy((await self._metrics_of(listing, [step]))[step])

    # --- loading and deleting

    def restore(
        self,
        step: int | None = None,
        *,
        keys: KeysArgument | None = None,
        into: Any = None,
        map_location: Any = None,
        weights_only: bool = True,
    ) -> Any:
        """Loads a checkpoint, and checks the CRC32s of all that it loads.

        Where the latest is damaged, the one before is loaded, and so on, with a warning that names both;
        :attr:`restored_step` tells which one it was.

        Args:
            step: Which; None for the latest.
            keys: As for :func:`torchferry.load`, and so all others.
            into: The same: what is filled in place; where the manager is ``sharded``, a state dict, on every rank.
            map_location: The same.
            weights_only: The same.

        Raises:
            CheckpointNotFoundError: there is no checkpoint, or none of this step.
            CheckpointCorruptError: that one is damaged; or all are, where no step was asked for.
            Exception: what else :func:`torchferry.load` raises.
        """
        return run(self.restore_async, step, keys=keys, into=into, map_location=map_location, weights_only=weights_only)

    async def restore_async(
        self,
        step: int | None = None,
        *,
        keys: KeysArgument | None = None,
        into: Any = None,
        map_location: Any = None,
        weights_only: bool = True,
    ) -> Any:
        """The asynchronous twin of :meth:`restore`."""
        found = await self._restore_anywhere(
            step, keys=keys, into=into, map_location=map_location, weights_only=weights_only
        )
        if found is None:
            raise CheckpointNotFoundError(f"There is no checkpoint in {self._said()}.")
        return found[0]

    def resume(
        self,
        *,
        keys: KeysArgument | None = None,
        into: Any = None,
        map_location: Any = None,
        weights_only: bool = True,
    ) -> Any:
        """Loads the latest checkpoint, as :meth:`restore` does; returns None where there is none yet."""
        return run(self.resume_async, keys=keys, into=into, map_location=map_location, weights_only=weights_only)

    async def resume_async(
        self,
        *,
        keys: KeysArgument | None = None,
        into: Any = None,
        map_location: Any = None,
        weights_only: bool = True,
    ) -> Any:
        """The asynchronous twin of :meth:`resume`."""
        found = await self._restore_anywhere(
            None, keys=keys, into=into, map_location=map_location, weights_only=weights_only
        )
        return None if found is None else found[0]

    def delete(self, step: int) -> None:
        """Deletes the checkpoint of a step; where there is none, nothing."""
        run(self.delete_async, step)

    async def delete_async(self, step: int) -> None:
        """The asynchronous twin of :meth:`delete`."""
        step = as_step(step)
        await self._wait_async()
        await (await self._series()).delete(await self._list(), step)
        self._forget_latest()

    # --- the end

    def close(self) -> None:
        """Waits as :meth:`wait_until_finished` does, and stops to listen to SIGTERM."""
        try:
            self.wait_until_finished()
        finally:
            self._end()

    async def close_async(self) -> None:
        """The asynchronous twin of :meth:`close`."""
        try:
            await self.wait_until_finished_async()
        finally:
            self._end()  # here: Python sets handlers of signals in the main thread only

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with _as_note_of(error):
            self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with _as_note_of(error):
            await self.close_async()

    # --- how it is done

    def _end(self) -> None:
        try:
            if self._preemption is not None:
                self._preemption.close()
        finally:
            if self._ranks is not None:
                self._ranks.close()
                self._ranks = None

    @property
    def _leads(self) -> bool:
        """Whether this is the process that decides, saves and deletes."""
        return self._ranks is None or self._ranks.rank == 0

    def _wants(self, step: int, force: bool) -> bool:
        """Whether the step may be one to save: where not, nothing need be prepared."""
        if self._ranks is None:  # else only what all of them know counts
            self.reached_preemption()
        return force or self._ends or step % self._interval == 0

    def _passes(self, step: int, force: bool) -> bool:
        """Whether there is nothing to do, which every rank knows by itself; raises the error of the save before."""
        if self._ranks is None:
            self._raise_failures()
        else:
            self.reached_preemption()
        return not self._wants(step, force)

    def _wait(self) -> None:
        """Waits for what this process has begun. Where that is interrupted, the next call waits for all of it."""
        self._wait_for_saves()
        if self._retaining is not None:
            wait_for(self._retaining)
        self._raise_failures()

    def _wait_for_saves(self) -> None:
        for over in tuple(self._under_way):
            wait_for(over)

    async def _wait_async(self) -> None:
        for over in tuple(self._under_way):
            await asyncio.shield(asyncio.wrap_future(over))
        if self._retaining is not None:
            await asyncio.shield(asyncio.wrap_future(self._retaining))
        self._raise_failures()

    def _raise_failures(self) -> None:
        """Raises the first error of the saves that are over; the others are notes of it."""
        over = [each for each in self._under_way if each.done()]
        for each in over:
            self._under_way.remove(each)
        failures = [error for each in over if (error := each.result()) is not None]
        for failure in failures[1:]:
            failures[0].add_note(f"Another save failed, too: {type(failure).__name__}: {failure}")
        if failures:
            raise failures[0]

    async def _begins(self, step: int, force: bool) -> bool:
        """Whether this step is to be saved; from now on it is the latest."""
        if not force and not await self._is_later(step):
            await self._warn_of_later(step)
            return False
        self._latest = max(step, -1 if self._latest is None else self._latest)
        return True

    @contextmanager
    def _asking_again_after_a_failure(self) -> Iterator[None]:
        """Where a save fails in here, the store is asked again for the latest step: this one may be saved again."""
        try:
            yield
        except BaseException:
            self._forget_latest()
            raise

    def _forget_latest(self) -> None:
        self._latest, self._knows_latest = None, False

    async def _is_later(self, step: int) -> bool:
        if not self._knows_latest:
            listing = await self._list()
            self._latest = max(self._good(listing), default=None)
            self._orphans = set(listing.metrics) - set(listing.steps)
            self._knows_latest = True
        return self._latest is None or step > self._latest

    async def _warn_of_later(self, step: int) -> None:
        """Says, once, why a step that is not there is not saved."""
        if not self._warned and step != self._latest and step not in (await self._list()).steps:
            self._warned = True
            warnings.warn(
                f"{self._said()}: step {step} is not saved, because step {self._latest} is there. To go on from an "
                "earlier step, delete the later ones, or use another URL.",
                stacklevel=2,
            )

    def _save(self, step: int, obj: Any, metrics: Mapping[str, Any] | None, force: bool, until: Any) -> bool:
        self._raise_failures()
        if not run(self._begins, step, force):
            return False
        with self._asking_again_after_a_failure():
            new = self._new(step, metrics, force)
            if self._background:
                self._begin(new, obj, until)
                if self._ends:
                    self._wait()
            else:
                run(self._write_metrics_first, new)
                run(self._finish, new, save(obj, url_of(self.url, name_of(step)), **self._options(new)))
        return True

    def _new(self, step: int, metrics: Mapping[str, Any] | None, force: bool) -> _New:
        best = self._retention.best
        if best is not None and best.metric not in (metrics or {}) and not self._warned_of_best:
            self._warned_of_best = True
            given = ", ".join(map(repr, metrics or ())) or "none"
            logger.warning(
                "Step %d has no metric %r, by which best= chooses; given: %s. It is worse than all that have it.",
                step,
                best.metric,
                given,
            )
        return _New(step, encode_metrics(metrics), replaces=force or step in self._damaged)

    def _begin(self, new: _New, obj: Any, until: Any, abandoned: Callable[[], bool] = lambda: False) -> None:
        """Begins to save in the background; raises a SaveUnderWayError if it is abandoned while it waits for room."""
        url = url_of(self.url, name_of(new.step))
        first = partial(self._write_metrics_first, new)
        self._follow(new, begin_save(obj, url, abandoned=abandoned, first=first, until=until, **self._options(new)))

    async def _begin_async(self, new: _New, obj: Any, until: Any) -> None:
        """:meth:`_begin` in a thread. A cancel ends the wait for room; a save that has begun by then is followed."""
        abandoned = threading.Event()

        def abandon() -> None:
            abandoned.set()
            SNAPSHOTS.wake()

        await in_thread(self._begin, new, obj, until, abandoned.is_set, interrupt=abandon)

    def _save_sharded(self, step: int, obj: Any, metrics: Mapping[str, Any] | None, force: bool) -> bool:
        """Saves on every rank; the first decides, and stores what goes beside."""
        from torchferry import distributed

        self._wait_for_saves()

        def next_one() -> _New:
            self._raise_failures()
            return self._new(step, metrics, force)

        new = self._on_all_ranks(next_one)
        if not self._on_first_rank(lambda: run(self._begins_sharded, new, force)):
            return False
        url = url_of(self.url, name_of(step, sharded=True))
        options = {**self._store, "part_size": self._part_size, "process_group": self._group}
        if not self._background:
            with self._asking_again_after_a_failure():
                distributed.save(obj, url, **options)
                self._on_first_rank(lambda: run(self._finish_sharded, new))
            return True
        over = Future[BaseException | None]()

        def finish(saved: Future[Any]) -> None:
            try:
                saved.result()
                if self._leads:
                    run(self._finish_sharded, new)
            except BaseException as error:  # noqa: BLE001 - goes on from the future
                self._forget_latest()
                over.set_result(error)
            else:
                over.set_result(None)

        with self._asking_again_after_a_failure():
            saving = distributed.async_save(obj, url, **options)
            self._under_way.append(over)
            saving.upload_completion.add_done_callback(finish)
            if self._ends:
                self._wait()
        return True

    async def _begins_sharded(self, new: _New, force: bool) -> bool:
        if not await self._begins(new.step, force):
            return False
        await self._write_metrics_first(new)
        return True

    async def _finish_sharded(self, new: _New) -> None:
        series = await self._series()
        await self._delete_replaced(series, new, keeps_metrics=new.metrics is not None)
        if new.metrics is not None:
            with _only_metrics_are_missing(new.step):
                await series.write_metrics(new.step, await series.stat_sharded(new.step), new.metrics)
        self._is_there(new)

    def _on_all_ranks(self, func: Callable[[], T]) -> T:
        """What it returns; where it fails on one rank, it fails on all: none goes on alone to where others wait."""
        error: Exception | None = None
        try:
            result = func()
        except Exception as failure:  # noqa: BLE001 - raised on every rank
            error = failure
        if self._ranks is not None:
            self._ranks.agree(error)
        if error is not None:
            raise error
        return result

    def _on_first_rank(self, func: Any) -> bool:
        """Does it on the first rank; all learn what it returned or raised."""
        if self._ranks is None:
            return bool(func())
        outcome, error = False, None
        if self._ranks.rank == 0:
            try:
                outcome = func()
            except BaseException as failure:  # noqa: BLE001 - raised on every rank
                error = failure
        return bool(self._ranks.from_first(outcome, error))

    def _options(self, new: _New) -> dict[str, Any]:
        series = self._open(self.url)
        return {**self._store, "part_size": self._part_size, "metadata": series.metadata_for(new.metrics)}

    def _follow(self, new: _New, saving: BackgroundSave) -> None:
        """Has what belongs to a save done when it is over, in the thread that waits for it."""
        over = Future[BaseException | None]()
        self._under_way.append(over)

        def finish(saved: BackgroundSave) -> None:
            what = "Step"
            try:
                stat = saved.result()
                what = "The metrics of step"
                run(self._finish, new, stat)
            except BaseException as error:  # noqa: BLE001 - goes on from the future
                self._forget_latest()
                said = str(error) or type(error).__name__
                logger.error("%s %d of %s: not saved: %s", what, new.step, self._said(), said)  # noqa: TRY400
                over.set_result(error)
            else:
                over.set_result(None)

        saving.add_done_callback(finish)

    async def _write_metrics_first(self, new: _New) -> None:
        """Stores metrics that go beside a checkpoint before it: who is killed in between does not lose them."""
        series = await self._series()
        if new.metrics is not None and not new.replaces and self._go_beside(series, new):
            with suppress(Exception):  # what is wrong is told when they are written again
                await series.write_metrics(new.step, None, new.metrics)

    def _go_beside(self, series: Series, new: _New) -> bool:
        """Whether there are metrics that will be an object of their own."""
        return new.metrics is not None and (self._sharded or series.metadata_for(new.metrics) is None)

    async def _finish(self, new: _New, stat: ObjectStat) -> None:
        """Stores what goes beside a checkpoint that is there, and begins to delete what goes."""
        series = await self._series()
        beside = self._go_beside(series, new)
        await self._delete_replaced(series, new, keeps_metrics=beside)
        if new.metrics is not None and beside:
            with _only_metrics_are_missing(new.step):
                await series.write_metrics(new.step, stat, new.metrics)
        self._is_there(new)

    async def _delete_replaced(self, series: Series, new: _New, *, keeps_metrics: bool) -> None:
        self._damaged.pop(new.step, None)
        if new.replaces or new.step in self._orphans:
            try:
                await series.delete_replaced(new.step, sharded=self._sharded, keeps_metrics=keeps_metrics)
            except Exception as error:  # noqa: BLE001 - what is there is right without it
                logger.warning("What step %d of %s replaces is still there: %s", new.step, self._said(), error)

    def _is_there(self, new: _New) -> None:
        self._metrics.pop(new.step, None)
        if self._retention.max_to_keep is not None:
            self._retain_soon(new.step)

    def _retain_soon(self, step: int) -> None:
        """Has what goes deleted; nobody waits for it. What is being done now looks again when it is through."""
        with self._turn:
            self._to_retain = step
            if self._retaining is not None and not self._retaining.done():
                return
            self._retaining = over = Future[None]()
        get_loop().call_soon_threadsafe(lambda: keep_running(asyncio.ensure_future(self._retain(over))))

    async def _retain(self, over: Future[None]) -> None:
        while True:
            with self._turn:
                step, self._to_retain = self._to_retain, None
                if step is None:
                    over.set_result(None)
                    return
            try:
                await self._delete_superfluous(step)
            except Exception as error:  # noqa: BLE001 - nobody waits for it, and the next one tries again
                logger.warning("Old checkpoints of %s stay until the next one is saved: %s", self._said(), error)
            except BaseException:
                over.set_result(None)
                raise

    async def _delete_superfluous(self, step: int) -> None:
        """Deletes what goes now that this step is there. Of later ones, the metrics may still be on their way."""
        listing = await self._list()
        good = [each for each in self._good(listing) if each <= step]
        if step not in good:  # somebody has deleted it: then nothing is sure
            return
        metrics = await self._metrics_of(listing, good) if self._retention.best else {}
        orphans = [each for each in listing.metrics if each not in listing.steps and each < step]
        series = await self._series()
        gone = [*self._retention.superfluous(good, metrics), *orphans]
        async with task_group() as tasks:
            for each in gone:
                tasks.start_soon(series.delete, listing, each)
        for each in gone:
            self._metrics.pop(each, None)

    async def _restore_anywhere(self, step: int | None, *, into: Any, **loading: Any) -> tuple[Any, Candidate] | None:
        fills = self._sharded and into is not None
        if fills and (loading.get("keys") is not None or not isinstance(into, MutableMapping)):
            raise TypeError(
                "into= of a sharded manager is a dict (of state dicts, tensors, modules), and keys= does not go with "
                "it: leave out of the dict what is not to be loaded."
            )
        await self.wait_until_finished_async()
        restorer = Restorer(self._candidates, self._store, self._ranks, self._group)
        if fills:
            found = await restorer.fill(step, into, loading["weights_only"], self._note_damaged)
        else:
            found = await restorer.load(step, loading | ({} if into is None else {"into": into}), self._note_damaged)
        if found is not None:
            self.restored_step = found[1].step
            self._forget_latest()
        return found

    def _note_damaged(self, candidate: Candidate) -> None:
        if candidate.url == self.url:
            self._damaged[candidate.step] = candidate.version

    async def _candidates(self, step: int | None) -> list[Candidate]:
        """What to restore, in the order of trying."""
        for find in (self._own, self._start):
            url = await find()
            if url is None:
                continue
            listing = await self._list(url)
            if step is not None:
                step = as_step(step)
                steps = [step] if step in listing.steps else []
            else:
                steps = (self._good(listing) or list(listing.steps))[::-1]  # where all are damaged, it says so again
            if steps:
                stored = [listing.steps[each] for each in steps]
                return [Candidate(url, each.step, each.sharded, each.version) for each in stored]
        if step is not None:
            raise CheckpointNotFoundError(f"{self._said()} has no checkpoint of step {step}.")
        return []

    async def _own(self) -> str | os.PathLike[str]:
        return self.url

    async def _start(self) -> str | os.PathLike[str] | None:
        """The URL of the series to start from while this one is empty."""
        return self._start_from

    async def _metrics_of(self, listing: SeriesListing, steps: Sequence[int]) -> dict[int, dict[str, Any]]:
        series = await self._series()
        for step in steps:
            version = listing.steps[step].version
            if self._metrics.get(step, ("", {}))[0] != version:
                self._metrics.pop(step, None)
                if metrics := await series.read_metrics(listing, step):
                    self._metrics[step] = version, metrics
        return {step: self._metrics[step][1] if step in self._metrics else {} for step in steps}

    def _good(self, listing: SeriesListing) -> list[int]:
        return [step for step, stored in listing.steps.items() if self._damaged.get(step) != stored.version]

    async def _list(self, url: str | os.PathLike[str] | None = None) -> SeriesListing:
        return await (await self._series(url)).list()

    async def _series(self, url: str | os.PathLike[str] | None = None) -> Series:
        return await in_thread(self._open, url or self.url, interrupt=lambda: _OPENING_PATIENCE)

    def _open(self, url: str | os.PathLike[str]) -> Series:
        with self._opening:
            name = os.fspath(url)
            if name not in self._opened:
                self._opened[name] = Series(url, **self._store)
            return self._opened[name]

    def _said(self) -> str:
        return mask(os.fspath(self.url))

    def leave_behind(self) -> None:
        """In a forked child, which has none of the threads that work for this manager."""
        self._opening, self._turn = threading.Lock(), threading.Lock()
        self._retaining, self._to_retain = None, None
        if any(each._state == "PENDING" for each in self._under_way):  # noqa: SLF001 - done() takes a lock, maybe held
            left = Future[BaseException | None]()
            left.set_result(
                TorchferryError(f"The save to {self._said()} goes on in the process that this one was forked from.")
            )
            self._under_way = [left]
        self._forget_latest()


_managers: WeakSet[CheckpointManager] = WeakSet()


def _after_fork() -> None:
    for manager in tuple(_managers):
        manager.leave_behind()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)


def _positive(name: str, given: Any) -> int:
    number = whole_number(given)
    if number is None or number < 1:
        raise ValueError(f"{name} is a whole number, at least 1; given: {given!r}.")
    return number


def _says_what_is_best(best: Any) -> bool:
    match best:
        case (str(), "min" | "max"):
            return True
        case _:
            return False


def _anchored(url: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """A relative path as it is now: the process may change its directory while the manager is used."""
    if isinstance(url, os.PathLike):
        return Path(url).absolute() if "://" not in os.fspath(url) else url
    if "::" in url or url.startswith("~") or begins_with_a_protocol(url):
        return url
    return os.path.abspath(url)  # noqa: PTH100 - a str stays one


@contextmanager
def _only_metrics_are_missing(step: int) -> Iterator[None]:
    """Says with an error that is raised in here what is there all the same."""
    try:
        yield
    except Exception as error:
        error.add_note(
            f"The checkpoint of step {step} is there, without its metrics: save it with force=True to have both."
        )
        raise


@contextmanager
def _as_note_of(error: BaseException | None) -> Iterator[None]:
    """What fails in here becomes a note of ``error``, which matters more; where that is None, it is raised."""
    try:
        yield
    except Exception as failure:
        if error is None:
            raise
        error.add_note(f"The last save failed, too: {type(failure).__name__}: {failure}")
