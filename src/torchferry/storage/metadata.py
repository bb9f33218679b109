"""What user metadata may be, whatever the store: most keep it as fields of HTTP."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torchferry.arguments import require_mapping
from torchferry.errors import UnsupportedOptionError

__all__ = ["require_storable"]

_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")  # https://www.rfc-editor.org/rfc/rfc9110#section-5.6.2


def require_storable(url: str, metadata: Mapping[Any, Any] | None) -> None:
    """Raises an UnsupportedOptionError where a name or a value is not one that a store can keep.

    Args:
        url: Where the object goes, for messages.
        metadata: Names, which are tokens of HTTP, and values, which are strings of printable characters.
    """
    require_mapping("metadata", metadata)
    for name, value in (metadata or {}).items():
        if not isinstance(name, str) or not _TOKEN.fullmatch(name):
            raise UnsupportedOptionError(
                f"{url}: no store keeps metadata of the name {name!r}: use letters, digits, '-', '_' and '.'."
            )
        if not isinstance(value, str) or not value.isprintable():
            raise UnsupportedOptionError(
                f"{url}: no store keeps the metadata {name!r}: {value!r}: use a string of printable characters."
            )
