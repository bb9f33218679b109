"""Text of others, made fit for people: in messages, in the log, on a terminal, in the Deck.

A key of a checkpoint, a record's name, a name of a global and an answer of a server may hold anything: sequences that
clear a terminal or set its title, newlines that forge rows of a table, marks that turn the direction of writing.
"""

from __future__ import annotations

__all__ = ["escaped", "printable"]

_MOST = 200  # characters


def escaped(text: str, *, keep: str = "") -> str:
    """The text, with a backslash escape as in ``repr`` for each character that is not printable, and not in ``keep``.

    These are control characters and newlines, marks that turn the direction of writing or that nobody sees, and halves
    of surrogate pairs.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in keep else repr(char)[1:-1] for char in text)


def printable(text: str) -> str:
    """The text, escaped, and cut to 200 characters."""
    return escaped(text if len(text) <= _MOST else f"{text[:_MOST]}...")
