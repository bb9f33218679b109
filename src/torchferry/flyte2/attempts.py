"""The checkpoint of a task of Flyte 2 that another attempt of it goes on from."""

from __future__ import annotations

from torchferry.checkpoint.attempts import TaskCheckpoint
from torchferry.flyte2 import hooks
from torchferry.flyte2.settings import storage_options

__all__ = ["task_checkpoint"]


def task_checkpoint() -> TaskCheckpoint:
    """Where the task that calls this keeps a checkpoint for its next attempt, if this one is killed.

    It is the object of ``flyte.ctx().checkpoint``, reached without a local file. In a local run it is the task's own,
    and its retries find it.

    Raises:
        RuntimeError: the caller is in no task, or the task has no such place.
    """
    paths = hooks.checkpoint_paths()
    if paths is None:
        raise RuntimeError("There is no checkpoint path here: call task_checkpoint() inside a task that Flyte runs.")
    # The destination is this attempt's own, but for those of a clustered task, whose pods start again within one.
    destination = paths[0]
    return TaskCheckpoint(destination, filter(None, paths), storage_options=storage_options)
