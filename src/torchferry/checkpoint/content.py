"""What of a checkpoint is saved, and whether it could be loaded again."""

from __future__ import annotations

import io
import pickle
from collections import Counter, OrderedDict
from typing import Any

import torch

from torchferry.checkpoint.adapters import refusal
from torchferry.checkpoint.hyperparameters import as_dict
from torchferry.checkpoint.values import MODULE_KEY, OPTIMIZER_KEY, LoadedCheckpoint, PyTorchCheckpoint, check_names

__all__ = ["check_loadable", "content_of"]

# What the weights_only unpickler builds whatever it holds: torch/_weights_only_unpickler.py, torch 2.13.
_LEAVES = frozenset({
    bool, bytearray, bytes, complex, float, int, str, type(None), torch.device, torch.dtype, torch.nn.Parameter,
    torch.Size, torch.Tensor,
})  # fmt: skip
_CONTAINERS = frozenset({Counter, OrderedDict, dict, list, set, tuple})


def content_of(checkpoint: PyTorchCheckpoint) -> dict[str, Any]:
    """The dict that is saved for a checkpoint, in the order of flytekit's own transformer.

    Calls ``state_dict()``, which may take long: run it in a worker thread.

    Args:
        checkpoint: A checkpoint, or an object of another class with the same three fields: flytekit has one.

    Raises:
        CheckpointValueError: there is nothing to save, or a hyperparameter has the name of one of the states.
    """
    if isinstance(checkpoint, LoadedCheckpoint):
        content = dict(checkpoint)
    else:
        content = {}
        if checkpoint.module is not None:
            content[MODULE_KEY] = _state_of("module", checkpoint.module)
        hyperparameters = as_dict(checkpoint.hyperparameters)
        check_names(hyperparameters)
        content.update(hyperparameters)
        if checkpoint.optimizer is not None:
            content[OPTIMIZER_KEY] = _state_of("optimizer", checkpoint.optimizer)
    if not content:
        raise refusal(f"There is nothing to save in {checkpoint!r}.")
    return content


def check_loadable(content: dict[str, Any]) -> None:
    """Refuses what cannot be pickled, and what ``torch.load(weights_only=True)``, the default, would refuse.

    Raises:
        CheckpointValueError: names the first such value, its type, and how to allow it.
    """
    for path, value in _unknown_values(content):
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        archive = io.BytesIO()
        try:
            torch.save(value, archive)
        except Exception as error:  # pickling runs user code, which may raise anything
            raise refusal(
                f"{path} is a {kind}, and cannot be saved: {error}. Save a plain value in its place."
            ) from error
        reason = _refusal(archive)
        if reason is not None:
            raise refusal(
                f"{path} is a {kind}, and could not be loaded again: loading takes tensors and plain values only "
                f"(weights_only=True). Save a plain value in its place; or allow the type in every task that loads it, "
                f"torch.serialization.add_safe_globals([{type(value).__qualname__}]); or annotate both sides with "
                f"LoadOptions(weights_only=False). torch says: {reason}"
            )


def _state_of(name: str, owner: Any) -> Any:
    state_dict = getattr(owner, "state_dict", None)
    if not callable(state_dict) or isinstance(owner, type):
        raise refusal(
            f"The {name} of a PyTorchCheckpoint is an object with a state_dict(); given: "
            f"{owner if isinstance(owner, type) else type(owner)}."
        )
    return state_dict()


def _unknown_values(content: dict[str, Any]) -> list[tuple[str, Any]]:
    """Values of types that may or may not load, with their paths, in the order in which they are saved."""
    unknown: list[tuple[str, Any]] = []
    seen: set[int] = set()
    waiting: list[tuple[str, Any]] = [
        (key if key in {MODULE_KEY, OPTIMIZER_KEY} else f"Hyperparameter {key!r}", value)
        for key, value in reversed(content.items())
    ]
    while waiting:
        path, value = waiting.pop()
        kind = type(value)
        if id(value) in seen:
            continue
        if kind not in _LEAVES and kind not in _CONTAINERS:
            unknown.append((path, value))
            continue
        if attributes := getattr(value, "__dict__", None):  # tensors and OrderedDicts are saved with theirs
            waiting.append((f"{path}.__dict__", attributes))
        if kind in _LEAVES:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            items = [*((f"a key of {path}", key) for key in value), *((f"{path}[{k!r}]", v) for k, v in value.items())]
        else:
            items = [(f"{path}[{index}]", item) for index, item in enumerate(value)]
        waiting.extend(reversed(items))
    return unknown


def _refusal(archive: io.BytesIO) -> str | None:
    """Why the weights_only unpickler refuses what was saved; None when it takes it.

    Asks the unpickler itself, and so knows what ``add_safe_globals`` allowed.
    """
    archive.seek(0)
    try:
        torch.load(archive, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        return str(error.__context__ or error).strip().splitlines()[0]
    return None
