"""Reads the options on an annotation: ``Annotated[PyTorchCheckpoint, LoadOptions(keys=...)]``."""

from __future__ import annotations

from dataclasses import fields
from functools import reduce
from typing import Any, TypeVar, get_args

from torchferry.checkpoint.adapters import refusal
from torchferry.options import LoadOptions, SaveOptions

__all__ = ["only_variant", "options_of", "without_annotations"]

OptionsT = TypeVar("OptionsT", LoadOptions, SaveOptions)


def options_of(t: Any, kind: type[OptionsT]) -> OptionsT:
    """The options of one kind that annotate a type; the defaults where none do.

    Several are joined, so that an alias can be refined:
    ``Annotated[Annotated[PyTorchCheckpoint, LoadOptions(keys=...)], LoadOptions(verify=False)]``.

    Raises:
        CheckpointValueError: two of them set the same field to different values.
    """
    found = [annotation for annotation in getattr(t, "__metadata__", ()) if isinstance(annotation, kind)]
    return reduce(_join, found, kind())


def without_annotations(t: Any) -> Any:
    """The type that is annotated, if it is."""
    return get_args(t)[0] if hasattr(t, "__metadata__") else t


def only_variant(union: Any, kind: type) -> tuple[int, Any] | None:
    """The one variant of a union that is a ``kind``, and its index; None where none is, or several are."""
    found: list[tuple[int, Any]] = []
    for index, variant in enumerate(get_args(without_annotations(union))):
        declared = without_annotations(variant)
        if isinstance(declared, type) and issubclass(declared, kind):
            found.append((index, variant))
    return found[0] if len(found) == 1 else None


def _join(first: OptionsT, second: OptionsT) -> OptionsT:
    kind = type(first)
    joined: dict[str, Any] = {}
    for field in fields(first):
        one, other = getattr(first, field.name), getattr(second, field.name)
        if field.default not in (one, other) and one != other:
            values = f" is {one!r} and {other!r}" if field.repr else ""
            raise refusal(f"Two {kind.__name__} on one annotation contradict each other: {field.name}{values}.")
        joined[field.name] = other if one == field.default else one
    return kind(**joined)
