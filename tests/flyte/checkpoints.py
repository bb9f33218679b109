"""What the tests of Flyte share: checkpoints, and looks at what is stored."""

from __future__ import annotations

from pathlib import Path

from flytekit import FlyteContext
from flytekit.configuration import DataConfig, S3Config
from samples import Progress, make_checkpoint

from torchferry.testing.servers import S3Server

__all__ = ["Progress", "data_config", "make_checkpoint", "sandbox_files", "stored_files"]


def data_config(endpoint: str, server: S3Server) -> DataConfig:
    return DataConfig(s3=S3Config(endpoint=endpoint, access_key_id=server.key, secret_access_key=server.secret))


def stored_files(context: FlyteContext) -> list[str]:
    """Every object under the raw output prefix."""
    access = context.file_access
    fs = access.raw_output_fs
    fs.invalidate_cache()
    return sorted(fs.find(access.raw_output_prefix))


def sandbox_files(context: FlyteContext) -> list[Path]:
    """Every file that is left in the local sandbox."""
    return [path for path in Path(context.file_access.local_sandbox_dir).rglob("*") if path.is_file()]
