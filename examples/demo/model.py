"""What the demo trains: a small model on signals made of a few patterns."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.nn.functional import mse_loss

WIDTH = 1792
BATCH = 64
PATTERNS = 16
STEPS = 8


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


def loss_of(model: torch.nn.Module) -> float:
    """The loss on data that the model has not seen."""
    inputs, targets = batch(10_000)
    with torch.inference_mode():
        return mse_loss(model(inputs), targets).item()
