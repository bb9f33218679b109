"""Sharded checkpoints: ``torch.distributed.checkpoint`` over torchferry's engine.

Needs torch with ``torch.distributed``, and numpy: ``pip install 'torchferry[dcp]'``. Names are imported when they
are first used: ``torchferry clean`` looks for what saves have left without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchferry.distributed.api import AsyncSave, async_save, load, save
    from torchferry.distributed.convert import consolidate, consolidate_async, shard, shard_async
    from torchferry.distributed.leftovers import StaleSave, stale_saves
    from torchferry.distributed.reader import StorageReader
    from torchferry.distributed.writer import StorageWriter

_MODULES = {
    "torchferry.distributed.api": ("AsyncSave", "async_save", "load", "save"),
    "torchferry.distributed.convert": ("consolidate", "consolidate_async", "shard", "shard_async"),
    "torchferry.distributed.leftovers": ("StaleSave", "stale_saves"),
    "torchferry.distributed.reader": ("StorageReader",),
    "torchferry.distributed.writer": ("StorageWriter",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "AsyncSave",
    "StaleSave",
    "StorageReader",
    "StorageWriter",
    "async_save",
    "consolidate",
    "consolidate_async",
    "load",
    "save",
    "shard",
    "shard_async",
    "stale_saves",
]


if not TYPE_CHECKING:  # as in torchferry itself

    def __getattr__(name: str) -> Any:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(_MODULE_OF[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
