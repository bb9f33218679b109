"""Moves a checkpoint between a task and the object store that its Flyte context is configured for."""

from __future__ import annotations

import logging
from functools import partial
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from fsspec.utils import get_protocol

from torchferry.checkpoint.transfer import load_content, or_anonymously, save_content
from torchferry.checkpoint.unchanged import manifest_if_unchanged
from torchferry.engine.cancellation import in_thread
from torchferry.flyte import hooks
from torchferry.saving import save_async

if TYPE_CHECKING:
    from flytekit.core.context_manager import FlyteContext
    from fsspec import AbstractFileSystem

    from torchferry.engine.transfer import TransferReport
    from torchferry.options import LoadOptions, SaveOptions

__all__ = ["download", "filesystem_for", "upload"]

_FILE_NAME = "checkpoint.pt"

# flytekit configures the filesystem of one name of each cloud.
_ALIASES = {"az": "abfs", "gcs": "gs", "s3a": "s3"}

_logger = logging.getLogger("torchferry")


async def upload(
    ctx: FlyteContext, content: dict[str, Any], options: SaveOptions, *, stored_at: str | None = None
) -> tuple[str, TransferReport | None]:
    """Saves ``content`` to a new place under the context's raw output prefix.

    Args:
        ctx: Says where, and has the credentials.
        content: What to save.
        options: How to save it.
        stored_at: Where ``content`` was loaded from, or saved before. While it is still what is stored there, nothing
            is saved, unless ``options`` ask for a store or metadata of their own.

    Returns:
        The URI where it is stored; and what moved, if anything did and torchferry moved it.

    Raises:
        TorchferryError: as :func:`torchferry.save_async` does.
    """
    has_own_place = options.metadata or options.storage_options
    if stored_at and not has_own_place and await _is_stored(ctx, content, stored_at):
        _logger.info("Not saved again: the checkpoint is what is stored at %s.", stored_at)
        return stored_at, None
    uri: str = ctx.file_access.get_random_remote_path(_FILE_NAME)
    if get_protocol(uri) == "flyte":
        return await _upload_through_flyte(ctx, content, uri, options), None
    filesystem = await _store(ctx, uri, options)
    metadata = hooks.execution_metadata(ctx)
    return uri, await save_content(content, uri, options, filesystem=filesystem, metadata=metadata)


async def download(ctx: FlyteContext, uri: str, options: LoadOptions) -> Any:
    """Loads what is saved at ``uri``.

    Raises:
        TorchferryError: as :func:`torchferry.load_async` does.
    """

    async def load(anonymous: bool) -> Any:
        if anonymous:
            get_filesystem = partial(ctx.file_access.get_filesystem, _configured_name(uri), anonymous=True)
            return await load_content(uri, options, filesystem=await in_thread(get_filesystem))
        return await load_content(uri, options, filesystem=await _store(ctx, uri, options))

    return await or_anonymously(uri, options, load)


async def _is_stored(ctx: FlyteContext, content: dict[str, Any], uri: str) -> bool:
    try:
        filesystem = await in_thread(filesystem_for, ctx, uri)
    except Exception as error:  # noqa: BLE001 - a filesystem's constructor raises anything; there may be no way back
        # What was loaded with LoadOptions(storage_options=...) can be out of reach without them.
        _logger.debug("%s is not looked at again: %s", uri, error)
        return False
    return await manifest_if_unchanged(content, uri, filesystem) is not None


async def _store(ctx: FlyteContext, uri: str, options: SaveOptions | LoadOptions) -> AbstractFileSystem | None:
    if options.storage_options:
        return None
    # The first filesystem of a kind imports its library: not on the event loop.
    return await in_thread(filesystem_for, ctx, uri)


def filesystem_for(ctx: FlyteContext, uri: str) -> AbstractFileSystem:
    """The filesystem for ``uri`` as flytekit configures it.

    It is bound to fsspec's own event loop, which lives as long as the process, so it works from every thread and loop.
    """
    access = ctx.file_access
    if get_protocol(uri) == get_protocol(access.raw_output_prefix):
        # One instance, and so one pool of connections, for the whole task. fsspec would make one a thread.
        return access.raw_output_fs
    return access.get_filesystem(_configured_name(uri), path=uri)


def _configured_name(uri: str) -> str:
    protocol: str = get_protocol(uri)
    return _ALIASES.get(protocol, protocol)


async def _upload_through_flyte(ctx: FlyteContext, content: dict[str, Any], uri: str, options: SaveOptions) -> str:
    """Saves through Flyte's data proxy, which takes one file in one signed request and says where it put it."""
    with TemporaryDirectory(dir=ctx.file_access.local_sandbox_dir) as directory:
        path = f"{directory}/{_FILE_NAME}"
        await save_async(content, path, shards=options.shards)
        return str(await ctx.file_access.async_put_data(path, uri))
