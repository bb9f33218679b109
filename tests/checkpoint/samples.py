"""What the tests share: hyperparameters, and a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from torchferry.checkpoint import PyTorchCheckpoint


@dataclass
class Progress:
    """Hyperparameters."""

    epochs: int = 3
    loss: float = 0.25


def make_checkpoint(seed: int = 0, width: int = 16) -> PyTorchCheckpoint:
    """A module and Adam after a step, and hyperparameters."""
    torch.manual_seed(seed)
    module = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.ReLU(), torch.nn.Linear(width, 4))
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.randn(2, width)).sum().backward()
    optimizer.step()
    return PyTorchCheckpoint(module=module, hyperparameters=Progress(), optimizer=optimizer)
