"""HTML for notebooks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from torchferry.printable import escaped

__all__ = ["html_table"]

_STYLE = "text-align:left;font-family:monospace;padding:0 1em 0 0"


def html_table(caption: str, rows: Iterable[Sequence[str]], head: Sequence[str] = ()) -> str:
    """A small table; all text is escaped."""
    cells = "".join(f'<th style="{_STYLE};font-weight:bold">{_shown(text)}</th>' for text in head)
    lines = [f"<tr>{cells}</tr>"] if head else []
    lines += ("<tr>" + "".join(f'<td style="{_STYLE}">{_shown(text)}</td>' for text in row) + "</tr>" for row in rows)
    return f"<div><b>{_shown(caption)}</b><table>{''.join(lines)}</table></div>"


def _shown(text: str) -> str:
    return escape(escaped(text))
