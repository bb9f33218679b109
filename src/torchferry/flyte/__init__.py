"""torchferry in Flyte: the type transformer for ``PyTorchCheckpoint``, and the value that a task receives.

Installing torchferry is enough: flytekit's own ``PyTorchCheckpoint`` annotation then uses it. These names are
for code that wants them directly. They are imported when first used, because flytekit and torch are heavy and
:mod:`torchferry.flyte.plugin` is loaded by every ``import flytekit``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from torchferry.flyte import plugin as _plugin  # noqa: F401 - before any other module here can import flytekit

if TYPE_CHECKING:
    from torchferry.flyte.attempts import task_checkpoints
    from torchferry.flyte.checkpoint import LoadedCheckpoint, PyTorchCheckpoint, PyTorchCheckpointTransformer
    from torchferry.flyte.sharded import ShardedCheckpoint

__all__ = [
    "LoadedCheckpoint",
    "PyTorchCheckpoint",
    "PyTorchCheckpointTransformer",
    "ShardedCheckpoint",
    "task_checkpoints",
]

_ELSEWHERE = {"ShardedCheckpoint": "sharded", "task_checkpoints": "attempts"}


if not TYPE_CHECKING:  # as in torchferry itself

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            value = getattr(import_module(f"torchferry.flyte.{_ELSEWHERE.get(name, 'checkpoint')}"), name)
        except ModuleNotFoundError as error:
            if error.name != "flytekit":
                raise
            message = "flytekit is not installed: pip install 'torchferry[flyte]'"
            raise ModuleNotFoundError(message, name="flytekit") from None
        globals()[name] = value
        return value
