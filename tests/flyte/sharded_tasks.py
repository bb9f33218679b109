"""Tasks of two ranks and of one, for test_sharded.py."""

from __future__ import annotations

import torch
import torch.distributed as dist
from flytekit import task
from flytekitplugins.kfpytorch import Elastic
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from torchferry.flyte import ShardedCheckpoint

WHOLE = torch.arange(35, dtype=torch.float32).reshape(7, 5)


def state() -> dict[str, DTensor]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {"weight": distribute_tensor(WHOLE, mesh, [Shard(0)], src_data_rank=None)}


@task(task_config=Elastic(nnodes=1, nproc_per_node=2, max_restarts=0))
def train() -> ShardedCheckpoint:
    dist.init_process_group("gloo")
    try:
        return ShardedCheckpoint.save(state())
    finally:
        dist.destroy_process_group()


@task
def resume(checkpoint: ShardedCheckpoint) -> float:
    """On one rank, which has no process group."""
    loaded = {"weight": torch.zeros(7, 5)}
    checkpoint.load(loaded)
    return float(loaded["weight"].sum())


@task
def evaluate(checkpoint: ShardedCheckpoint) -> float:
    return float(checkpoint.load_all()["weight"].sum())
