"""Loads the latest checkpoint of a series that is not damaged, on one process or on all ranks of a training."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torchferry.engine.cancellation import in_thread, wait_in_thread
from torchferry.errors import (
    CheckpointChangedError,
    CheckpointFormatError,
    CheckpointNotFoundError,
    CheckpointValueError,
    TorchferryError,
    mask,
)
from torchferry.loading import load_async
from torchferry.series.steps import name_of, url_of

if TYPE_CHECKING:
    import torch.distributed as dist

    from torchferry.series.ranks import Ranks

__all__ = ["Candidate", "Restorer"]

logger = logging.getLogger("torchferry")

_TRIES = 3  # of the ranks to load one version
_FALLS_BACK = (CheckpointFormatError, CheckpointNotFoundError, CheckpointChangedError)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A checkpoint that may be restored.

    Attributes:
        url: Of its series.
        step: Its step.
        sharded: Whether it is a sharded one.
        version: Tells it from others of the same step.
    """

    url: str | os.PathLike[str]
    step: int
    sharded: bool
    version: str = ""

    @property
    def place(self) -> str | os.PathLike[str]:
        """Its own URL."""
        return url_of(self.url, name_of(self.step, sharded=self.sharded))

    @property
    def directory(self) -> str:
        """Where it would be as a sharded one, without secrets."""
        return mask(os.fspath(url_of(self.url, name_of(self.step, sharded=True))))

    def __str__(self) -> str:
        return mask(os.fspath(self.place))


class Restorer:
    """Loads checkpoints of a series.

    Args:
        candidates: Gives those to try, the first one first: of this step, or of any where it is None.
        store: What :func:`torchferry.load` takes to get there.
        ranks: The ranks of the training; None where this process is alone. Then every method is collective.
        group: Their process group, for sharded checkpoints.
    """

    def __init__(
        self,
        candidates: Callable[[int | None], Awaitable[list[Candidate]]],
        store: Mapping[str, Any],
        ranks: Ranks | None,
        group: dist.ProcessGroup | None,
    ) -> None:
        self._candidates = candidates
        self._store = store
        self._ranks = ranks
        self._group = group

    async def load(
        self, step: int | None, options: Mapping[str, Any], damaged: Callable[[Candidate], None]
    ) -> tuple[Any, Candidate] | None:
        """Loads the first candidate that is not damaged, with a warning that names those that are.

        Args:
            step: Which; None for the latest.
            options: Those of :func:`torchferry.load`.
            damaged: Told of those that are.

        Returns:
            What was loaded, and from where; None where there is nothing.

        Raises:
            TorchferryError: the error of the first, where all are damaged; or of the only one, where there is a step.
        """
        if self._ranks is None:
            return await self._load_first(await self._candidates(step), step, partial(self._load, options), damaged)
        tried = 0
        while True:
            found = await self._load_on_all(self._ranks, step, options, damaged)
            if found is None or await self._is_still_there(self._ranks, found[1]):
                return found
            tried += 1
            if tried == _TRIES:
                raise CheckpointChangedError(f"{found[1]} was replaced while the ranks loaded it, {tried} times.")

    async def _is_still_there(self, ranks: Ranks, candidate: Candidate) -> bool:
        """Whether it is the version that was there before the first rank loaded it: then all have loaded that one."""
        is_there: bool | None = None
        error: Exception | None = None
        if ranks.rank == 0:
            try:
                is_there = _said(candidate) in map(_said, await self._candidates(candidate.step))
            except CheckpointNotFoundError:
                is_there = False
            except Exception as failure:  # noqa: BLE001 - raised on every rank
                error = failure
        return bool(await in_thread(ranks.from_first, is_there, error))

    async def _load_on_all(
        self, ranks: Ranks, step: int | None, options: Mapping[str, Any], damaged: Callable[[Candidate], None]
    ) -> tuple[Any, Candidate] | None:
        loaded: Any = None
        said: Any = None
        error: Exception | None = None
        if ranks.rank == 0:
            try:
                candidates = await self._candidates(step)
                found = await self._load_first(candidates, step, partial(self._load, options), damaged)
                if found is not None:
                    loaded, said = found[0], _said(found[1])
            except Exception as failure:  # noqa: BLE001 - raised on every rank
                error = failure
        said = await in_thread(ranks.from_first, said, error)
        if said is None:
            return None
        candidate = Candidate(*said)
        if ranks.rank != 0:
            try:
                loaded = await self._load(options, candidate)
            except Exception as failure:  # noqa: BLE001 - the same
                error = failure
        await in_thread(ranks.agree, error)
        return loaded, candidate

    async def fill(
        self, step: int | None, into: Any, weights_only: bool, damaged: Callable[[Candidate], None]
    ) -> tuple[Any, Candidate] | None:
        """The same with a state dict of sharded tensors, which is filled on every rank.

        All fall back together, because an error of one rank is raised on all.
        """
        candidates: list[Candidate] = []
        error: Exception | None = None
        if self._ranks is None or self._ranks.rank == 0:
            try:
                candidates = await self._candidates(step)
            except Exception as failure:  # noqa: BLE001 - raised on every rank
                error = failure
        if self._ranks is not None:
            said = await in_thread(self._ranks.from_first, [_said(each) for each in candidates], error)
            candidates = [Candidate(*each) for each in said]
        elif error is not None:
            raise error
        return await self._load_first(candidates, step, partial(self._fill, into, weights_only), damaged)

    async def _load_first(
        self,
        candidates: list[Candidate],
        step: int | None,
        load: Callable[[Candidate], Awaitable[Any]],
        damaged: Callable[[Candidate], None],
    ) -> tuple[Any, Candidate] | None:
        failures: list[tuple[Candidate, TorchferryError]] = []
        for candidate in candidates:
            try:
                loaded = await load(candidate)
            except _FALLS_BACK as error:
                if step is not None:
                    raise
                failures.append((candidate, error))
                damaged(candidate)
                continue
            for failed, failure in failures:
                message = f"{failure} Restored {candidate} instead of {failed}."
                logger.warning("%s", message)
                warnings.warn(message, stacklevel=2)
            return loaded, candidate
        if not failures:
            return None
        for _, failure in failures[1:]:
            failures[0][1].add_note(str(failure))
        raise failures[0][1]

    async def _load(self, options: Mapping[str, Any], candidate: Candidate) -> Any:
        try:
            return await load_async(candidate.place, **self._store, **options)
        except CheckpointChangedError:  # replaced meanwhile by somebody who saves the same step
            return await load_async(candidate.place, **self._store, **options)

    async def _fill(self, into: Any, weights_only: bool, candidate: Candidate) -> Any:
        from torchferry import distributed

        if not candidate.sharded:
            raise CheckpointValueError(
                f"{candidate} is one object, which fills no sharded tensors: restore it without into=, or make it a "
                f"sharded one: torchferry convert {candidate} {candidate.directory}/"
            )
        load = partial(distributed.load, into, candidate.place, weights_only=weights_only, process_group=self._group)
        await wait_in_thread(partial(load, **self._store))
        return into


def _said(candidate: Candidate) -> list[Any]:
    """A candidate as JSON has it."""
    return [os.fspath(candidate.url), candidate.step, candidate.sharded, candidate.version]
