"""Save and load options as values: for Flyte annotations, and to pass a choice around."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torchferry.formats.keys import KeysArgument, as_keys

__all__ = ["LoadOptions", "SaveOptions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveOptions:
    """How to save; the fields are the keyword arguments of :func:`torchferry.save`.

    Hashable, so that it can stand in ``Annotated[...]``.
    """

    storage_options: Mapping[str, Any] | None = field(default=None, repr=False)  # flytekit prints types in its errors
    part_size: int | None = None
    metadata: Mapping[str, str] | None = None
    give_up_after: float | None = None
    shards: bool = False

    def __hash__(self) -> int:
        options = (self.part_size, _freeze(self.metadata), self.give_up_after, self.shards)
        return hash((_freeze(self.storage_options), *options))


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """How to load; the fields are the keyword arguments of :func:`torchferry.load`.

    Hashable, so that it can stand in ``Annotated[...]``; a ``map_location`` that is a dict or a callable
    hashes by what it holds.
    """

    keys: KeysArgument | None = None
    exclude: KeysArgument | None = None
    map_location: Any = None
    weights_only: bool = True
    verify: bool = True
    storage_options: Mapping[str, Any] | None = field(default=None, repr=False)  # as above
    give_up_after: float | None = None

    def __post_init__(self) -> None:
        for name in ("keys", "exclude"):
            object.__setattr__(self, name, as_keys(getattr(self, name)))  # hashable, and of one kind

    def __hash__(self) -> int:
        return hash(
            (
                self.keys,
                self.exclude,
                _freeze(self.map_location),
                self.weights_only,
                self.verify,
                _freeze(self.storage_options),
                self.give_up_after,
            )
        )


def _freeze(value: Any) -> Hashable:
    if isinstance(value, Mapping):
        return frozenset((key, _freeze(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(_freeze(item) for item in value)
    if isinstance(value, set):
        return frozenset(value)
    hashable: Hashable = value
    return hashable
