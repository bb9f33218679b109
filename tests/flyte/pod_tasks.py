"""Tasks for pyflyte-execute, which imports this module as a pod does."""

from __future__ import annotations

import os
import signal
import uuid
from typing import Annotated, NamedTuple, Optional

import torch
from flytekit import dynamic, map_task, task
from flytekit.extras.pytorch import PyTorchCheckpoint
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from torchferry import LoadOptions
from torchferry.flyte import task_checkpoints


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


@task
def read_maybe(checkpoint: Optional[PyTorchCheckpoint]) -> int:  # noqa: UP045 - what flytekit's users write
    return 0 if checkpoint is None else int(checkpoint["steps"])  # type: ignore[index]


@task
def read_all(checkpoints: list[PyTorchCheckpoint], named: dict[str, PyTorchCheckpoint]) -> int:
    return sum(int(checkpoint["steps"]) for checkpoint in [*checkpoints, *named.values()])  # type: ignore[index]


@task
def read_dict(values: dict[str, int]) -> int:
    return sum(values.values())


class Passed(NamedTuple):
    checkpoint: PyTorchCheckpoint
    maybe: Optional[PyTorchCheckpoint]  # noqa: UP045
    several: list[PyTorchCheckpoint]


@dynamic
def pass_on(checkpoint: PyTorchCheckpoint) -> Passed:
    """A checkpoint that a dynamic received goes to tasks, and out, in every position."""
    read(checkpoint=checkpoint)
    read_maybe(checkpoint=checkpoint)
    read_maybe(checkpoint=None)
    read_all(checkpoints=[checkpoint, train(steps=1)], named={"a": checkpoint})
    evaluate(checkpoint=checkpoint)
    read_dict(values=checkpoint.hyperparameters)
    return Passed(checkpoint, checkpoint, [checkpoint])


@dynamic
def change(checkpoint: PyTorchCheckpoint) -> PyTorchCheckpoint:
    """No task at all, and another checkpoint than it received."""
    checkpoint["steps"] += 1  # type: ignore[index]
    return checkpoint


def train_as_a_rank(steps: int) -> PyTorchCheckpoint:
    torch.distributed.init_process_group("gloo")
    module = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    torch.distributed.destroy_process_group()
    return PyTorchCheckpoint(module=module, hyperparameters={"steps": steps}, optimizer=optimizer)


@task
def train_in_ranks(steps: int) -> PyTorchCheckpoint:
    """What flytekitplugins-kfpytorch makes of a task with ``task_config=Elastic(nnodes=1, nproc_per_node=2)``."""
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", start_method="spawn", max_restarts=0,
    )  # fmt: skip
    checkpoint: PyTorchCheckpoint = elastic_launch(config, train_as_a_rank)(steps)[0]
    return checkpoint


@task
def resumes(steps: int) -> list[int]:
    """Killed at its third step, in the first attempt."""
    with task_checkpoints(max_to_keep=1) as checkpoints:
        loaded = checkpoints.resume()
        first = 0 if loaded is None else int(loaded["step"])
        for step in range(first, steps):
            checkpoints.save(step + 1, PyTorchCheckpoint(torch.nn.Linear(4, 4), {"step": step + 1}))
            if loaded is None and step == 2:
                checkpoints.wait_until_finished()
                os.kill(os.getpid(), signal.SIGKILL)
    return [first, steps]


train_many = map_task(train)
read_many = map_task(read)
