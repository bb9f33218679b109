"""Every error that torchferry raises on purpose.

One root, :class:`TorchferryError`. Each error is also the builtin exception that a caller would
catch without knowing torchferry: a missing checkpoint is a ``FileNotFoundError``, a refused one a
``PermissionError``. Messages name the URL, what was tried, and what to do; the exception that
caused it, if any, is in ``__cause__``.
"""

from __future__ import annotations

import logging
import pickle
import re

from torchferry.printable import escaped

__all__ = [
    "BackendNotInstalledError",
    "ChangedWhileSavingError",
    "CheckpointChangedError",
    "CheckpointCorruptError",
    "CheckpointFormatError",
    "CheckpointKeyError",
    "CheckpointMismatchError",
    "CheckpointNotFoundError",
    "CheckpointValueError",
    "InterpreterEndedError",
    "MaskedError",
    "NotEnoughMemoryError",
    "RankFailedError",
    "SaveUnderWayError",
    "StorageError",
    "StoragePermissionError",
    "StorageUnavailableError",
    "TorchferryError",
    "UnsafeCheckpointError",
    "UnsupportedOptionError",
    "UnsupportedURLError",
    "forget_frames",
    "mask",
    "masked",
    "shows_frames",
]


_PASSWORD = re.compile(
    r"(://(?!arn:)(?:[^\[/@\s:][^/@\s:]*)?:)"  # the user's name; no ARN of S3, no IPv6 address
    r"(?!\d{1,5}/|:[a-z][a-z0-9+.-]*://)"  # no port, no next URL of a chain
    r"(?:(?!://)[^\s])+(?=@)"  # to the last @: a password that was not quoted may contain one, or a slash
)
_HTTP_USER = re.compile(r"(https?://)[^/@\s:?#]+(?=@)")  # a token may be given as the user's name
_NAMES = (
    r"[\w.%~-]*(?:token|secret|passw(?:or)?d|passphrase|pwd|signature|authorization"
    r"|(?:api|access|secret|account|private|shared)[-_]?key)"
    r"|(?:[\w.%~-]*[-_.])?(?:sig|auth|pass|key|jwt|code)"
)
_FIELD = re.compile(rf"([?&;#](?:{_NAMES})=)[^&\s'\"]+?(?=[:,.)\]]*(?:[&\s'\"]|$))", re.IGNORECASE)


def mask(text: str) -> str:
    """``text`` as people may see it: without the secrets of URLs in it, and with nothing that acts on a terminal.

    Passwords, keys, tokens and signatures become ``***``. That is what stands between a user's name and the last ``@``,
    the name before an ``@`` of http, and the values of fields whose name ends in "token", "signature", "apikey" and
    the like. Control characters, but for newlines, become backslash escapes.
    """
    for secret in (_PASSWORD, _HTTP_USER, _FIELD):
        text = secret.sub(_without_secret, text)
    return escaped(text, keep="\n\t")


def _without_secret(match: re.Match[str]) -> str:
    return f"{match[1]}***"  # not a template: re imports a module for one, which fails while the interpreter ends


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


def shows_frames() -> bool:
    """Whether tracebacks show the frames of torchferry and the libraries below: for who debugs them."""
    return logging.getLogger("torchferry").isEnabledFor(logging.DEBUG)


def forget_frames(error: TorchferryError, but: BaseException | None = None) -> None:
    """Lets go of the frames that an error and its causes were raised in, unless :func:`shows_frames`.

    Args:
        error: The error.
        but: An exception that was being handled before, which is none of ours.
    """
    left: list[BaseException | None] = [] if shows_frames() else [error]
    seen = {id(but)}
    while left:
        forgets = left.pop()
        if forgets is not None and id(forgets) not in seen:
            seen.add(id(forgets))
            forgets.__traceback__ = None
            left += [forgets.__cause__, forgets.__context__]


class TorchferryError(Exception):
    """The root of torchferry's errors.

    No text in them, notes included, shows a secret of a URL, or holds anything that acts on a terminal.
    """

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

    @classmethod
    def at(cls, url: str) -> ChangedWhileSavingError:
        """The error, in the words that are right wherever it is noticed."""
        return cls(
            f"{url}: a tensor was changed while it was being saved. Nothing was stored. Wait for the save before the "
            "next optimizer step, or have a snapshot saved: torchferry.save_in_background(obj, url)."
        )


class SaveUnderWayError(TorchferryError, RuntimeError):
    """There is no room for another snapshot while a save in the background is under way. Nothing was saved."""


class CheckpointFormatError(TorchferryError, ValueError):
    """The object is no checkpoint, or one in a format that cannot be loaded this way; the message names the format."""


class CheckpointCorruptError(CheckpointFormatError):
    """The object is a damaged checkpoint: truncated, or a record does not match its CRC32."""


class CheckpointKeyError(TorchferryError, KeyError):
    """A key asked for in ``keys=`` is not in the checkpoint; the message lists those that are."""


class CheckpointMismatchError(TorchferryError, RuntimeError):
    """A checkpoint does not fit what it is to be loaded into; the message names what differs.

    Nothing was changed, but where only torch could tell while it loaded: of a module that decides itself what it takes,
    and of values that torch alone can make.
    """


class CheckpointValueError(TorchferryError, ValueError):
    """A checkpoint cannot be made of this: nothing to save, a name that is taken, a value that no load would take."""


class NotEnoughMemoryError(TorchferryError, MemoryError):
    """This machine has no memory for a whole checkpoint; ``keys=`` loads a part of it."""


class InterpreterEndedError(TorchferryError, RuntimeError):
    """The interpreter is ending, and its threads have ended: nothing can be saved or loaded any more."""


class RankFailedError(TorchferryError, RuntimeError):
    """A rank of a distributed save or load failed or died, and so all failed; ``failures`` has each rank's error."""


class UnsafeCheckpointError(TorchferryError, pickle.UnpicklingError):
    """The checkpoint needs globals that ``weights_only=True`` does not allow; the message names them."""


class UnsupportedURLError(TorchferryError, ValueError):
    """No filesystem is known for this URL's protocol."""


class UnsupportedOptionError(TorchferryError, ValueError):
    """An option, or a combination of options, that this store cannot honour."""


class BackendNotInstalledError(TorchferryError, ImportError):
    """The library that reaches this kind of store is not installed; the message names the extra to install."""
