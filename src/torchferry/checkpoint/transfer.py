"""Saves and loads a checkpoint as the options on its annotation say, and says in the log what moved."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
from fsspec.callbacks import Callback

from torchferry.checkpoint.devices import default_map_location
from torchferry.errors import CheckpointCorruptError, StorageUnavailableError
from torchferry.loading import load_async
from torchferry.saving import save_async

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from fsspec import AbstractFileSystem

    from torchferry.options import LoadOptions, SaveOptions

__all__ = ["Transfer", "load_content", "save_content"]

T = TypeVar("T")

RETRY_DELAYS = (1.0, 4.0, 16.0)
"""Seconds before each further attempt, after a store's client has given up retrying by itself.

Worth it, because of what comes next: Flyte fails a task at once for an input that cannot be loaded, and for an
output that cannot be saved it runs the whole task, training included, again.
"""

_logger = logging.getLogger("torchferry")


@dataclass(frozen=True, slots=True)
class Transfer:
    """What moved: the argument of the record that the logger "torchferry" gets at level INFO for each transfer.

    Attributes:
        verb: "Saved" or "Loaded".
        uri: The object.
        size: Bytes that went through the network; fewer than the object has where ``keys=`` chose a part.
        seconds: From the call to the answer, retries included.
    """

    verb: str
    uri: str
    size: int
    seconds: float

    def __str__(self) -> str:
        rate = self.size / self.seconds / 1e9
        return f"{self.verb} {self.uri}: {self.size / 1e6:.1f} MB in {self.seconds:.2f} s, {rate:.2f} GB/s."


async def save_content(
    content: dict[str, Any],
    uri: str,
    options: SaveOptions,
    *,
    filesystem: AbstractFileSystem | None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Saves ``content`` at ``uri``.

    Args:
        content: What to save.
        uri: Where.
        options: How.
        filesystem: Reaches the store; not used where ``options`` have ``storage_options``.
        metadata: Goes to the object, too; ``options`` win.

    Raises:
        TorchferryError: as :func:`torchferry.save_async` does.
    """
    arguments: dict[str, Any] = {
        "part_size": options.part_size,
        "metadata": {**(metadata or {}), **(options.metadata or {})} or None,
        "plane": options.plane,
        **_store(options, filesystem),
    }
    await _move("Saved", uri, partial(save_async, content, uri, **arguments))


async def load_content(uri: str, options: LoadOptions, *, filesystem: AbstractFileSystem | None) -> Any:
    """Loads what is saved at ``uri``. Without a ``map_location`` it goes to this process's rank's device.

    Args:
        uri: What to load.
        options: How.
        filesystem: Reaches the store; not used where ``options`` have ``storage_options``.

    Raises:
        TorchferryError: as :func:`torchferry.load_async` does.
    """
    map_location = default_map_location() if options.map_location is None else options.map_location
    arguments: dict[str, Any] = {
        "keys": options.keys,
        "map_location": map_location,
        "weights_only": options.weights_only,
        "verify": options.verify,
        "plane": options.plane,
        **_store(options, filesystem),
    }
    return await _move("Loaded", uri, partial(load_async, uri, **arguments))


def _store(options: SaveOptions | LoadOptions, filesystem: AbstractFileSystem | None) -> dict[str, Any]:
    if options.storage_options:
        return {"storage_options": options.storage_options}
    return {"filesystem": filesystem}


async def _move(verb: str, uri: str, action: Callable[..., Awaitable[T]]) -> T:
    started = perf_counter()
    callback, result = await _persistently(action)
    _logger.info("%s", Transfer(verb, uri, callback.value, perf_counter() - started))
    return result


async def _persistently(action: Callable[..., Awaitable[T]]) -> tuple[Callback, T]:
    for delay in RETRY_DELAYS:
        try:
            return await _counted(action)
        except (StorageUnavailableError, CheckpointCorruptError) as error:
            # Corrupt, too: bytes that were damaged on their way are good when they are read again.
            _logger.warning("%s Trying again in %s s.", error, delay)
        await anyio.sleep(delay)
    return await _counted(action)


async def _counted(action: Callable[..., Awaitable[T]]) -> tuple[Callback, T]:
    callback = Callback()
    return callback, await action(callback=callback)
