"""Which values a load takes, by their names: exact ones, what lies below them, globs, or a function."""

from __future__ import annotations

import fnmatch
import re
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable
from typing import TypeAlias

__all__ = ["Keys", "KeysArgument", "as_keys", "is_asked"]

KeysArgument: TypeAlias = "str | Collection[str] | Callable[[str], bool]"
"""What ``keys=`` and ``exclude=`` take."""

_GLOB = re.compile(r"[*?\[]")


def as_keys(given: KeysArgument | None) -> tuple[str, ...] | Callable[[str], bool] | None:
    """``keys=`` or ``exclude=`` as a hashable value: a tuple of names, a function, or None.

    Raises:
        TypeError: it is something else.
    """
    if given is None or callable(given):
        return given
    if isinstance(given, str):
        return (given,)
    names = tuple(given) if isinstance(given, Iterable) else (given,)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"keys are strings, as inspect prints them, or one function of a name: not {given!r}.")
    return names


class Keys:
    """A choice of names.

    A key takes the value of that name and all whose names go on with a dot: "model.encoder" takes
    "model.encoder.0.weight". With ``*``, ``?`` or ``[...]`` it is a glob, in which ``*`` stands for dots, too. A
    function is asked for each name of a tensor or a plain value.

    Args:
        given: What the user gave.

    Attributes:
        function: The function, if one was given.
        names: The names and globs, else.
    """

    def __init__(self, given: tuple[str, ...] | Callable[[str], bool]) -> None:
        self.function = given if callable(given) else None
        self.names: tuple[str, ...] = () if callable(given) else given
        self._exact: dict[str, list[str]] = {}
        for name in self.names:
            self._exact.setdefault(name.removesuffix("."), []).append(name)
        self._lengths = sorted({len(name) for name in self._exact})
        self._sorted = sorted(self._exact)
        globs = [name for name in self.names if _GLOB.search(name)]
        self._globs = [(name, re.compile(fnmatch.translate(name)[:-2] + r"(?:\..*)?\Z", re.DOTALL)) for name in globs]
        self._taken: set[str] = set()

    @property
    def unmatched(self) -> list[str]:
        """The names and globs that have taken nothing so far."""
        return [name for name in self.names if name not in self._taken]

    def takes(self, name: str, *, is_leaf: bool) -> bool:
        """Whether a value of this name is taken, with all that is in it.

        Args:
            name: Its name.
            is_leaf: Whether it is a tensor or a plain value: functions are asked for no others.
        """
        if self.function is not None:
            return is_leaf and bool(self.function(name))
        taken = self._exact_of(name)
        taken += [glob for glob, pattern in self._globs if pattern.match(name)]
        self._taken.update(taken)
        return bool(taken)

    def reaches_into(self, name: str) -> bool:
        """Whether what is in a value of this name, which is not taken itself, may be taken."""
        if self.function is not None or self._globs or not name:
            return True
        before = f"{name}."
        at = bisect_left(self._sorted, before)
        return at < len(self._sorted) and self._sorted[at].startswith(before)

    def _exact_of(self, name: str) -> list[str]:
        found: list[str] = []
        for length in self._lengths:
            if length >= len(name):
                if length == len(name):
                    found += self._exact.get(name, ())
                break
            if length and name[length] == ".":  # nothing lies below the empty name
                found += self._exact.get(name[:length], ())
        return found


def is_asked(name: str, keys: Keys | None, exclude: Keys | None) -> bool:
    """Whether a value of this name, in which nothing else has one, is asked for: by ``keys``, and not excluded."""
    if exclude is not None and exclude.takes(name, is_leaf=True):
        return False
    return keys is None or keys.takes(name, is_leaf=True)
