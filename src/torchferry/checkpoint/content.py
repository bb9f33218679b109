"""What of a checkpoint is saved, and whether it could be loaded again."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch

from torchferry.checkpoint.adapters import refusal
from torchferry.checkpoint.hyperparameters import as_dict, is_dataclass_instance, is_named_tuple
from torchferry.checkpoint.plain import CONTAINERS, LEAVES, made_plain, plain_form, plain_number
from torchferry.checkpoint.values import (
    MODULE_KEY,
    OPTIMIZER_KEY,
    LoadedCheckpoint,
    PyTorchCheckpoint,
    name_is_taken,
)
from torchferry.errors import CheckpointValueError
from torchferry.formats.torch_hooks import torch_load, torch_save
from torchferry.formats.torch_pickle import pickle_object

__all__ = ["Loadable", "content_of", "loadable", "prepared"]

_ANYTHING = (Exception, SystemExit)  # what user code may raise that pickling, repr() and comparing run
_STATES = {MODULE_KEY, OPTIMIZER_KEY}
_SIMPLE = frozenset({bool, bytes, complex, float, str, type(None)})
_LONGEST_INT = 2000  # bits; from 2,040 on, torch's weights_only unpickler refuses them
_DEEPEST = 100  # containers in containers: pickle takes some 490, less where the caller is deep in calls already
_LONGEST_TEXT = 300  # characters of a name or an error in a message


def content_of(checkpoint: PyTorchCheckpoint, failed: dict[str, BaseException] | None = None) -> dict[str, Any]:
    """The dict that is saved for a checkpoint, in the order of flytekit's own transformer.

    Calls ``state_dict()``, which may take long: run it in a worker thread.

    Args:
        checkpoint: A checkpoint, or an object of another class with the same three fields: flytekit has one.
        failed: Given the error of each part that cannot be had, by its name: of a state, of a hyperparameter.

    Raises:
        CheckpointValueError: there is nothing to save, or there is a hyperparameter with the name of a state.
        Exception: what else keeps a part from being had; only without ``failed``, or where nothing else is left.
    """
    if isinstance(checkpoint, LoadedCheckpoint):
        return dict(checkpoint) or _refuse_nothing(checkpoint)
    errors: dict[str, BaseException] = {}
    content: dict[str, Any] = {}
    _put_state(content, "module", checkpoint.module, errors)
    hyperparameters = as_dict(checkpoint.hyperparameters, errors)
    for name in _STATES & hyperparameters.keys():
        errors[name] = refusal(name_is_taken(name))
        del hyperparameters[name]
    content.update(hyperparameters)
    _put_state(content, "optimizer", checkpoint.optimizer, errors)
    if errors and (failed is None or not content):
        raise next(iter(errors.values()))
    if failed is not None:
        failed.update(errors)
    return content or _refuse_nothing(checkpoint)


def _refuse_nothing(checkpoint: PyTorchCheckpoint) -> NoReturn:
    raise refusal(f"There is nothing to save in {checkpoint!r}.")


def _put_state(content: dict[str, Any], name: str, owner: Any, errors: dict[str, BaseException]) -> None:
    if owner is None:
        return
    key = f"{name}_state_dict"
    try:
        content[key] = _state_of(name, owner)
    except _ANYTHING as error:
        errors[key] = error


@dataclass(frozen=True, slots=True)
class Loadable:
    """Content as ``torch.load(weights_only=True)``, the default, takes it; or what comes closest.

    Attributes:
        content: What to save.
        refused: What of it would not be loaded, and what to do: the first such value; None where all would be.
        left_out: What is not in it, because it cannot be pickled: hyperparameters, and entries of the states.
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
    failed: dict[str, BaseException] = {}
    content = content_of(checkpoint, failed)
    ready = _picklable(content) if trusted else loadable(content)
    if not failed:
        return ready
    name, error = next(iter(failed.items()))
    is_ours = isinstance(error, CheckpointValueError)
    said = str(error) if is_ours else f"{name} cannot be had: {type(error).__name__}: {_sentence(error)}"
    return replace(ready, refused=ready.refused or said, left_out=(*ready.left_out, *failed))


def _picklable(content: dict[str, Any]) -> Loadable:
    """The content without what cannot be pickled."""
    try:
        pickle_object(content)
    except _ANYTHING:
        return _without_unsaved(content, trusted=True)
    return Loadable(content)


def loadable(content: dict[str, Any]) -> Loadable:
    """The content as ``torch.load(weights_only=True)``, the default, takes it.

    What it would refuse becomes a plain value where that loses nothing (:mod:`torchferry.checkpoint.plain`): anything
    among hyperparameters, which ``hyperparameters_as`` turns back; in the states only numpy's scalars.

    Returns:
        With ``content`` itself where nothing has to change; the user's own containers are never changed.

    Raises:
        CheckpointValueError: nothing of ``content`` can be pickled.
    """
    if not _unknown_values(content):
        return Loadable(content)
    return _without_unsaved(_made_plain(content), trusted=False)


def _without_unsaved(plain: dict[str, Any], *, trusted: bool) -> Loadable:
    refused: list[str] = []
    left_out: dict[tuple[Any, ...], None] = {}
    needs_trust = False
    for unknown in _unknown_values(plain):
        if any(unknown.entry[: len(entry)] == entry for entry in left_out):
            continue
        archive = io.BytesIO()
        try:
            torch_save(unknown.value, archive)
        except _ANYTHING as error:
            left_out[unknown.entry] = None
            refused.append(f"{unknown.path} is a {_kind(unknown.value)}, and cannot be saved: {_sentence(error)}")
            refused[-1] += " Save a plain value in its place."
            continue
        if not trusted and (reason := _refusal(archive)) is not None:
            needs_trust = True
            refused.append(_advice(unknown.path, unknown.value, archive, reason))
    if not refused:
        return Loadable(plain)
    for entry in left_out:
        plain = _without(plain, entry)
    if not plain:
        raise refusal(refused[0])
    names = tuple(".".join(map(_shown, entry)) for entry in left_out)
    return Loadable(plain, refused[0], names, needs_trust or trusted)


def _without(container: Any, entry: tuple[Any, ...]) -> Any:
    """A copy without an entry of a dict in it; other containers stay the same."""
    first, *rest = entry
    if isinstance(container, tuple):
        return (*container[:first], _without(container[first], tuple(rest)), *container[first + 1 :])
    new = copy(container)
    if rest:
        new[first] = _without(container[first], tuple(rest))
    else:
        del new[first]
    return new


def _made_plain(content: dict[str, Any]) -> dict[str, Any]:
    others = {key: value for key, value in content.items() if key not in _STATES}
    try:
        plain_others = made_plain(others, plain_form, _is_allowed)
    except _ANYTHING:
        if len(others) <= 1:  # what is in the way is found among the unknown values
            return content
        return {name: item for key in content for name, item in _made_plain({key: content[key]}).items()}
    hyperparameters = iter(plain_others.items())
    plain: dict[str, Any] = {}
    for key, value in content.items():  # in their order
        if key in others:
            plain_key, plain_value = next(hyperparameters)
            plain[key if plain_key in _STATES else plain_key] = plain_value
        else:
            plain[key] = made_plain(value, plain_number, _is_allowed)
    return plain


def _advice(path: str, value: Any, archive: io.BytesIO, reason: str) -> str:
    with torch.serialization.safe_globals([type(value)]):
        helps = _refusal(archive) is None
    allow = (
        f"allow the type in every task that loads it, torch.serialization.add_safe_globals([{_kind(value, short=True)}"
        "]); or "
    )
    return (
        f"{path} is a {_kind(value)}, and could not be loaded again: loading takes tensors and plain values only "
        f"(weights_only=True). Save a plain value in its place; or {allow if helps else ''}annotate both sides with "
        f"LoadOptions(weights_only=False). torch says: {_sentence(reason)}"
    )


def _kind(value: Any, *, short: bool = False) -> str:
    kind = type(value)
    try:
        name, module = str(kind.__qualname__), str(kind.__module__)
    except _ANYTHING:  # a metaclass may do so
        return type.__repr__(kind)
    return name if short or module == "builtins" else f"{module}.{name}"


def _sentence(message: object) -> str:
    try:
        text = repr(message) if isinstance(message, SystemExit) else str(message)
    except _ANYTHING:
        text = type(message).__name__
    return f"{_shortened(text).rstrip('. ')}."


def _shown(key: Any) -> str:
    return _shortened(key) if isinstance(key, str) else _represented(key)


def _represented(key: Any) -> str:
    try:
        return _shortened(repr(key))
    except _ANYTHING:
        return f"<{_kind(key)}>"


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}..."


def _state_of(name: str, owner: Any) -> Any:
    if isinstance(owner, Mapping):
        return owner
    state_dict = getattr(owner, "state_dict", None)
    if not callable(state_dict) or isinstance(owner, type):
        raise refusal(
            f"The {name} of a PyTorchCheckpoint is an object with a state_dict(), or such a state; given: "
            f"{owner if isinstance(owner, type) else type(owner)}."
        )
    return state_dict()


@dataclass(frozen=True, slots=True)
class _Unknown:
    """A value of a type that may or may not load.

    Attributes:
        entry: Where to leave it out: the keys, and positions in lists and tuples, down to an entry of a dict in one of
            the states; of a hyperparameter, its name.
        path: Where it is, for messages.
        value: Itself.
    """

    entry: tuple[Any, ...]
    path: str
    value: Any


def _unknown_values(content: dict[str, Any]) -> list[_Unknown]:
    """Values of types that may or may not load, in the order in which they are saved."""
    unknown: list[_Unknown] = []
    seen: set[int] = set()
    for key, value in content.items():
        is_state = key in _STATES
        path = str(key) if is_state else f"Hyperparameter {_represented(key)}"
        roots = [_Unknown((key,), f"The name of {path}", key), _Unknown((key,), path, value)]
        try:
            unknown += _unknown_in(roots, is_state, seen)
        except _ANYTHING:  # nothing is known of a value that cannot be looked at
            unknown.append(roots[1])
    return unknown


def _unknown_in(roots: list[_Unknown], is_state: bool, seen: set[int]) -> list[_Unknown]:
    unknown: list[_Unknown] = []
    waiting = [(root, root.entry, 0) for root in reversed(roots)]  # with the place of each, and how deep that is
    while waiting:
        found, place, depth = waiting.pop()
        value, path = found.value, found.path
        kind = type(value)
        if id(value) in seen:
            continue
        is_known = kind in LEAVES or kind in CONTAINERS
        if not is_known or (kind is int and value.bit_length() > _LONGEST_INT) or depth > _DEEPEST:
            unknown.append(found if depth <= _DEEPEST else roots[1])
            if depth > _DEEPEST:
                return unknown
            continue
        inside: list[tuple[_Unknown, tuple[Any, ...]]] = []
        if attributes := getattr(value, "__dict__", None):  # tensors and OrderedDicts are saved with theirs
            inside.append((_Unknown(found.entry, f"{path}.__dict__", attributes), ()))
        if kind in CONTAINERS:
            seen.add(id(value))
            inside += _items(found, place, is_state)
        waiting.extend((item, where, depth + 1) for item, where in reversed(inside))
    return unknown


def _items(found: _Unknown, place: tuple[Any, ...], is_state: bool) -> list[tuple[_Unknown, tuple[Any, ...]]]:
    """What a container has, and where; () for a place that cannot be named."""
    value, path = found.value, found.path
    if not isinstance(value, dict):
        named = bool(place) and isinstance(value, list | tuple)
        return [
            (_Unknown(found.entry, f"{path}[{index}]", item), (*place, index) if named else ())
            for index, item in enumerate(value)
            if not _is_simple(item)
        ]
    inside: list[tuple[_Unknown, tuple[Any, ...]]] = []
    items: list[tuple[_Unknown, tuple[Any, ...]]] = []
    for key, item in value.items():
        if _is_simple(key) and _is_simple(item):
            continue
        name = (*place, key) if place else ()
        entry = name if is_state and place else found.entry
        inside.append((_Unknown(entry, f"a key of {path}", key), ()))
        items.append((_Unknown(entry, f"{path}[{_represented(key)}]", item), name))
    return inside + items


def _is_simple(value: Any) -> bool:
    """Whether it is known to load, and nothing is in it: most values are."""
    kind = type(value)
    return kind in _SIMPLE or (kind is int and value.bit_length() <= _LONGEST_INT)


def _is_allowed(value: Any) -> bool:
    """Whether the weights_only unpickler takes a value of this type."""
    if is_named_tuple(value) or is_dataclass_instance(value):  # may hold tensors, and so be large
        return type(value) in torch.serialization.get_safe_globals()
    archive = io.BytesIO()
    try:
        torch_save(value, archive)
    except _ANYTHING:
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
    except _ANYTHING as error:
        return _sentence(error)
    return None
