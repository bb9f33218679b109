"""Flyte tasks whose checkpoints never touch the disk: train, evaluate, resume.

Runs by itself: python -m examples.demo --flyte 2 --store s3 (flytekit is --flyte 1; gcs, azure and local are the other
stores; nox -s demo -- --store gcs). It starts such a store on this machine, runs the tasks with it as Flyte's store for
raw data, and shows what each hand-over moved. It ends with status 0 only if everything it says is true.
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
from importlib import import_module
from pathlib import Path

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # torch's word on what nothing here needs
warnings.filterwarnings("ignore", message="Support for class-based `config`")  # pydantic's, on a model of flyte's

# Whatever cloud this machine is set up for, the demo stays on 127.0.0.1.
for name in [name for name in os.environ if name.startswith(("AWS_", "AZURE_", "FLYTE_", "GOOGLE_"))]:
    del os.environ[name]
os.environ |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}

import torch

from torchferry import TransferReport

from .model import STEPS, Progress, build, fit
from .stores import STORES, Store


class Transfers(logging.Handler):
    """Collects what torchferry logs of each transfer."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.seen: list[TransferReport] = []
        logger = logging.getLogger("torchferry")
        logger.setLevel(logging.INFO)
        logger.propagate = False  # flyte prints what reaches the root
        logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.seen += [argument for argument in record.args or () if isinstance(argument, TransferReport)]

    def of(self, verb: str, url: str | None = None) -> list[TransferReport]:
        return [transfer for transfer in self.seen if transfer.verb == verb and url in {None, transfer.url}]


def show(hand_over: str, what: str, transfer: TransferReport, object_size: int) -> None:
    print(
        f"  {hand_over:<24}{what:<16}{transfer.nbytes / 1e6:7.1f} MB{transfer.seconds:7.2f} s"
        f"{transfer.bytes_per_second / 1e9:7.2f} GB/s{transfer.nbytes / object_size:6.0%} of the object"
    )


def losses_of(values: list[float]) -> str:
    return " ".join(f"{value:.4f}" for value in values)


def run(flyte: str, store: str) -> bool:
    """Runs the tasks, prints what they did, and returns whether all of it held."""
    sandbox = Path(tempfile.mkdtemp(prefix="flyte-demo-"))
    here = Path.cwd()
    try:
        with STORES[store]() as started:
            return _run(flyte, started, sandbox)
    finally:
        os.chdir(here)
        shutil.rmtree(sandbox)


def _run(flyte: str, store: Store, sandbox: Path) -> bool:
    print(f"\ntorchferry demo: Flyte {flyte} trains, evaluates and resumes\n")
    print(f"  store        {store.description}, sharing these {os.cpu_count()} cores")
    print(f"  raw data     {store.prefix}", flush=True)
    tasks = import_module(f"{__package__}.flyte{flyte}")
    transfers = Transfers()
    checkpoint, evaluated = tasks.run(store, sandbox, STEPS)

    first, second = transfers.of("save")
    loads = sorted(transfers.of("load", first.url), key=lambda transfer: transfer.nbytes)
    part, whole = loads[0], loads[-1]
    print("\nHand-overs\n")
    show("train  -> store", "module, Adam", first, first.nbytes)
    show("store  -> evaluate", "module", part, first.nbytes)
    show("store  -> resume", "module, Adam", whole, first.nbytes)
    show("resume -> store", "module, Adam", second, second.nbytes)

    with store.fs.open(first.url) as file:
        stored = torch.load(file, weights_only=True)
    model, optimizer = build()
    reference = Progress()
    fit(model, optimizer, reference, 2 * STEPS)
    resumed = checkpoint.hyperparameters_as(Progress)

    print("\nLosses\n")
    print(f"  {f'train, steps 1 to {STEPS}':<40}{losses_of(resumed.losses[:STEPS])}")
    print(f"  {f'resume, steps {STEPS + 1} to {2 * STEPS}':<40}{losses_of(resumed.losses[STEPS:])}")
    print(f"  {'the same steps without interruption':<40}{losses_of(reference.losses[STEPS:])}")
    print(f"  {f'evaluate after step {STEPS}, on other data':<40}{evaluated:.4f}")

    differences = [abs(a - b) for a, b in zip(resumed.losses, reference.losses, strict=True)]
    files = [file for file in sandbox.rglob("*") if file.is_file()]
    checks = {
        f"The checkpoint has at least 100 MB: {first.nbytes / 1e6:.1f} MB": first.nbytes >= 100e6,
        f"The resumed loss continues: {max(differences):.1g} off the uninterrupted run at most": max(differences)
        < 1e-4,
        "The loss goes down in training, and further after the resume": max(resumed.losses[STEPS:])
        < min(resumed.losses[:STEPS]),
        "The evaluation had the trained module": evaluated < resumed.losses[STEPS - 1],
        f"The evaluation read {part.nbytes / first.nbytes:.0%} of the object: the module alone": part.nbytes
        < 0.36 * first.nbytes,
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
    parser.add_argument("--flyte", choices=("1", "2"), default="1", help="flytekit (1) or flyte (2)")
    chosen = parser.parse_args()
    sys.exit(0 if run(chosen.flyte, chosen.store) else 1)
