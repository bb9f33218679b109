"""The value classes as Flyte 2 knows them, and the errors that it understands."""

from __future__ import annotations

import pickle

from flyte.errors import NonRecoverableError, RuntimeSystemError, RuntimeUserError
from flyte.types import TypeTransformerFailedError

from torchferry.checkpoint.adapters import message_of
from torchferry.checkpoint.values import LoadedCheckpoint, PyTorchCheckpoint
from torchferry.errors import (
    ChangedWhileSavingError,
    CheckpointValueError,
    NotEnoughMemoryError,
    StorageError,
    StorageUnavailableError,
    TorchferryError,
)

__all__ = ["Flyte2CheckpointValueError", "LoadedCheckpoint", "PyTorchCheckpoint", "flyte_error"]


# Of what may be different next time.
_PASSING = (StorageError, ChangedWhileSavingError, NotEnoughMemoryError)
# pickle raises the last two as well.
_LASTING = (TorchferryError, pickle.PicklingError, AttributeError, TypeError)


class Flyte2CheckpointValueError(CheckpointValueError, TypeTransformerFailedError):
    """A checkpoint cannot be made of this; flyte's own transformers raise the second of its bases."""


def flyte_error(error: BaseException, what: str) -> Exception:
    """The error of Flyte 2 that stands for ``error``: it decides whether the task runs again.

    Args:
        error: What went wrong.
        what: What could not be done, before a colon.

    Returns:
        A ``RuntimeSystemError`` where the store is unavailable: Flyte runs the task again, on its own account. A
        ``NonRecoverableError`` for what another attempt cannot change, such as a value that cannot be pickled: a
        training is not repeated for it. A ``RuntimeUserError`` for everything else: Flyte runs the task again as
        often as its ``retries`` say.
    """
    message = f"{what}: {message_of(error)}"
    code = type(error).__name__
    if isinstance(error, StorageUnavailableError):
        return RuntimeSystemError(code, message)
    if isinstance(error, _LASTING) and not isinstance(error, _PASSING):
        return NonRecoverableError(message, code)
    return RuntimeUserError(code, message)
