"""The storage writer of ``torch.distributed.checkpoint``: one shard a rank, and the commit."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter as DcpStorageWriter
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from torchferry.distributed.errors import with_portable_errors
from torchferry.distributed.metadata import read_metadata, shards_of, storage_info, write_metadata
from torchferry.distributed.place import METADATA, Place, new_save_name, require_one, save_name_of, shard_path
from torchferry.distributed.staging import Stager
from torchferry.engine.loops import own_loop, run, run_on
from torchferry.engine.tasks import task_group
from torchferry.engine.transfer import Transfer, TransferReport, current
from torchferry.engine.types import ObjectStat
from torchferry.errors import (
    CheckpointNotFoundError,
    CheckpointValueError,
    RankFailedError,
    StorageError,
    StoragePermissionError,
    TorchferryError,
    mask,
)
from torchferry.formats.item_stream import Item, ItemStream

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem
    from fsspec.callbacks import Callback

__all__ = ["StorageWriter", "remove_before", "require_shards", "shards_before"]

logger = logging.getLogger("torchferry.distributed")

_LONG = 60.0  # seconds that a save takes, after which its shards are looked at before the commit
_LOOKS = 16  # under way at once
_BYTES = 4096  # about how many bytes an item has that is no tensor


@dataclass(frozen=True)
class _Shard:
    """Where a rank's shard goes; travels from the coordinator to the rank as the plan's ``storage_data``.

    Attributes:
        save: The save's name.
        rank: The rank.
    """

    save: str
    rank: int

    @property
    def relative_path(self) -> str:
        return shard_path(self.save, self.rank)


@dataclass(frozen=True)
class _ShardResult(WriteResult):
    """The first item's result, with what the store said of the shard.

    Attributes:
        shard: Relative path, size and ETag.
        directory: The URL that the rank saved to.
    """

    shard: tuple[str, int, str | None] = ("", 0, None)
    directory: str = ""


class StorageWriter(Stager, DcpStorageWriter):
    """Saves sharded checkpoints to any store: ``dcp.save(state_dict, storage_writer=StorageWriter(url))``.

    Each rank's items go up as one object, straight from the tensors' memory, in bounded memory and parallel parts.
    The checkpoint appears at once, when all shards are there; what was at the URL before is whole until then, and
    removed afterwards. The layout is the stock one: stock readers read it.

    Called by DCP in this order: on all ranks :meth:`set_up_storage_writer`, :meth:`prepare_local_plan`; on the
    coordinator :meth:`prepare_global_plan`; on all ranks :meth:`write_data`; on the coordinator :meth:`finish`.
    What fails on one rank fails the save on all, as DCP's ``CheckpointException``, which is no ``Exception``;
    :func:`torchferry.distributed.save` raises torchferry's own errors.

    Args:
        url: The directory of the checkpoint: any fsspec URL, or a local path.
        storage_options: Arguments for the fsspec filesystem of ``url``.
        filesystem: An fsspec filesystem to use as it is, instead of ``storage_options``.
        part_size: Bytes in a part of a shard's multipart upload, instead of 16 MiB (or what the size needs).
        overwrite: Whether a checkpoint that is there may be replaced. If not, the save is refused.
        give_up_after: Seconds without progress after which failed requests are not repeated any more; 120 by default.
        callback: Told the size of this rank's shard, and of bytes as the store acknowledges them.
        report: Called with the :class:`~torchferry.TransferReport` of this rank's shard.

    Attributes:
        may_be_committed: Whether ``.metadata`` was sent: the checkpoint may be there, whatever was answered.
        ranks: How many must save together; None for any number.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        storage_options: Mapping[str, Any] | None = None,
        filesystem: AbstractFileSystem | None = None,
        part_size: int | None = None,
        overwrite: bool = True,
        give_up_after: float | None = None,
        callback: Callback | None = None,
        report: Callable[[TransferReport], object] | None = None,
    ) -> None:
        super().__init__()
        self._url = url
        self._options = {"storage_options": storage_options, "filesystem": filesystem}
        self._part_size = part_size
        self._overwrite = overwrite
        self._give_up_after = give_up_after
        self._callback = callback
        self._report = report
        self._opened: Place | None = None
        self._rank: int | None = None
        self._is_coordinator = False
        self._use_collectives = True
        self._written: list[str] = []  # shards of this rank that no metadata names, as far as it knows
        self.may_be_committed = False
        self.ranks: int | None = None

    # --- called by DCP

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it can be a URL."""
        return isinstance(checkpoint_id, str | os.PathLike)

    @property
    def checkpoint_id(self) -> str:
        """The URL, without secrets."""
        return mask(os.fspath(self._url))

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Called where ``dcp.save`` is given a ``checkpoint_id``: the URL to save to."""
        if checkpoint_id is not None and os.fspath(checkpoint_id) != os.fspath(self._url):
            self._url = checkpoint_id
            self._opened = None

    def storage_meta(self) -> StorageMeta:
        """What planners may want to know."""
        return StorageMeta(checkpoint_id=self.checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Notes what this rank is."""
        del args
        self._is_coordinator = is_coordinator
        self._rank = kwargs.get("rank")
        self._use_collectives = kwargs.get("use_collectives", True)
        self._written.clear()
        self.may_be_committed = False

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Leaves the plan as it is."""
        return plan

    @with_portable_errors
    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Chooses the save's name, and where each rank's shard goes."""
        if self.ranks not in {None, len(plans)}:
            raise RankFailedError(
                f"Of {self.ranks} ranks, {len(plans)} came to save: the process group has changed since the save "
                "began. Wait for its result before you destroy the group."
            )
        if not self._overwrite:
            run(self._require_nothing_there)
        save = new_save_name()
        first = 0 if self._use_collectives else self._rank or 0
        return [replace(plan, storage_data=_Shard(save, first + index)) for index, plan in enumerate(plans)]

    @with_portable_errors
    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Uploads this rank's items."""
        written: Future[list[WriteResult]] = Future()
        written.set_result(run(self._write, plan, planner) if plan.items else [])
        return written

    @with_portable_errors
    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Commits: puts ``.metadata``, and then removes the shards of the checkpoint that was there before."""
        run(self._commit, metadata, results)

    # --- for torchferry.distributed

    @property
    def is_uncommitted(self) -> bool:
        """Whether nothing can be committed: this rank would do it, and has not begun to."""
        return self._is_coordinator and not self.may_be_committed

    def discard(self) -> None:
        """Removes what this rank has written for a save that failed before anything was committed."""
        written, self._written = self._written, []
        try:
            if written:
                run(self._remove, written)
        except (TorchferryError, OSError) as error:
            logger.warning("What a failed save wrote to %s is left for clean: %s", self.checkpoint_id, error)

    # --- the work

    async def _place(self) -> Place:
        if self._opened is None:
            self._opened = await Place.open_async(self._url, **self._options)
        return self._opened

    async def _remove(self, relative_paths: list[str]) -> None:
        await (await self._place()).delete(relative_paths)

    @property
    def _metadata_name(self) -> str:
        return METADATA if self._use_collectives or self._rank is None else f"__{self._rank}{METADATA}"

    async def _require_nothing_there(self) -> None:
        place = await self._place()
        path = place.at(self._metadata_name)
        try:
            await run_on(place.backend.loop, place.backend.stat, path)
        except CheckpointNotFoundError:
            return
        raise CheckpointValueError(f"{place.url} has a checkpoint already: overwrite=True replaces it.")

    async def _write(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        place = await self._place()
        shard: _Shard = plan.storage_data
        if not isinstance(shard, _Shard) or shard.relative_path in _used:
            # A planner that caches plans gives that of a save before: its name is taken.
            shard = _Shard(new_save_name(), getattr(shard, "rank", None) or self._rank or 0)
        if len(_used) > _KEPT:
            _used.clear()
        _used.add(shard.relative_path)
        transfer = Transfer(
            "save", mask(place.url_of(shard.relative_path)), callback=self._callback, give_up_after=self._give_up_after
        )
        with transfer.running(self._report):
            return await run_on(own_loop(place.backend.loop), self._upload, place, shard.relative_path, plan, planner)

    async def _upload(
        self, place: Place, relative_path: str, plan: SavePlan, planner: SavePlanner
    ) -> list[WriteResult]:
        ordered = sorted(plan.items, key=lambda item: item.type != WriteItemType.BYTE_IO)  # small ones side by side
        unlike: set[MetadataIndex] = set()
        items = [
            Item(_nbytes(item), partial(_resolve, planner, item, unlike), held_by=partial(_held_by, planner, item))
            for item in ordered
        ]
        stream = ItemStream(
            items,
            plan_for=place.backend.upload_plan,
            part_size=self._part_size,
            url=place.url_of(relative_path),
        )
        transfer = current()
        self._written.append(relative_path)
        async with stream.running(), transfer.telling():
            transfer.set_size(stream.size_hint)
            stat = await place.backend.write(place.at(relative_path), stream, plan=stream.plan)
            transfer.set_size(stat.size)
            transfer.moved_at_least(stat.size)
        places = [
            storage_info(relative_path, written, is_as_planned=item.index not in unlike)
            for item, written in zip(ordered, stream.written, strict=True)
        ]
        results = [WriteResult(item.index, info.length, info) for item, info in zip(ordered, places, strict=True)]
        first = results[0]
        shard = (relative_path, stat.size, stat.etag)
        return [
            _ShardResult(first.index, first.size_in_bytes, first.storage_data, shard, place.whole_url),
            *results[1:],
        ]

    async def _commit(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        place = await self._place()
        storage_data = {result.index: result.storage_data for of_rank in results for result in of_rank}
        written = [result for of_rank in results for result in of_rank if isinstance(result, _ShardResult)]
        require_one({place.whole_url, *(result.directory for result in written)}, "save to")
        shards = {path: (size, etag) for path, size, etag in (result.shard for result in written)}
        name = self._metadata_name
        save = next(iter(shards), new_save_name()).partition("/")[0]
        with Transfer("save", mask(place.url_of(name)), give_up_after=self._give_up_after).running(None):
            before = await shards_before(place, name)
            data = write_metadata(metadata, storage_data, place.url, save, shards)
            await require_shards(place, shards)
            self.may_be_committed = True
            stat = await place.put(name, data)
            self._written.clear()
            await remove_before(place, name, stat, [path for path in before if path not in shards])


_used: set[str] = set()  # shards that this process has written
_KEPT = 10_000


def _nbytes(item: WriteItem) -> int:
    data = item.tensor_data
    if data is None:
        return _BYTES
    return data.chunk.sizes.numel() * data.properties.dtype.itemsize


def _resolve(planner: SavePlanner, item: WriteItem, unlike: set[MetadataIndex]) -> torch.Tensor | memoryview:
    """What is stored of an item; notes in ``unlike`` those that are other tensors than their plan says."""
    data = planner.resolve_data(item)
    if isinstance(data, io.BytesIO):
        return data.getbuffer()
    if data.layout is not torch.strided:
        raise CheckpointValueError(
            f"{item.index.fqn} is a sparse tensor ({data.layout}), of which torch.distributed.checkpoint loads "
            "nothing: save what to_dense() makes of it."
        )
    said = item.tensor_data
    if said is not None and data.shape != said.chunk.sizes:
        raise CheckpointValueError(
            f"The planner gives {item.index.fqn} as {list(data.shape)}, and its plan says {list(said.chunk.sizes)}: "
            "nothing could load it."
        )
    if said is not None and data.dtype != said.properties.dtype:
        unlike.add(item.index)
    return data


def _held_by(planner: SavePlanner, item: WriteItem) -> Iterable[torch.Tensor]:
    """The DTensor that an item is of, and its memory.

    An operation in place counts up the version of the DTensor alone, or of its memory alone; ``to_local()`` makes a new
    tensor each time, which nobody keeps.
    """
    whole = (getattr(planner, "state_dict", None) or {}).get(item.index.fqn)
    if not isinstance(whole, DTensor):
        return ()
    with torch.no_grad():  # else its version is one of its own
        return whole, whole.to_local()


async def require_shards(place: Place, relative_paths: Collection[str]) -> None:
    """Looks that the shards of a save that took long are there, before it is committed.

    Somebody may have cleaned meanwhile, and taken those of the ranks that were done long ago for a dead save's: a store
    does not show everything that is under way, and a rank may compute for long before it stages anything.

    Raises:
        StorageError: one is gone.
    """
    begun = [found[1] for path in relative_paths if (found := save_name_of(path)) is not None]
    if not begun or (datetime.now(UTC) - min(begun)).total_seconds() < _LONG:
        return
    limiter = anyio.CapacityLimiter(_LOOKS)

    async def look(path: str) -> None:
        async with limiter:
            try:
                await run_on(place.backend.loop, place.backend.stat, place.at(path))
            except CheckpointNotFoundError as error:
                raise StorageError(
                    f"{place.url_of(path)} was removed while the save was under way, maybe by clean with an "
                    "older_than= that is less than the save takes. Nothing was committed."
                ) from error
            except StoragePermissionError:  # who may only write cannot look
                return

    async with task_group() as tasks:
        for path in relative_paths:
            tasks.start_soon(look, path)


async def shards_before(place: Place, name: str) -> list[str]:
    """The shards of the checkpoint that is there."""
    try:
        data, _ = await place.get(name)
        return shards_of(read_metadata(data, place.url_of(name), weights_only=True))
    except CheckpointNotFoundError:
        return []
    except TorchferryError as error:
        logger.warning("The shards of the checkpoint that was at %s are left for clean: %s", place.url, error)
        return []


async def remove_before(place: Place, name: str, committed: ObjectStat, relative_paths: list[str]) -> None:
    """Removes the shards of the checkpoint that was there, after another was committed."""
    if not relative_paths:
        return
    try:
        there = await run_on(place.backend.loop, place.backend.stat, place.at(name))
        if there.etag == committed.etag:  # else somebody else has saved meanwhile
            await place.delete(relative_paths)
    except (TorchferryError, OSError) as error:  # the save has succeeded
        logger.warning("The shards of the checkpoint that was at %s are left for clean: %s", place.url, error)
