"""For mkdocs: links from a page to the repository's other files become links to the repository."""

from __future__ import annotations

import re
from typing import Any

_FOLDERS = "src|examples|benchmarks|storage_backends|tests|reliability"
_OUTSIDE = re.compile(rf"\]\((?:\.\./)+((?:{_FOLDERS})[^)]*|[A-Z]+\.md[^)]*)\)")


def on_page_markdown(markdown: str, *, config: Any, **_: Any) -> str:
    """Called by mkdocs for each page."""
    return _OUTSIDE.sub(rf"]({config.repo_url}/blob/main/\1)", markdown)
