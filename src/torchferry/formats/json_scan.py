"""Reads JSON of a known form, a value at a time: hostile JSON takes no more memory than its text.

``json.loads`` makes objects of 64 bytes and more of three bytes of text, and fails in odd ways on what is nested deep.
"""

from __future__ import annotations

import re
from json import JSONDecodeError, decoder
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["JsonScanner"]

_scan_string: Any = decoder.scanstring  # type: ignore[attr-defined]  # in C; not in typeshed
_SPACE = re.compile(r"[ \t\n\r]*+")
# Of most members, in one match each: three times as fast as a token at a time.
_STRING = re.compile(r'[ \t\n\r]*+"([^"\\\x00-\x1f]*+)"')
_KEY = re.compile(_STRING.pattern + r"[ \t\n\r]*+:")
_NEXT = re.compile(r"[ \t\n\r]*+([,}])")
_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]{0,19})(?![0-9.eE])")
_TOKEN = re.compile(r"[\[\]{},:]|-?[0-9][0-9.eE+-]*|true|false|null")
_OPENING = {"[", "{"}
_CLOSING = {"]", "}"}


class JsonScanner:
    """Reads ``text`` from its start.

    Every method raises a ValueError for JSON that is not of the form that is asked for.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def members(self) -> Iterator[str]:
        """The keys of an object; after each, its value must be read before the next is asked for."""
        self._take("{")
        if self._takes("}"):
            return
        while True:
            if matched := _KEY.match(self._text, self._at):
                key, self._at = matched[1], matched.end()
            else:
                key = self.string()
                self._take(":")
            yield key
            if (matched := _NEXT.match(self._text, self._at)) is None:
                raise self._error(",")
            self._at = matched.end()
            if matched[1] == "}":
                return

    def integers(self, most: int) -> tuple[int, ...]:
        """An array of at most so many integers of at most 20 digits."""
        self._take("[")
        found: list[int] = []
        if self._takes("]"):
            return ()
        while True:
            matched = _INTEGER.match(self._text, self._skip_space())
            if matched is None or len(found) == most:
                raise self._error("an array of integers")
            found.append(int(matched[0]))
            self._at = matched.end()
            if self._takes("]"):
                return tuple(found)
            self._take(",")

    def string(self) -> str:
        """A string."""
        if matched := _STRING.match(self._text, self._at):
            self._at = matched.end()
            return matched[1]
        self._take('"')
        try:
            value: str
            value, self._at = _scan_string(self._text, self._at)
        except JSONDecodeError as error:
            raise self._error("a string") from error
        return value

    def null(self) -> bool:
        """Whether null comes next, which is read then."""
        return self._takes("null")

    def skip(self) -> None:
        """Reads a value of any form, and forgets it."""
        depth = 0
        while True:
            at = self._skip_space()
            if self._text[at : at + 1] == '"':
                self.string()
            else:
                matched = _TOKEN.match(self._text, at)
                if matched is None or (not depth and matched[0] in {",", ":", "]", "}"}):
                    raise self._error("a value")
                self._at = matched.end()
                depth += (matched[0] in _OPENING) - (matched[0] in _CLOSING)
            if not depth:
                return

    def end(self) -> None:
        """Nothing but space follows."""
        if self._skip_space() != len(self._text):
            raise self._error("the end")

    def _take(self, symbol: str) -> None:
        if not self._takes(symbol):
            raise self._error(symbol)

    def _takes(self, symbol: str) -> bool:
        at = self._skip_space()
        if not self._text.startswith(symbol, at):
            return False
        self._at = at + len(symbol)
        return True

    def _skip_space(self) -> int:
        matched = _SPACE.match(self._text, self._at)
        self._at = matched.end() if matched else self._at
        return self._at

    def _error(self, wanted: str) -> ValueError:
        return ValueError(f"at character {self._at} there is not {wanted}")
