"""Removes what killed saves have left: multipart uploads, uncommitted blocks, temporary files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import anyio

from torchferry.engine.loops import own_loop, run_on, synchronous
from torchferry.engine.tasks import task_group
from torchferry.engine.transfer import Transfer
from torchferry.errors import CheckpointNotFoundError, mask
from torchferry.storage.base import Backend, Leftover
from torchferry.storage.registry import open_backend_async

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

__all__ = ["CleanReport", "clean", "clean_async"]

OLDER_THAN = 3600.0
_AT_ONCE = 16


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
    (local, and other fsspec filesystems), and shards of sharded checkpoints that no ``.metadata`` beside them names.
    Other objects are left alone, whatever they are.

    A save that is under way is not touched: what it stages changes every few seconds, and a local file is locked
    by its process besides. Ages are by the store's times and this machine's clock.

    Args:
        url: A bucket, a prefix, an object or a directory, as an fsspec URL or a local path. Of files: a directory.
        older_than: Seconds for which nothing came to what is removed; 0 for all of it, where nobody saves.
        dry_run: Remove nothing; only say what would be.
        storage_options: Arguments for the fsspec filesystem.
        filesystem: An fsspec filesystem to use as it is, instead of ``storage_options``.
        give_up_after: Seconds after which failed requests are not repeated any more; 120 by default.

    Raises:
        CheckpointNotFoundError: there is no such bucket, container or directory.
        StorageError: see :class:`~torchferry.storage.base.Backend`.
    """
    backend, path = await open_backend_async(
        url, storage_options=storage_options, filesystem=filesystem, directory=True
    )
    latest = datetime.now(UTC) - timedelta(seconds=older_than) if older_than else None
    with Transfer("clean", mask(os.fspath(url)), give_up_after=give_up_after).running(None):
        return await run_on(own_loop(backend.loop), _clean, backend, path, latest, dry_run)


clean = synchronous(clean_async)


async def _clean(backend: Backend, path: str, latest: datetime | None, dry_run: bool) -> CleanReport:
    below = f"{path}/"
    removed: list[Leftover] = []
    younger: list[Leftover] = []
    kept: list[Leftover] = []
    slots = anyio.Semaphore(_AT_ONCE)

    async def discard(leftover: Leftover) -> None:
        try:
            (removed if dry_run or await backend.discard(leftover) else kept).append(leftover)
        finally:
            slots.release()

    async with task_group() as tasks:
        async for leftover in backend.leftovers(below if backend.has_directories else path):
            if leftover.path == path or leftover.path.startswith(below):
                if latest is not None and (leftover.modified is None or leftover.modified > latest):
                    younger.append(leftover)
                else:
                    await slots.acquire()
                    tasks.start_soon(discard, leftover)
    with suppress(CheckpointNotFoundError, ImportError):  # no directory; a torch without torch.distributed
        from torchferry.distributed.leftovers import remove_stale_save, stale_saves

        for stale in await stale_saves(backend, below):
            leftover = Leftover(stale.paths[0], stale.url, "shards of an unfinished save", modified=stale.modified)
            if latest is not None and stale.modified > latest:
                younger.append(leftover)
                continue
            if not dry_run:
                await remove_stale_save(backend, stale)
            removed.append(leftover)
    return CleanReport(tuple(removed), tuple(younger), tuple(kept))
