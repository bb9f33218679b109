"""What is in a checkpoint, in a few numbers and names: what the Deck shows. Holds no tensors."""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from torchferry.checkpoint.content import content_of
from torchferry.checkpoint.values import MODULE_KEY, OPTIMIZER_KEY

__all__ = ["Summary", "TensorRow", "remember_summary", "summarize", "summary_of"]

_SUMMARY = "_torchferry_summary"

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
    """

    uri: str | None
    module: list[TensorRow] = field(default_factory=list)
    optimizer: list[TensorRow] = field(default_factory=list)
    other: list[TensorRow] = field(default_factory=list)
    groups: list[dict[str, str]] = field(default_factory=list)
    hyperparameters: list[tuple[str, str, str]] = field(default_factory=list)


def summarize(content: Mapping[str, Any], uri: str | None) -> Summary:
    """Summarizes the dict that is saved for a checkpoint. Looks at no tensor's values."""
    storages: set[int] = set()
    summary = Summary(uri)
    for key, value in content.items():
        if key == MODULE_KEY:
            summary.module.extend(_rows("", value, storages))
        elif key == OPTIMIZER_KEY:
            summary.optimizer.extend(_rows("", value, storages))
            summary.groups.extend(_groups(value))
        else:
            summary.other.extend(_rows(str(key), value, storages))
            summary.hyperparameters.append((str(key), type(value).__name__, _SHORT.repr(value)))
    return summary


def remember_summary(checkpoint: Any, content: Mapping[str, Any], uri: str) -> None:
    """Keeps the summary of what was saved with the checkpoint itself; never raises.

    The Deck is made after the upload, and asking a module for its state again may gather it from all ranks again.
    """
    try:
        vars(checkpoint)[_SUMMARY] = summarize(content, uri)
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
    for group in groups if isinstance(groups, list | tuple) else ():
        if isinstance(group, Mapping):
            options = {str(key): _SHORT.repr(value) for key, value in group.items() if key != "params"}
            yield {"parameters": f"{len(group.get('params', ())):,}", **options}


def _rows(name: str, value: Any, storages: set[int]) -> Iterator[TensorRow]:
    if isinstance(value, torch.Tensor):
        yield TensorRow(name, tuple(value.shape), str(value.dtype).removeprefix("torch."), _size(value, storages))
    elif isinstance(value, Mapping | list | tuple):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in items:
            yield from _rows(f"{name}.{key}" if name else str(key), item, storages)


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
        self.maxstring = self.maxother = 160
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = self.maxfrozenset = 8

    def repr1(self, x: Any, level: int) -> str:
        if isinstance(x, torch.Tensor):
            return f"tensor{list(x.shape)} {str(x.dtype).removeprefix('torch.')}"
        return super().repr1(x, level)


_SHORT = _ShortRepr()
