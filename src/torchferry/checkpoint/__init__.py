"""Checkpoints as values of tasks: what is saved of them, what is received, what a page shows of them.

No Flyte SDK is imported here; a test holds that. :mod:`torchferry.flyte` is the adapter for flytekit. Every adapter
hands out these classes, so a checkpoint of one SDK is a checkpoint of another.
"""

from __future__ import annotations

from torchferry.checkpoint.values import LoadedCheckpoint, PyTorchCheckpoint, RestoredHyperparameters

__all__ = ["LoadedCheckpoint", "PyTorchCheckpoint", "RestoredHyperparameters"]
