"""What of a checkpoint is saved, and whether it could be loaded again."""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch

from torchferry.checkpoint.adapters import refusal
from torchferry.checkpoint.hyperparameters import as_dict, is_dataclass_instance, is_named_tuple
from torchferry.checkpoint.plain import CONTAINERS, LEAVES, made_plain, plain_form, plain_number
from torchferry.checkpoint.values import MODULE_KEY, OPTIMIZER_KEY, LoadedCheckpoint, PyTorchCheckpoint, check_names

__all__ = ["content_of", "loadable"]


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


def loadable(content: dict[str, Any]) -> dict[str, Any]:
    """The content as ``torch.load(weights_only=True)``, the default, takes it.

    What it would refuse becomes a plain value where that loses nothing (:mod:`torchferry.checkpoint.plain`): anything
    among hyperparameters, which ``hyperparameters_as`` turns back; in the states only numpy's scalars.

    Returns:
        ``content`` itself where nothing has to change; the user's own containers are never changed.

    Raises:
        CheckpointValueError: names the first value that cannot be made plain, its type, and how to allow it; or that
            cannot be pickled.
    """
    if not _unknown_values(content):
        return content
    others = {key: value for key, value in content.items() if key not in {MODULE_KEY, OPTIMIZER_KEY}}
    plain_others = made_plain(others, plain_form, _is_allowed)
    check_names(plain_others)
    hyperparameters = iter(plain_others.items())
    converted: dict[str, Any] = {}
    for key, value in content.items():  # in their order
        if key in others:
            plain_key, plain_value = next(hyperparameters)
            converted[plain_key] = plain_value
        else:
            converted[key] = made_plain(value, plain_number, _is_allowed)
    _check_loadable(converted)
    return converted


def _check_loadable(content: dict[str, Any]) -> None:
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
    waiting: list[tuple[str, Any]] = []
    for key, value in reversed(content.items()):
        path = key if key in {MODULE_KEY, OPTIMIZER_KEY} else f"Hyperparameter {key!r}"
        waiting += [(path, value), (f"The name of {path}", key)]
    while waiting:
        path, value = waiting.pop()
        kind = type(value)
        if id(value) in seen:
            continue
        if kind not in LEAVES and kind not in CONTAINERS:
            unknown.append((path, value))
            continue
        if attributes := getattr(value, "__dict__", None):  # tensors and OrderedDicts are saved with theirs
            waiting.append((f"{path}.__dict__", attributes))
        if kind in LEAVES:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            items = [*((f"a key of {path}", key) for key in value), *((f"{path}[{k!r}]", v) for k, v in value.items())]
        else:
            items = [(f"{path}[{index}]", item) for index, item in enumerate(value)]
        waiting.extend(reversed(items))
    return unknown


def _is_allowed(value: Any) -> bool:
    """Whether the weights_only unpickler takes a value of this type."""
    if is_named_tuple(value) or is_dataclass_instance(value):  # may hold tensors, and so be large
        return type(value) in torch.serialization.get_safe_globals()
    archive = io.BytesIO()
    try:
        torch.save(value, archive)
    except Exception:  # noqa: BLE001 - pickling runs user code, which may raise anything
        return False
    return _refusal(archive) is None


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
