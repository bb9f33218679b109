"""Keys of a module's state, with and without what wrappers put into them.

``DistributedDataParallel`` and ``DataParallel`` put ``module.`` before every key; ``torch.compile`` puts ``_orig_mod.``
before every key of what it compiled, which may be a part of the module.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

import torch

__all__ = ["matched_to"]

_COMPILED = "_orig_mod"
_PARALLEL = "module"


def matched_to(module: torch.nn.Module, state: Mapping[str, Any]) -> tuple[Mapping[str, Any], dict[str, str]]:
    """A module's state with the keys that ``module`` has for it, where they differ in wrappers only.

    Looks at names, and not at ``module.state_dict()``, which can gather a sharded module from all ranks.

    Args:
        module: What the state is for, wrapped or not.
        state: What was saved, of a module that was wrapped or not.

    Returns:
        The state to load: ``state`` itself where other keys would not match more of the module's. And the saved
        key of each key in it.
    """
    unchanged = {key: key for key in state}
    tensors = chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
    names = {name for name, _ in tensors}
    if names.issuperset(state) or not all(isinstance(key, str) for key in state):
        return state, unchanged
    rename = _renaming(module, names, state)
    saved_keys = {rename(key): key for key in state}
    if len(saved_keys) < len(state) or len(names & saved_keys.keys()) <= len(names & state.keys()):
        return state, unchanged
    renamed = OrderedDict((key, state[saved]) for key, saved in saved_keys.items())
    if metadata := getattr(state, "_metadata", None):  # by module: the version of its state's format
        vars(renamed)["_metadata"] = {rename(path): value for path, value in metadata.items()}
    return renamed, saved_keys


def _renaming(module: torch.nn.Module, names: Iterable[str], state: Mapping[str, Any]) -> Callable[[str], str]:
    bare, saved_bare = _unwrapping(names), _unwrapping(state)
    # Of a wrapper and what it wraps the inner one comes later, and counts.
    paths = {bare(path): path for path, _ in module.named_modules(remove_duplicate=False)}

    def rename(key: str) -> str:
        parent, rest = saved_bare(key), ""
        while parent not in paths:
            parent, _, leaf = parent.rpartition(".")
            rest = f".{leaf}{rest}"
        return f"{paths[parent]}{rest}".removeprefix(".")

    return rename


def _unwrapping(keys: Iterable[str]) -> Callable[[str], str]:
    """Takes out of a key what wrappers put into it: ``module`` only where all ``keys`` begin with it."""
    split = [_uncompiled(key) for key in keys]
    depth = 0
    while split and all(len(parts) > depth + 1 and parts[depth] == _PARALLEL for parts in split):
        depth += 1
    return lambda key: ".".join(_uncompiled(key)[depth:])


def _uncompiled(key: str) -> list[str]:
    return [part for part in key.split(".") if part != _COMPILED]
