"""Fixtures for what needs no Flyte SDK."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from torchferry.checkpoint import PyTorchCheckpoint

sys.path.append(str(Path(__file__).parent))

from samples import make_checkpoint


@pytest.fixture
def checkpoint() -> PyTorchCheckpoint:
    """A module and Adam after a step, and hyperparameters."""
    return make_checkpoint()
