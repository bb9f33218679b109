"""What the command prints: tables, sizes, ages, progress."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import islice
from typing import TYPE_CHECKING, Any

from torchferry.printable import escaped

if TYPE_CHECKING:
    from fsspec.callbacks import Callback

__all__ = [
    "Table",
    "age",
    "escaped",
    "is_terminal",
    "nobody_reads",
    "one_line",
    "print_json",
    "progress",
    "say",
    "size",
]

_WIDEST = 200  # characters that a column is filled up to
_MOST_BY_RICH = 1000  # rows: it takes a millisecond each
_TOGETHER = 1000  # objects of a list that are encoded at once
_PIECES = 4096  # of JSON that are written at once
_NARROWEST = 40  # columns of a terminal that rich fits a table into
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


def nobody_reads() -> None:
    """Called where a pipe was closed: whoever reads has enough, as ``| head``. What is still to be printed is not."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(text: str = "") -> None:
    """Prints a line."""
    print(text)


def print_json(value: Any) -> None:
    """Prints a value for programs; each entry of a list that it has on a line of its own.

    JSON has no NaN and no infinite numbers: they are the texts "NaN", "Infinity" and "-Infinity".
    """
    pieces = _json_lines(value)
    while some := "".join(islice(pieces, _PIECES)):
        sys.stdout.write(some)
    print()


def _json_lines(value: Any, levels: int = 2, indent: str = "") -> Iterator[str]:
    if not levels or not value or not isinstance(value, (dict, list)):
        yield _dumps(value)
        return
    line = f",\n{indent}  "
    if isinstance(value, list):
        for start in range(0, len(value), _TOGETHER):
            yield f"{line if start else '[' + line[1:]}{_joined(value[start : start + _TOGETHER], line)}"
        yield f"\n{indent}]"
        return
    for number, (name, part) in enumerate(value.items()):
        yield f"{line if number else '{' + line[1:]}{json.dumps(name)}: "
        yield from _json_lines(part, levels - 1, f"{indent}  ")
    yield f"\n{indent}}}"


def _joined(parts: list[Any], line: str) -> str:
    """The JSON of each, with ``line`` between them. Of objects, all at once: that takes a third of the time."""
    text = _dumps(parts)
    are_objects = all(isinstance(part, dict) for part in parts)
    if are_objects and text.count("}, {") == len(parts) - 1:  # between them, and nowhere in a text
        return text[1:-1].replace("}, {", f"}}{line}{{")
    return line.join(map(_dumps, parts))


def _dumps(value: Any) -> str:
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return json.dumps(value) if isinstance(value, float) and not math.isfinite(value) else value


class Table:
    """Rows in columns, without lines; nothing is cut.

    Args:
        columns: Their headings.
        right: Those whose cells stand on the right.
    """

    def __init__(self, *columns: str, right: tuple[str, ...] = ()) -> None:
        self._columns = columns
        self._right = right
        self._rows: list[tuple[str, ...]] = []

    def add_row(self, *cells: str) -> None:
        """Adds a row."""
        self._rows.append(cells)

    def show(self) -> None:
        """Prints it: on a terminal by rich, as wide as that is; into a pipe, or where it does not fit, by itself."""
        is_wide = shutil.get_terminal_size().columns >= _NARROWEST
        if is_terminal() and is_wide and len(self._rows) <= _MOST_BY_RICH:
            self._show_by_rich()
            return
        rows = [self._columns, *self._rows]
        widths = [min(max(map(len, column)), _WIDEST) for column in zip(*rows, strict=True)]
        widths[-1] = widths[-1] if self._columns[-1] in self._right else 0
        aligned = [">" if column in self._right else "<" for column in self._columns]
        for row in rows:
            cells = zip(row, aligned, widths, strict=True)
            print("  ".join(f"{cell:{align}{width}}" for cell, align, width in cells).rstrip())

    def _show_by_rich(self) -> None:
        from rich.console import Console
        from rich.table import Table as RichTable

        class Terminal(Console):
            def on_broken_pipe(self) -> None:
                raise BrokenPipeError  # rich would end the process with status 1

        made = RichTable(*self._columns, box=None, pad_edge=False, header_style="bold")
        for column in made.columns:
            column.overflow = "fold"
            column.justify = "right" if column.header in self._right else "left"
            column.no_wrap = column.header in self._right
        for row in self._rows:
            made.add_row(*row)
        Terminal(highlight=False, markup=False, emoji=False).print(made)


@contextmanager
def progress(verb: str) -> Generator[Callback]:
    """A callback that moves a bar on standard error, where somebody looks at it; nothing of it remains."""
    from torchferry.progress import RichCallback

    with RichCallback(verb) as callback:
        yield callback
