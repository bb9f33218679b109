"""Picks a part of a checkpoint's object by the names of its values."""

from __future__ import annotations

import difflib
import reprlib
from collections import OrderedDict
from copy import copy
from itertools import islice
from typing import TYPE_CHECKING, Any

from torchferry.errors import CheckpointCorruptError, CheckpointFormatError, CheckpointKeyError
from torchferry.formats.stand_ins import OrderedStandIn, children, is_leaf, name_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

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


def leaves(graph: Graph, part: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """:func:`values_of` a part of the object that a graph has read from its pickle."""
    return values_of(part, graph.nbytes, graph.url)


def values_of(part: Any, nbytes: int, url: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The values in the dicts, lists and tuples of an object by name, and the ``_metadata`` of state dicts.

    Args:
        part: The object, of stand-ins or as torch has loaded it.
        nbytes: Bytes that it was read from. It may have names of 8 MiB and 8 bytes for each of them.
        url: For messages.

    Raises:
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
        if not isinstance(value, dict | list | tuple):
            held += _nbytes(name)
            if held > _HELD + nbytes * _HELD_EACH:
                raise CheckpointCorruptError(f"{url} is damaged: its names are longer than its length allows.")
            found[name] = value
            continue
        kept = value.attributes.get("_metadata") if isinstance(value, OrderedStandIn) else _metadata_of(value)
        if kept is not None:
            attributes[name] = kept
        items = [(f"{name}.{key}" if name and key else name or key, item) for _, key, item in _items(value)]
        stack += reversed(items)
    return found, attributes


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
