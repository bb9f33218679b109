"""The demo as tasks of Flyte 2."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import flyte
import flyte.storage

from torchferry import LoadOptions
from torchferry.flyte2 import PyTorchCheckpoint

from .model import Progress, build, fit, loss_of
from .stores import Store

env = flyte.TaskEnvironment(name="demo")

ModuleOnly = Annotated[PyTorchCheckpoint, LoadOptions(keys=("module_state_dict",))]


@env.task
async def train(steps: int) -> PyTorchCheckpoint:
    model, optimizer = build()
    progress = Progress()
    fit(model, optimizer, progress, steps)
    return PyTorchCheckpoint(module=model, hyperparameters=progress, optimizer=optimizer)


@env.task
async def evaluate(checkpoint: ModuleOnly) -> float:
    model, _ = build()
    checkpoint.restore(module=model)
    return loss_of(model)


@env.task
async def resume(checkpoint: PyTorchCheckpoint, steps: int) -> PyTorchCheckpoint:
    model, optimizer = build()
    checkpoint.restore(module=model, optimizer=optimizer)
    progress = checkpoint.hyperparameters_as(Progress)
    fit(model, optimizer, progress, steps)
    return PyTorchCheckpoint(module=model, hyperparameters=progress, optimizer=optimizer)


@env.task
async def pipeline(steps: int) -> tuple[PyTorchCheckpoint, float]:
    trained = await train(steps)
    evaluated = await evaluate(trained)
    return await resume(trained, steps), evaluated


def run(store: Store, sandbox: Path, steps: int) -> tuple[PyTorchCheckpoint, float]:
    """Runs the tasks; returns the checkpoint at their end, and what the evaluation found."""
    os.chdir(sandbox)  # a local run makes empty directories named for the raw data path
    storage = None
    if store.s3 is not None:
        s3 = store.s3
        storage = flyte.storage.S3(
            endpoint=s3.endpoint, access_key_id=s3.key, secret_access_key=s3.secret, region=s3.region
        )
    flyte.init(storage=storage)
    local = flyte.with_runcontext(mode="local", raw_data_path=store.prefix)
    resumed, evaluated = local.run(pipeline, steps=steps).outputs()
    return resumed, evaluated
