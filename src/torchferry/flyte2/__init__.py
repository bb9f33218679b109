"""torchferry in Flyte 2 (the package ``flyte``): checkpoints, modules and tensors as values of tasks.

Installing torchferry is enough for ``torch.nn.Module`` and ``torch.Tensor``. Checkpoints are of the class
:class:`PyTorchCheckpoint`, which :mod:`torchferry.flyte` has, too: a checkpoint of one Flyte is one of the other. The
names here are imported when they are first used, because flyte and torch are heavy, and flyte loads
:mod:`torchferry.flyte2.plugin` in every program that has a task.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchferry.flyte2.attempts import task_checkpoints
    from torchferry.flyte2.settings import storage_options
    from torchferry.flyte2.transformers import PyTorchCheckpointTransformer
    from torchferry.flyte2.values import LoadedCheckpoint, PyTorchCheckpoint

__all__ = [
    "LoadedCheckpoint",
    "PyTorchCheckpoint",
    "PyTorchCheckpointTransformer",
    "storage_options",
    "task_checkpoints",
]

_MODULE_OF = {
    "LoadedCheckpoint": "transformers",  # which registers itself, and all that follows from that
    "PyTorchCheckpoint": "transformers",
    "PyTorchCheckpointTransformer": "transformers",
    "storage_options": "settings",
    "task_checkpoints": "attempts",
}


if not TYPE_CHECKING:  # as in torchferry itself

    def __getattr__(name: str) -> Any:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        except ModuleNotFoundError as error:
            if error.name != "flyte":
                raise
            raise ModuleNotFoundError(
                "Flyte 2 is not installed: pip install 'torchferry[flyte2]'", name="flyte"
            ) from None
        globals()[name] = value
        return value
