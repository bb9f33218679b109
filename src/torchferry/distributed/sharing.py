"""What all ranks ask for alike is read by one of them, and the others get it through the process group."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

from torchferry.engine.memory import BLOCK_SIZE, EVERYTHING_ELSE, Claim
from torchferry.engine.types import MIB
from torchferry.formats.item_stream import is_plain
from torchferry.formats.torch_hooks import kept_gloo_group

__all__ = ["Broadcast", "Shared", "cpu_group", "said_by_all", "share"]

_LONGEST = 64 * MIB  # of one broadcast out of a tensor's own memory
_UNDER_WAY = 4  # broadcasts at once
_SPARE = 3  # blocks beside those: one that is filled, and what is held for a moment more


@dataclass(frozen=True, slots=True)
class Shared:
    """Who reads what; travels from the coordinator to the ranks as the plan's ``storage_data``.

    Attributes:
        items: Which items of this rank's plan all ranks have, in an order that is the same on all.
        owners: The rank that reads each.
    """

    items: tuple[int, ...]
    owners: tuple[int, ...]


def share(plans: Sequence[LoadPlan], sizes: Mapping[Any, int]) -> list[LoadPlan]:
    """Notes in each rank's plan who reads the items that all ranks have; each rank about as many bytes of them.

    Args:
        plans: Of all ranks.
        sizes: Bytes of each item that is stored, by its index.
    """
    numbered = [{_key(item): number for number, item in enumerate(plan.items)} for plan in plans]
    common = [key for key in numbered[0] if all(key in other for other in numbered[1:])]
    if not common:
        return [replace(plan, storage_data=Shared((), ())) for plan in plans]
    loads = [0] * len(plans)
    owner_of: dict[Any, int] = {}  # by what is stored: two names of one item are read by one rank
    for key in sorted(common, key=lambda key: -sizes.get(key[1], 0)):
        if key[1] not in owner_of:
            owner = owner_of[key[1]] = loads.index(min(loads))
            loads[owner] += sizes.get(key[1], 0)
    owners = tuple(owner_of[key[1]] for key in common)
    return [
        replace(plan, storage_data=Shared(tuple(numbers[key] for key in common), owners))
        for plan, numbers in zip(plans, numbered, strict=True)
    ]


def _key(item: ReadItem) -> tuple[Any, ...]:
    return (
        item.type,
        item.storage_index,
        item.dest_index,
        tuple(item.storage_offsets),
        tuple(item.dest_offsets),
        tuple(item.lengths),
    )


def cpu_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """A group of the same ranks that moves memory of the CPU: the same one where it is gloo's."""
    of = group or dist.group.WORLD
    assert of is not None  # noqa: S101 - there is a process group
    return of if dist.get_backend(of) == "gloo" else kept_gloo_group("broadcasts", group)


def said_by_all(group: dist.ProcessGroup, word: str | None) -> set[str | None]:
    """What the ranks say; None is that of a rank that has failed."""
    told: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(told, word, group=group)
    return set(told)


class Broadcast:
    """The exchange of what ranks have read for each other.

    Large tensors are sent out of their own memory, 64 MiB at a time. All else goes through blocks of 4 MiB: small
    tensors together, bytes, and what is not contiguous or not on the CPU.

    Args:
        group: The ranks.
        shared: What is exchanged.
        items: This rank's plan.
        targets: A tensor for each item; None for one that is bytes.
        sizes: Bytes of each item that is bytes, by its number.

    Attributes:
        looks: What must be the same on all ranks.
        others: The numbers of the items that other ranks read for this one.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        shared: Shared,
        items: Sequence[ReadItem],
        targets: Sequence[torch.Tensor | None],
        sizes: Mapping[int, int],
    ) -> None:
        self._group = group
        self._shared = shared
        self._targets = targets
        self._sizes = sizes
        self._rank = dist.get_rank(group)
        self._ranks = dist.get_process_group_ranks(group)
        pairs = zip(shared.items, shared.owners, strict=True)
        self.others = frozenset(number for number, owner in pairs if owner != self._rank)
        looks = [self._look(items[number], number) for number in shared.items]
        self.looks = hashlib.sha256(repr(looks).encode()).hexdigest()

    def _look(self, item: ReadItem, number: int) -> tuple[Any, ...]:
        target = self._targets[number]
        if item.type == LoadItemType.BYTE_IO or target is None:
            return (*_key(item), "bytes", self._sizes[number])
        return (*_key(item), target.dtype, tuple(target.shape), _is_straight(target))

    def exchange(self, contents: dict[int, bytearray]) -> None:
        """Sends what this rank has read, and receives the rest into the targets.

        A rank that cannot take what it gets goes on to the end: the others would wait for it.

        Args:
            contents: The bytes of items that are no tensors, by their number; given those of the others.
        """
        claim = EVERYTHING_ELSE.claim((_UNDER_WAY + _SPARE) * BLOCK_SIZE, piece=BLOCK_SIZE)
        try:
            failed = self._exchange(contents, claim)
        finally:
            claim.close()
        if failed is not None:
            raise failed

    def _exchange(self, contents: dict[int, bytearray], claim: Claim) -> BaseException | None:
        failed: BaseException | None = None
        under_way: deque[_Sending] = deque()
        for owner in range(len(self._ranks)):
            numbers = [n for n, of in zip(self._shared.items, self._shared.owners, strict=True) if of == owner]
            for number in numbers:
                if self._targets[number] is None and owner != self._rank:
                    contents[number] = bytearray(self._sizes[number])
            for sending in self._sendings(numbers, owner, contents, claim):
                if len(under_way) >= _UNDER_WAY:
                    failed = under_way.popleft().finish() or failed
                failed = sending.copy_in() or failed
                sending.start(self._ranks[owner], self._group)
                under_way.append(sending)
        while under_way:
            failed = under_way.popleft().finish() or failed
        return failed

    def _sendings(
        self, numbers: Sequence[int], owner: int, contents: dict[int, bytearray], claim: Claim
    ) -> Iterator[_Sending]:
        """What one rank sends: large tensors out of their memory, the others together, through blocks."""
        is_sender = owner == self._rank
        parts: list[torch.Tensor] = []
        filled = 0
        for number in numbers:
            target = self._targets[number]
            if target is not None and _is_straight(target):
                flat = target.view(-1).view(torch.uint8)
                for start in range(0, len(flat), _LONGEST):
                    yield _Sending(flat[start : start + _LONGEST], [], is_sender)
                continue
            for part in _pieces(contents[number] if target is None else target):
                if parts and filled + part.nbytes > BLOCK_SIZE:
                    yield _Sending(_block(claim, filled), parts, is_sender)
                    parts, filled = [], 0
                parts.append(part)
                filled += part.nbytes
        if filled:
            yield _Sending(_block(claim, filled), parts, is_sender)


class _Sending:
    """One broadcast.

    Args:
        memory: Bytes that are sent, or received.
        parts: Tensors that are copied into it before, or from it afterwards; none where it is a tensor's own memory.
        is_sender: Which of the two.
    """

    def __init__(self, memory: torch.Tensor, parts: Sequence[torch.Tensor], is_sender: bool) -> None:
        self._memory = memory
        self._parts = parts
        self._is_sender = is_sender
        self._work: Any = None

    def copy_in(self) -> BaseException | None:
        """Copies what is sent; returns why it could not."""
        return self._copy() if self._is_sender else None

    def start(self, source: int, group: dist.ProcessGroup) -> None:
        """Begins."""
        self._work = dist.broadcast(self._memory, src=source, group=group, async_op=True)

    def finish(self) -> BaseException | None:
        """Waits, and copies what was received; returns why it could not."""
        self._work.wait()
        return None if self._is_sender else self._copy()

    def _copy(self) -> BaseException | None:
        at = 0
        try:
            for part in self._parts:
                there = self._memory[at : at + part.nbytes]
                at += part.nbytes
                if self._is_sender:
                    whole = part.resolve_conj().resolve_neg().contiguous()
                    flat = whole.as_strided((part.numel(),), (1,))  # view(-1) keeps the stride of a single element
                    there.copy_(flat.view(torch.uint8))
                else:
                    part.copy_(_aligned(there, part.dtype).view(part.shape))
        except Exception as error:  # noqa: BLE001 - raised when all is exchanged
            return error.with_traceback(None)  # its frames would hold blocks
        return None


def _block(claim: Claim, nbytes: int) -> torch.Tensor:
    return torch.frombuffer(claim.take()[:nbytes], dtype=torch.uint8)


def _aligned(there: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (there.clone() if there.storage_offset() % dtype.itemsize else there).view(dtype)


def _is_straight(target: torch.Tensor) -> bool:
    """Whether it is large, and its memory is its elements, one after the other."""
    return (
        target.is_cpu
        and target.nbytes >= MIB
        and is_plain(target)
        and target.is_contiguous()
        and not (target.is_conj() or target.is_neg())
    )


def _pieces(value: torch.Tensor | bytearray) -> Iterator[torch.Tensor]:
    """Parts of at most a block."""
    if isinstance(value, bytearray):
        if value:
            yield from torch.split(torch.frombuffer(value, dtype=torch.uint8), BLOCK_SIZE)
        return
    if not value.numel():
        return
    if value.nbytes <= BLOCK_SIZE or not value.dim():
        yield value
        return
    row = value.nbytes // value.shape[0]
    for rows in torch.split(value, max(1, BLOCK_SIZE // row)):
        yield from (_pieces(rows[0]) if rows.nbytes > BLOCK_SIZE else (rows,))
