"""The storage reader of ``torch.distributed.checkpoint``: the bytes that a rank needs, straight into its tensors."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader as DcpStorageReader
from torch.futures import Future

from torchferry.distributed.archives import Guess, StoredTensor, find_tensor
from torchferry.distributed.checks import ReadPart
from torchferry.distributed.errors import with_portable_errors
from torchferry.distributed.fetch import Files, fetch
from torchferry.distributed.metadata import chunk_of, extras_of, read_metadata, require_plain
from torchferry.distributed.place import METADATA, Place, require_one
from torchferry.distributed.placing import Plan, Wanted
from torchferry.distributed.sharing import Broadcast, Shared, cpu_group, said_by_all, share
from torchferry.distributed.slices import Piece
from torchferry.engine.cancellation import in_thread
from torchferry.engine.loops import run, run_on
from torchferry.engine.tasks import task_group
from torchferry.engine.transfer import Transfer, TransferReport, current
from torchferry.engine.types import Buffer, ObjectStat
from torchferry.errors import (
    CheckpointChangedError,
    CheckpointCorruptError,
    mask,
)
from torchferry.printable import printable

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem
    from fsspec.callbacks import Callback

__all__ = ["StorageReader"]

_SMALL = 256 << 10  # an item of somebody else's writer that is shorter is read whole
_LONGEST_OVERHEAD = 16 << 10  # bytes of an archive beside its tensor: with more, torch has to load it
_LOOKS = 16  # files that are looked up at once


class StorageReader(DcpStorageReader):
    """Loads sharded checkpoints from any store: ``dcp.load(state_dict, storage_reader=StorageReader(url))``.

    It reads what torchferry, the stock writers and s3torchconnector wrote. Each rank reads the bytes that it needs,
    all files at once, straight into its tensors where they are contiguous; a part of a tensor costs its own bytes.
    Every item that is read whole is checked against its CRC32. Shards that torchferry wrote must be the version that
    was saved; others must not change while they are read.

    Args:
        url: The directory of the checkpoint: any fsspec URL, or a local path.
        storage_options: Arguments for the fsspec filesystem of ``url``.
        filesystem: An fsspec filesystem to use as it is, instead of ``storage_options``.
        verify: Check CRC32s, and that each shard is the one that was saved.
        weights_only: Allow only DCP's own classes in ``.metadata``. Without, a checkpoint can run any code.
        give_up_after: Seconds without progress after which failed requests are not repeated any more; 120 by default.
        callback: Told the number of bytes that this rank needs, and of those that have arrived.
        report: Called with the :class:`~torchferry.TransferReport` of what this rank read.
        broadcast: Items that all ranks ask for alike, as under DDP, are read by one of them, which sends them to the
            others through the process group. The coordinator's says for all ranks.
        process_group: The one that ``dcp.load`` is given, for ``broadcast``.
    """

    def __init__(
        self,
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
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self._url = url
        self._options = {"storage_options": storage_options, "filesystem": filesystem}
        self._verify = verify
        self._weights_only = weights_only
        self._give_up_after = give_up_after
        self._callback = callback
        self._report = report
        self._broadcast = broadcast
        self._group = process_group
        self._opened: Place | None = None
        self._metadata: Metadata | None = None
        self._plan: LoadPlan | None = None
        self.read_parts: list[ReadPart] = []
        self._told: Metadata | None = None  # of the .metadata that another rank has read

    @classmethod
    def at(cls, place: Place, *, verify: bool = True, weights_only: bool = True) -> StorageReader:
        """A reader of what is at a place; for torchferry itself."""
        reader = cls(place.url, verify=verify, weights_only=weights_only)
        reader._opened = place
        return reader

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
        """Called where ``dcp.load`` is given a ``checkpoint_id``: the URL to load from."""
        self._metadata = None
        if checkpoint_id is not None and os.fspath(checkpoint_id) != os.fspath(self._url):
            self._url = checkpoint_id
            self._opened = self._told = None

    @with_portable_errors
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Reads ``.metadata``; with ``rank=``, that of one rank (saved with ``use_collectives=False``)."""
        del args
        rank = kwargs.get("rank")
        if self._told is not None and rank is None:
            return self._told
        name = METADATA if rank is None else f"__{rank}{METADATA}"
        data = run(self.read_metadata_bytes, name)
        return read_metadata(data, mask(self._require_place().url_of(name)), weights_only=self._weights_only)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Notes where the items are."""
        del is_coordinator, args, kwargs
        self._metadata = metadata

    @with_portable_errors
    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Notes in the plan where this rank loads from."""
        return replace(plan, storage_data=run(self._place).whole_url)

    @with_portable_errors
    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Leaves the plans as they are, but for who reads what all ranks have."""
        require_one({plan.storage_data for plan in plans}, "load from")
        if not self._broadcast or len(plans) == 1 or not dist.is_initialized():
            return plans
        if len(plans) != dist.get_world_size(self._group):
            return plans
        assert self._metadata is not None  # noqa: S101 - DCP has set up the reader
        return share(plans, {index: info.length for index, info in self._metadata.storage_data.items()})

    @with_portable_errors
    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Reads this rank's items into the tensors that ``planner`` names."""
        done: Future[None] = Future()
        done.set_result(None)
        self._plan = plan
        shared = plan.storage_data
        contents: dict[int, bytearray] = {}
        if isinstance(shared, Shared) and shared.items:
            targets = self._read_shared(plan, planner, shared, contents)
            if targets is None:
                return done
        else:
            targets = _targets(plan.items, planner)
            self._read(plan.items, targets, range(len(targets)), contents)
        for index, (item, target) in enumerate(zip(plan.items, targets, strict=True)):
            if target is None:
                planner.load_bytes(item, io.BytesIO(contents.pop(index)))
            else:
                planner.commit_tensor(item, target)
        return done

    def _read(
        self,
        items: Sequence[ReadItem],
        targets: Sequence[torch.Tensor | None],
        numbers: Sequence[int],
        contents: dict[int, bytearray],
    ) -> None:
        """Reads the items of these numbers."""
        if not numbers:
            return
        assert self._metadata is not None  # noqa: S101 - DCP has set up the reader
        found: dict[int, bytearray] = {}
        requests = [items[number] for number in numbers]
        run(self.read_items, self._metadata, requests, [targets[number] for number in numbers], found)
        contents.update((numbers[index], content) for index, content in found.items())

    def _read_shared(
        self, plan: LoadPlan, planner: LoadPlanner, shared: Shared, contents: dict[int, bytearray]
    ) -> list[torch.Tensor | None] | None:
        """Reads what is this rank's to read, and exchanges it; None where another rank has failed.

        The ranks tell each other how they are before each step: none waits for one that has failed.
        """
        assert self._metadata is not None  # noqa: S101 - DCP has set up the reader
        storage_data = self._metadata.storage_data
        group = cpu_group(self._group)
        everything: Sequence[int] = range(len(plan.items))
        try:
            targets = _targets(plan.items, planner)
            lengths = {
                number: storage_data[plan.items[number].storage_index].length
                for number in shared.items
                if targets[number] is None
            }
            broadcast = Broadcast(group, shared, plan.items, targets, lengths)
        except BaseException:
            said_by_all(group, None)
            raise
        said = said_by_all(group, broadcast.looks)
        if None in said:
            return None
        is_shared = len(said) == 1  # else their tensors differ: each reads for itself
        try:
            mine = [number for number in everything if number not in broadcast.others] if is_shared else everything
            self._read(plan.items, targets, mine, contents)
        except BaseException:
            said_by_all(group, None)
            raise
        if None in said_by_all(group, "read"):
            return None
        if is_shared:
            broadcast.exchange(contents)
        return targets

    # --- for torchferry.distributed

    def use(self, data: bytes, *, is_checked: bool = False) -> None:
        """Takes a ``.metadata`` that was read; raises as :meth:`read_metadata`.

        Args:
            data: What is stored.
            is_checked: Whether another rank has taken it, too: what it would cost is not looked into again.
        """
        url = f"{self.checkpoint_id}/{METADATA}"
        self._told = read_metadata(data, url, weights_only=self._weights_only, is_checked=is_checked)

    async def read_metadata_bytes(self, name: str = METADATA) -> bytes:
        """What is stored as ``.metadata``."""
        place = await self._place()
        with Transfer("load", mask(place.url_of(name)), give_up_after=self._give_up_after).running(None):
            data, _ = await place.get(name)
        return data

    def read_again(self, damaged: Collection[tuple[str, int]], planner: LoadPlanner) -> None:
        """Reads what this rank has of some items again, also what another rank has read for it.

        Args:
            damaged: The items, as in :class:`ReadPart`.
            planner: As in :meth:`read_data`.
        """
        assert self._plan is not None  # noqa: S101 - it has been read before
        assert self._metadata is not None  # noqa: S101 - DCP has set up the reader
        infos = [self._metadata.storage_data[item.storage_index] for item in self._plan.items]
        items = [
            item
            for item, info in zip(self._plan.items, infos, strict=True)
            if item.type != LoadItemType.BYTE_IO and (info.relative_path, info.offset) in damaged
        ]
        if not items:
            return
        targets = _targets(items, planner)
        self.read_parts = [part for part in self.read_parts if part.item not in damaged]
        run(self._read_again, self._metadata, items, targets)
        for item, target in zip(items, targets, strict=True):
            assert target is not None  # noqa: S101 - it is a tensor's
            planner.commit_tensor(item, target)

    async def _read_again(
        self, metadata: Metadata, requests: Sequence[ReadItem], targets: Sequence[torch.Tensor | None]
    ) -> None:
        place = await self._place()
        transfer = Transfer("load", place.url, give_up_after=self._give_up_after)
        with transfer.running(self._report):
            for name in dict.fromkeys(request.storage_index.fqn for request in requests):
                transfer.warn(f"{place.url}: {printable(name)} does not match its CRC32. Reading it again.")
            await self.read_items_within(place, metadata, requests, targets, {})

    async def read_items(
        self,
        metadata: Metadata,
        requests: Sequence[ReadItem],
        targets: Sequence[torch.Tensor | None],
        contents: dict[int, bytearray],
    ) -> None:
        """Reads items.

        Args:
            metadata: Says where they are.
            requests: What to read.
            targets: A tensor for each, of the shape that the request says; None for an item that is no tensor.
            contents: Given the bytes of those, by the index of the request.
        """
        place = await self._place()
        transfer = Transfer("load", place.url, callback=self._callback, give_up_after=self._give_up_after)
        with transfer.running(self._report):
            await self.read_items_within(place, metadata, requests, targets, contents)

    async def read_items_within(
        self,
        place: Place,
        metadata: Metadata,
        requests: Sequence[ReadItem],
        targets: Sequence[torch.Tensor | None],
        contents: dict[int, bytearray],
    ) -> None:
        """:meth:`read_items`, as a part of the transfer that the caller is in."""
        await run_on(place.backend.loop, self._read_items, place, metadata, requests, targets, contents)

    # --- the work

    async def _place(self) -> Place:
        if self._opened is None:
            self._opened = await Place.open_async(self._url, **self._options)
        return self._opened

    def _require_place(self) -> Place:
        assert self._opened is not None  # noqa: S101 - asked for only when it is there
        return self._opened

    async def _read_items(
        self,
        place: Place,
        metadata: Metadata,
        requests: Sequence[ReadItem],
        targets: Sequence[torch.Tensor | None],
        contents: dict[int, bytearray],
        guess: bool = True,
    ) -> None:
        first, later = _apart(requests)
        if later:
            for chosen in (first, later):
                found: dict[int, bytearray] = {}
                some = [requests[number] for number in chosen], [targets[number] for number in chosen]
                await self._read_items(place, metadata, *some, found, guess)
                contents.update((chosen[index], content) for index, content in found.items())
            return
        infos = [_info(metadata, request.storage_index, place.url) for request in requests]
        paths = list(dict.fromkeys(info.relative_path for info in infos))
        with current().stage("opening"):
            stats = await self.versions(place, metadata, paths)
        numbers = {path: number for number, path in enumerate(paths)}
        files = Files(place.backend, [(place.at(path), stat) for path, stat in zip(paths, stats, strict=True)])
        wanted = [
            Wanted(request, numbers[info.relative_path], info, target)
            for request, info, target in zip(requests, infos, targets, strict=True)
        ]
        _check_lengths(wanted, stats)
        with current().stage("planning"):
            stored, guesses = await self._find_archives(files, stats, metadata, wanted, guess)
        plan = await in_thread(Plan, metadata, wanted, stored, guesses, contents, stats, self._verify)
        transfer = current()
        transfer.set_size(plan.nbytes)
        with transfer.stage("reading"):
            async with transfer.telling():
                await fetch(files, plan.parts, plan.checksums, place.url)
        self.read_parts += plan.read_parts
        if wrong := await in_thread(plan.disproved):
            again = [want.request for want in wrong], [want.target for want in wrong]
            await self._read_items(place, metadata, *again, contents, guess=False)
        await in_thread(plan.finish)

    async def _find_archives(
        self,
        files: Files,
        stats: Sequence[ObjectStat],
        metadata: Metadata,
        wanted: Sequence[Wanted],
        guess: bool,
    ) -> tuple[dict[tuple[int, int], StoredTensor], dict[tuple[int, int], Guess]]:
        """Where the tensors are in items of somebody else's writer: what is known, and what is guessed.

        One of each kind is looked into: others of its dtype, with as many dimensions and as large an archive, should be
        like it. What tells is read together with them, and costs no request.
        """
        looked: list[Wanted] = []
        kinds: dict[Any, list[tuple[Wanted, Sequence[int]]]] = {}
        for want in wanted:
            if want.target is None or want.info.length <= _SMALL or hasattr(want.info, "crc32"):
                continue
            dtype, chunk = chunk_of(metadata, want.request.storage_index)
            kind = dtype, len(chunk.sizes), want.info.length - chunk.sizes.numel() * dtype.itemsize
            if guess and kind in kinds and want.request.lengths == chunk.sizes:
                kinds[kind].append((want, chunk.sizes))
            else:
                kinds.setdefault(kind, [(want, ())])
                looked.append(want)
        stored = await self.look_into_archives(files, stats, metadata, map(_place_of, looked))
        guesses: dict[tuple[int, int], Guess] = {}
        rest: list[Wanted] = []
        for (first, _), *others in kinds.values():
            like = stored.get((first.number, first.info.offset))
            for want, shape in others:
                found = None if like is None else Guess.like(like, shape, want.info.length)
                if found is None:
                    rest.append(want)
                else:
                    guesses.setdefault((want.number, want.info.offset), found)
        stored.update(await self.look_into_archives(files, stats, metadata, map(_place_of, rest)))
        return stored, {place: found for place, found in guesses.items() if place not in stored}

    async def versions(self, place: Place, metadata: Metadata, paths: Sequence[str]) -> list[ObjectStat]:
        """The version of each file: the one that was saved, or else the one that is there."""
        extras = extras_of(metadata)
        same_place = extras.url == place.url and self._verify
        found: dict[str, ObjectStat] = {}

        async def look(path: str) -> None:
            known = extras.shards.get(path)
            if (
                known is not None and known[1] is not None and same_place and not place.is_local
            ):  # a file's version is another in each copy
                found[path] = ObjectStat(place.url_of(path), *known)
                return
            stat = await run_on(place.backend.loop, place.backend.stat, place.at(path))
            if known is not None and self._verify and stat.size != known[0]:
                raise CheckpointChangedError(
                    f"{stat.url} has {stat.size} bytes, and not the {known[0]} that were saved: it is another save's."
                )
            found[path] = stat

        for first in range(0, len(paths), _LOOKS):
            async with task_group() as tasks:
                for path in paths[first : first + _LOOKS]:
                    tasks.start_soon(look, path)
        return [found[path] for path in paths]

    async def look_into_archives(
        self,
        files: Files,
        stats: Sequence[ObjectStat],
        metadata: Metadata,
        items: Iterable[tuple[int, Any, MetadataIndex]],
    ) -> dict[tuple[int, int], StoredTensor]:
        """Where the tensors are in items of somebody else's writer, by file and offset: both ends of each are read.

        Args:
            files: What is read.
            stats: The version of each.
            metadata: The checkpoint's.
            items: File, place and index of each tensor.
        """
        ends: dict[tuple[int, int], tuple[int, bytearray, bytearray]] = {}
        parts: list[tuple[int, Piece]] = []
        for number, info, index in items:
            place = (number, info.offset)
            require_plain(index, info, stats[number].url)
            if hasattr(info, "crc32") or place in ends:
                continue
            dtype, chunk = chunk_of(metadata, index)
            overhead = info.length - chunk.sizes.numel() * dtype.itemsize
            if not 0 < overhead <= _LONGEST_OVERHEAD:
                continue
            head, tail = bytearray(overhead), bytearray(overhead)
            ends[place] = info.length, head, tail
            stop = info.offset + info.length
            parts += [
                (number, Piece(info.offset, info.offset + overhead, partial(_keep, head))),
                (number, Piece(stop - overhead, stop, partial(_keep, tail))),
            ]
        if parts:
            await fetch(files, parts, [None] * len(stats), "")
        return await in_thread(_find_tensors, ends, stats)


def _targets(items: Sequence[ReadItem], planner: LoadPlanner) -> list[torch.Tensor | None]:
    """The tensor that each item goes to; None for bytes."""
    return [None if item.type == LoadItemType.BYTE_IO else planner.resolve_tensor(item).detach() for item in items]


def _place_of(want: Wanted) -> tuple[int, Any, MetadataIndex]:
    return want.number, want.info, want.request.storage_index


def _info(metadata: Metadata, index: MetadataIndex, url: str) -> Any:
    try:
        info = metadata.storage_data[index]
    except KeyError:
        raise CheckpointCorruptError(f"{url}: the metadata does not say where {printable(index.fqn)} is.") from None
    require_plain(index, info, url)
    return info


def _apart(requests: Sequence[ReadItem]) -> tuple[list[int], list[int]]:
    """The numbers of requests that have no element in common, but for those that are for the same part of an item.

    Returns:
        Theirs; and those of the rest, which only a planner of somebody's own asks for.
    """
    taken: dict[MetadataIndex, set[tuple[torch.Size, torch.Size]]] = {}
    first: list[int] = []
    later: list[int] = []
    for number, request in enumerate(requests):
        part = request.storage_offsets, request.lengths
        parts = taken.setdefault(request.storage_index, set())
        if part in parts or not any(_meet(part, other) for other in parts):
            parts.add(part)
            first.append(number)
        else:
            later.append(number)
    return first, later


def _meet(one: tuple[torch.Size, torch.Size], other: tuple[torch.Size, torch.Size]) -> bool:
    return all(
        max(start, other_start) < min(start + length, other_start + other_length)
        for start, length, other_start, other_length in zip(*one, *other, strict=True)
    )


def _check_lengths(wanted: Sequence[Wanted], stats: Sequence[ObjectStat]) -> None:
    for want in wanted:
        stat, info = stats[want.number], want.info
        if not 0 <= info.offset <= info.offset + info.length <= stat.size:
            raise CheckpointCorruptError(
                f"{stat.url} has {stat.size} bytes: too short for {printable(want.request.storage_index.fqn)}, "
                f"{info.length} bytes at {info.offset}."
            )


def _find_tensors(
    ends: Mapping[tuple[int, int], tuple[int, bytearray, bytearray]], stats: Sequence[ObjectStat]
) -> dict[tuple[int, int], StoredTensor]:
    found = {
        place: find_tensor(bytes(head), bytes(tail), length, stats[place[0]].url)
        for place, (length, head, tail) in ends.items()
    }
    return {place: stored for place, stored in found.items() if stored is not None}


def _keep(memory: bytearray, data: Buffer) -> None:
    memory[:] = data
