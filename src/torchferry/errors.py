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
    "MaskedError",
    "NotEnoughMemoryError",
    "StorageError",
    "StoragePermissionError",
    "StorageUnavailableError",
    "TorchferryError",
    "UnsafeCheckpointError",
    "UnsupportedOptionError",
    "UnsupportedURLError",
    "mask",
    "masked",
]


_PASSWORD = re.compile(
    r"(://(?!arn:)(?:[^\[/@\s:][^/@\s:]*)?:)"  # the user's name; no ARN of S3, no IPv6 address
    r"(?!\d{1,5}/|:[a-z][a-z0-9+.-]*://)"  # no port, no next URL of a chain
    r"(?:(?!://)[^\s])+(?=@)"  # to the last @: a password that was not quoted may contain one, or a slash
)
_NAMES = (
    r"[\w.%~-]*(?:token|secret|passw(?:or)?d|passphrase|pwd|signature|authorization"
    r"|(?:api|access|secret|account|private|shared)[-_]?key)"
    r"|(?:[\w.%~-]*[-_.])?(?:sig|auth|pass|key)"
)
_FIELD = re.compile(rf"([?&;#](?:{_NAMES})=)[^&\s'\"]+?(?=[:,.)\]]*(?:[&\s'\"]|$))", re.IGNORECASE)


def mask(text: str) -> str:
    """``text`` without the secrets of URLs in it: passwords, keys, tokens and signatures become ``***``.

    That is what stands between a user's name and the last ``@``, and the values of fields whose name ends in "token",
    "signature", "apikey" and the like.
    """
    return _FIELD.sub(r"\1***", _PASSWORD.sub(r"\1***", text))


class MaskedError(Exception):
    """Stands for an error of another library whose text shows a secret of a URL: its type and text, masked."""


def masked(error: Exception) -> Exception:
    """``error``, or where its text or its causes' show a secret of a URL, a :class:`MaskedError` in its place.

    For ``raise TorchferryError(...) from masked(error)``: a traceback prints the text of causes, too.
    """
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    safe_cause = masked(cause) if isinstance(cause, Exception) else cause
    notes = [mask(note) for note in getattr(error, "__notes__", ())]
    text = str(error)
    if mask(text) == text and mask(repr(error)) == repr(error) and notes == getattr(error, "__notes__", []):
        if safe_cause is not cause:
            error.__cause__ = safe_cause
        return error
    safe = MaskedError(mask(f"{type(error).__name__}: {text}")).with_traceback(error.__traceback__)
    safe.__cause__ = safe_cause
    for note in notes:
        safe.add_note(note)
    return safe


class TorchferryError(Exception):
    """The root of torchferry's errors. No text in them, notes included, shows a secret of a URL."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(mask(arg) if isinstance(arg, str) else arg for arg in args))

    def add_note(self, note: str) -> None:
        """Adds a note, without the secrets of URLs in it."""
        super().add_note(mask(note))

    def __str__(self) -> str:
        # KeyError shows the repr of its argument and OSError its (errno, message) pair: a message is a message.
        return str(self.args[-1]) if self.args else type(self).__name__


class StorageError(TorchferryError, OSError):
    """The store refused or failed an operation, and doing it again would not help (``errno`` is set where known)."""


class CheckpointNotFoundError(StorageError, FileNotFoundError):
    """No object at this URL; the message says whether the bucket or container is missing too."""


class StoragePermissionError(StorageError, PermissionError):
    """The credentials are missing, wrong or not allowed to do this, or the store is read-only."""


class StorageUnavailableError(StorageError, ConnectionError):
    """The store did not answer, or answered that it is overloaded, through all retries: trying later may help."""


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
