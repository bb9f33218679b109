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
import threading
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

__all__ = ["TAKE_OVER_VARIABLE", "install", "taking_over"]

TAKE_OVER_VARIABLE = "TORCHFERRY_TAKE_OVER"
"""Set this environment variable to 0 to leave flytekit's own ``PyTorchCheckpoint`` alone."""

_OURS = "torchferry.flyte.checkpoint"
_FLYTEKITS = "flytekit.extras.pytorch.checkpoint"
_TYPE_ENGINE = "flytekit.core.type_engine"

_logger = logging.getLogger("torchferry")


def taking_over() -> bool:
    """Whether flytekit's own class is to use torchferry: yes, unless ``TORCHFERRY_TAKE_OVER=0``."""
    return os.environ.get(TAKE_OVER_VARIABLE, "1").lower() not in {"0", "false", "no", "off"}


def install() -> None:
    """Installs the import hook, and takes over at once what is imported already. Doing it twice changes nothing."""
    if not taking_over() or any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _AfterImport())
    if _is_imported(_TYPE_ENGINE):
        _answer_guesses()
    if _is_imported(_FLYTEKITS):
        _take_over()


def _answer_guesses() -> None:
    try:
        from torchferry.flyte.hooks import register_guesser

        register_guesser()
    except Exception:  # whatever it is: this runs within every `import flytekit`
        _logger.warning("torchferry does not fit this flytekit, and leaves it as it is.", exc_info=True)


def _take_over() -> None:
    if _OURS in sys.modules:  # it registers itself, when it is done
        return
    try:
        import_module(_OURS)
    except Exception:  # whatever it is: flytekit's own transformer works, and must stay importable
        _logger.warning("torchferry cannot take over PyTorchCheckpoint; flytekit's own stays in place.", exc_info=True)


def _is_imported(name: str) -> bool:
    # `_initializing` is what importlib itself asks before it waits for another import; no public question exists.
    return name in sys.modules and not getattr(sys.modules[name].__spec__, "_initializing", False)


class _AfterImport(MetaPathFinder):
    """Finds the modules that matter here as everybody else would, and has a look after each has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Finds ``fullname`` through the finders behind this one, if it is one that matters."""
        if fullname not in {_TYPE_ENGINE, _FLYTEKITS} and not fullname.startswith("torchferry.flyte."):
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _WatchedLoader(spec.loader)
                return spec
        return None


class _Nesting(threading.local):
    """How many watched modules this thread is in the middle of importing."""

    depth = 0


class _WatchedLoader(Loader):
    """Another loader, and what is to be done after it. Everything else about it stays (sources, resources)."""

    _nesting = _Nesting()

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Creates the module as the wrapped loader does."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Executes the module; then answers guesses, or takes over."""
        self._nesting.depth += 1
        try:
            self._loader.exec_module(module)
        finally:
            self._nesting.depth -= 1
        # Not while a module of ours is half imported that has brought us here: what follows imports them.
        if self._nesting.depth == 0:
            if _TYPE_ENGINE in sys.modules:
                _answer_guesses()
            if _FLYTEKITS in sys.modules:
                _take_over()


install()
