"""What became of the tries of one scenario, and the table of all."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from torchferry import TorchferryError

COLUMNS = ("scenario", "cloud", "tried", "right", "clear error", "wrong", "left behind", "slowest")


@dataclass
class Outcome:
    """A row of the table.

    Attributes:
        scenario: What was done.
        cloud: Where.
        right: Tries after which everything is as it must be.
        clear: Tries that ended with an error of torchferry's, and nothing wrong is stored.
        wrong: All others.
        left: What is staged and nobody will finish.
        slowest: Seconds; what of, the scenario says.
        notes: What happened how often.
    """

    scenario: str
    cloud: str
    right: int = 0
    clear: int = 0
    wrong: int = 0
    left: int = 0
    slowest: float = 0.0
    notes: Counter[str] = field(default_factory=Counter)

    def add_error(self, error: BaseException) -> None:
        """Counts a try that ended with this error, and is otherwise as it was."""
        if isinstance(error, TorchferryError) and "://" in str(error):
            self.clear += 1
        else:
            self.wrong += 1
        alike = re.sub(r"\b(?=\w*\d)[\w-]{6,}\b|\d+", "#", str(error))  # but for names and numbers
        self.notes[f"{type(error).__name__}: {alike[:160]}"] += 1

    def add_wrong(self, what: str) -> None:
        self.wrong += 1
        self.notes[what] += 1

    def cells(self) -> tuple[str, ...]:
        tried = self.right + self.clear + self.wrong
        counts = (tried, self.right, self.clear, self.wrong, self.left)
        return (self.scenario, self.cloud, *map(str, counts), f"{self.slowest:.2f} s" if self.slowest else "")


def table(outcomes: Iterable[Outcome]) -> str:
    """The table in Markdown, and below it the notes."""
    outcomes = list(outcomes)
    rows = [COLUMNS, *(outcome.cells() for outcome in outcomes)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    for outcome in outcomes:
        lines += [
            f"{outcome.scenario}, {outcome.cloud}: {count} x {note}" for note, count in outcome.notes.most_common()
        ]
    return "\n".join(lines)
