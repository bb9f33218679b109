"""What is in a checkpoint, in a few numbers and names: what the Deck shows. Holds no tensors."""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeAlias

import torch

from torchferry.checkpoint.content import content_of
from torchferry.checkpoint.values import MODULE_KEY, OPTIMIZER_KEY
from torchferry.engine.collector import collector_paused
from torchferry.engine.transfer import TransferReport

_Place: TypeAlias = "tuple[_Place | None, Any]"  # where a value is: the place of what it is in, and its key there

__all__ = ["Summary", "TensorRow", "remember_summary", "summarize", "summary_of"]

_SUMMARY = "_torchferry_summary"
_LONGEST_INT = 500  # bits of a number that is shown
_LONGEST_NAME = 500  # characters of the name of a tensor
_MOST_ROWS = 20_000
_PLAIN = frozenset({bool, bytes, float, int, str, type(None)})
_CONTAINERS = (dict, list, tuple, Mapping)  # the last one takes longest to ask
_MOST_GROUPS = 1000  # parameter groups that are looked at

_logger = logging.getLogger("torchferry")


@dataclass(frozen=True, slots=True)
class TensorRow:
    """One tensor.

    Attributes:
        name: Its keys, joined by dots.
        shape: Its shape.
        dtype: Its type, without "torch.".
        size: Bytes that it adds to the checkpoint: its whole storage, which a view shares with others; 0 where an
            earlier tensor has brought the storage along.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    size: int


@dataclass(frozen=True, slots=True)
class Summary:
    """What is in a checkpoint.

    Attributes:
        uri: Where it is stored, if it is.
        module: The tensors of the module's state.
        optimizer: The tensors of the optimizer's state.
        other: The tensors among the hyperparameters.
        groups: The optimizer's parameter groups: their options, as short texts.
        hyperparameters: Name, type and value, as short texts.
        saved: How it was saved, if it was.
    """

    uri: str | None
    module: list[TensorRow] = field(default_factory=list)
    optimizer: list[TensorRow] = field(default_factory=list)
    other: list[TensorRow] = field(default_factory=list)
    groups: list[dict[str, str]] = field(default_factory=list)
    hyperparameters: list[tuple[str, str, str]] = field(default_factory=list)
    saved: TransferReport | None = None


@collector_paused()
def summarize(content: Mapping[str, Any], uri: str | None, saved: TransferReport | None = None) -> Summary:
    """Summarizes the dict that is saved for a checkpoint. Looks at no tensor's values."""
    storages: set[int] = set()
    summary = Summary(uri, saved=saved)
    for key, value in content.items():
        if key == MODULE_KEY:
            summary.module.extend(_rows("", value, storages))
        elif key == OPTIMIZER_KEY:
            summary.optimizer.extend(_rows("", value, storages))
            summary.groups.extend(_groups(value))
        else:
            summary.other.extend(_rows(_text(key), value, storages))
            summary.hyperparameters.append((_text(key), type(value).__name__, _SHORT.repr(value)))
    return summary


def remember_summary(
    checkpoint: Any, content: Mapping[str, Any], uri: str, saved: TransferReport | None = None
) -> None:
    """Keeps the summary of what was saved with the checkpoint itself; never raises.

    The Deck is made after the upload, and asking a module for its state again may gather it from all ranks again.
    """
    try:
        vars(checkpoint)[_SUMMARY] = summarize(content, uri, saved)
    except (Exception, SystemExit):  # what is saved is saved, whatever the Deck will say
        _logger.debug("A checkpoint has no summary.", exc_info=True)


def summary_of(checkpoint: Any) -> Summary:
    """The summary that :func:`remember_summary` kept, or a new one, which asks the module for its state.

    Raises:
        Exception: whatever the user's values raise.
    """
    summary: Summary | None = vars(checkpoint).get(_SUMMARY)
    return summary or summarize(content_of(checkpoint), getattr(checkpoint, "uri", None))


def _groups(state: Any) -> Iterator[dict[str, str]]:
    groups = state.get("param_groups") if isinstance(state, Mapping) else None
    for group in groups[:_MOST_GROUPS] if isinstance(groups, list | tuple) else ():
        if isinstance(group, Mapping):
            parameters = group.get("params", ())
            count = f"{len(parameters):,}" if isinstance(parameters, list | tuple) else _SHORT.repr(parameters)
            options = islice(((key, value) for key, value in group.items() if key != "params"), _MOST_GROUPS)
            yield {"parameters": count, **{_text(key): _SHORT.repr(value) for key, value in options}}


def _rows(name: str, value: Any, storages: set[int]) -> Iterator[TensorRow]:
    """The tensors in a value: a row for each of the first 20,000, and one for all others."""
    found = _tensors((None, name) if name else None, value)
    for place, tensor in islice(found, _MOST_ROWS):
        dtype = str(tensor.dtype).removeprefix("torch.")
        yield TensorRow(_name(place), tuple(tensor.shape), dtype, _size(tensor, storages))
    count = size = 0
    last = None
    for _, tensor in found:
        count += 1
        if tensor is not last:  # there may be a million of one
            size += _size(tensor, storages)
        last = tensor
    if count:
        yield TensorRow(f"{count:,} others", (), "", size)


def _tensors(place: _Place | None, value: Any) -> Iterator[tuple[_Place | None, torch.Tensor]]:
    """The tensors in a value, depth first, without recursion; a container that occurs again is left out then."""
    if isinstance(value, torch.Tensor):
        yield place, value
    seen: set[int] = set()
    stack: list[tuple[_Place | None, Iterator[tuple[Any, Any]]]] = [(place, _children(value))]
    while stack:
        before, items = stack[-1]
        for key, item in items:
            if type(item) in _PLAIN:
                continue
            if isinstance(item, torch.Tensor):
                yield (before, key), item
            elif isinstance(item, _CONTAINERS) and id(item) not in seen:
                seen.add(id(item))
                stack.append(((before, key), _children(item)))
                break
        else:
            stack.pop()


def _children(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return iter(value.items())
    return iter(enumerate(value)) if isinstance(value, list | tuple) else iter(())


def _name(place: _Place | None) -> str:
    """The keys that lead to a place, with dots between; the last 500 characters of them, or a little more."""
    parts: list[str] = []
    length = 0
    while place is not None and length < _LONGEST_NAME:
        place, key = place
        parts.append(_text(key))
        length += len(parts[-1])
    if place is not None:
        parts.append("\N{HORIZONTAL ELLIPSIS}")
    return ".".join(reversed(parts))


def _text(key: Any) -> str:
    """A key as text: a tuple, for one, may hold as much as a checkpoint."""
    return key[:_LONGEST_NAME] if isinstance(key, str) else _SHORT.repr(key)


def _size(tensor: torch.Tensor, storages: set[int]) -> int:
    if tensor.is_meta:
        return 0
    try:
        storage = tensor.untyped_storage()
        identity, size = storage._cdata, storage.nbytes()
    except (NotImplementedError, RuntimeError):  # sparse, and subclasses without a storage of their own
        return tensor.element_size() * (tensor._nnz() if tensor.is_sparse else tensor.numel())
    if identity in storages:
        return 0
    storages.add(identity)
    return size


class _ShortRepr(reprlib.Repr):
    """``repr`` that stays short and cheap, and prints no tensor's values."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 4
        self.maxstring = self.maxother = 160
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = self.maxfrozenset = 8

    def repr1(self, x: Any, level: int) -> str:
        if isinstance(x, torch.Tensor):
            return f"tensor{list(x.shape)} {str(x.dtype).removeprefix('torch.')}"
        if isinstance(x, dict):  # subclasses too, whose own repr shows all of them
            return self.repr_dict(x, level)
        if isinstance(x, list):
            return self.repr_list(x, level)
        if isinstance(x, bytes | bytearray):
            return repr(bytes(x[: self.maxstring])) + ("..." if len(x) > self.maxstring else "")
        if isinstance(x, int) and abs(x) >> _LONGEST_INT:
            return f"an int of {x.bit_length()} bits"  # of very long ones, Python makes no text
        return super().repr1(x, level)

    def repr_dict(self, x: dict[Any, Any], level: int) -> str:
        """As it is in the class, but unsorted: to sort keys may take long."""
        if not x or level <= 0:
            return "{...}" if x else "{}"
        pairs = islice(dict.items(x), self.maxdict)
        parts = [f"{self.repr1(key, level - 1)}: {self.repr1(value, level - 1)}" for key, value in pairs]
        return f"{{{', '.join([*parts, '...'] if len(x) > self.maxdict else parts)}}}"

    def repr_set(self, x: set[Any], level: int) -> str:
        """As it is in the class, but unsorted."""
        if not x or level <= 0:
            return "{...}" if x else "set()"
        parts = [self.repr1(value, level - 1) for value in islice(x, self.maxset)]
        return f"{{{', '.join([*parts, '...'] if len(x) > self.maxset else parts)}}}"

    def repr_frozenset(self, x: Any, level: int) -> str:
        """The same."""
        return f"frozenset({self.repr_set(x, level)})"


_SHORT = _ShortRepr()
