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


def state(fill: bool) -> dict[str, DTensor]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    values = WHOLE if fill else torch.zeros(7, 5)
    return {"weight": distribute_tensor(values, mesh, [Shard(0)], src_data_rank=None)}


@task(task_config=Elastic(nnodes=1, nproc_per_node=2, max_restarts=0))
def train() -> ShardedCheckpoint:
    dist.init_process_group("gloo")
    try:
        return ShardedCheckpoint.save(state(fill=True))
    finally:
        dist.destroy_process_group()


@task(task_config=Elastic(nnodes=1, nproc_per_node=2, max_restarts=0))
def resume(checkpoint: ShardedCheckpoint) -> float:
    dist.init_process_group("gloo")
    try:
        loaded = state(fill=False)
        checkpoint.load(loaded)
        total = loaded["weight"].to_local().sum()
        dist.all_reduce(total)
        return float(total)
    finally:
        dist.destroy_process_group()


@task
def evaluate(checkpoint: ShardedCheckpoint) -> float:
    return float(checkpoint.load_all()["weight"].sum())
