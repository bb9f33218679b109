"""Saves and loads a checkpoint as the options on its annotation say."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from fsspec.utils import get_protocol

from torchferry.checkpoint.devices import default_map_location
from torchferry.errors import StoragePermissionError
from torchferry.loading import load_async
from torchferry.saving import save_async

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from fsspec import AbstractFileSystem

    from torchferry.engine.transfer import TransferReport
    from torchferry.options import LoadOptions, SaveOptions

__all__ = ["load_content", "or_anonymously", "save_content"]

_ANONYMOUS = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az"})  # stores that have public data

_logger = logging.getLogger("torchferry")


async def save_content(
    content: dict[str, Any],
    uri: str,
    options: SaveOptions,
    *,
    filesystem: AbstractFileSystem | None,
    metadata: Mapping[str, str] | None = None,
) -> TransferReport:
    """Saves ``content`` at ``uri``.

    Args:
        content: What to save.
        uri: Where.
        options: How.
        filesystem: Reaches the store; not used where ``options`` have ``storage_options``.
        metadata: Goes to the object, too; ``options`` win.

    Returns:
        What moved, and how fast.

    Raises:
        TorchferryError: as :func:`torchferry.save_async` does.
    """
    arguments: dict[str, Any] = {
        "part_size": options.part_size,
        "shards": options.shards,
        "give_up_after": options.give_up_after,
        "metadata": {**(metadata or {}), **(options.metadata or {})} or None,
        **_store(options, filesystem),
    }
    reports: list[TransferReport] = []
    await save_async(content, uri, report=reports.append, **arguments)
    return reports[0]


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
        "exclude": options.exclude,
        "map_location": map_location,
        "weights_only": options.weights_only,
        "verify": options.verify,
        "give_up_after": options.give_up_after,
        **_store(options, filesystem),
    }
    return await load_async(uri, **arguments)


async def or_anonymously(uri: str, options: LoadOptions, load: Callable[[bool], Awaitable[Any]]) -> Any:
    """Loads public data where credentials are wrong or missing, as Flyte does.

    Args:
        uri: What to load.
        options: How. With ``storage_options`` of their own nothing else is tried.
        load: Called with whether to do it without credentials.

    Raises:
        StoragePermissionError: with the credentials that there are, and without any, it cannot be read.
    """
    try:
        return await load(False)
    except StoragePermissionError:
        if get_protocol(uri) not in _ANONYMOUS or options.storage_options:
            raise
        try:
            return await load(True)
        except StoragePermissionError:
            _logger.debug("%s cannot be read anonymously either.", uri)
        raise


def _store(options: SaveOptions | LoadOptions, filesystem: AbstractFileSystem | None) -> dict[str, Any]:
    if options.storage_options:
        return {"storage_options": options.storage_options}
    return {"filesystem": filesystem}
