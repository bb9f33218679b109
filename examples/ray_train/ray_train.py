"""Ray Train with sharded checkpoints: each worker saves its part to the store, and Ray is told where the whole one is.

    python examples/ray_train/ray_train.py /tmp/runs --epochs 4

The model is spread over two workers (FSDP2). Kill it whenever you like, and start it again: it goes on where it was.
Instead of a directory, an S3 URL: s3://bucket/runs. pyarrow, which Ray looks into the store with, and s3fs find the
same credentials in the environment.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path, PurePosixPath
from typing import Any

# Before Ray is imported: it sends nothing anywhere, and listens on 127.0.0.1 alone.
os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0")

import ray
import ray.train
import torch
from ray.train import Checkpoint, CheckpointConfig, CheckpointUploadMode, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import torchferry.distributed as sharded

NAME = "fsdp"  # of the run: Ray finds by it what there is to resume
STEPS = 5  # an epoch


def train(config: dict[str, Any]) -> None:
    """What each worker runs."""
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    model, optimizer = made(init_device_mesh("cpu", (world_size,)))
    epoch = 0
    if (checkpoint := ray.train.get_checkpoint()) is not None:
        epoch = restore(model, optimizer, f"{config['url']}/{PurePosixPath(checkpoint.path).name}")
        print(f"worker {rank} resumes after epoch {epoch}", flush=True)
    while epoch < config["epochs"]:
        epoch += 1
        for step in range(STEPS):
            loss = loss_of(model, batch(epoch * STEPS + step).chunk(world_size)[rank])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        name = f"epoch-{epoch:04}"
        weights, state = get_state_dict(model, optimizer)
        sharded.save({"model": weights, "optimizer": state, "epoch": epoch}, f"{config['url']}/{name}")
        # It lies where Ray would have copied it to, so nothing is copied. Ray deletes it when it is old.
        storage = context.get_storage()
        checkpoint = Checkpoint(f"{storage.experiment_fs_path}/{name}", storage.storage_filesystem)
        ray.train.report(
            {"loss": loss.item(), "epoch": epoch}, checkpoint, checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD
        )
        if rank == 1 and epoch == config["die_after"]:
            ray.train.get_all_reported_checkpoints()  # waits until Ray has noted the last one
            os._exit(1)


def made(mesh: Any = None) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """The model, spread over a mesh, and its optimizer."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
    if mesh is not None:
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def batch(number: int) -> torch.Tensor:
    return torch.randn(16, 32, generator=torch.Generator().manual_seed(number))


def loss_of(model: torch.nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    return (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()


def restore(model: torch.nn.Module, optimizer: torch.optim.Optimizer, url: str) -> int:
    """Loads the parts that this worker has, however many workers saved it; returns the epoch."""
    weights, state = get_state_dict(model, optimizer)
    content: dict[str, Any] = {"model": weights, "optimizer": state, "epoch": 0}
    sharded.load(content, url)
    set_state_dict(model, optimizer, model_state_dict=content["model"], optim_state_dict=content["optimizer"])
    return int(content["epoch"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("storage", help="where the runs are: a directory, or an S3 URL")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--keep", type=int, default=2, help="keep so many checkpoints (2)")
    parser.add_argument("--die-after", type=int, help="a worker dies after this epoch, to see the run resumed")
    options = parser.parse_args()
    storage = options.storage if "://" in options.storage else str(Path(options.storage).resolve())
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80 << 20)  # nothing large goes through that
    try:
        result = TorchTrainer(
            train,
            train_loop_config={"url": f"{storage}/{NAME}", "epochs": options.epochs, "die_after": options.die_after},
            scaling_config=ScalingConfig(num_workers=2),
            torch_config=TorchConfig(backend="gloo"),
            run_config=RunConfig(
                name=NAME,
                storage_path=storage,
                checkpoint_config=CheckpointConfig(num_to_keep=options.keep),
                failure_config=FailureConfig(max_failures=1),
            ),
        ).fit()
        print(f"epoch {result.metrics['epoch']}: loss {result.metrics['loss']:.6f}, {result.checkpoint.path}")
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
