"""A checkpoint that one attempt of a task leaves for the next, where an SDK has a place for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from torchferry.checkpoint.content import content_of, loadable
from torchferry.checkpoint.transfer import load_content, save_content
from torchferry.checkpoint.values import LoadedCheckpoint, PyTorchCheckpoint
from torchferry.engine.cancellation import in_thread
from torchferry.engine.loops import synchronous
from torchferry.errors import CheckpointNotFoundError
from torchferry.options import LoadOptions, SaveOptions

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

__all__ = ["TaskCheckpoint"]

OptionsT = TypeVar("OptionsT", LoadOptions, SaveOptions)


class TaskCheckpoint:
    """Loads what an earlier attempt of this task saved, and saves for the next one. One object, and no local file.

    Args:
        destination: Where this attempt saves.
        sources: Where an earlier attempt may have saved, the latest first; this attempt's own place may be one.
        storage_options: Gives the arguments for the filesystem of a URL.
        filesystem: Gives the filesystem of a URL, instead.

    Attributes:
        destination: As above.
        sources: As above; the destination comes first once something is saved there.
    """

    def __init__(
        self,
        destination: str,
        sources: Iterable[str],
        *,
        storage_options: Callable[[str], Mapping[str, Any]] | None = None,
        filesystem: Callable[[str], AbstractFileSystem] | None = None,
    ) -> None:
        self.destination = destination
        self.sources = list(sources)
        self._storage_options = storage_options
        self._filesystem = filesystem

    async def load_async(self, options: LoadOptions | None = None) -> Any:
        """Loads what was saved last, by this attempt or the one before.

        Args:
            options: How; as on an annotation.

        Returns:
            A :class:`LoadedCheckpoint` where a checkpoint or a dict was saved, and else what was saved. None when
            nothing was.

        Raises:
            TorchferryError: as :func:`torchferry.load_async` does; that there is nothing is no error.
        """
        chosen = options or LoadOptions()
        for url in self.sources:
            try:
                reached, filesystem = await self._reach(url, chosen)
                loaded = await load_content(url, reached, filesystem=filesystem)
            except CheckpointNotFoundError:
                continue
            return LoadedCheckpoint(loaded, uri=url) if isinstance(loaded, dict) else loaded
        return None

    async def save_async(self, checkpoint: Any, options: SaveOptions | None = None) -> None:
        """Saves a checkpoint, in place of the one that this attempt saved before: all of it, or none.

        Args:
            checkpoint: A :class:`PyTorchCheckpoint`, or anything else that ``torch.save`` takes.
            options: How; as on an annotation.

        Raises:
            CheckpointValueError: what was saved can only be loaded in another way; the message says how.
            TorchferryError: as :func:`torchferry.save_async` does.
        """
        error = None
        if isinstance(checkpoint, PyTorchCheckpoint):
            prepared = await in_thread(lambda: loadable(content_of(checkpoint)))
            checkpoint, error = prepared.content, prepared.error(self.destination)
        chosen, filesystem = await self._reach(self.destination, options or SaveOptions())
        await save_content(checkpoint, self.destination, chosen, filesystem=filesystem)
        if self.destination not in self.sources[:1]:
            self.sources.insert(0, self.destination)
        if error is not None:
            raise error

    load = synchronous(load_async)
    save = synchronous(save_async)

    async def _reach(self, url: str, options: OptionsT) -> tuple[OptionsT, AbstractFileSystem | None]:
        if options.storage_options or (self._filesystem is None and self._storage_options is None):
            return options, None
        # The first filesystem of a kind imports its library: not on the event loop.
        if self._filesystem is not None:
            return options, await in_thread(self._filesystem, url)
        assert self._storage_options is not None  # noqa: S101 - one of the three
        return replace(options, storage_options=await in_thread(self._storage_options, url)), None
