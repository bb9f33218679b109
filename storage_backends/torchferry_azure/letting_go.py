"""Has adlfs's filesystems freed when nobody uses them any more, with the connections of their clients.

adlfs (2026.8) gives each filesystem finalizers that hold the filesystem itself, so that it stays, with 1 MiB and a
connection, until the process ends. They are replaced by one that holds its clients. It is the one place that knows how.
"""

from __future__ import annotations

import asyncio
import atexit
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from fsspec.asyn import sync

if TYPE_CHECKING:
    from adlfs import AzureBlobFileSystem
    from fsspec import AbstractFileSystem

__all__ = ["let_go", "session_of"]

_EXIT_SECONDS = 2.0

_alive: dict[int, weakref.ref[AzureBlobFileSystem]] = {}  # by id: those of the same options are equal to each other


def session_of(fs: AbstractFileSystem) -> Any:
    """The session of aiohttp that a filesystem's client has; None where it has none, or not yet."""
    pipeline = getattr(getattr(fs, "service_client", None), "_pipeline", None)
    transport = getattr(pipeline, "_transport", None)
    while transport is not None and not hasattr(transport, "session"):
        transport = getattr(transport, "_transport", None)
    return getattr(transport, "session", None)


def let_go(fs: AzureBlobFileSystem) -> None:
    """Replaces the finalizers of a filesystem; called once for each.

    Those of one that its user drives from a loop of their own stay: nobody else can close its clients.
    """
    if fs.asynchronous:
        return
    for finalizer in list(getattr(weakref.finalize, "_registry", {})):
        held = finalizer.peek()
        if held is not None and held[0] is fs and any(argument is fs for argument in held[2]):
            finalizer.detach()
    _alive[id(fs)] = weakref.ref(fs)
    weakref.finalize(fs, _alive.pop, id(fs), None).atexit = False
    weakref.finalize(fs, _close, fs.loop, _clients_of(fs)).atexit = False


def _clients_of(fs: AzureBlobFileSystem) -> list[Any]:
    clients = [fs.service_client, getattr(fs, "credential", None)]
    return [client for client in clients if asyncio.iscoroutinefunction(getattr(client, "close", None))]


def _close(loop: asyncio.AbstractEventLoop | None, clients: list[Any]) -> None:
    """Closes clients on their loop; does not wait: the garbage collector may have come in any thread."""
    if loop is not None and loop.is_running():
        loop.call_soon_threadsafe(lambda: loop.create_task(_close_all(clients)))


async def _close_all(clients: list[Any]) -> None:
    for client in clients:
        with suppress(Exception):  # whatever it is: nobody uses it any more
            await client.close()


@atexit.register
def _close_at_exit() -> None:
    """Closes those that are left, as adlfs's own finalizers would."""
    for fs in [fs for ref in list(_alive.values()) if (fs := ref()) is not None]:
        with suppress(Exception):
            sync(fs.loop, _close_all, _clients_of(fs), timeout=_EXIT_SECONDS)
