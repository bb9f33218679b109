"""Moves values of tasks between a task and the run's raw data path, with the storage settings of Flyte 2."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Hashable, MutableMapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from torch.utils.weak import WeakIdKeyDictionary

from torchferry.checkpoint.transfer import load_content, or_anonymously, save_content
from torchferry.checkpoint.unchanged import fingerprint, manifest_if_unchanged
from torchferry.checkpoint.values import PyTorchCheckpoint, remembered_place
from torchferry.engine.cancellation import in_thread
from torchferry.errors import CheckpointValueError, TorchferryError
from torchferry.flyte2 import hooks
from torchferry.flyte2.settings import storage_options
from torchferry.loading import inspect_async

if TYPE_CHECKING:
    from torchferry.engine.transfer import TransferReport
    from torchferry.options import LoadOptions, SaveOptions

__all__ = ["Stored", "download", "once", "upload"]

T = TypeVar("T")
OptionsT = TypeVar("OptionsT", "LoadOptions", "SaveOptions")

_logger = logging.getLogger("torchferry")


@dataclass(frozen=True, slots=True)
class Stored:
    """What is stored, and where.

    Attributes:
        uri: Where.
        fingerprint: A name for the content; None where it carries no CRC32s.
        saved: What moved; None where it was stored already.
    """

    uri: str
    fingerprint: str | None
    saved: TransferReport | None = None


async def upload(value: Any, content: Any, options: SaveOptions, *, name: str) -> Stored:
    """Saves ``content`` to a new place under the run's raw data path.

    While it is still what is stored where ``value`` was loaded from, or saved before, nothing is saved, unless
    ``options`` ask for a store or metadata of their own.

    Args:
        value: What the task has.
        content: What to save of it.
        options: How to save it.
        name: The last part of its URI.

    Raises:
        CheckpointValueError: there is no raw data path: the caller is in no task, and in no run.
        TorchferryError: as :func:`torchferry.save_async` does.
    """
    stored_at = _places.get(value)
    if stored_at is None and isinstance(value, PyTorchCheckpoint):  # stored by flytekit, or for the next attempt
        stored_at = remembered_place(value)
    if stored_at is not None and not (options.metadata or options.storage_options):
        there = await _configured(stored_at, options)
        manifest = await manifest_if_unchanged(content, stored_at, storage_options=there.storage_options)
        if manifest is not None:
            _logger.info("Not saved again: it is what is stored at %s.", stored_at)
            return Stored(stored_at, fingerprint(manifest))
    uri = await in_thread(hooks.new_place, name)
    if uri is None:
        raise CheckpointValueError(
            "There is no raw data path here to save it to: Flyte has one in tasks and in local runs. Save it with "
            "torchferry.save, pass the URL to the task, and load it there."
        )
    configured = await _configured(uri, options)
    saved = await save_content(content, uri, configured, filesystem=None)
    _places[value] = uri
    return Stored(uri, await _fingerprint_of(uri, configured), saved)


async def _fingerprint_of(uri: str, options: SaveOptions) -> str | None:
    """A name for the content of what was just saved; None where it cannot be read, or torchferry cannot read it."""
    try:
        return fingerprint(
            await inspect_async(uri, storage_options=options.storage_options, give_up_after=options.give_up_after)
        )
    except TorchferryError as error:  # it is stored: the task's work is not lost for this
        _logger.warning("%s has no hash, so that tasks are not found in Flyte's cache by it: %s", uri, error)
        return None


async def download(uri: str, options: LoadOptions, value_of: Callable[[Any], T]) -> T:
    """Loads what is saved at ``uri``, and notes that it is there.

    Args:
        uri: What to load.
        options: How.
        value_of: Makes the task's value of what was loaded.

    Raises:
        TorchferryError: as :func:`torchferry.load_async` does.
    """

    async def load(anonymous: bool) -> Any:
        if anonymous:
            configured = replace(options, storage_options=storage_options(uri, anonymous=True))
        else:
            configured = await _configured(uri, options)
        return await load_content(uri, configured, filesystem=None)

    value = value_of(await or_anonymously(uri, options, load))
    _places[value] = uri
    return value


async def once(key: Hashable, save: Callable[[], Awaitable[Stored]]) -> Stored:
    """Runs ``save``, or waits for the one with the same key that is under way.

    Flyte converts the arguments of a call side by side: one checkpoint that is two arguments is saved once.
    """
    with _lock:
        under_way = _under_way.get(key)
        if under_way is None:
            mine = _under_way[key] = Future[Stored]()
    if under_way is not None:
        with suppress(Exception):  # it is the other's to report; perhaps it was cancelled alone
            return await asyncio.shield(asyncio.wrap_future(under_way))
        return await save()
    try:
        stored = await save()
    except BaseException:
        mine.set_exception(RuntimeError("It was not saved."))
        raise
    finally:
        with _lock:
            del _under_way[key]
    mine.set_result(stored)
    return stored


# Where values of tasks are stored. By identity, and not by equality: that of tensors is another tensor.
_places: MutableMapping[Any, str] = WeakIdKeyDictionary()
_lock = threading.Lock()
_under_way: dict[Hashable, Future[Stored]] = {}


async def _configured(uri: str, options: OptionsT) -> OptionsT:
    if options.storage_options:
        return options
    # The first look at the settings may import libraries: not on the event loop.
    return replace(options, storage_options=await in_thread(partial(storage_options, uri)))
