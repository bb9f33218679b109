"""``save`` and ``load`` of sharded checkpoints by their URL."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException, _wrap_exception
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlanner, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.checkpoint.stateful import Stateful

from torchferry.distributed.checks import ReadPart, damage_of, find_damaged
from torchferry.distributed.errors import is_uncommitted, portable, ranks_as_errors
from torchferry.distributed.planner import SafeLoadPlanner
from torchferry.distributed.reader import StorageReader
from torchferry.distributed.staging import Stager
from torchferry.distributed.writer import StorageWriter
from torchferry.engine.cancellation import ThreadPool
from torchferry.engine.loops import run
from torchferry.engine.transfer import TransferReport
from torchferry.errors import RankFailedError, mask
from torchferry.formats.torch_hooks import kept_gloo_group

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem
    from fsspec.callbacks import Callback

__all__ = ["AsyncSave", "async_save", "load", "save"]

logger = logging.getLogger("torchferry.distributed")

T = TypeVar("T")

_uploads = ThreadPool(1, "torchferry-sharded")  # one save after the other, in the same order on every rank
_stager = Stager()
_last: list[Future[Metadata]] = []


@dataclass(frozen=True, slots=True)
class AsyncSave:
    """A save that is under way, as ``torch.distributed.checkpoint.AsyncSaveResponse``.

    Attributes:
        url: Where to, without secrets.
        staging_completion: Done when the state dict may be changed: when :func:`async_save` has returned.
        upload_completion: Done when the checkpoint is there; its result is the metadata.
    """

    url: str
    staging_completion: Future[None]
    upload_completion: Future[Metadata]

    def done(self) -> bool:
        """Whether the save is over, in whichever way."""
        return self.upload_completion.done()

    def result(self, timeout: float | None = None) -> Metadata:
        """Waits until the checkpoint is there, on all ranks.

        Raises:
            TimeoutError: it is still under way after ``timeout`` seconds.
            Exception: what :func:`save` raises.
        """
        return self.upload_completion.result(timeout)


def save(
    state_dict: dict[str, Any],
    url: str | os.PathLike[str],
    *,
    storage_options: Mapping[str, Any] | None = None,
    filesystem: AbstractFileSystem | None = None,
    part_size: int | None = None,
    overwrite: bool = True,
    give_up_after: float | None = None,
    callback: Callback | None = None,
    report: Callable[[TransferReport], object] | None = None,
    planner: SavePlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
) -> Metadata:
    """Saves a sharded checkpoint: to be called on every rank of the group; each saves its own part.

    The checkpoint appears at ``url`` when all ranks have saved theirs, or not at all, and what was there before is
    whole until then. Without a process group, all of it is saved by this process.

    Args:
        state_dict: As ``torch.distributed.checkpoint.save`` takes it: DTensors, sharded tensors, tensors (each saved
            once, by one rank), anything that can be pickled, and objects with ``state_dict`` and ``load_state_dict``.
        url: The directory of the checkpoint: any fsspec URL, or a local path.
        storage_options: Arguments for the fsspec filesystem of ``url``.
        filesystem: An fsspec filesystem to use as it is, instead of ``storage_options``.
        part_size: Bytes in a part of a shard's multipart upload, instead of 16 MiB (or what the size needs).
        overwrite: Whether a checkpoint that is there may be replaced.
        give_up_after: Seconds without progress after which failed requests are not repeated any more; 120 by default.
        callback: Told the size of this rank's shard, and of bytes as the store acknowledges them.
        report: Called with the :class:`~torchferry.TransferReport` of this rank's shard.
        planner: Passed on to DCP.
        process_group: The same.
        no_dist: The same: save all of ``state_dict`` in this process.

    Returns:
        The checkpoint's metadata, on every rank.

    Raises:
        RankFailedError: a rank died, or failed with an error that is not torchferry's own. Nothing was committed.
        StorageError: the store refused or failed on some rank; the message names it. On every rank.
    """
    writer = StorageWriter(
        url,
        storage_options=storage_options,
        filesystem=filesystem,
        part_size=part_size,
        overwrite=overwrite,
        give_up_after=give_up_after,
        callback=callback,
        report=report,
    )
    alone = _is_alone(no_dist)
    values = _on_all_ranks(f"save {writer.checkpoint_id}", lambda: _without_owners(state_dict), process_group, alone)
    return save_with(writer, values, planner=planner, process_group=process_group, alone=alone)


def save_with(
    writer: StorageWriter,
    state_dict: dict[str, Any],
    *,
    planner: SavePlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    alone: bool,
) -> Metadata:
    """``dcp.save`` with torchferry's own errors; removes what this rank wrote where nothing was committed."""
    with ranks_as_errors(f"save {writer.checkpoint_id}", writer.ranks or _world_size(process_group, alone)):
        try:
            with _quiet(alone):
                metadata: Metadata = dcp_save(
                    state_dict,
                    storage_writer=writer,
                    planner=planner,
                    process_group=process_group,
                    no_dist=alone,
                )
        except BaseException as error:
            if writer.is_uncommitted or (isinstance(error, CheckpointException) and is_uncommitted(error)):
                writer.discard()
            raise
    return metadata


def async_save(
    state_dict: dict[str, Any],
    url: str | os.PathLike[str],
    *,
    storage_options: Mapping[str, Any] | None = None,
    filesystem: AbstractFileSystem | None = None,
    part_size: int | None = None,
    overwrite: bool = True,
    give_up_after: float | None = None,
    callback: Callback | None = None,
    report: Callable[[TransferReport], object] | None = None,
    planner: SavePlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
) -> AsyncSave:
    """:func:`save` that returns when ``state_dict`` may be changed: a copy of it in host memory is saved meanwhile.

    The copy's memory is reused by the next save, which waits until this one is over. The ranks talk over a gloo group
    of their own, which the first call makes: nothing gets between the collectives of the training. The interpreter
    ends when the save has ended.

    Args:
        state_dict: As for :func:`save`, and so all others.
        url: The same.
        storage_options: The same.
        filesystem: The same.
        part_size: The same.
        overwrite: The same.
        give_up_after: The same.
        callback: The same.
        report: The same.
        planner: The same.
        process_group: The same.
        no_dist: The same.

    Returns:
        The save that is under way; its result raises what :func:`save` raises.
    """
    writer = StorageWriter(
        url,
        storage_options=storage_options,
        filesystem=filesystem,
        part_size=part_size,
        overwrite=overwrite,
        give_up_after=give_up_after,
        callback=callback,
        report=report,
    )
    alone = _is_alone(no_dist)
    group = None if alone else kept_gloo_group("saves", process_group)
    if _last:
        wait(_last)  # its outcome is its caller's to look at
        _last.clear()
    what = f"save {writer.checkpoint_id}"
    staged = _on_all_ranks(what, lambda: _stager.stage(_without_owners(state_dict)), group, alone)
    writer.ranks = _world_size(group, alone)
    upload = _uploads.executor.submit(_save_later, writer, staged, planner=planner, process_group=group, alone=alone)
    del staged
    upload.add_done_callback(partial(_log_failure, what))
    _last.append(upload)
    staging: Future[None] = Future()
    staging.set_result(None)
    return AsyncSave(writer.checkpoint_id, staging, upload)


def _save_later(writer: StorageWriter, staged: dict[str, Any], *, alone: bool, **options: Any) -> Metadata:
    """:func:`save_with` in the thread of the uploads, while the training may end its process group."""
    try:
        return save_with(writer, staged, alone=alone, **options)
    except Exception as error:
        if alone or dist.is_initialized():
            raise
        raise RankFailedError(
            f"{writer.checkpoint_id} was not saved: the process group was destroyed meanwhile. Wait for result() of "
            "async_save() before dist.destroy_process_group()."
        ) from error


def _without_owners(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The states of the objects in it in their places."""
    return {key: value.state_dict() if isinstance(value, Stateful) else value for key, value in state_dict.items()}


def _hand_over(values: Mapping[str, Any], state_dict: dict[str, Any]) -> None:
    """Gives the objects in it their states, and takes the others' values."""
    for key, value in values.items():
        owner = state_dict[key]
        if isinstance(owner, Stateful):
            owner.load_state_dict(value)
        else:
            state_dict[key] = value


def _on_all_ranks(what: str, prepare: Callable[[], T], group: dist.ProcessGroup | None, alone: bool) -> T:
    """What ``prepare()`` returns; where it fails on one rank, all fail: the others would go on to wait for that rank.

    And that rank's next save would be taken for a part of this one.
    """
    if alone:
        return prepare()
    failure: BaseException | None = None
    try:
        prepared = prepare()
    except BaseException as error:  # noqa: BLE001 - raised on every rank
        failure = portable(error)
    told: list[Any] = [None] * dist.get_world_size(group)
    with ranks_as_errors(what, len(told)):
        dist.all_gather_object(told, failure, group=group)
        if failures := {rank: _wrap_exception(error) for rank, error in enumerate(told) if error is not None}:
            raise CheckpointException("prepare", failures)
    return prepared


def _log_failure(what: str, upload: Future[Metadata]) -> None:
    """Says what may never be asked for."""
    if not upload.cancelled() and (error := upload.exception()) is not None:
        logger.error("Could not %s in the background: %s: %s", what, type(error).__name__, error)


def load(
    state_dict: dict[str, Any],
    url: str | os.PathLike[str],
    *,
    storage_options: Mapping[str, Any] | None = None,
    filesystem: AbstractFileSystem | None = None,
    verify: bool = True,
    weights_only: bool = True,
    give_up_after: float | None = None,
    callback: Callback | None = None,
    report: Callable[[TransferReport], object] | None = None,
    broadcast: bool = False,
    planner: LoadPlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
) -> None:
    """Loads a sharded checkpoint into ``state_dict``, in place: to be called on every rank of the group.

    The number of ranks and the placements may be others than those it was saved with. Rank 0 reads ``.metadata`` and
    tells the others.

    Args:
        state_dict: As ``torch.distributed.checkpoint.load`` takes it: its tensors are filled.
        url: The directory of the checkpoint.
        storage_options: Arguments for the fsspec filesystem of ``url``.
        filesystem: An fsspec filesystem to use as it is, instead of ``storage_options``.
        verify: Check CRC32s, and that each shard is the one that was saved.
        weights_only: Load only tensors and plain values, also from what is no tensor; as in ``torch.load``. Has no
            say in what a ``planner`` of yours does.
        give_up_after: Seconds without progress after which failed requests are not repeated any more; 120 by default.
        callback: Told the number of bytes that this rank needs, and of those that have arrived.
        report: Called with the :class:`~torchferry.TransferReport` of what this rank read; again with that of what it
            read again, as the ranks' parts of an item together did not match its CRC32.
        broadcast: Items that all ranks ask for alike, as under DDP, are read by one of them, which sends them to the
            others through the process group (gloo: from host memory). For stores that are slower than the network.
        planner: Passed on to DCP.
        process_group: The same.
        no_dist: The same: load in this process, without the others.

    Raises:
        CheckpointNotFoundError: there is no checkpoint. On every rank, as all errors.
        CheckpointCorruptError: it is damaged.
        CheckpointChangedError: a shard is not the one that was saved.
        UnsafeCheckpointError: it needs globals that ``weights_only=True`` does not allow.
        RankFailedError: a rank died, or failed with an error that is not torchferry's own.
        StorageError: see :class:`~torchferry.storage.base.Backend`.
    """
    planner = planner or SafeLoadPlanner(weights_only=weights_only)
    reader = StorageReader(
        url,
        storage_options=storage_options,
        filesystem=filesystem,
        verify=verify,
        weights_only=weights_only,
        give_up_after=give_up_after,
        callback=callback,
        report=report,
        broadcast=broadcast,
        process_group=process_group,
    )
    alone = _is_alone(no_dist)
    what = f"load {mask(os.fspath(url))}"
    values = _on_all_ranks(what, lambda: _without_owners(state_dict), process_group, alone)
    with ranks_as_errors(what, _world_size(process_group, alone)):
        _read_and_tell(reader, process_group, alone)
        with _quiet(alone):
            dcp_load(
                values,
                storage_reader=reader,
                planner=planner,
                process_group=process_group,
                no_dist=alone,
            )
        if verify:
            _check_together(reader, planner, process_group, alone)
    _on_all_ranks(what, lambda: _hand_over(values, state_dict), process_group, alone)


def _read_and_tell(reader: StorageReader, group: dist.ProcessGroup | None, alone: bool) -> None:
    """Gives every rank's reader the ``.metadata`` that rank 0 reads and checks; or raises its error on every rank."""
    told: list[Any] = [None]
    is_reader = alone or dist.get_rank(group) == 0
    if is_reader:
        try:
            told[0] = run(reader.read_metadata_bytes)
            reader.use(told[0])
        except BaseException as error:
            if alone:
                raise
            told[0] = portable(error)
    if not alone:
        dist.broadcast_object_list(told, src=dist.get_global_rank(group, 0) if group else 0, group=group)
    if isinstance(told[0], BaseException):
        raise CheckpointException("read", {0: _wrap_exception(told[0])})
    if not is_reader:
        reader.use(told[0], is_checked=True)


def _check_together(reader: StorageReader, planner: LoadPlanner, group: dist.ProcessGroup | None, alone: bool) -> None:
    """Checks what no rank has read as a whole; what does not match is read again, once, as all that ranks read."""
    if damaged := _damaged(reader, group, alone):
        items = {part.item for part in damaged}
        _on_all_ranks(f"load {reader.checkpoint_id}", lambda: reader.read_again(items, planner), group, alone)
        if damaged := _damaged(reader, group, alone):
            raise damage_of(damaged[0])


def _damaged(reader: StorageReader, group: dist.ProcessGroup | None, alone: bool) -> list[ReadPart]:
    """A part of each item that is damaged, on every rank: rank 0 puts the CRC32s of all ranks' parts together."""
    if alone:
        return find_damaged(reader.read_parts)
    root = dist.get_global_rank(group, 0) if group else 0
    is_root = dist.get_rank(group) == 0
    gathered: list[Any] = [[]] * dist.get_world_size(group)
    dist.gather_object(reader.read_parts, gathered if is_root else None, dst=root, group=group)
    outcome: list[Any] = [None]
    if is_root:
        try:
            outcome[0] = find_damaged(part for parts in gathered for part in parts)
        except BaseException as error:  # noqa: BLE001 - raised on every rank
            outcome[0] = portable(error)
    dist.broadcast_object_list(outcome, src=root, group=group)
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    damaged: list[ReadPart] = outcome[0]
    return damaged


def _is_alone(no_dist: bool) -> bool:
    return no_dist or not dist.is_available() or not dist.is_initialized()


def _world_size(group: dist.ProcessGroup | None, alone: bool) -> int:
    return 1 if alone else dist.get_world_size(group)


@contextmanager
def _quiet(alone: bool) -> Generator[None]:
    """Without DCP's warning that there is no process group, where that is so on purpose."""
    if not alone:
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable)")
        yield
