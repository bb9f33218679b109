"""The demo as a workflow of flytekit (Flyte 1)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NamedTuple

from flytekit import FlyteContextManager, task, workflow
from flytekit.configuration import DataConfig, S3Config
from flytekit.core.data_persistence import FileAccessProvider
from flytekit.extras.pytorch import PyTorchCheckpoint  # flytekit's own name: installing torchferry is the only change
from flytekit.utils.asyn import run_sync

from torchferry import LoadOptions

from .model import Progress, build, fit, loss_of
from .stores import Store

ModuleOnly = Annotated[PyTorchCheckpoint, LoadOptions(keys=("module_state_dict",))]


class Results(NamedTuple):
    resumed: PyTorchCheckpoint
    evaluated: float


@task
def train(steps: int) -> PyTorchCheckpoint:
    model, optimizer = build()
    progress = Progress()
    fit(model, optimizer, progress, steps)
    return PyTorchCheckpoint(module=model, hyperparameters=progress, optimizer=optimizer)


@task
async def evaluate(checkpoint: ModuleOnly) -> float:
    model, _ = build()
    checkpoint.restore(module=model)
    return loss_of(model)


@task
def resume(checkpoint: PyTorchCheckpoint, steps: int) -> PyTorchCheckpoint:
    model, optimizer = build()
    checkpoint.restore(module=model, optimizer=optimizer)
    progress = checkpoint.hyperparameters_as(Progress)
    fit(model, optimizer, progress, steps)
    return PyTorchCheckpoint(module=model, hyperparameters=progress, optimizer=optimizer)


@workflow
def pipeline(steps: int) -> Results:
    trained = train(steps=steps)
    evaluated = run_sync(evaluate, checkpoint=trained)  # a workflow's own body is not async
    return Results(resumed=resume(checkpoint=trained, steps=steps), evaluated=evaluated)


def run(store: Store, sandbox: Path, steps: int) -> tuple[PyTorchCheckpoint, float]:
    """Runs the workflow; returns the checkpoint at its end, and what the evaluation found."""
    config = DataConfig()
    if store.s3 is not None:
        s3 = store.s3
        config = DataConfig(s3=S3Config(endpoint=s3.endpoint, access_key_id=s3.key, secret_access_key=s3.secret))
    provider = FileAccessProvider(sandbox, store.prefix, data_config=config)
    context = FlyteContextManager.current_context()
    with FlyteContextManager.with_context(context.with_file_access(provider)):
        results = pipeline(steps=steps)
    return results.resumed, results.evaluated
