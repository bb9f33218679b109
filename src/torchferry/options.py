"""Save and load options as values: for Flyte annotations, and to pass a choice around."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

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

    def __hash__(self) -> int:
        return hash((_freeze(self.storage_options), self.part_size, _freeze(self.metadata), self.give_up_after))


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """How to load; the fields are the keyword arguments of :func:`torchferry.load`.

    Hashable, so that it can stand in ``Annotated[...]``; a ``map_location`` that is a dict or a callable
    hashes by what it holds.
    """

    keys: Sequence[str] | None = None
    map_location: Any = None
    weights_only: bool = True
    verify: bool = True
    storage_options: Mapping[str, Any] | None = field(default=None, repr=False)  # as above
    give_up_after: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.keys, str):
            raise TypeError(f"keys is a sequence of keys: ({self.keys!r},) for one.")

    def __hash__(self) -> int:
        return hash(
            (
                _freeze(self.keys),
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
