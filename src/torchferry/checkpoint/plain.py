"""Plain values in place of small objects that ``torch.load(weights_only=True)`` refuses, where they say the same.

numpy's scalars become Python's numbers and strings; members of enums their values; paths, dates, decimals, fractions,
UUIDs and torch's version their texts; a timedelta its seconds; NamedTuples, dataclasses and namespaces dicts; a
frozenset a set, a deque a list. ``LoadedCheckpoint.hyperparameters_as`` turns them back, by the types of the fields.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from contextlib import suppress
from copy import copy
from dataclasses import fields
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from pathlib import PosixPath, PurePosixPath, PureWindowsPath, WindowsPath
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import torch
from torch.torch_version import TorchVersion

from torchferry.checkpoint.hyperparameters import is_dataclass_instance, is_named_tuple

__all__ = ["CONTAINERS", "LEAVES", "made_plain", "plain_form", "plain_number"]

# What the weights_only unpickler builds whatever it holds: torch/_weights_only_unpickler.py, torch 2.13.
LEAVES = frozenset({
    bool, bytearray, bytes, complex, float, int, str, type(None), torch.device, torch.dtype, torch.nn.Parameter,
    torch.Size, torch.Tensor,
})  # fmt: skip
CONTAINERS = frozenset({Counter, OrderedDict, dict, list, set, tuple})


def _as_text(value: Any) -> Any:
    # The offset of a time zone is in the text; the name of a zone with summer time, and which 2:30 it was, are not.
    zone = getattr(value, "tzinfo", None)
    return value if getattr(value, "fold", 0) or not isinstance(zone, timezone | None) else value.isoformat()


def _as_seconds(value: timedelta) -> Any:
    seconds = value.total_seconds()  # exact to 2**53 microseconds, which are 285 years
    with suppress(OverflowError):  # timedelta.max, rounded up
        if timedelta(seconds=seconds) == value:
            return seconds
    return value


def _as_list(value: deque[Any]) -> Any:
    return list(value) if value.maxlen is None else value


def _as_dict(value: Any) -> dict[str, Any]:
    return dict(vars(value))


# By type, and not by isinstance: a subclass can know more than its text says.
_FORMS: dict[type, Callable[[Any], Any]] = {
    Decimal: str,
    Fraction: str,
    Namespace: _as_dict,
    PosixPath: str,
    PurePosixPath: str,
    PureWindowsPath: str,
    SimpleNamespace: _as_dict,
    TorchVersion: str,
    UUID: str,
    WindowsPath: str,
    date: _as_text,
    datetime: _as_text,
    deque: _as_list,
    frozenset: set,
    time: _as_text,
    timedelta: _as_seconds,
}


def plain_number(value: Any) -> Any:
    """A numpy scalar as Python's bool, int, float, complex, str or bytes; any other value as it is.

    A dtype that Python has no number for (``longdouble``, ``datetime64``) is left as it is.
    """
    numpy = sys.modules.get("numpy")  # what is a numpy scalar has imported it
    if numpy is None or not isinstance(value, numpy.generic):
        return value
    plain = value.item()
    return plain if type(plain) in LEAVES else value


def plain_form(value: Any) -> Any:
    """A plain value that says the same, of which parts may have to be made plain in turn; else ``value`` itself."""
    form = value
    if isinstance(value, Enum):
        form = value.value
    elif (make := _FORMS.get(type(value))) is not None:
        form = make(value)
    elif is_named_tuple(value):
        form = value._asdict()
    elif is_dataclass_instance(value):
        names = [field.name for field in fields(value)]
        # What else an object holds would be lost: a dataclass can also be a module.
        if not isinstance(value, dict | list | tuple) and getattr(value, "__dict__", {}).keys() <= {*names}:
            form = {name: getattr(value, name) for name in names}
    else:
        form = plain_number(value)
    return form


def made_plain(value: Any, form: Callable[[Any], Any], allowed: Callable[[Any], bool]) -> Any:
    """``value`` with plain values inside; the containers around them are new, the user's own stay as they are.

    Args:
        value: Containers and leaves.
        form: :func:`plain_form` or :func:`plain_number`.
        allowed: Whether a value can be loaded as it is. Asked once for each type.

    Returns:
        ``value`` itself where nothing in it changes. Objects that it holds twice are one object in the result, too.
    """
    converter = _Converter(form, allowed)
    converted = converter.convert(value)
    return converted if converter.changed else value


class _Converter:
    def __init__(self, form: Callable[[Any], Any], allowed: Callable[[Any], bool]) -> None:
        self.changed = False
        self._form = form
        self._allowed = allowed
        self._allowed_types: dict[type, bool] = {}
        # By id, with the object itself: an id is good only as long as its object lives.
        self._done: dict[int, tuple[Any, Any]] = {}

    def convert(self, value: Any) -> Any:
        kind = type(value)
        if kind in LEAVES:
            return value
        if id(value) in self._done:
            return self._done[id(value)][1]
        if kind in CONTAINERS:
            return self._container(value)
        form = self._form(value)
        if form is value or self._is_allowed(value):
            return value
        self.changed = True
        self._remember(value, value)  # found again inside itself it is left to be refused
        return self._remember(value, self.convert(form))

    def _is_allowed(self, value: Any) -> bool:
        kind = type(value)
        if kind not in self._allowed_types:
            self._allowed_types[kind] = self._allowed(value)
        return self._allowed_types[kind]

    def _container(self, value: Any) -> Any:
        if isinstance(value, set):
            items = [self.convert(item) for item in value]
            kept = all(map(_is_hashable, items)) and len({*items}) == len(value)  # else left to be refused
            return self._remember(value, {*items} if kept else value)
        if isinstance(value, tuple):
            converted = tuple([self.convert(item) for item in value])
            # A tuple can hold a list that holds the tuple, which has then been converted on the way.
            return self._done[id(value)][1] if id(value) in self._done else self._remember(value, converted)
        new = self._remember(value, copy(value))  # with the attributes of an OrderedDict; before what may hold it
        new.clear()
        if isinstance(value, list):
            new.extend(self.convert(item) for item in value)
            return new
        for key, item in value.items():
            plain_key = self.convert(key)
            if not _is_hashable(plain_key) or plain_key in new or (plain_key in value and plain_key != key):
                plain_key = key  # two keys that become one would lose an item: left to be refused
            new[plain_key] = self.convert(item)
        return new

    def _remember(self, value: Any, result: Any) -> Any:
        self._done[id(value)] = value, result
        return result


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True
