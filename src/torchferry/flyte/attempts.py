"""The checkpoint of a task of flytekit that another attempt of it goes on from."""

from __future__ import annotations

from flytekit import current_context
from flytekit.core.context_manager import FlyteContextManager

from torchferry.checkpoint.attempts import TaskCheckpoint
from torchferry.flyte import hooks
from torchferry.flyte.transfer import filesystem_for

__all__ = ["task_checkpoint"]

_FILE_NAME = "checkpoint.pt"


def task_checkpoint() -> TaskCheckpoint:
    """Where the task that calls this keeps a checkpoint for its next attempt, if this one is killed.

    It is the one file in the folder of ``current_context().checkpoint``, reached without a local file.

    Raises:
        NotImplementedError: flytekit's own, where there is no such place.
    """
    destination, source = hooks.checkpoint_folders(current_context().checkpoint)
    context = FlyteContextManager.current_context()
    return TaskCheckpoint(
        f"{destination.rstrip('/')}/{_FILE_NAME}",
        [f"{source.rstrip('/')}/{_FILE_NAME}"] if source else [],
        filesystem=lambda url: filesystem_for(context, url),
    )
