"""What saves that died have left in the directory of a sharded checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from torchferry.distributed.place import METADATA, Place, is_shard_name, save_name_of
from torchferry.engine.cancellation import in_thread
from torchferry.errors import (
    CheckpointChangedError,
    CheckpointFormatError,
    CheckpointNotFoundError,
    UnsafeCheckpointError,
)

if TYPE_CHECKING:
    from torchferry.storage.base import Backend, Leftover, ListedObject

logger = logging.getLogger("torchferry.distributed")

__all__ = ["StaleSave", "remove_stale_save", "stale_saves"]


@dataclass(frozen=True, slots=True)
class StaleSave:
    """The shards of a save that no metadata names: it died, or it is under way, or its checkpoint was replaced.

    Attributes:
        url: The directory that they are in.
        paths: Of the shards, as the backend's verbs take them.
        nbytes: Of all.
        modified: When the save last wrote or staged something there, or began, with a time zone.
    """

    url: str
    paths: tuple[str, ...]
    nbytes: int
    modified: datetime

    @property
    def age(self) -> float:
        """Seconds since then."""
        return (datetime.now(UTC) - self.modified).total_seconds()


async def stale_saves(backend: Backend, prefix: str, staged: Iterable[Leftover] | None = None) -> list[StaleSave]:
    """Finds the saves below ``prefix``, of any number of checkpoints, that no ``.metadata`` beside them names.

    Only what :class:`~torchferry.distributed.StorageWriter` has written is looked at: shards by their names, in
    directories by theirs that are no checkpoints themselves. Call it on the backend's loop. A save that is under way is
    among them: :attr:`StaleSave.age` tells.

    Args:
        backend: Of the store.
        prefix: What the paths begin with.
        staged: What ``backend.leftovers(prefix)`` has found already; by default it is asked.

    Raises:
        StorageError: the store cannot be listed or read.
    """
    if staged is None:  # asked before the shards are listed: one that is finished in between is seen
        staged = [leftover async for leftover in backend.leftovers(prefix)]
    times_staged: dict[str, list[datetime]] = {}
    for leftover in staged:
        folder = leftover.path.rpartition("/")[0]
        times_staged.setdefault(folder, []).append(leftover.modified or datetime.now(UTC))
    found, metadata = await _list(backend, prefix)
    stale: list[StaleSave] = []
    for directory, saves in found.items():
        place = Place(backend, directory, backend.url(directory))
        if not f"{directory}/".startswith(prefix):  # only some of the directory was listed
            metadata[directory] = [
                name
                async for each in backend.list(f"{directory}/")
                if (name := each.path.removeprefix(f"{directory}/")).endswith(METADATA) and "/" not in name
            ]
        # Metadata may have come since the listing.
        named = await _named(place, {METADATA, *metadata.get(directory, ())})
        if named is None:
            continue
        for save, shards in saves.items():
            if save in named or f"{directory}/{save}" in metadata:  # or a checkpoint that somebody has called so
                continue
            begun = save_name_of(f"{save}/")
            assert begun is not None  # noqa: S101 - as found above
            times = [begun[1], *(shard.modified for shard in shards if shard.modified is not None)]
            times += times_staged.get(f"{directory}/{save}", ())
            paths = tuple(shard.path for shard in shards)
            nbytes = sum(shard.size for shard in shards)
            stale.append(StaleSave(backend.url(f"{directory}/{save}"), paths, nbytes, max(times)))
    return stale


async def remove_stale_save(backend: Backend, stale: StaleSave) -> None:
    """Deletes the shards of a stale save. Call it on the backend's loop."""
    directory = stale.paths[0].rpartition("/")[0].rpartition("/")[0]
    place = Place(backend, directory, stale.url)
    await place.delete([path.removeprefix(f"{directory}/") for path in stale.paths])


async def _list(backend: Backend, prefix: str) -> tuple[dict[str, dict[str, list[ListedObject]]], dict[str, list[str]]]:
    """Lists the shards below a prefix by directory and save, and the names of metadata by directory."""
    found: dict[str, dict[str, list[ListedObject]]] = {}
    metadata: dict[str, list[str]] = {}
    async for listed in backend.list(prefix):
        directory, _, name = listed.path.rpartition("/")
        if name.endswith(METADATA):
            metadata.setdefault(directory, []).append(name)
            continue
        above, _, save = directory.rpartition("/")
        if save_name_of(f"{save}/") is not None and is_shard_name(name):
            found.setdefault(above, {}).setdefault(save, []).append(listed)
    return found, metadata


async def _named(place: Place, names: Collection[str]) -> set[str] | None:
    """The saves that metadata names; None where some cannot be read: then none is known to be stale."""
    named: set[str] = set()
    for name in names:
        try:
            named |= await _saves_in(place, name)
        except CheckpointNotFoundError:
            continue  # gone meanwhile
        except (CheckpointFormatError, UnsafeCheckpointError, CheckpointChangedError) as error:
            logger.warning("What saves have left in %s is left alone: %s", place.url, error)
            return None
    return named


async def _saves_in(place: Place, name: str) -> set[str]:
    """The saves that an object of metadata names."""
    try:
        data, _ = await place.get(name)
    except CheckpointChangedError:  # a save has committed meanwhile
        data, _ = await place.get(name)
    return await in_thread(_names, data, place.url_of(name))


def _names(data: bytes, url: str) -> set[str]:
    from torchferry.distributed.metadata import read_metadata, shards_of  # torch: only where there is such a save

    return {path.partition("/")[0] for path in shards_of(read_metadata(data, url, weights_only=True))}
