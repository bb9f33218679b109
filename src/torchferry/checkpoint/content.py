"""What of a checkpoint is saved, and whether it could be loaded again."""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from typing import Any

import torch

from torchferry.checkpoint.adapters import refusal
from torchferry.checkpoint.hyperparameters import as_dict, is_dataclass_instance, is_named_tuple
from torchferry.checkpoint.plain import CONTAINERS, LEAVES, made_plain, plain_form, plain_number
from torchferry.checkpoint.values import MODULE_KEY, OPTIMIZER_KEY, LoadedCheckpoint, PyTorchCheckpoint, check_names
from torchferry.errors import CheckpointValueError
from torchferry.formats.torch_hooks import torch_load, torch_save

__all__ = ["Loadable", "content_of", "loadable", "prepared"]


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


@dataclass(frozen=True, slots=True)
class Loadable:
    """Content as ``torch.load(weights_only=True)``, the default, takes it; or what comes closest.

    Attributes:
        content: What to save.
        refused: What of it would not be loaded, and what to do: the first such value; None where all would be.
        left_out: The keys that are not in it, because what they hold cannot be pickled.
        needs_trust: Whether it is loaded with ``weights_only=False`` only.
    """

    content: dict[str, Any]
    refused: str | None = None
    left_out: tuple[str, ...] = ()
    needs_trust: bool = False

    def error(self, uri: str) -> CheckpointValueError | None:
        """What to raise when the content is stored at ``uri``: a task does its work once, and none of it is lost."""
        if self.refused is None:
            return None
        without = f", without {', '.join(map(repr, self.left_out))}" if self.left_out else ""
        trust = ", weights_only=False" if self.needs_trust else ""
        return refusal(
            f"{self.refused} The checkpoint is stored all the same{without}: torchferry.load({uri!r}{trust}) reads it."
        )


def prepared(checkpoint: Any, *, trusted: bool = False) -> Loadable:
    """What to save of a checkpoint. Calls ``state_dict()`` as :func:`content_of`: run it in a worker thread.

    Args:
        checkpoint: As for :func:`content_of`.
        trusted: Whether it will be loaded with ``weights_only=False``, which takes everything.

    Raises:
        CheckpointValueError: as :func:`content_of` and :func:`loadable` do.
    """
    content = content_of(checkpoint)
    return Loadable(content) if trusted else loadable(content)


def loadable(content: dict[str, Any]) -> Loadable:
    """The content as ``torch.load(weights_only=True)``, the default, takes it.

    What it would refuse becomes a plain value where that loses nothing (:mod:`torchferry.checkpoint.plain`): anything
    among hyperparameters, which ``hyperparameters_as`` turns back; in the states only numpy's scalars.

    Returns:
        With ``content`` itself where nothing has to change; the user's own containers are never changed.

    Raises:
        CheckpointValueError: the name of a hyperparameter, made plain, is that of one of the states; or nothing of
            ``content`` can be pickled.
    """
    if not _unknown_values(content):
        return Loadable(content)
    plain = _made_plain(content)
    refused: list[str] = []
    left_out: dict[Any, None] = {}
    needs_trust = False
    for key, path, value in _unknown_values(plain):
        if key in left_out:
            continue
        archive = io.BytesIO()
        try:
            torch_save(value, archive)
        except Exception as error:  # noqa: BLE001 - pickling runs user code, which may raise anything
            left_out[key] = None
            refused.append(f"{path} is a {_kind(value)}, and cannot be saved: {_sentence(error)}")
            refused[-1] += " Save a plain value in its place."
            continue
        if (reason := _refusal(archive)) is not None:
            needs_trust = True
            refused.append(_advice(path, value, archive, reason))
    if not refused:
        return Loadable(plain)
    kept = {key: value for key, value in plain.items() if key not in left_out}
    if not kept:
        raise refusal(refused[0])
    return Loadable(kept, refused[0], tuple(map(str, left_out)), needs_trust)


def _made_plain(content: dict[str, Any]) -> dict[str, Any]:
    others = {key: value for key, value in content.items() if key not in {MODULE_KEY, OPTIMIZER_KEY}}
    plain_others = made_plain(others, plain_form, _is_allowed)
    check_names(plain_others)
    hyperparameters = iter(plain_others.items())
    plain: dict[str, Any] = {}
    for key, value in content.items():  # in their order
        if key in others:
            plain_key, plain_value = next(hyperparameters)
            plain[plain_key] = plain_value
        else:
            plain[key] = made_plain(value, plain_number, _is_allowed)
    return plain


def _advice(path: str, value: Any, archive: io.BytesIO, reason: str) -> str:
    with torch.serialization.safe_globals([type(value)]):
        helps = _refusal(archive) is None
    allow = (
        f"allow the type in every task that loads it, torch.serialization.add_safe_globals([{type(value).__qualname__}"
        "]); or "
    )
    return (
        f"{path} is a {_kind(value)}, and could not be loaded again: loading takes tensors and plain values only "
        f"(weights_only=True). Save a plain value in its place; or {allow if helps else ''}annotate both sides with "
        f"LoadOptions(weights_only=False). torch says: {_sentence(reason)}"
    )


def _kind(value: Any) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _sentence(message: object) -> str:
    return f"{str(message).rstrip('. ')}."


def _state_of(name: str, owner: Any) -> Any:
    state_dict = getattr(owner, "state_dict", None)
    if not callable(state_dict) or isinstance(owner, type):
        raise refusal(
            f"The {name} of a PyTorchCheckpoint is an object with a state_dict(); given: "
            f"{owner if isinstance(owner, type) else type(owner)}."
        )
    return state_dict()


def _unknown_values(content: dict[str, Any]) -> list[tuple[Any, str, Any]]:
    """Values of types that may or may not load, with their keys and paths, in the order in which they are saved."""
    unknown: list[tuple[Any, str, Any]] = []
    seen: set[int] = set()
    waiting: list[tuple[Any, str, Any]] = []
    for key, value in reversed(content.items()):
        path = key if key in {MODULE_KEY, OPTIMIZER_KEY} else f"Hyperparameter {key!r}"
        waiting += [(key, path, value), (key, f"The name of {path}", key)]
    while waiting:
        key, path, value = waiting.pop()
        kind = type(value)
        if id(value) in seen:
            continue
        if kind not in LEAVES and kind not in CONTAINERS:
            unknown.append((key, path, value))
            continue
        if attributes := getattr(value, "__dict__", None):  # tensors and OrderedDicts are saved with theirs
            waiting.append((key, f"{path}.__dict__", attributes))
        if kind in LEAVES:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            items = [*((f"a key of {path}", k) for k in value), *((f"{path}[{k!r}]", v) for k, v in value.items())]
        else:
            items = [(f"{path}[{index}]", item) for index, item in enumerate(value)]
        waiting.extend((key, *item) for item in reversed(items))
    return unknown


def _is_allowed(value: Any) -> bool:
    """Whether the weights_only unpickler takes a value of this type."""
    if is_named_tuple(value) or is_dataclass_instance(value):  # may hold tensors, and so be large
        return type(value) in torch.serialization.get_safe_globals()
    archive = io.BytesIO()
    try:
        torch_save(value, archive)
    except Exception:  # noqa: BLE001 - pickling runs user code, which may raise anything
        return False
    return _refusal(archive) is None


def _refusal(archive: io.BytesIO) -> str | None:
    """Why the weights_only unpickler refuses what was saved; None when it takes it.

    Asks the unpickler itself, and so knows what ``add_safe_globals`` allowed.
    """
    archive.seek(0)
    try:
        torch_load(archive, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        # Without torch's own advice, which is given whether it helps or not.
        return str(error.__context__ or error).strip().splitlines()[0].split(" Please use ")[0]
    return None
