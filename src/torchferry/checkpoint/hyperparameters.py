"""Hyperparameters: dataclasses and NamedTuples become the dicts that are saved, and are rebuilt from them.

So is what :mod:`torchferry.checkpoint.plain` made plain: members of enums, paths, dates, numpy's scalars and others.
"""

from __future__ import annotations

import inspect
import sys
from argparse import Namespace
from collections import OrderedDict, deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal, InvalidOperation
from enum import Enum
from fractions import Fraction
from pathlib import PurePath
from types import SimpleNamespace, UnionType
from typing import (
    Annotated,
    Any,
    Final,
    NotRequired,
    Required,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)
from uuid import UUID

__all__ = ["as_dict", "is_dataclass_instance", "is_named_tuple", "rebuild"]

T = TypeVar("T")

_DATES: frozenset[type] = frozenset({date, datetime, time})
_OF_TEXTS: frozenset[type] = frozenset({Decimal, Fraction, UUID})
_SAVED_AS: dict[type, type] = {frozenset: set, deque: list}  # what a container of another kind was saved as


def is_dataclass_instance(value: object) -> bool:
    """Whether ``value`` is an instance, and not the class, of a dataclass."""
    return is_dataclass(value) and not isinstance(value, type)


def is_named_tuple(value: object) -> bool:
    """Whether ``value`` is an instance of a NamedTuple."""
    return isinstance(value, tuple) and hasattr(value, "_fields")


def as_dict(hyperparameters: Any, failed: dict[str, BaseException] | None = None) -> dict[str, Any]:
    """Hyperparameters in whatever form, as a new dict by name.

    Args:
        hyperparameters: Those.
        failed: Given the errors of fields that cannot be had, by their names; without, the first is raised.
    """
    if hyperparameters is None:
        return {}
    if is_named_tuple(hyperparameters):
        return dict(zip(hyperparameters._fields, hyperparameters, strict=True))
    if not is_dataclass_instance(hyperparameters):
        return dict(dict.items(hyperparameters) if isinstance(hyperparameters, dict) else hyperparameters)
    values: dict[str, Any] = {}
    for field in fields(hyperparameters):
        if not field.init and not hasattr(hyperparameters, field.name):  # and nobody has set it
            continue
        try:
            values[field.name] = _plain(getattr(hyperparameters, field.name))
        except (Exception, SystemExit) as error:
            if failed is None:
                raise
            failed[field.name] = error
    return values


def _plain(value: Any) -> Any:
    """``dataclasses.asdict`` without its deep copies, which double tensors and fail on those that require grad."""
    if is_dataclass_instance(value):
        return as_dict(value)
    if type(value) in {list, tuple}:
        return type(value)(map(_plain, value))
    if type(value) is dict:
        return {key: _plain(item) for key, item in value.items()}  # a dict is no key
    return value


def rebuild(cls: type[T], values: Mapping[str, Any]) -> T:
    """Makes a ``cls`` from the values of its fields.

    The types of the fields say what becomes of their values, in lists, tuples, sets and dicts too: dataclasses and
    NamedTuples are rebuilt, and so is what :mod:`torchferry.checkpoint.plain` made plain.

    Raises:
        TypeError: ``cls`` is neither a dataclass nor a NamedTuple, or ``values`` lacks a field without a default or
            has one that ``cls`` does not know, or one that is no member of its field's enum, or an annotation names
            what is not there at run time.
    """
    made: Any = get_origin(cls) or cls
    if is_dataclass(made):
        known = {field.name: field.init for field in fields(made)}
    elif names := getattr(made, "_fields", None):
        known = dict.fromkeys(names, True)
    else:
        raise TypeError(f"Hyperparameters can be had as a dataclass or a NamedTuple, not as {cls!r}.")
    try:
        hints = _field_types(made, get_args(cls))
    except NameError as error:
        raise TypeError(
            f"The types of {made.__qualname__}'s fields cannot be told: {error}. Import what they name at run time, "
            "not under TYPE_CHECKING, and define it in a module."
        ) from error
    given = {name: _convert(hints.get(name, Any), value) for name, value in values.items()}
    arguments = {name: value for name, value in given.items() if known.get(name, True)}
    try:
        inspect.signature(made).bind(**arguments)
    except TypeError as error:
        raise TypeError(
            f"The hyperparameters ({', '.join(values) or 'none'}) do not fit {made.__qualname__}"
            f"({', '.join(known)}): {error}."
        ) from error
    result: T = made(**arguments)
    if is_dataclass(made):
        for name, value in given.items():  # __init__ does not take all of them, and __post_init__ may change them again
            object.__setattr__(result, name, value)
    return result


def _field_types(cls: type[Any], arguments: tuple[Any, ...]) -> dict[str, Any]:
    """The types of a class's fields, its bases' too, with what the type variables of each stand for."""
    stand_for = dict(zip(getattr(cls, "__parameters__", ()), arguments, strict=False))
    hints: dict[str, Any] = {}
    for base in reversed(vars(cls).get("__orig_bases__", cls.__bases__)):
        made = get_origin(base) or base
        if isinstance(made, type):  # NamedTuple is a function
            hints |= _field_types(made, tuple(_substituted(argument, stand_for) for argument in get_args(base)))
    own = inspect.get_annotations(cls)
    resolved = get_type_hints(cls) if own else {}
    return hints | {name: _substituted(hint, stand_for) for name, hint in resolved.items() if name in own}


def _substituted(hint: Any, stand_for: Mapping[Any, Any]) -> Any:
    if isinstance(hint, TypeVar):
        return stand_for.get(hint, hint)
    variables = () if isinstance(hint, type) else getattr(hint, "__parameters__", ())
    return hint[tuple(stand_for.get(variable, variable) for variable in variables)] if variables else hint


def _convert(hint: Any, value: Any) -> Any:
    hint = getattr(hint, "__supertype__", hint)  # of a NewType
    origin, arguments = get_origin(hint), get_args(hint)
    converted = value
    if origin in {Annotated, Final, Required, NotRequired}:
        converted = _convert(arguments[0], value)
    elif origin in {Union, UnionType}:
        converted = _convert_first(arguments, value)
    elif is_typeddict(hint) and isinstance(value, dict):
        hints = get_type_hints(hint)
        converted = {key: _convert(hints.get(key, Any), item) for key, item in value.items()}
    elif isinstance(hint, type) and origin is None:
        converted = _convert_to(hint, value)
    elif isinstance(value, Mapping) and (is_dataclass(origin) or hasattr(origin, "_fields")):
        converted = rebuild(hint, value)  # a generic one, with its arguments
    elif isinstance(origin, type) and arguments:
        converted = _convert_container(origin, arguments, value)
    return converted


def _convert_container(kind: Any, arguments: tuple[Any, ...], value: Any) -> Any:
    """The items as the arguments of a hint, such as ``list[Path]`` or ``Mapping[str, Path]``, say."""
    given = type(value)
    saved_as = _SAVED_AS.get(kind, kind)
    if given not in {dict, OrderedDict, list, set, tuple} or not issubclass(given, saved_as):
        return value
    if issubclass(given, dict):
        if len(arguments) != 2:  # noqa: PLR2004 - of the keys and of the items
            return value
        return given((_convert(arguments[0], key), _convert(arguments[1], item)) for key, item in value.items())
    if given is tuple:
        hints = arguments if len(arguments) == len(value) and Ellipsis not in arguments else arguments[:1] * len(value)
        return tuple(_convert(item_hint, item) for item_hint, item in zip(hints, value, strict=True))
    items = [_convert(arguments[0], item) for item in value]
    return kind(items) if kind in _SAVED_AS else given(items)


def _convert_to(cls: Any, value: Any) -> Any:
    converted = value
    if cls in type(value).__mro__:  # isinstance() refuses Any and protocols
        pass
    elif isinstance(value, Mapping) and (is_dataclass(cls) or hasattr(cls, "_fields")):
        converted = rebuild(cls, value)
    elif isinstance(value, Mapping) and cls in {Namespace, SimpleNamespace}:
        converted = cls(**value)
    elif issubclass(cls, Enum):
        converted = _member(cls, value)
    elif isinstance(value, str) and issubclass(cls, PurePath):
        converted = cls(value)
    elif isinstance(value, str) and cls in _DATES | _OF_TEXTS:
        converted = _from_text(cls, value)
    elif isinstance(value, int | float) and cls is timedelta:
        converted = timedelta(seconds=value)
    elif type(value) is _SAVED_AS.get(cls):
        converted = cls(value)
    elif (numpy := sys.modules.get("numpy")) and issubclass(cls, numpy.generic):
        with suppress(TypeError):  # np.floating and other kinds of numbers have no values of their own
            converted = cls(value)
    return converted


def _member(cls: type[Enum], value: Any) -> Enum:
    for member in cls:
        with suppress(TypeError):
            # The value of the member was made plain, too, where it was a path or a dataclass.
            if member.value == value or _convert(type(member.value), value) == member.value:
                return member
    try:
        return cls(value)  # several flags
    except ValueError as error:
        raise TypeError(f"{value!r} is no value of the enum {cls.__qualname__}.") from error


def _from_text(cls: Any, value: str) -> Any:
    try:
        return cls.fromisoformat(value) if cls in _DATES else cls(value)
    except (ValueError, InvalidOperation, ZeroDivisionError) as error:
        kind = f"{cls.__qualname__} in ISO format" if cls in _DATES else cls.__qualname__
        raise TypeError(f"{value!r} is no {kind}.") from error


def _convert_first(hints: tuple[Any, ...], value: Any) -> Any:
    if type(value) in hints:  # str | Path: what was saved as a text may have been one
        return value
    if isinstance(value, Mapping):
        hints = _of_these_fields(hints, value)
    inexact = value
    for hint in hints:
        try:
            converted = _convert(hint, value)
        except TypeError:
            continue  # a dataclass with other fields: the next one may fit
        # A datetime can be made of a date's text, and a Fraction of a Decimal's: they would be saved as other texts.
        if converted is not value and (type(converted) not in _DATES | _OF_TEXTS or _text_of(converted) == value):
            return converted
        inexact = converted if inexact is value else inexact
    return inexact


def _of_these_fields(hints: tuple[Any, ...], values: Mapping[str, Any]) -> tuple[Any, ...]:
    """The hints of a union, without the classes that have other fields where one has exactly these.

    Raises:
        TypeError: several have exactly these: nothing tells which of them it was.
    """
    exact = [hint for hint in hints if _field_names(hint) == {*values}]
    if len(exact) > 1:
        names = " and ".join(getattr(hint, "__qualname__", str(hint)) for hint in exact)
        raise TypeError(f"{names} have the same fields ({', '.join(values)}): nothing tells which of them was saved.")
    return tuple(hint for hint in hints if hint in exact or _field_names(hint) is None) if exact else hints


def _field_names(hint: Any) -> set[str] | None:
    """Those of a dataclass or a NamedTuple; None of anything else."""
    cls = get_origin(hint) or hint
    if is_dataclass(cls):
        return {field.name for field in fields(cls)}
    names = getattr(cls, "_fields", None)
    return None if names is None else {*names}


def _text_of(value: Any) -> str:
    return value.isoformat() if type(value) in _DATES else str(value)
