"""The checkpoints of a task of Flyte 2, which another attempt of it goes on from."""

from __future__ import annotations

from typing import Any

from torchferry.checkpoint.series import TaskCheckpoints
from torchferry.flyte2 import hooks
from torchferry.flyte2.settings import storage_options

__all__ = ["task_checkpoints"]

_SERIES = "-steps"  # beside the one object, which is flyte's own for a task


def task_checkpoints(**options: Any) -> TaskCheckpoints:
    """Where the task that calls this keeps checkpoints for its next attempt, if this one is killed.

    They are streamed to beside the object of ``flyte.ctx().checkpoint``, and back. A task that is retried finds, with
    ``resume()``, what the attempts before it have saved. In a local run the place is the task's own.

    Args:
        **options: Those of :class:`torchferry.CheckpointManager`, such as ``max_to_keep=1`` for the last one only.

    Raises:
        RuntimeError: the caller is in no task, or the task has no such place.
    """
    paths = hooks.checkpoint_paths()
    if paths is None:
        raise RuntimeError("There is no place for checkpoints here: call this inside a task.")
    destination, source = paths
    if options.get("filesystem") is None:
        options.setdefault("storage_options", storage_options(destination))
    return TaskCheckpoints(f"{destination}{_SERIES}", source and f"{source}{_SERIES}", **options)
