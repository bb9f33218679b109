"""The documentation's pages as programs: what stands in their Python blocks runs as it stands there.

A page is one module: its blocks run in their order, in one namespace, with the page's own line numbers. Beside what is
shown there is, in comments that no reader of the rendered page sees:

* ``<!-- not run: REASON -->`` before a block;
* ``<!-- run unseen`` with Python up to ``-->``: what the page takes for granted, such as a model;
* ``<!-- needs: MODULE, ... -->``: the page is skipped where one of these is not installed.

``python tests/pages.py PAGE...`` runs pages without pytest, in a new directory.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import textwrap
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

__all__ = ["Page"]

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)(?P<rest>.*)$")
_NOT_RUN = re.compile(r"^ *<!-- not run: .+ -->$")
_UNSEEN = re.compile(r"^ *<!-- run unseen$")
_NEEDS = re.compile(r"^<!-- needs: (.+) -->$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Page:
    """A page, and the Python in it.

    Attributes:
        path: The Markdown file.
        source: Its Python; every line has the number that it has in the page.
        blocks: How many blocks run, without those that are not seen.
        skipped: How many Python blocks do not run.
        missing: Modules that it needs and that are not installed.
    """

    path: Path
    source: str
    blocks: int
    skipped: int
    missing: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> Page:
        """Reads a page."""
        text = path.read_text()
        lines = text.splitlines()
        source = [""] * len(lines)
        blocks = skipped = at = 0
        is_run = True
        while at < len(lines):
            fence = _FENCE.match(lines[at])
            unseen = _UNSEEN.match(lines[at])
            end = at + 1
            if fence or unseen:
                closing = "-->" if unseen else "```"
                while lines[end].strip() != closing:
                    end += 1
                if unseen or (fence and fence["language"] == "python" and is_run):
                    source[at + 1 : end] = textwrap.dedent("\n".join(lines[at + 1 : end])).split("\n")
                    blocks += not unseen
                elif fence and fence["language"] == "python":
                    skipped += 1
                end += 1
            if lines[at].strip():
                is_run = not _NOT_RUN.match(lines[at])
            at = end
        needed = [name.strip() for found in _NEEDS.findall(text) for name in found.split(",")]
        return cls(path, "\n".join(source), blocks, skipped, tuple(name for name in needed if not _is_there(name)))

    def run(self) -> None:
        """Runs it, in the working directory."""
        name = "page_" + re.sub(r"\W", "_", self.path.stem)
        module = ModuleType(name)
        module.__file__ = str(self.path)
        sys.modules[name] = module  # dataclasses and Flyte's tasks look for it
        try:
            exec(compile(self.source, str(self.path), "exec", dont_inherit=True), module.__dict__)
        finally:
            del sys.modules[name]


def _is_there(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # of a package that it is in
        return False


if __name__ == "__main__":
    sys.path.pop(0)  # this directory
    pages = [Page.read(Path(argument).absolute()) for argument in sys.argv[1:]]
    with tempfile.TemporaryDirectory() as directory:
        os.chdir(directory)
        for page in pages:
            page.run()
            print(f"{page.path.name}: {page.blocks} blocks ran")
        os.chdir("/")
