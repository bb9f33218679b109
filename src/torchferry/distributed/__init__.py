"""Sharded checkpoints: ``torch.distributed.checkpoint`` over torchferry's engine.

Needs torch with ``torch.distributed``, and numpy: ``pip install 'torchferry[dcp]'``.
"""

from __future__ import annotations

from torchferry.distributed.api import load, save
from torchferry.distributed.reader import StorageReader
from torchferry.distributed.writer import StorageWriter

__all__ = ["StorageReader", "StorageWriter", "load", "save"]
