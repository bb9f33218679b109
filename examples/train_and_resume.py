"""Trains a model, saves every 10 steps, keeps 3 checkpoints; goes on where it was, when it was killed.

    python examples/train_and_resume.py /tmp/run --steps 500

Kill it whenever you like (Ctrl-C, kill -9), and start it again. Instead of a directory, any URL: s3://bucket/run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from torchferry import CheckpointManager


def train(url: str, steps: int, every: int, keep: int | None) -> float:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    with CheckpointManager(url, max_to_keep=keep, save_interval_steps=every, handle_preemption=True) as checkpoints:
        step, value = 0, float("nan")
        if (saved := checkpoints.resume()) is not None:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            step, value = saved["step"], saved["loss"]
            print(f"resumed from step {step}", flush=True)
        ends = False
        while step < steps and not ends:
            step += 1
            batch = torch.randn(16, 32, generator=torch.Generator().manual_seed(step))
            loss = (model(batch) - batch.sum(1, keepdim=True)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            value = loss.item()
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "loss": value}
            ends = checkpoints.reached_preemption()  # before the save, which then sees any SIGTERM that ends the loop
            checkpoints.save(step, state, metrics={"loss": value})
    print(f"step {step}: loss {value:.6f}")
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="where the checkpoints are: a directory, or any fsspec URL")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--every", type=int, default=10, help="save every so many steps (10)")
    parser.add_argument("--keep", type=int, default=3, help="keep so many checkpoints (3); 0 for all")
    parser.add_argument("--result", type=Path, help="write the last loss to this file")
    options = parser.parse_args()
    loss = train(options.url, options.steps, options.every, options.keep or None)
    if options.result:
        options.result.write_text(f"{loss!r}\n")


if __name__ == "__main__":
    sys.exit(main())
