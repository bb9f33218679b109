"""Tasks for pyflyte-execute, which imports this module as a pod does."""

from __future__ import annotations

from typing import Annotated

import torch
from flytekit import map_task, task
from flytekit.extras.pytorch import PyTorchCheckpoint

from torchferry import LoadOptions


@task
def train(steps: int) -> PyTorchCheckpoint:
    torch.manual_seed(steps)
    module = torch.nn.Linear(4, 4)
    return PyTorchCheckpoint(module=module, hyperparameters={"steps": steps})


@task
async def evaluate(checkpoint: Annotated[PyTorchCheckpoint, LoadOptions(keys=("module_state_dict",))]) -> list[str]:
    return list(checkpoint)


@task
def read(checkpoint: PyTorchCheckpoint) -> int:
    """What existing code does with what it receives."""
    torch.nn.Linear(4, 4).load_state_dict(checkpoint["module_state_dict"])  # type: ignore[index]
    return int(checkpoint["steps"])  # type: ignore[index]


@task
def refuse(steps: int) -> PyTorchCheckpoint:
    return PyTorchCheckpoint(hyperparameters={"steps": {"nested": print}, "n": steps})


train_many = map_task(train)
read_many = map_task(read)
