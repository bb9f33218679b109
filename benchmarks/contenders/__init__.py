"""Who is measured: torchferry, what a user would take instead, and the floors that nobody can beat.

A contender is a function that is given a :class:`Task` and returns the operation to measure. What it does before
that (imports, temporary directories) is not measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from benchmarks.endpoint import Store

__all__ = ["CONTENDERS", "Contender", "Task", "loader", "saver"]


@dataclass(frozen=True, slots=True)
class Task:
    """What a contender may need to know.

    Attributes:
        store: The endpoint.
        directory: An empty local directory, deleted afterwards.
        work: What is saved or loaded; see works.py.
        size: How much of it.
    """

    store: Store
    directory: Path
    work: str
    size: int


Save: TypeAlias = "Callable[[dict[str, Any], str], object]"
"""Saves a checkpoint under a key of the store's bucket."""

Load: TypeAlias = "Callable[[str], Any]"
"""Loads what is under a key; returns a mapping of tensors, or a buffer."""


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to save or to load.

    Attributes:
        name: Unique for each verb.
        verb: "save" or "load".
        start: Given a task, returns the operation.
        format: What it loads; see formats.py. None: nothing of the store's.
        remote: Whether its bytes go over the network.
        keys: The parts of the checkpoint that it loads; None for all.
    """

    name: str
    verb: str
    start: Callable[[Task], Save] | Callable[[Task], Load]
    format: str | None = None
    remote: bool = True
    keys: tuple[str, ...] | None = None


CONTENDERS: dict[tuple[str, str], Contender] = {}
"""By verb and name."""


def saver(name: str, *, remote: bool = True) -> Callable[[Callable[[Task], Save]], Callable[[Task], Save]]:
    """Registers a contender that saves."""

    def register(start: Callable[[Task], Save]) -> Callable[[Task], Save]:
        CONTENDERS["save", name] = Contender(name, "save", start, remote=remote)
        return start

    return register


def loader(
    name: str, *, file_format: str | None = "torch", remote: bool = True, keys: tuple[str, ...] | None = None
) -> Callable[[Callable[[Task], Load]], Callable[[Task], Load]]:
    """Registers a contender that loads."""

    def register(start: Callable[[Task], Load]) -> Callable[[Task], Load]:
        CONTENDERS["load", name] = Contender(name, "load", start, format=file_format, remote=remote, keys=keys)
        return start

    return register


from benchmarks.contenders import disk, ferry, floors, integrations, peers  # noqa: E402, F401 - they register themselves
