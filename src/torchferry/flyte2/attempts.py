"""The checkpoint of a task of Flyte 2 that another attempt of it goes on from."""

from __future__ import annotations

from torchferry.checkpoint.attempts import TaskCheckpoint
from torchferry.flyte2 import hooks
from torchferry.flyte2.settings import storage_options

__all__ = ["task_checkpoint"]


def task_checkpoint() -> TaskCheckpoint:
    """Where the task that calls this keeps a checkpoint for its next attempt, if this one is killed.

    It is the object of ``flyte.ctx().checkpoint``, reached without a local file.

    Raises:
        RuntimeError: the caller is in no task, or the task has no such place.
    """
    paths = hooks.checkpoint_paths()
    if paths is None:
        raise RuntimeError("There is no checkpoint path here: call task_checkpoint() inside a task that Flyte runs.")
    destination, source = paths
    return TaskCheckpoint(destination, source, storage_options=storage_options)
