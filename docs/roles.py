"""For mkdocstrings: roles such as :class:`~torchferry.X` in docstrings become plain code."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":\w+:`~?\.?(?:torchferry\.)?(?:[a-z_]\w*\.)*(\w+)`")


class Roles(griffe.Extension):
    """Changes each docstring as it is found."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for each object."""
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(r"`\1`", obj.docstring.value)
