"""The example with a real Ray on this machine: two workers, one of which dies. `nox -s ray` runs it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_state_dict

import torchferry

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torchferry.testing.servers import S3Server

EXAMPLE = Path(__file__).with_name("ray_train.py")
MOST_SECONDS = 280


@pytest.fixture
def session() -> Iterator[Path]:
    """Where Ray keeps its sockets, whose paths must be short."""
    place = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    yield place
    left = [process for process in psutil.process_iter() if is_of(process, place)]
    for process in left:
        process.kill()
    shutil.rmtree(place, ignore_errors=True)
    assert left == [], "Ray left processes"


def is_of(process: psutil.Process, place: Path) -> bool:
    try:
        return process.environ().get("RAY_TMPDIR") == str(place)
    except psutil.Error:
        return False


def run(session: Path, server: S3Server, *arguments: str) -> str:
    environment = {
        **os.environ,
        "RAY_TMPDIR": str(session),
        "PYTHONPATH": os.pathsep.join(sys.path),
        "AWS_ENDPOINT_URL": server.endpoint,
        "AWS_ACCESS_KEY_ID": server.key,
        "AWS_SECRET_ACCESS_KEY": server.secret,
        "AWS_DEFAULT_REGION": server.region,
    }
    command = [sys.executable, str(EXAMPLE), *arguments]
    ended = subprocess.run(
        command, env=environment, cwd=session, capture_output=True, text=True, timeout=MOST_SECONDS, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


def test_ray_workers_save_and_resume_and_nothing_is_copied(
    session: Path, s3_server: S3Server, s3_url: str, s3_client: Any
) -> None:
    said = run(session, s3_server, s3_url, "--epochs", "3", "--die-after", "2")
    assert "resumes after epoch 2" in said  # the workers that Ray started anew

    bucket, _, prefix = s3_url.removeprefix("s3://").partition("/")
    found = s3_client.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/fsdp/")["Contents"]
    names = {each["Key"].removeprefix(f"{prefix}/fsdp/"): each["Size"] for each in found}
    checkpoints = {name.partition("/")[0] for name, size in names.items() if "/" in name and size}
    assert checkpoints == {"epoch-0002", "epoch-0003"}  # Ray deleted the others, and copied none
    assert len([name for name in names if name.endswith(".distcp")]) == 2 * 2

    loaded = torchferry.load(f"{s3_url}/fsdp/epoch-0003", storage_options=s3_server.storage_options)
    assert loaded["epoch"] == 3
    for name, tensor in trained_alone(3).items():
        torch.testing.assert_close(loaded["model"][name], tensor, rtol=1e-4, atol=1e-5)


def trained_alone(epochs: int) -> dict[str, torch.Tensor]:
    """What one process makes of the same batches."""
    spec = importlib.util.spec_from_file_location("ray_train", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    model, optimizer = example.made()
    for number in range(example.STEPS, (epochs + 1) * example.STEPS):
        loss = example.loss_of(model, example.batch(number))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return get_state_dict(model, optimizer)[0]
