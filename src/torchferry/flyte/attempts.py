"""The checkpoints of a task of flytekit, which another attempt of it goes on from."""

from __future__ import annotations

from typing import Any

from flytekit.core.context_manager import FlyteContextManager

from torchferry.checkpoint.series import TaskCheckpoints
from torchferry.flyte import hooks
from torchferry.flyte.transfer import filesystem_for

__all__ = ["task_checkpoints"]


def task_checkpoints(**options: Any) -> TaskCheckpoints:
    """Where the task that calls this keeps checkpoints for its next attempt, if this one is killed.

    They are in the place of ``flytekit.current_context().checkpoint``, and streamed there and back. A task that is
    retried finds, with ``resume()``, what the attempts before it have saved.

    Args:
        **options: Those of :class:`torchferry.CheckpointManager`, such as ``max_to_keep=1`` for the last one only.

    Raises:
        RuntimeError: the caller is in no task, or the task has no such place.
    """
    context = FlyteContextManager.current_context()
    folders = hooks.checkpoint_folders(context)
    if folders is None:
        raise RuntimeError("There is no place for checkpoints here: call this inside a task.")
    destination, source = folders
    if options.get("storage_options") is None:
        options.setdefault("filesystem", filesystem_for(context, destination))
    return TaskCheckpoints(destination, source, **options)
