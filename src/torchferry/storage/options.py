"""The storage options of a filesystem's class: which there are, and which one a misspelt one was meant to be."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torchferry.errors import UnsupportedOptionError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

    from torchferry.storage.base import Backend

__all__ = ["option_names", "require_known", "unknown_option"]

_OF_FSSPEC = frozenset({"listings_expiry_time", "max_paths", "skip_instance_cache", "use_listings_cache"})
"""Options of every filesystem: https://filesystem-spec.readthedocs.io/en/latest/features.html#listings-caching."""

_NEAR = 0.6  # difflib's own measure: "endpoint" is 0.8 near to "endpoint_url"
_MISSPELT = 0.8  # so near, that an option that may exist is taken for a misspelt one


def option_names(kind: type[AbstractFileSystem]) -> frozenset[str]:
    """The options that the constructors of a class and its base classes name."""
    names = set(_OF_FSSPEC)
    for base in kind.__mro__:
        if "__init__" in vars(base):
            parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
            names |= {each.name for each in parameters if each.kind not in {each.VAR_POSITIONAL, each.VAR_KEYWORD}}
    return frozenset(names - {"self"})


def require_known(
    url: str, kind: type[AbstractFileSystem], backend: type[Backend], options: Mapping[str, object]
) -> None:
    """Raises an UnsupportedOptionError where an option is not one of a backend's filesystem, and names the nearest."""
    names = option_names(kind)
    further = backend.further_options
    for name in options:
        if name in names or name in (further or ()):
            continue
        meant = backend.options_elsewhere.get(name)
        if further is None and meant is None and not difflib.get_close_matches(name, names, 1, _MISSPELT):
            continue
        raise UnsupportedOptionError(f"{url}: {_no_such_option(kind, name, meant)}")


def unknown_option(error: Exception, kind: type[AbstractFileSystem]) -> str | None:
    """What to say of a constructor's error about an option that it does not know; None for another error."""
    found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    return _no_such_option(kind, found.group(1)) if found else None


def _no_such_option(kind: type[AbstractFileSystem], name: str, meant: str | None = None) -> str:
    names = option_names(kind)
    if meant is None:
        meant = next(iter(difflib.get_close_matches(name, names, 1, _NEAR)), None)
    advice = f"Did you mean {meant}?" if meant else f"There are: {', '.join(sorted(names))}."
    return f"{kind.__name__} has no option {name!r}. {advice}"
