"""What flyte loads: the entry point ``flyte.plugins.types``. It imports no torch.

flyte calls it when it first looks a type up, which every program with a task does, whether it uses torch or not. So
the transformers wait until torch has been imported: a type of torch cannot be looked up before.
"""

from __future__ import annotations

import logging
from importlib import import_module

__all__ = ["install"]

_logger = logging.getLogger("torchferry")


def install() -> None:
    """Makes flyte use torchferry as soon as torch is imported. Doing it twice changes nothing."""
    from torchferry.flyte2 import hooks

    hooks.register_guesser()
    hooks.when_torch_is_imported(_register)


def _register() -> None:
    try:
        import_module("torchferry.flyte2.transformers")  # registers what it has
    except Exception:  # whatever it is: flyte's own ways work, and tasks without torch must go on
        _logger.warning("torchferry does not fit this flyte, and leaves it as it is.", exc_info=True)
