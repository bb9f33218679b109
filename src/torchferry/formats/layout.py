"""Where the ranges of an object lie in the memory of a load."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["Layout", "Run", "whole"]


class Run(NamedTuple):
    """The bytes ``start`` to ``stop`` of an object, which lie in memory from ``at`` on."""

    start: int
    stop: int
    at: int


@dataclass(frozen=True, slots=True)
class Layout:
    """How the memory of a load is laid out.

    Attributes:
        size: Bytes of memory.
        runs: What lies in it of the object, in the object's order, disjoint.
        written: Offset in memory and bytes of what does not come from the object; asked when all of it has arrived.
    """

    size: int
    runs: Sequence[Run]
    written: Callable[[], Iterator[tuple[int, bytes]]]

    def parts(self, start: int, stop: int) -> Iterator[Run]:
        """What lies in memory of the object's bytes ``start`` to ``stop``."""
        for index in range(max(bisect_right(self.runs, start, key=_start) - 1, 0), len(self.runs)):
            run = self.runs[index]
            if run.start >= stop:
                return
            first, last = max(start, run.start), min(stop, run.stop)
            if first < last:
                yield Run(first, last, run.at + first - run.start)


def whole(size: int, written: Callable[[], Iterator[tuple[int, bytes]]] = lambda: iter(())) -> Layout:
    """All of an object of ``size`` bytes, at its own offsets."""
    return Layout(size, (Run(0, size, 0),), written)


def _start(run: Run) -> int:
    return run.start
