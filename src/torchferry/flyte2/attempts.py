"""The checkpoints of a task of Flyte 2 that another attempt of it goes on from."""

from __future__ import annotations

from typing import Any

from torchferry.checkpoint.attempts import TaskCheckpoint
from torchferry.checkpoint.series import TaskCheckpoints
from torchferry.flyte2 import hooks
from torchferry.flyte2.settings import storage_options

__all__ = ["task_checkpoint", "task_checkpoints"]

_SERIES = "-steps"  # beside the one object, which is flyte's own for a task


def task_checkpoint() -> TaskCheckpoint:
    """Where the task that calls this keeps one checkpoint for its next attempt, if this one is killed.

    It is the object of ``flyte.ctx().checkpoint``, reached without a local file. In a local run it is the task's own,
    and its retries find it.

    Raises:
        RuntimeError: the caller is in no task, or the task has no such place.
    """
    # The destination is this attempt's own, but for those of a clustered task, whose pods start again within one.
    destination, source = _paths()
    return TaskCheckpoint(destination, filter(None, (destination, source)), storage_options=storage_options)


def task_checkpoints(**options: Any) -> TaskCheckpoints:
    """Where the task that calls this keeps a series of checkpoints, for its next attempt if this one is killed.

    They are streamed to beside the object of ``flyte.ctx().checkpoint``, and back. A task that is retried finds, with
    ``resume()``, what the attempts before it have saved.

    Args:
        **options: Those of :class:`torchferry.CheckpointManager`, such as ``max_to_keep``.

    Raises:
        RuntimeError: the caller is in no task, or the task has no such place.
    """
    destination, source = _paths()
    if options.get("filesystem") is None:
        options.setdefault("storage_options", storage_options(destination))
    return TaskCheckpoints(f"{destination}{_SERIES}", source and f"{source}{_SERIES}", **options)


def _paths() -> tuple[str, str | None]:
    paths = hooks.checkpoint_paths()
    if paths is None:
        raise RuntimeError("There is no place for checkpoints here: call this inside a task.")
    return paths
