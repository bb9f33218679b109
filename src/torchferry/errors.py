"""Every error that torchferry raises on purpose.

One root, :class:`TorchferryError`. Each error is also the builtin exception that a caller would
catch without knowing torchferry: a missing checkpoint is a ``FileNotFoundError``, a refused one a
``PermissionError``. Messages name the URL, what was tried, and what to do; the exception that
caused it, if any, is in ``__cause__``.
"""

from __future__ import annotations

import pickle
import re

__all__ = [
    "BackendNotInstalledError",
    "ChangedWhileSavingError",
    "CheckpointChangedError",
    "CheckpointCorruptError",
    "CheckpointFormatError",
    "CheckpointKeyError",
    "CheckpointNotFoundError",
    "CheckpointValueError",
    "NotEnoughMemoryError",
    "StorageError",
    "StoragePermissionError",
    "StorageUnavailableError",
    "TorchferryError",
    "UnsafeCheckpointError",
    "UnsupportedOptionError",
    "UnsupportedURLError",
    "mask",
]


_SECRETS = re.compile(
    r"(://[^/@\s:]*:)[^/@\s]+(?=@)"
    r"|([?&](?:sig|X-Amz-Signature|X-Amz-Security-Token|X-Goog-Signature|Signature|access_token|token|password)=)"
    r"[^&\s'\":,]+",
    re.IGNORECASE,
)
"""What must not be shown of a URL: the password before the host, and what a query is signed with."""


def mask(text: str) -> str:
    """``text`` without what must not be shown of a URL: passwords and signatures become ``***``."""
    return _SECRETS.sub(r"\1\2***", text)


class TorchferryError(Exception):
    """The root of torchferry's errors."""

    def __str__(self) -> str:
        # KeyError shows the repr of its argument and OSError its (errno, message) pair: a message is a message.
        message = str(self.args[-1]) if self.args else type(self).__name__
        return mask(message)


class StorageError(TorchferryError, OSError):
    """The store refused or failed an operation, and doing it again would not help (``errno`` is set where known)."""


class CheckpointNotFoundError(StorageError, FileNotFoundError):
    """No object at this URL; the message says whether the bucket or container is missing too."""


class StoragePermissionError(StorageError, PermissionError):
    """The credentials are missing, wrong or not allowed to do this, or the store is read-only."""


class StorageUnavailableError(StorageError, ConnectionError):
    """The store did not answer, or answered that it is overloaded, through all repetitions: trying later may help."""


class CheckpointChangedError(StorageError):
    """The object was replaced while it was being read."""


class ChangedWhileSavingError(TorchferryError, RuntimeError):
    """A tensor was changed while it was being sent. Nothing was stored: what was there before still is."""


class CheckpointFormatError(TorchferryError, ValueError):
    """The object is no checkpoint, or one in a format that cannot be loaded this way; the message names the format."""


class CheckpointCorruptError(CheckpointFormatError):
    """The object is a damaged checkpoint: truncated, or a record does not match its CRC32."""


class CheckpointKeyError(TorchferryError, KeyError):
    """A key asked for in ``keys=`` is not in the checkpoint; the message lists those that are."""


class CheckpointValueError(TorchferryError, ValueError):
    """A checkpoint cannot be made of this: nothing to save, a name that is taken, a value that no load would take."""


class NotEnoughMemoryError(TorchferryError, MemoryError):
    """This machine has no memory for a whole checkpoint; ``keys=`` loads a part of it."""


class UnsafeCheckpointError(TorchferryError, pickle.UnpicklingError):
    """The checkpoint needs globals that ``weights_only=True`` does not allow; the message names them."""


class UnsupportedURLError(TorchferryError, ValueError):
    """No filesystem is known for this URL's protocol."""


class UnsupportedOptionError(TorchferryError, ValueError):
    """An option, or a combination of options, that this store cannot honour."""


class BackendNotInstalledError(TorchferryError, ImportError):
    """The library that reaches this kind of store is not installed; the message names the extra to install."""
