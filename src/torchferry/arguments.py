"""What an argument must be, said in a sentence before anything is moved."""

from __future__ import annotations

import operator
import os
from collections.abc import Collection, Mapping
from contextlib import suppress
from numbers import Real
from typing import Any

from torchferry.errors import UnsupportedOptionError

__all__ = [
    "require_callback",
    "require_choice",
    "require_mapping",
    "require_nbytes",
    "require_path",
    "require_seconds",
    "whole_number",
]


def require_callback(given: Any) -> None:
    """Raises a TypeError where ``callback=`` is given and is no callback of fsspec's."""
    if given is not None and not all(hasattr(given, name) for name in ("set_size", "relative_update", "close")):
        raise TypeError(f"callback= takes a callback of fsspec's, such as torchferry.RichCallback(): not {given!r}.")


def require_choice(name: str, given: Any, choices: Collection[str]) -> None:
    """Raises an UnsupportedOptionError where an argument is given and is not one of the choices."""
    if given is not None and given not in choices:
        raise UnsupportedOptionError(f"{name}= is one of {', '.join(map(repr, choices))}: not {given!r}.")


def require_mapping(name: str, given: Any) -> None:
    """Raises a TypeError where an argument is given and is no mapping."""
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(f"{name}= is a mapping, such as a dict: not a {type(given).__name__}.")  # it may hold a secret


def require_nbytes(name: str, given: Any) -> None:
    """Raises an UnsupportedOptionError where an argument is given and is no whole number of bytes, 1 or more."""
    if given is not None and (whole_number(given) or 0) < 1:
        raise UnsupportedOptionError(f"{name}= is a number of bytes, such as {16 << 20}: not {given!r}.")


def require_path(given: Any) -> None:
    """Raises a TypeError where what should be a URL is neither a string nor a path."""
    if not isinstance(given, str | os.PathLike):
        raise TypeError(f"A URL is a string or a path: not {given!r}.")


def require_seconds(name: str, given: Any) -> None:
    """Raises an UnsupportedOptionError where an argument is given and is no number of seconds, 0 or more."""
    if given is not None and not (isinstance(given, Real) and float(given) >= 0):
        raise UnsupportedOptionError(f"{name}= is a number of seconds, such as 120: not {given!r}.")


def whole_number(given: Any) -> int | None:
    """A whole number as an int: numpy and tensors have some, too. None for a bool, and for what is none."""
    if isinstance(given, bool):
        return None
    with suppress(TypeError, ValueError, RuntimeError):  # of what is no whole number, and of a tensor of several
        return operator.index(given)
    return None
