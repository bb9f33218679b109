"""Removes what killed saves have left: multipart uploads, uncommitted blocks, temporary files."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio

from torchferry.arguments import require_seconds
from torchferry.engine.loops import own_loop, run_on, synchronous
from torchferry.engine.tasks import task_group
from torchferry.engine.transfer import Transfer
from torchferry.errors import (
    CheckpointChangedError,
    CheckpointCorruptError,
    CheckpointFormatError,
    CheckpointNotFoundError,
    mask,
)
from torchferry.formats.safetensors import INDEX_SUFFIX, parse_shard_name, stem_of
from torchferry.objects.safetensors_opening import named_by
from torchferry.storage.base import Backend, Leftover, ListedObject
from torchferry.storage.registry import open_backend_async

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

__all__ = ["CleanReport", "clean", "clean_async"]

logger = logging.getLogger("torchferry")

OLDER_THAN = 3600.0
_AT_ONCE = 16
_SHARD = "shard of an unfinished save"
_UNKNOWN = datetime.max.replace(tzinfo=UTC)  # when what the store gives no time was changed: maybe just now


@dataclass(frozen=True, slots=True)
class CleanReport:
    """What :func:`clean` found.

    Attributes:
        removed: What it has removed; with ``dry_run``, what it would try to.
        younger: What is not old enough, and may belong to a save that is under way.
        kept: What it could not remove: a process has the file locked, or the store has no safe way to.
    """

    removed: tuple[Leftover, ...] = ()
    younger: tuple[Leftover, ...] = ()
    kept: tuple[Leftover, ...] = ()


async def clean_async(
    url: str | os.PathLike[str],
    *,
    older_than: float = OLDER_THAN,
    dry_run: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    filesystem: AbstractFileSystem | None = None,
    give_up_after: float | None = None,
) -> CleanReport:
    """Removes what saves that were killed have left at ``url`` and below: nothing that anybody can load.

    Multipart uploads (S3, Google Cloud Storage), uncommitted blocks where there is no blob (Azure), temporary files
    (local, and other fsspec filesystems), shards of sharded checkpoints that no ``.metadata`` beside them names, and
    shards of safetensors that have the time of a save in their names and that no index beside them names. Other objects
    are left alone, whatever they are: so are shards with Hugging Face's plain names, which may be anybody's.

    A save that is under way is not touched: what it stages changes every few seconds, and a local file is locked
    by its process besides. Several shards are as young as the last that is staged or finished of them. Ages are by the
    store's times and this machine's clock.

    Args:
        url: A bucket, a prefix, an object or a directory, as an fsspec URL or a local path. Of files: a directory.
        older_than: Seconds for which nothing came to what is removed; 0 for all of it, where nobody saves.
        dry_run: Remove nothing; only say what would be.
        storage_options: Arguments for the fsspec filesystem.
        filesystem: An fsspec filesystem to use as it is, instead of ``storage_options``.
        give_up_after: Seconds after which failed requests are not repeated any more; 120 by default.

    Raises:
        CheckpointNotFoundError: there is no such bucket, container or directory.
        UnsupportedOptionError: ``older_than`` is no number of seconds.
        StorageError: see :class:`~torchferry.storage.base.Backend`.
    """
    require_seconds("older_than", older_than)
    backend, path = await open_backend_async(
        url, storage_options=storage_options, filesystem=filesystem, directory=True
    )
    latest = _ago(older_than) if older_than else None
    with Transfer("clean", mask(os.fspath(url)), give_up_after=give_up_after).running(None):
        return await run_on(own_loop(backend.loop), _clean, backend, path, latest, dry_run)


clean = synchronous(clean_async)


def _ago(seconds: float) -> datetime:
    try:
        return datetime.now(UTC) - timedelta(seconds=seconds)
    except OverflowError:  # nothing is as old as that
        return datetime.min.replace(tzinfo=UTC)


async def _clean(backend: Backend, path: str, latest: datetime | None, dry_run: bool) -> CleanReport:
    below = f"{path}/"
    removed: list[Leftover] = []
    younger: list[Leftover] = []
    kept: list[Leftover] = []
    slots = anyio.Semaphore(_AT_ONCE)
    staged = [
        leftover
        async for leftover in backend.leftovers(below if backend.has_directories else path)
        if leftover.path == path or leftover.path.startswith(below)
    ]
    # Listed after what is staged, so that a shard which is finished meanwhile is seen, and before anything is removed.
    shards = [each async for each in _shards(backend, below, staged)]
    changes = _last_changes(staged, [shard for shard, _ in shards])

    def is_younger(leftover: Leftover) -> bool:
        return latest is not None and changes.get(_save_of(leftover.path), leftover.modified or _UNKNOWN) > latest

    async def discard(leftover: Leftover) -> None:
        try:
            (removed if dry_run or await backend.discard(leftover) else kept).append(leftover)
        finally:
            slots.release()

    async with task_group() as tasks:
        for leftover in staged:
            if is_younger(leftover):
                younger.append(leftover)
            else:
                await slots.acquire()
                tasks.start_soon(discard, leftover)
    under_way = {_save_of(leftover.path) for leftover in kept}
    for shard, remove in shards:
        save = _save_of(shard.path)
        if is_younger(shard):
            younger.append(shard)
        elif not under_way.isdisjoint({save, (save[0], "")}):
            kept.append(shard)
        else:
            if not dry_run:
                await remove()
            removed.append(shard)
    return CleanReport(tuple(removed), tuple(younger), tuple(kept))


def _save_of(path: str) -> tuple[str, str]:
    """The folder of what a save has left, and what tells the save from others there: "" where no name does.

    Without a name it may be of any save in the folder: a temporary file's name says nothing of its target.
    """
    folder, _, name = path.rpartition("/")
    stem, save = parse_shard_name(name) or ("", None)
    return folder, "" if save is None else f"{stem}-{save}"


def _last_changes(staged: Sequence[Leftover], shards: Sequence[Leftover]) -> dict[tuple[str, str], datetime]:
    """When each save that has left shards last staged or finished something."""
    newest: dict[tuple[str, str], datetime] = {}
    for leftover in (*staged, *shards):
        save, modified = _save_of(leftover.path), leftover.modified or _UNKNOWN
        newest[save] = max(modified, newest.get(save, modified))
    saves = {_save_of(shard.path) for shard in shards}
    return {save: max(newest[save], newest.get((save[0], ""), newest[save])) for save in saves}


async def _shards(
    backend: Backend, below: str, staged: Sequence[Leftover]
) -> AsyncIterator[tuple[Leftover, Callable[[], Awaitable[None]]]]:
    """The shards of unfinished saves below a prefix, and what removes each."""
    with suppress(CheckpointNotFoundError):  # no directory
        for leftover in await _unnamed_shards(backend, below):
            yield leftover, partial(run_on, backend.loop, backend.delete, leftover.path)
    with suppress(CheckpointNotFoundError, ImportError):  # a torch without torch.distributed
        from torchferry.distributed.leftovers import remove_stale_save, stale_saves

        for stale in await stale_saves(backend, below, staged):
            leftover = Leftover(stale.paths[0], stale.url, "shards of an unfinished save", modified=stale.modified)
            yield leftover, partial(remove_stale_save, backend, stale)


async def _unnamed_shards(backend: Backend, below: str) -> list[Leftover]:
    """The shards of safetensors that saves of torchferry wrote and that no index beside them names."""
    saves: dict[str, dict[tuple[str, str], list[ListedObject]]] = {}
    others: dict[str, list[str]] = {}
    async for item in backend.list(below):
        folder = item.path.rpartition("/")[0]
        stem, save = parse_shard_name(item.path) or ("", None)
        if save is None:
            others.setdefault(folder, []).append(item.path)
        else:
            saves.setdefault(folder, {}).setdefault((stem, save), []).append(item)
    found: list[Leftover] = []
    for folder, shards in saves.items():
        stems = {stem for stem, _ in shards}
        # An index may have come since, and one with the name of a file: as a copy may call it.
        indexes = {path for path in others.get(folder, ()) if path.endswith(".json") or stem_of(path) in stems}
        named = await _named(backend, indexes | {stem + INDEX_SUFFIX for stem in stems})
        if named is None:
            continue
        for items in shards.values():
            modified = max((item.modified for item in items if item.modified is not None), default=None)
            if named.isdisjoint(item.path for item in items):
                found += [Leftover(item.path, item.url, _SHARD, modified=modified) for item in items]
    return found


async def _named(backend: Backend, indexes: Collection[str]) -> set[str] | None:
    """The paths that these name, whichever are indexes; None where one cannot be read: then nothing is known."""
    named: set[str] = set()
    for index in indexes:
        try:
            try:
                named |= await named_by(backend, index)
            except CheckpointChangedError:  # a save has published its own meanwhile
                named |= await named_by(backend, index)
        except (CheckpointCorruptError, CheckpointChangedError) as error:
            logger.warning("What saves have left beside it is left alone: %s", error)
            return None
        except (CheckpointNotFoundError, CheckpointFormatError):
            continue
    return named
