"""What the clouds' backends share: the choice of a plane, and checking that settings translate to obstore."""

from __future__ import annotations

import asyncio
import logging
import os
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any

from torchferry.errors import UnsupportedOptionError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable

    from fsspec import AbstractFileSystem

    from torchferry.storage.base import Backend, Plane
    from torchferry.storage.obstore import ObstoreBackend

__all__ = [
    "UPLOAD_PATIENCE",
    "UntranslatableError",
    "choose_plane",
    "credentials_from",
    "names",
    "once_a_process",
    "require_known",
]

logger = logging.getLogger("torchferry.storage")

UPLOAD_PATIENCE = timedelta(minutes=15)
"""How long one request of obstore may take: it may be one of 24 parts of 16 MiB that share a line of 4 Mbit/s."""


_CREDENTIALS_PATIENCE = 60.0  # seconds

_user: int | None = None  # the process that first used obstore: this one, or the one it was forked from


class UntranslatableError(Exception):
    """A setting of an fsspec filesystem that obstore cannot honour; the message names it."""


def choose_plane(
    plane: Plane, cloud: str, library: str, *, fsspec: Callable[[], Backend], obstore: Callable[[], Backend]
) -> Backend:
    """The backend of the plane that was asked for; for "auto" obstore's, where all settings translate.

    Args:
        plane: Which plane was asked for.
        cloud: The cloud's name, for messages.
        library: What carries the fsspec plane, for messages.
        fsspec: Makes the backend of the fsspec plane.
        obstore: Makes the backend of the obstore plane, or raises :class:`UntranslatableError`.

    Raises:
        UnsupportedOptionError: ``plane`` is "obstore", and a setting does not translate.
    """
    if plane == "fsspec":
        return fsspec()
    try:
        return obstore()
    except UntranslatableError as error:
        if plane == "obstore":
            raise UnsupportedOptionError(
                f"The obstore plane cannot honour this {cloud} configuration: {error}."
            ) from None
        _log_once(f"{cloud} goes through {library}: obstore, which is faster, cannot honour {error}.")
        return fsspec()


def once_a_process(fs: AbstractFileSystem, make: Callable[[], ObstoreBackend]) -> ObstoreBackend:
    """What ``make()`` returned first for this filesystem in this process: it owns the connections.

    Neither connections nor what obstore runs on survive a fork: a child would wait for its first answer for ever.

    Raises:
        UntranslatableError: this process was forked from one that had used obstore.
    """
    global _user  # noqa: PLW0603 - obstore has one runtime in a process
    if _user not in {None, os.getpid()}:
        raise UntranslatableError("a process that was forked from one that had used it (start it with 'spawn')")
    attributes = vars(fs)
    if "_torchferry_obstore" not in attributes:
        attributes["_torchferry_obstore"] = make()
        _user = os.getpid()
    backend: ObstoreBackend = attributes["_torchferry_obstore"]
    return backend


def credentials_from(
    loop: asyncio.AbstractEventLoop, func: Callable[..., Coroutine[Any, Any, Any]], *args: object
) -> Callable[[], Any]:
    """A credential provider for obstore: what ``func(*args)`` returns, on ``loop``, which runs in a thread of its own.

    Not an asynchronous one, which obstore takes too: in the middle of an upload it asks in threads where no event loop
    runs, and gets "no running event loop" for its credentials.
    """

    def provide() -> Any:
        return asyncio.run_coroutine_threadsafe(func(*args), loop).result(_CREDENTIALS_PATIENCE)

    return provide


def require_known(where: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises :class:`UntranslatableError` for settings that nobody has looked at."""
    if unknown := sorted(set(given) - set(known)):
        raise UntranslatableError(f"{where} {', '.join(map(repr, unknown))}")


def names(text: str) -> frozenset[str]:
    """The words of ``text``."""
    return frozenset(text.split())


@cache
def _log_once(message: str) -> None:
    logger.warning(message)
