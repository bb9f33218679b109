"""A Flyte workflow whose checkpoints never touch the disk: train, evaluate, resume.

Runs by itself: python examples/flyte_demo.py --store s3 (or gcs, azure, local; nox -s demo -- --store gcs). It starts
such a store on this machine, runs the workflow with it as Flyte's raw output store, and shows what each hand-over
moved. It ends with status 0 only if everything it says is true.
"""

# ruff: noqa: E402 - the filter for a warning has to come before what warns
from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NamedTuple

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # torch's word on what nothing here needs

# Whatever cloud this machine is set up for, the demo stays on 127.0.0.1.
for name in [name for name in os.environ if name.startswith(("AWS_", "AZURE_", "GOOGLE_"))]:
    del os.environ[name]
os.environ |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}

import fsspec
import torch
from flytekit import FlyteContextManager, task, workflow
from flytekit.configuration import DataConfig, S3Config
from flytekit.core.data_persistence import FileAccessProvider
from flytekit.extras.pytorch import PyTorchCheckpoint  # flytekit's own name: installing torchferry is the only change
from flytekit.utils.asyn import run_sync
from torch.nn.functional import mse_loss

from torchferry import LoadOptions
from torchferry.checkpoint.transfer import Transfer
from torchferry.testing.azure import azurite
from torchferry.testing.gcs import fake_gcs_server
from torchferry.testing.servers import seaweedfs

WIDTH = 1792
BATCH = 64
PATTERNS = 16
STEPS = 8
BUCKET = "flyte-demo"

ModuleOnly = Annotated[PyTorchCheckpoint, LoadOptions(keys=("module_state_dict",))]


# ---------------------------------------------------------------------------------------------------------- the model


@dataclass
class Progress:
    """What the checkpoint says of itself; saved as its hyperparameters."""

    learning_rate: float = 3e-4
    step: int = 0
    losses: list[float] = field(default_factory=list)


def build() -> tuple[torch.nn.Module, torch.optim.Adam]:
    torch.manual_seed(1)
    layers = [torch.nn.Linear(WIDTH, WIDTH), torch.nn.GELU(), torch.nn.Linear(WIDTH, WIDTH), torch.nn.GELU()]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(WIDTH, WIDTH))
    return model, torch.optim.Adam(model.parameters(), lr=Progress.learning_rate)


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What there is to learn: signals made of a few patterns, in reverse. The same for a step in every run."""
    patterns = torch.randn(PATTERNS, WIDTH, generator=torch.Generator().manual_seed(0))
    mixture = torch.randn(BATCH, PATTERNS, generator=torch.Generator().manual_seed(1 + step)) / PATTERNS**0.5
    signals = mixture @ patterns
    return signals, signals.flip(1)


def fit(model: torch.nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, steps: int) -> None:
    for _ in range(steps):
        inputs, targets = batch(progress.step)
        optimizer.zero_grad()
        loss = mse_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
        progress.step += 1
        progress.losses.append(loss.item())


# ------------------------------------------------------------------------------------------------------- the workflow


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
    inputs, targets = batch(10_000)
    with torch.inference_mode():
        return mse_loss(model(inputs), targets).item()


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


# ---------------------------------------------------------------------------------------------------------- the stores


@contextmanager
def s3_store(sandbox: Path) -> Iterator[tuple[str, FileAccessProvider]]:
    with seaweedfs() as server:
        fs = fsspec.filesystem("s3", **server.storage_options)
        fs.mkdir(BUCKET)
        fs.pipe_file(f"{BUCKET}/first", b"-")  # SeaweedFS makes room for a bucket at its first write: takes seconds
        config = S3Config(endpoint=server.endpoint, access_key_id=server.key, secret_access_key=server.secret)
        provider = FileAccessProvider(sandbox, f"s3://{BUCKET}/raw", data_config=DataConfig(s3=config))
        yield f"SeaweedFS, an S3 on {server.endpoint}", provider


@contextmanager
def gcs_store(sandbox: Path) -> Iterator[tuple[str, FileAccessProvider]]:
    with fake_gcs_server() as server:
        fsspec.config.conf["gs"] = server.storage_options  # Flyte has no settings for another Google than Google
        fsspec.filesystem("gs").mkdir(BUCKET)
        yield f"fake-gcs-server, a GCS on {server.endpoint}", FileAccessProvider(sandbox, f"gs://{BUCKET}/raw")


@contextmanager
def azure_store(sandbox: Path) -> Iterator[tuple[str, FileAccessProvider]]:
    program = Path(__file__).parents[1] / "tests/azurite/node_modules/.bin/azurite-blob"
    with azurite(program=program if program.exists() else None) as server:
        fsspec.config.conf["abfs"] = server.storage_options
        fsspec.filesystem("abfs").mkdir(BUCKET)
        yield f"Azurite, an Azure on {server.endpoint}", FileAccessProvider(sandbox, f"abfs://{BUCKET}/raw")


@contextmanager
def local_store(sandbox: Path) -> Iterator[tuple[str, FileAccessProvider]]:
    with tempfile.TemporaryDirectory(prefix="flyte-demo-store-") as directory:
        yield "a directory of this machine", FileAccessProvider(sandbox, f"{directory}/raw")


STORES = {"s3": s3_store, "gcs": gcs_store, "azure": azure_store, "local": local_store}


# ------------------------------------------------------------------------------------------------------- what happened


class Transfers(logging.Handler):
    """Collects what torchferry logs of each transfer."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.seen: list[Transfer] = []
        logger = logging.getLogger("torchferry")
        logger.setLevel(logging.INFO)
        logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.seen += [argument for argument in record.args or () if isinstance(argument, Transfer)]

    def of(self, verb: str, uri: str) -> list[Transfer]:
        return [transfer for transfer in self.seen if (transfer.verb, transfer.uri) == (verb, uri)]


def show(hand_over: str, what: str, transfer: Transfer, object_size: int) -> None:
    rate = transfer.size / transfer.seconds / 1e9
    print(
        f"  {hand_over:<24}{what:<16}{transfer.size / 1e6:7.1f} MB{transfer.seconds:7.2f} s{rate:7.2f} GB/s"
        f"{transfer.size / object_size:6.0%} of the object"
    )


def losses_of(values: list[float]) -> str:
    return " ".join(f"{value:.4f}" for value in values)


def run(store: str) -> bool:
    """Runs the workflow, prints what it did, and returns whether all of it held."""
    sandbox = Path(tempfile.mkdtemp(prefix="flyte-demo-"))
    try:
        with STORES[store](sandbox) as (description, provider):
            return _run(description, provider, sandbox)
    finally:
        shutil.rmtree(sandbox)


def _run(description: str, provider: FileAccessProvider, sandbox: Path) -> bool:
    print("\ntorchferry demo: a Flyte workflow trains, evaluates and resumes\n")
    print(f"  store        {description}, sharing these {os.cpu_count()} cores")
    print(f"  raw output   {provider.raw_output_prefix}", flush=True)
    transfers = Transfers()
    context = FlyteContextManager.current_context()
    with FlyteContextManager.with_context(context.with_file_access(provider)):
        results = pipeline(steps=STEPS)

    first, second = (transfer for transfer in transfers.seen if transfer.verb == "Saved")
    loads = sorted(transfers.of("Loaded", first.uri), key=lambda transfer: transfer.size)
    part, whole = loads[0], loads[-1]
    print("\nHand-overs\n")
    show("train  -> store", "module, Adam", first, first.size)
    show("store  -> evaluate", "module", part, first.size)
    show("store  -> resume", "module, Adam", whole, first.size)
    show("resume -> store", "module, Adam", second, second.size)

    fs, path = provider.raw_output_fs, first.uri
    with fs.open(path) as file:
        stored = torch.load(file, weights_only=True)
    model, optimizer = build()
    reference = Progress()
    fit(model, optimizer, reference, 2 * STEPS)
    resumed = results.resumed.hyperparameters_as(Progress)

    print("\nLosses\n")
    print(f"  {f'train, steps 1 to {STEPS}':<40}{losses_of(resumed.losses[:STEPS])}")
    print(f"  {f'resume, steps {STEPS + 1} to {2 * STEPS}':<40}{losses_of(resumed.losses[STEPS:])}")
    print(f"  {'the same steps without interruption':<40}{losses_of(reference.losses[STEPS:])}")
    print(f"  {f'evaluate after step {STEPS}, on other data':<40}{results.evaluated:.4f}")

    differences = [abs(a - b) for a, b in zip(resumed.losses, reference.losses, strict=True)]
    files = [file for file in sandbox.rglob("*") if file.is_file()]
    checks = {
        f"The checkpoint has at least 100 MB: {first.size / 1e6:.1f} MB": first.size >= 100e6,
        f"The resumed loss continues: {max(differences):.1g} off the uninterrupted run at most": max(differences)
        < 1e-4,
        "The loss goes down in training, and further after the resume": max(resumed.losses[STEPS:])
        < min(resumed.losses[:STEPS]),
        "The evaluation had the trained module": results.evaluated < resumed.losses[STEPS - 1],
        f"The evaluation read {part.size / first.size:.0%} of the object: the module alone": part.size
        < 0.36 * first.size,
        "torch.load reads the stored object without torchferry": stored["step"] == STEPS,
        f"Local files written by any task: {len(files)}": not files,
    }
    print("\nWhat held\n")
    for check, held in checks.items():
        print(f"  {'yes' if held else 'NO '}   {check}")
    print()
    return all(checks.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--store", choices=STORES, default="s3", help="where the checkpoints go (default: s3)")
    sys.exit(0 if run(parser.parse_args().store) else 1)
