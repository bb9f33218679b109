"""The checkpoints of a task of flytekit, which another attempt of it goes on from."""

from __future__ import annotations

from typing import Any

from flytekit.core.context_manager import FlyteContext, FlyteContextManager

from torchferry.checkpoint.attempts import TaskCheckpoint
from torchferry.checkpoint.series import TaskCheckpoints
from torchferry.flyte import hooks
from torchferry.flyte.transfer import filesystem_for

__all__ = ["task_checkpoint", "task_checkpoints"]

_FILE_NAME = "checkpoint.pt"


def task_checkpoint() -> TaskCheckpoint:
    """Where the task that calls this keeps one checkpoint for its next attempt, if this one is killed.

    It is the one file in the folder of ``flytekit.current_context().checkpoint``, reached without a local file.

    Raises:
        RuntimeError: the caller is in no task, or the task has no such place.
    """
    context = FlyteContextManager.current_context()
    destination, source = _folders(context)
    return TaskCheckpoint(
        f"{destination.rstrip('/')}/{_FILE_NAME}",
        [f"{source.rstrip('/')}/{_FILE_NAME}"] if source else [],
        filesystem=lambda url: filesystem_for(context, url),
    )


def task_checkpoints(**options: Any) -> TaskCheckpoints:
    """Where the task that calls this keeps a series of checkpoints, for its next attempt if this one is killed.

    They are in the place of ``flytekit.current_context().checkpoint``, and streamed there and back. A task that is
    retried finds, with ``resume()``, what the attempts before it have saved.

    Args:
        **options: Those of :class:`torchferry.CheckpointManager`, such as ``max_to_keep``.

    Raises:
        RuntimeError: the caller is in no task, or the task has no such place.
    """
    context = FlyteContextManager.current_context()
    destination, source = _folders(context)
    if options.get("storage_options") is None:
        options.setdefault("filesystem", filesystem_for(context, destination))
    return TaskCheckpoints(destination, source, **options)


def _folders(context: FlyteContext) -> tuple[str, str | None]:
    """Where this attempt keeps checkpoints, and where the one before did, if there was one."""
    folders = hooks.checkpoint_folders(context)
    if folders is None:
        raise RuntimeError("There is no place for checkpoints here: call this inside a task.")
    return folders
