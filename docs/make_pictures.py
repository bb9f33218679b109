"""Makes the documentation's pictures: the command in a terminal, and a Deck. ``nox -s pictures``.

What they show is what the program prints: checkpoints of a small model on an S3 server of this machine.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from io import StringIO
from pathlib import Path

import botocore.session
import torch
from rich.console import Console
from rich.text import Text

import torchferry
from torchferry.checkpoint import PyTorchCheckpoint
from torchferry.checkpoint.deck import deck_of
from torchferry.testing.servers import seaweedfs

PICTURES = Path(__file__).parent / "pictures"
WIDTH = 92  # columns
COMMANDS = (
    "torchferry ls s3://bucket/run-7 --long",
    "torchferry inspect s3://bucket/run-7/step-0000002000.pt --depth 3",
    "torchferry diff s3://bucket/run-7/step-0000001000.pt s3://bucket/run-7/step-0000002000.pt",
    "torchferry verify s3://bucket/run-7/step-0000002000.pt",
)


def model_and_optimizer() -> tuple[torch.nn.ModuleDict, torch.optim.Optimizer]:
    """A transformer of 13 million parameters after a step of Adam."""
    torch.manual_seed(7)
    model = torch.nn.ModuleDict(
        {
            "embedding": torch.nn.Embedding(16_384, 384),
            "encoder": torch.nn.TransformerEncoder(
                torch.nn.TransformerEncoderLayer(384, 6, 1536, batch_first=True), 4, enable_nested_tensor=False
            ),
            "head": torch.nn.Linear(384, 10),
        }
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return model, optimizer


def terminal(environment: dict[str, str]) -> None:
    """Runs the commands, and draws what they print."""
    console = Console(record=True, width=WIDTH, file=StringIO(), force_terminal=True)
    for command in COMMANDS:
        program = f"stty cols {WIDTH}; {sys.executable} -m torchferry {command.partition(' ')[2]} 2>/dev/null"
        on_terminal = ["script", "-qec", program, "/dev/null"]  # of util-linux; it ends with the command's status
        done = subprocess.run(on_terminal, env=environment, capture_output=True, text=True, check=False)
        if done.returncode not in {0, 1}:
            raise SystemExit(f"{command}: {done.stdout}")
        console.print(Text.assemble(("$ ", "bold green"), (command, "bold")))
        console.print(Text.from_ansi(done.stdout.rstrip()))
        console.print()
    svg = console.export_svg(title="torchferry", unique_id="torchferry")
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)  # the reader's own font: nothing is fetched
    (PICTURES / "terminal.svg").write_text(svg.replace("Fira Code", "ui-monospace, Menlo, Consolas, DejaVu Sans Mono"))


def deck(checkpoint: PyTorchCheckpoint) -> None:
    """Draws the Deck of a checkpoint, as Chromium shows it."""
    with tempfile.TemporaryDirectory() as directory:
        page = Path(directory, "deck.html")
        page.write_text(f"<meta charset=utf-8><body style='margin:24px'>{deck_of(checkpoint)}")
        chromium = shutil.which("chromium")
        assert chromium is not None
        picture = f"--screenshot={PICTURES / 'deck.png'}"
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1000,1520"]
        subprocess.run([chromium, *flags, picture, page.as_uri()], check=True, capture_output=True, timeout=120)


def main(wanted: list[str]) -> None:
    """Makes the pictures of these names, or all."""
    model, optimizer = model_and_optimizer()
    if not wanted or "deck" in wanted:
        deck(PyTorchCheckpoint(module=model, optimizer=optimizer, hyperparameters={"epochs": 3, "lr": 3e-4}))
    if wanted and "terminal" not in wanted:
        return
    with seaweedfs() as server:
        environment = {
            **os.environ,
            "AWS_ENDPOINT_URL": server.endpoint,
            "AWS_ACCESS_KEY_ID": server.key,
            "AWS_SECRET_ACCESS_KEY": server.secret,
            "AWS_DEFAULT_REGION": server.region,
            "TERM": "xterm-256color",
        }
        os.environ.update({name: value for name, value in environment.items() if name.startswith("AWS_")})
        client = botocore.session.get_session().create_client("s3", endpoint_url=server.endpoint)
        client.create_bucket(Bucket="bucket")
        client.close()
        with torchferry.CheckpointManager("s3://bucket/run-7", background=False) as manager:
            for step in (1000, 2000, 3000):
                torch.nn.init.normal_(model["head"].weight)  # somebody trains the head alone
                manager.save(step, {"model": model.state_dict(), "step": step, "lr": 3e-4})
        terminal(environment)


if __name__ == "__main__":
    main(sys.argv[1:])
