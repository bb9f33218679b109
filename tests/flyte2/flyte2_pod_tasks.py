"""Tasks for flyte's container entrypoint, which imports this module as a pod does."""

from __future__ import annotations

import os
import signal
from typing import Annotated

import flyte
import torch
from pydantic import BaseModel

from torchferry import LoadOptions
from torchferry.flyte2 import PyTorchCheckpoint, task_checkpoints

env = flyte.TaskEnvironment(name="pod")


@env.task(report=True)
async def train(steps: int) -> PyTorchCheckpoint:
    torch.manual_seed(steps)
    return PyTorchCheckpoint(torch.nn.Linear(4, 4), {"steps": steps})


@env.task
async def evaluate(checkpoint: Annotated[PyTorchCheckpoint, LoadOptions(keys=("module_state_dict",))]) -> list[str]:
    return list(checkpoint)


@env.task
async def refuse(steps: int) -> PyTorchCheckpoint:
    return PyTorchCheckpoint(hyperparameters={"steps": {"nested": print}, "n": steps})


class Trained(BaseModel):
    checkpoint: PyTorchCheckpoint


@env.task
async def refuse_in_model(steps: int) -> Trained:
    return Trained(checkpoint=PyTorchCheckpoint(hyperparameters={"steps": {"nested": print}, "n": steps}))


@env.task
async def resumes(steps: int) -> list[int]:
    """Killed at its third step, in the first attempt."""
    async with task_checkpoints(max_to_keep=1) as checkpoints:
        loaded = await checkpoints.resume_async()
        first = 0 if loaded is None else int(loaded["step"])
        for step in range(first, steps):
            await checkpoints.save_async(step + 1, PyTorchCheckpoint(torch.nn.Linear(4, 4), {"step": step + 1}))
            if loaded is None and step == 2:
                await checkpoints.wait_until_finished_async()
                os.kill(os.getpid(), signal.SIGKILL)
    return [first, steps]
