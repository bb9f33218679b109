"""What the command prints: tables, sizes, ages, progress."""

from __future__ import annotations

import json
import sys
from collections.abc import Generator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from torchferry.printable import escaped

if TYPE_CHECKING:
    from fsspec.callbacks import Callback
    from rich.console import Console
    from rich.table import Table

__all__ = ["age", "console", "escaped", "is_terminal", "one_line", "print_json", "progress", "say", "size", "table"]

_UNLIMITED = 1 << 20  # columns
_UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB")
_AGES = ((86_400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def size(nbytes: int) -> str:
    """A number of bytes: "1.5 MB"."""
    number, unit = float(nbytes), 0
    while number >= 999.95 and unit < len(_UNITS) - 1:  # noqa: PLR2004 - rounds to 1000.0
        number /= 1000
        unit += 1
    return f"{nbytes} {'byte' if nbytes == 1 else 'bytes'}" if not unit else f"{number:.1f} {_UNITS[unit]}"


def age(modified: datetime | None) -> str:
    """How long ago that was: "3 h"."""
    if modified is None:
        return ""
    seconds = max(0.0, (datetime.now(UTC) - modified).total_seconds())
    for length, unit in _AGES:
        if seconds >= length:
            return f"{int(seconds // length)} {unit}"
    return "0 s"


def one_line(text: str) -> str:
    """An error's text on one line."""
    return " ".join(escaped(line) for line in text.splitlines() if line.strip()) or "failed"


def is_terminal() -> bool:
    """Whether somebody looks at standard output."""
    return sys.stdout.isatty()


def console() -> Console:
    """Where tables go: as wide as the terminal, or, into a pipe, as wide as they are."""
    from rich.console import Console

    class Terminal(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # rich would end the process with status 1

    return Terminal(width=None if is_terminal() else _UNLIMITED, highlight=False, markup=False, emoji=False)


def say(text: str = "") -> None:
    """Prints a line."""
    print(text)


def print_json(value: Any) -> None:
    """Prints a value for programs."""
    print(json.dumps(value, indent=2))


def table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    """A table without lines, whose first column is never cut."""
    from rich.table import Table

    made = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for column in made.columns:
        column.overflow = "fold"
        column.justify = "right" if column.header in right else "left"
        column.no_wrap = column.header in right
    return made


@contextmanager
def progress(verb: str) -> Generator[Callback]:
    """A callback that moves a bar on standard error, where somebody looks at it; nothing of it remains."""
    from torchferry.progress import RichCallback

    with RichCallback(verb) as callback:
        yield callback
