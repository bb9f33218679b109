"""Picks a part of a checkpoint's object by the names of its values."""

from __future__ import annotations

import difflib
import reprlib
from collections import OrderedDict
from copy import copy
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from torchferry.errors import CheckpointCorruptError, CheckpointFormatError, CheckpointKeyError
from torchferry.formats.stand_ins import OrderedStandIn, children, is_leaf, is_tensor_leaf, name_of
from torchferry.printable import printable

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from torchferry.formats.graph import Graph
    from torchferry.formats.keys import Keys

__all__ = ["leaves", "missing_keys", "pick", "take", "values_of"]

_VISITS = (1 << 16, 1)  # values that a choice may look at, and so many for each byte of the pickle
_LONGEST_NAME = 1 << 18  # characters
_HELD = 8 << 20  # bytes of names that are held at once
_HELD_EACH = 8  # more for each byte of the pickle
_WIDEST = 4  # bytes of a character, in text that is not ASCII
_DEEPEST = 400  # containers in one another: the stack has room for them, and for a function of the user's
_SHOWN_KEYS = 50  # in the message about one that is not there
_SHORT = reprlib.Repr()  # of a key, which may be a tuple of many others
_SHORT.maxlevel = 2
_SHORT.maxstring = _SHORT.maxother = 200

_TOO_MANY = "more names, or longer ones, than its length allows"

_NOTHING: Any = object()


def pick(graph: Graph, keys: Keys | None, exclude: Keys | None) -> Any:
    """The part of the object that ``keys`` take, without what ``exclude`` takes; nested as it is.

    A container that is not taken as a whole becomes one with the taken items only: a dict stays a dict of its kind;
    of a list, a tuple or an object remains a dict, with the indices or the names of the attributes as keys.

    Raises:
        CheckpointFormatError: the object is a tensor or a plain value, and has no names.
        CheckpointKeyError: a key takes nothing.
        CheckpointCorruptError: the object is not made as torch makes it.
    """
    try:
        return _part_of(graph.root, keys, exclude, graph.nbytes, graph.url)
    except _LimitError as error:
        raise CheckpointCorruptError(f"{graph.url}: data.pkl is none that torch writes: {error}.") from error


def take(loaded: Any, keys: Keys | None, exclude: Keys | None, nbytes: int, url: str) -> Any:
    """:func:`pick` of an object that torch has loaded, from so many bytes."""
    try:
        return _part_of(loaded, keys, exclude, nbytes, url)
    except _LimitError as error:
        raise CheckpointCorruptError(f"{url} is damaged: {error}.") from error


def _part_of(root: Any, keys: Keys | None, exclude: Keys | None, nbytes: int, url: str) -> Any:
    if _is_leaf(root):
        raise CheckpointFormatError(f"{url} holds no dict, so it has no keys to choose from: load it without keys=.")
    part = _Picker(keys, exclude, _VISITS[0] + _VISITS[1] * nbytes).pick("", root)
    if keys is not None and keys.unmatched:
        raise missing_keys(url, keys.unmatched, (name for name, _ in children(root) if name))
    return {} if part is _NOTHING else part


def missing_keys(url: str, missing: Sequence[str], names: Iterable[str]) -> CheckpointKeyError:
    """The error for keys that take nothing: it names some that would."""
    every = [*islice(names, 1 << 16)]
    shown = ", ".join(_SHORT.repr(name) for name in every[:_SHOWN_KEYS])
    more = f" and {len(every) - _SHOWN_KEYS} more" if len(every) > _SHOWN_KEYS else ""
    near = difflib.get_close_matches(missing[0], every[:1000], 1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    some = ", ".join(map(repr, missing[:_SHOWN_KEYS]))
    return CheckpointKeyError(f"{url} has no key {some}; its keys are {shown}{more}.{hint}")


def leaves(graph: Graph, part: Any, whole: Collection[str] = ()) -> tuple[dict[str, Any], dict[str, Any]]:
    """:func:`values_of` a part of the object that a graph has read from its pickle."""
    return values_of(part, graph.nbytes, graph.url, whole)


def values_of(part: Any, nbytes: int, url: str, whole: Collection[str] = ()) -> tuple[dict[str, Any], dict[str, Any]]:
    """The values in the dicts, lists and tuples of an object by name, and the ``_metadata`` of state dicts.

    Args:
        part: The object, of stand-ins or as torch has loaded it.
        nbytes: Bytes that it was read from. It may have names of 8 MiB and 8 bytes for each of them.
        url: For messages.
        whole: Names of values that are taken as they are, containers or not.

    Raises:
        CheckpointFormatError: a tensor and another value have one name, as {"a.b": ..., "a": {"b": ...}} has.
        CheckpointCorruptError: it has more names, or longer ones: its containers hold each other very often, or
            themselves.
    """
    found: dict[str, Any] = {}
    attributes: dict[str, Any] = {}
    room = _VISITS[0] + _VISITS[1] * nbytes
    held = 0
    stack: list[tuple[str, Any]] = [("", part)]
    while stack:
        name, value = stack.pop()
        room -= 1 + len(name) // 64
        if room < 0 or len(name) > _LONGEST_NAME:
            raise CheckpointCorruptError(f"{url} is damaged: it has {_TOO_MANY}.")
        if name in whole or not isinstance(value, dict | list | tuple):
            held += _nbytes(name)
            if held > _HELD + nbytes * _HELD_EACH:
                raise CheckpointCorruptError(f"{url} is damaged: its names are longer than its length allows.")
            if found.setdefault(name, value) is not value:
                if _is_tensor(value) or _is_tensor(found[name]):
                    raise _two_of_one_name(part, name, whole, url)
                found[name] = value
            continue
        kept = value.attributes.get("_metadata") if isinstance(value, OrderedStandIn) else _metadata_of(value)
        if kept is not None:
            attributes[name] = kept
        items = [(f"{name}.{key}" if name and key else name or key, item) for _, key, item in _items(value)]
        stack += reversed(items)
    return found, attributes


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or is_tensor_leaf(value)


def _two_of_one_name(part: Any, name: str, whole: Collection[str], url: str) -> CheckpointFormatError:
    """The error for two values of one name: it says where each is, in Python's way."""
    places: list[str] = []
    stack: list[tuple[str, str, Any]] = [("", name, part)]  # what leads to a value, and the rest of the name
    while stack and len(places) < 2:  # noqa: PLR2004 - as many as have been found
        place, rest, value = stack.pop()
        if isinstance(value, dict | list | tuple) and not (name in whole and not rest):
            items = [
                (f"{place}[{_SHORT.repr(key)}]", _after(rest, key_name), item) for key, key_name, item in _items(value)
            ]
            stack += reversed([(there, left, item) for there, left, item in items if left is not None])
        elif not rest:
            places.append(place)
    return CheckpointFormatError(
        f"{url} has two values that are called {printable(name)!r}: {' and '.join(map(printable, places))}. Neither "
        "into= nor a conversion could tell them apart: load it without into=, and rename one."
    )


def _after(name: str, part: str) -> str | None:
    """What remains of a name after its first part; None where it begins in another way."""
    if not part or name == part:
        return name[len(part) :]
    return name[len(part) + 1 :] if name.startswith(f"{part}.") else None


def _metadata_of(loaded: dict[Any, Any] | list[Any] | tuple[Any, ...]) -> Any:
    return getattr(loaded, "_metadata", None) if isinstance(loaded, OrderedDict) else None


class _LimitError(Exception):
    """An object is larger than its length allows. No ValueError: a function of the user's may raise that."""


class _Picker:
    def __init__(self, keys: Keys | None, exclude: Keys | None, room: int) -> None:
        self._keys = keys
        self._exclude = exclude
        self._room = room
        self._held = 0  # bytes of the names of the containers that the current one is in
        self._path: set[int] = set()  # ids of the containers that the current one is in

    def pick(self, name: str, value: Any, *, taken: bool = False) -> Any:
        """The part of a value; ``_NOTHING`` if nothing of it is taken."""
        self._room -= 1 + len(name) // 64  # a long name takes as long as several short ones
        if self._room < 0 or len(name) > _LONGEST_NAME:
            raise _LimitError(f"it has {_TOO_MANY}")
        leaf = _is_leaf(value)
        if name and self._exclude is not None and self._exclude.takes(name, is_leaf=leaf):
            return _NOTHING
        # All keys are asked, so that each that takes something is known.
        asked = self._keys is not None and bool(name) and self._keys.takes(name, is_leaf=leaf)
        taken = taken or asked or self._keys is None
        if leaf or id(value) in self._path:
            return value if taken else _NOTHING
        if taken and self._exclude is None and (self._keys is None or not self._keys.unmatched):
            return value
        if not taken and self._keys is not None and not self._keys.reaches_into(name):
            return _NOTHING
        self._path.add(id(value))
        self._held += _nbytes(name)
        try:
            if self._held > _HELD:
                raise _LimitError("its names are longer than its length allows")
            if len(self._path) > _DEEPEST:
                raise _LimitError(f"it is nested more than {_DEEPEST} deep")
            return self._pick_items(name, value, taken=taken)
        finally:
            self._held -= _nbytes(name)
            self._path.discard(id(value))

    def _pick_items(self, name: str, value: Any, *, taken: bool) -> Any:
        """The container itself if all its items are taken, or else one of those that are."""
        items = _items(value)
        picked: dict[Any, Any] = {}
        is_whole = bool(items) or taken
        for key, part, item in items:
            found = self.pick(f"{name}.{part}" if name and part else name or part, item, taken=taken)
            is_whole &= found is item
            if found is _NOTHING:
                continue
            if part or isinstance(value, dict):
                picked[key] = found
            elif isinstance(found, dict):  # the state of an object has the object's name
                picked.update(found)
        if is_whole:
            return value
        if not picked:
            return _NOTHING
        return _like(value, picked) if isinstance(value, dict) else picked


def _like(whole: dict[Any, Any], items: dict[Any, Any]) -> dict[Any, Any]:
    """A dict of the same kind, with the same attributes, such as ``_metadata``."""
    if isinstance(whole, OrderedStandIn):
        part_of = OrderedStandIn.__new__(type(whole))
        dict.update(part_of, items)
        if whole.attributes:
            part_of.attributes = whole.attributes
        return part_of
    if type(whole) is dict:
        return items
    kind = OrderedDict if isinstance(whole, OrderedDict) else dict  # its class may refuse to be changed
    part = copy(whole)
    kind.clear(part)
    for key, item in items.items():
        kind.__setitem__(part, key, item)
    return part


def _is_leaf(value: Any) -> bool:
    """:func:`is_leaf`, also of what torch has loaded: a tuple of a class, such as ``torch.Size``, has no names."""
    return is_leaf(value) or (isinstance(value, tuple) and type(value) is not tuple)


def _nbytes(name: str) -> int:
    return len(name) if name.isascii() else _WIDEST * len(name)


def _items(value: Any) -> list[tuple[Any, str, Any]]:
    """Key, name and value of each item of a container."""
    if isinstance(value, dict):
        return [(key, name_of(key), item) for key, item in dict.items(value)]
    if isinstance(value, list | tuple):
        return [(index, str(index), item) for index, item in enumerate(value)]
    return [(name, name, item) for name, item in children(value)]
