"""Text of a checkpoint, made fit for messages."""

from __future__ import annotations

__all__ = ["printable"]

_MOST = 200  # characters


def printable(text: str) -> str:
    """The text without anything that acts on a terminal, and cut to 200 characters.

    Escape sequences, newlines, marks that turn the direction of writing, and halves of surrogate pairs become
    backslash escapes, as in ``repr``.
    """
    if len(text) > _MOST:
        text = f"{text[:_MOST]}..."
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
