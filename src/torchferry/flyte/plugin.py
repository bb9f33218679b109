"""Takes over flytekit's ``PyTorchCheckpoint``, without importing torch or flytekit to do it.

flytekit loads the entry point group ``flytekit.plugins`` at the end of every ``import flytekit``, before user
code can import anything of it. It loads, and does not call, what an entry point names: importing this module
is what installs. Importing torch there would make ``import flytekit`` take seconds, so the take-over waits in an
import hook until flytekit's own checkpoint module has been imported.
"""

from __future__ import annotations

import logging
import os
import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

__all__ = ["TAKE_OVER_VARIABLE", "install", "taking_over"]

TAKE_OVER_VARIABLE = "TORCHFERRY_TAKE_OVER"
"""Set this environment variable to 0 to leave flytekit's own ``PyTorchCheckpoint`` alone."""

_OURS = "torchferry.flyte.checkpoint"

_logger = logging.getLogger("torchferry")


def taking_over() -> bool:
    """Whether flytekit's own class is to use torchferry: yes, unless ``TORCHFERRY_TAKE_OVER=0``."""
    return os.environ.get(TAKE_OVER_VARIABLE, "1").lower() not in {"0", "false", "no", "off"}


def install() -> None:
    """Installs the import hook, and takes over at once what is imported already. Doing it twice changes nothing."""
    if not taking_over() or any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _AfterImport())
    for name, action in _ACTIONS.items():
        if name in sys.modules and not _initializing(name):
            action()


def _take_over() -> None:
    # Our module imports flytekit's: when that is what brought us here, ours registers itself when it is done.
    if _initializing(_OURS):
        return
    try:
        import_module(_OURS)
    except Exception:  # whatever it is: flytekit's own transformer works, and must stay importable
        _logger.warning("torchferry cannot take over PyTorchCheckpoint; flytekit's own stays in place.", exc_info=True)


def _answer_guesses() -> None:
    from torchferry.flyte.hooks import register_guesser

    register_guesser()


_ACTIONS: dict[str, Callable[[], None]] = {
    "flytekit.core.type_engine": _answer_guesses,
    "flytekit.extras.pytorch.checkpoint": _take_over,
}


def _initializing(name: str) -> bool:
    # What importlib itself asks before it waits for another thread's import; no public question exists.
    return bool(getattr(getattr(sys.modules.get(name), "__spec__", None), "_initializing", False))


class _AfterImport(MetaPathFinder):
    """Finds two modules of flytekit as everybody else would, and runs an action after each has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Finds ``fullname`` through the finders behind this one, if it is one of ours to watch."""
        action = _ACTIONS.get(fullname)
        if action is None:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _ThenRun(spec.loader, action)
                return spec
        return None


class _ThenRun(Loader):
    """Another loader, with an action after it. Everything else about it stays (sources, resources)."""

    def __init__(self, loader: Loader, action: Callable[[], None]) -> None:
        self._loader = loader
        self._action = action

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Creates the module as the wrapped loader does."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Executes the module, then runs the action."""
        self._loader.exec_module(module)
        self._action()


install()
