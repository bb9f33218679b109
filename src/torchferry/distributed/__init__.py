"""Sharded checkpoints: ``torch.distributed.checkpoint`` over torchferry's engine.

Needs torch with ``torch.distributed``, and numpy: ``pip install 'torchferry[dcp]'``.
"""

from __future__ import annotations

from torchferry.distributed.api import AsyncSave, async_save, load, save
from torchferry.distributed.convert import consolidate, consolidate_async, shard, shard_async
from torchferry.distributed.leftovers import StaleSave, stale_saves
from torchferry.distributed.reader import StorageReader
from torchferry.distributed.writer import StorageWriter

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
