"""What the tests of Flyte share: checkpoints, and looks at what is stored."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from flytekit import FlyteContext
from flytekit.configuration import DataConfig, S3Config

from torchferry.flyte import PyTorchCheckpoint
from torchferry.testing.servers import S3Server


@dataclass
class Progress:
    """Hyperparameters."""

    epochs: int = 3
    loss: float = 0.25


def data_config(endpoint: str, server: S3Server) -> DataConfig:
    return DataConfig(s3=S3Config(endpoint=endpoint, access_key_id=server.key, secret_access_key=server.secret))


def make_checkpoint(seed: int = 0, width: int = 16) -> PyTorchCheckpoint:
    torch.manual_seed(seed)
    module = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.ReLU(), torch.nn.Linear(width, 4))
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.randn(2, width)).sum().backward()
    optimizer.step()
    return PyTorchCheckpoint(module=module, hyperparameters=Progress(), optimizer=optimizer)


def stored_files(context: FlyteContext) -> list[str]:
    """Every object under the raw output prefix."""
    access = context.file_access
    fs = access.raw_output_fs
    fs.invalidate_cache()
    return sorted(fs.find(access.raw_output_prefix))


def sandbox_files(context: FlyteContext) -> list[Path]:
    """Every file that is left in the local sandbox."""
    return [path for path in Path(context.file_access.local_sandbox_dir).rglob("*") if path.is_file()]
