"""The checkpoints that the attempts of one task leave for each other, where an SDK has a place for them."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from torchferry.checkpoint.content import prepared
from torchferry.checkpoint.values import LoadedCheckpoint, PyTorchCheckpoint, remember_place
from torchferry.engine.cancellation import in_thread
from torchferry.errors import CheckpointNotFoundError, CheckpointValueError
from torchferry.manager import CheckpointManager
from torchferry.series.steps import name_of, url_of

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["TaskCheckpoints"]

_BEFORE = "attempt-before.txt"
_MOST_ATTEMPTS = 1000


class TaskCheckpoints(CheckpointManager):
    """A :class:`~torchferry.CheckpointManager` of one attempt of a task, which starts where the attempt before ended.

    It also saves a ``PyTorchCheckpoint``. The task can return the same one afterwards: as long as it is what is stored,
    it is not uploaded again. Do not let another task delete it: choose ``max_to_keep`` for what this task needs.

    Args:
        destination: Where this attempt saves.
        source: Where the attempt before saved; None for the first one.
        **options: Those of :class:`~torchferry.CheckpointManager`.
    """

    def __init__(self, destination: str, source: str | None, **options: Any) -> None:
        super().__init__(destination, **options)
        self._source = source
        self._asked = False

    def save(
        self, step: int, obj: Any, metrics: Mapping[str, Any] | None = None, *, force: bool = False, until: Any = None
    ) -> bool:
        """Saves a checkpoint, as :meth:`torchferry.CheckpointManager.save` does.

        Args:
            step: As there, and so all others.
            obj: A ``PyTorchCheckpoint``, or anything else that ``torch.save`` takes.
            metrics: As there.
            force: The same.
            until: The same.

        Raises:
            CheckpointValueError: what was saved can only be loaded in another way; the message says how.
        """
        if not isinstance(obj, PyTorchCheckpoint) or not self._wants(step, force):
            return super().save(step, obj, metrics, force=force, until=until)
        content, error = self._content(step, obj)
        saved = super().save(step, content, metrics, force=force, until=until)
        return self._saved(step, obj, saved, error)

    async def save_async(
        self, step: int, obj: Any, metrics: Mapping[str, Any] | None = None, *, force: bool = False, until: Any = None
    ) -> bool:
        """The asynchronous twin of :meth:`save`."""
        if not isinstance(obj, PyTorchCheckpoint) or not self._wants(step, force):
            return await super().save_async(step, obj, metrics, force=force, until=until)
        content, error = await in_thread(self._content, step, obj)
        saved = await super().save_async(step, content, metrics, force=force, until=until)
        return self._saved(step, obj, saved, error)

    async def _restore_anywhere(self, step: int | None, *, into: Any, **loading: Any) -> Any:
        found = await super()._restore_anywhere(step, into=into, **loading)
        if found is None or into is not None or not isinstance(found[0], dict):
            return found
        loaded, candidate = found
        return LoadedCheckpoint(loaded, uri=os.fspath(candidate.place)), candidate

    async def _start(self) -> str | os.PathLike[str] | None:
        """The last attempt that has saved something; noted for the next one, in case this one saves nothing."""
        if not self._asked:
            self._start_from = await self._last_that_saved()
            if self._start_from is not None and self._leads:
                await (await self._series()).write(_BEFORE, os.fspath(self._start_from).encode())
            self._asked = True
        return self._start_from

    async def _last_that_saved(self) -> str | None:
        url = self._source
        for _ in range(_MOST_ATTEMPTS):
            if url is None or (await self._list(url)).steps:
                return url
            before = None
            with suppress(CheckpointNotFoundError):
                before = (await (await self._series(url)).read(_BEFORE)).decode()
            url = before
        return None

    def _content(self, step: int, checkpoint: PyTorchCheckpoint) -> tuple[Any, CheckpointValueError | None]:
        ready = prepared(checkpoint)
        return ready.content, ready.error(self._place(step))

    def _saved(self, step: int, checkpoint: PyTorchCheckpoint, saved: bool, error: CheckpointValueError | None) -> bool:
        if saved:
            remember_place(checkpoint, self._place(step))
        if saved and error is not None:
            raise error
        return saved

    def _place(self, step: int) -> str:
        return os.fspath(url_of(self.url, name_of(step)))
