"""A series of checkpoints as it is stored: one object or directory a step, found by listing."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torchferry.arguments import whole_number
from torchferry.engine.cancellation import in_thread
from torchferry.engine.loops import own_loop, run_on
from torchferry.engine.transfer import Transfer
from torchferry.engine.types import Chunk, ObjectStat
from torchferry.errors import CheckpointChangedError, CheckpointNotFoundError, mask
from torchferry.storage.local import LocalBackend
from torchferry.storage.registry import is_chain, open_backend

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from fsspec import AbstractFileSystem

__all__ = ["Series", "SeriesListing", "StoredStep", "as_step", "encode_metrics", "name_of", "url_of"]

logger = logging.getLogger("torchferry")

T = TypeVar("T")

LAST = 10**10 - 1
"""The last step that there can be: names have ten digits, so that they sort by step."""

METADATA_NAME = "torchferrymetrics"  # letters alone: every store takes that
_MOST_METADATA = 1024  # bytes; S3 takes 2 KiB with all names
_NAME = re.compile(r"step-([0-9]{10})(?:\.pt|(/\.metadata)|(\.metrics\.json))")
_OF_A_SHARDED = re.compile(r"\.metadata|(?:[^/]+/)*[^/]+\.distcp")


@dataclass(frozen=True, slots=True)
class StoredStep:
    """A whole checkpoint of a series.

    Attributes:
        step: Its step.
        path: As the backend's verbs take it; of a sharded one, its directory.
        sharded: Whether it is a directory of ``torch.distributed.checkpoint``, which has its ``.metadata``.
        size: Bytes; of a sharded one, those of ``.metadata``.
        etag: The version, where a listing tells.
        modified: When it was written, where a listing tells.
    """

    step: int
    path: str
    sharded: bool
    size: int
    etag: str | None = None
    modified: datetime | None = None

    @property
    def object_path(self) -> str:
        """The path of the object whose version counts: of a sharded one, ``.metadata``."""
        return f"{self.path}/.metadata" if self.sharded else self.path

    @property
    def version(self) -> str:
        """Tells this version from others of the same step."""
        return f"{self.etag} {self.size} {self.modified}"


@dataclass(frozen=True, slots=True)
class SeriesListing:
    """What is in a series.

    Attributes:
        steps: The whole checkpoints, by step, in order.
        metrics: The paths of metrics that are objects of their own, by step.
        older: Where a step is there as an object and as a directory: the one that was written before the other.
    """

    steps: dict[int, StoredStep] = field(default_factory=dict)
    metrics: dict[int, str] = field(default_factory=dict)
    older: dict[int, StoredStep] = field(default_factory=dict)


class Series:
    """The checkpoints below one URL.

    Args:
        url: Of the directory.
        storage_options: As for :func:`torchferry.save`.
        filesystem: The same.
        give_up_after: The same.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        storage_options: Mapping[str, Any] | None,
        filesystem: AbstractFileSystem | None,
        give_up_after: float | None,
    ) -> None:
        self.url = mask(os.fspath(url))
        self._give_up_after = give_up_after
        opened = open_backend(url, storage_options=storage_options, filesystem=filesystem, directory=True)
        self._backend, self._path = opened

    async def list(self) -> SeriesListing:
        """Lists what is there; nothing where the directory is not there yet."""
        return await self._run("list", self._list)

    async def delete(self, listing: SeriesListing, step: int) -> None:
        """Deletes a checkpoint, and then its metrics; what is not there (any more) is no error."""
        await self._run("delete", partial(self._delete, listing, step))

    async def delete_replaced(self, step: int, *, sharded: bool, keeps_metrics: bool) -> None:
        """Deletes what belongs to earlier checkpoints of a step, now that a new one is there.

        Args:
            step: The step.
            sharded: Whether the new one is sharded: an older one of the other kind goes.
            keeps_metrics: Whether the metrics that are an object of their own are those of the new one.
        """
        await self._run("delete", partial(self._delete_replaced, step, sharded, keeps_metrics))

    def metadata_for(self, metrics: str | None) -> dict[str, str] | None:
        """The metadata to save an object with, where the store keeps it and it is not too long."""
        if metrics is None or not self._backend.keeps_metadata or len(metrics) > _MOST_METADATA:
            return None
        return {METADATA_NAME: metrics}

    async def write_metrics(self, step: int, stat: ObjectStat | None, metrics: str) -> None:
        """Stores metrics as an object of their own, with the version of the checkpoint that they are of.

        Where that is None, they count for whatever version will be there.
        """
        etag, size = (None, None) if stat is None else (stat.etag, stat.size)
        data = f'{{"etag": {json.dumps(etag)}, "size": {json.dumps(size)}, "metrics": {metrics}}}'.encode()
        await self._run("write", partial(self._write, f"{self._path}/step-{step:010}.metrics.json", data))

    async def stat_sharded(self, step: int) -> ObjectStat:
        """The version of a sharded checkpoint: that of its metadata."""
        path = f"{self._path}/{name_of(step, sharded=True)}/.metadata"
        return await self._run("look up", partial(self._backend.stat, path))

    async def read_metrics(self, listing: SeriesListing, step: int) -> dict[str, Any]:
        """The metrics of a checkpoint; empty where it was saved without, or is another version by now.

        Damaged ones are as good as none: the log has a warning that names them.
        """
        return await self._run("read", partial(self._read_metrics, listing, step))

    async def read(self, name: str) -> bytes:
        """Reads a small object of the directory."""
        return await self._run("read", partial(self._read, f"{self._path}/{name}"))

    async def write(self, name: str, data: bytes) -> None:
        """Writes a small object into the directory."""
        await self._run("write", partial(self._write, f"{self._path}/{name}", data))

    async def _run(self, verb: str, func: Callable[[], Coroutine[Any, Any, T]]) -> T:
        with Transfer(verb, self.url, give_up_after=self._give_up_after).running(None):
            return await run_on(own_loop(self._backend.loop), func)

    async def _list(self) -> SeriesListing:
        found: list[StoredStep] = []
        metrics: dict[int, str] = {}
        try:
            async for each in self._backend.list(f"{self._path}/step-"):
                match = _NAME.fullmatch(each.path.removeprefix(f"{self._path}/"))
                if match is None or not each.size:  # Azure shows an empty blob for a moment
                    continue
                step, sharded = int(match[1]), match[2] is not None
                if match[3]:
                    metrics[step] = each.path
                else:
                    path = each.path.removesuffix(match[2] or "")
                    found.append(StoredStep(step, path, sharded, each.size, each.etag, each.modified))
        except CheckpointNotFoundError:
            if not self._backend.has_directories:  # it is the bucket that is missing
                raise
        found.sort(key=lambda each: (each.step, each.modified.timestamp() if each.modified else 0.0))
        steps = {each.step: each for each in found}  # of two, the later
        older = {each.step: each for each in found if each is not steps[each.step]}
        return SeriesListing(steps, metrics, older)

    async def _delete(self, listing: SeriesListing, step: int) -> None:
        for stored in (listing.older.get(step), listing.steps.get(step)):
            if stored is not None:
                await self._delete_stored(stored)
        if step in listing.metrics:
            await self._backend.delete(listing.metrics[step])

    async def _delete_replaced(self, step: int, sharded: bool, keeps_metrics: bool) -> None:
        listing = await self._list()
        there = [each for each in (listing.steps.get(step), listing.older.get(step)) if each is not None]
        if all(each.sharded != sharded for each in there):  # somebody has deleted the new one: then nothing is sure
            return
        for stored in there:
            if stored.sharded != sharded:
                await self._delete_stored(stored)
        if step in listing.metrics and not keeps_metrics:
            await self._backend.delete(listing.metrics[step])

    async def _delete_stored(self, stored: StoredStep) -> None:
        await (self._delete_sharded(stored.path) if stored.sharded else self._backend.delete(stored.path))

    async def _delete_sharded(self, directory: str) -> None:
        """Deletes a sharded checkpoint: what makes it one first, so that a part of it is never taken for a whole."""
        await self._backend.delete(f"{directory}/.metadata")
        directories = {directory}
        with suppress(CheckpointNotFoundError):  # a directory that is gone
            paths = [each.path async for each in self._backend.list(f"{directory}/")]
            for path in paths:
                if _OF_A_SHARDED.fullmatch(path.removeprefix(f"{directory}/")):
                    await self._backend.delete(path)
                    directories.add(path.rpartition("/")[0])
        if isinstance(self._backend, LocalBackend):
            for path in sorted(directories, key=len, reverse=True):
                with suppress(OSError):  # somebody's file is in there
                    await in_thread(os.rmdir, path)

    async def _read_metrics(self, listing: SeriesListing, step: int) -> dict[str, Any]:
        stored = listing.steps[step]
        etag = stored.etag
        try:
            if etag is None or (self._backend.keeps_metadata and not stored.sharded):
                stat = await self._backend.stat(stored.object_path)
                etag = stat.etag
                if text := stat.metadata.get(METADATA_NAME):
                    return _decode(text, self._said(step))
            if step in listing.metrics:
                data = await self._read(listing.metrics[step])
                return _metrics_of(_decode(data, self._said(step)), etag, stored.size)
        except CheckpointNotFoundError:  # deleted meanwhile
            pass
        return {}

    def _said(self, step: int) -> str:
        return f"step {step} in {self.url}"

    async def _read(self, path: str) -> bytes:
        try:
            return await self._read_version(path)
        except CheckpointChangedError:  # written again meanwhile
            return await self._read_version(path)

    async def _read_version(self, path: str) -> bytes:
        stat = await self._backend.stat(path)
        return bytes(await self._backend.read(path, 0, stat.size, stat))

    async def _write(self, path: str, data: bytes) -> None:
        async def chunks() -> AsyncIterator[Chunk]:
            yield Chunk(data)

        await self._backend.write(path, chunks(), plan=self._backend.upload_plan(len(data)))


def as_step(step: Any) -> int:
    """A step as an int: numpy and tensors have whole numbers, too.

    Raises:
        ValueError: it is no step.
    """
    number = whole_number(step)
    if number is None or not 0 <= number <= LAST:
        raise ValueError(f"A step is a whole number from 0 to {LAST:,}; given: {step!r}.")
    return number


def name_of(step: int, *, sharded: bool = False) -> str:
    """The name of a step's checkpoint in the directory of its series.

    Raises:
        ValueError: it is no step.
    """
    return f"step-{as_step(step):010}" if sharded else f"step-{as_step(step):010}.pt"


def url_of(url: str | os.PathLike[str], name: str) -> str | os.PathLike[str]:
    """The URL of what has this name in a directory.

    Of a chain, the directory is in the first layer that has a path: ``dir://run/NAME::file:///d``.
    """
    if not isinstance(url, str):
        return Path(url) / name
    layers = url.split("::") if "://" in url and is_chain(url) else [url]
    place = next((number for number, layer in enumerate(layers) if "://" in layer), -1)
    start, protocol_ends, path = layers[place].rpartition("://")
    path = f"{path.rstrip('/')}/{name}" if path else name
    layers[place] = f"{start}{protocol_ends}{path}"
    return "::".join(layers)


def encode_metrics(metrics: Mapping[str, Any] | None) -> str | None:
    """Metrics as JSON: numbers (tensors and numpy scalars of one, too), text, and what is made of them.

    Raises:
        ValueError: something in them is none of that, or they are no dict.
    """
    if not metrics:
        return None
    if not isinstance(metrics, Mapping) or not all(isinstance(name, str) for name in metrics):
        raise ValueError(f'Metrics are a dict of names and numbers, such as {{"loss": 0.5}}; given: {metrics!r}.')

    def plain(value: Any) -> Any:
        item = getattr(value, "item", None)
        if callable(item):
            try:
                return item()
            except (RuntimeError, ValueError):  # a tensor of several
                pass
        raise ValueError(f"A metric is a number or text; given: {value!r}.")

    return json.dumps(dict(metrics), default=plain)


def _metrics_of(said: Mapping[str, Any], etag: str | None, size: int) -> dict[str, Any]:
    """What an object of metrics says of this version; empty where it is of another one."""
    metrics, version = said.get("metrics"), (said.get("etag"), said.get("size", -1))
    is_of_it = version in ((None, None), (etag, size))  # no set: what JSON has need not be hashable
    return metrics if isinstance(metrics, dict) and is_of_it else {}


def _decode(data: str | bytes, said: str) -> dict[str, Any]:
    """A dict from JSON; empty, with a warning in the log, where it is none."""
    try:
        found = json.loads(data)
        if isinstance(found, dict):
            return found
    except (ValueError, RecursionError):
        pass
    logger.warning("The metrics of %s are damaged: it counts as saved without.", said)
    return {}
