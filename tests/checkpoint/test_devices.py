"""Tensors go to the accelerator of this process's rank. There is none here: the decision is tested."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from torchferry.checkpoint.devices import default_map_location


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes torch say that there are accelerators."""

    def make(kind: str, count: int, current: int = 0) -> None:
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
        monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: current)

    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return make


def test_without_an_accelerator_it_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert default_map_location() == torch.device("cpu")


@pytest.mark.parametrize(
    ("rank", "count", "current", "expected"),
    [
        ("0", 8, 0, "cuda:0"),
        ("3", 8, 0, "cuda:3"),
        ("7", 8, 2, "cuda:7"),
        ("3", 1, 0, "cuda:0"),  # a launcher that shows each process only its own device
        (None, 8, 5, "cuda:5"),
        ("", 8, 1, "cuda:1"),
        ("none", 8, 1, "cuda:1"),
    ],
)
def test_it_is_the_device_of_the_rank(
    accelerator: Any, monkeypatch: pytest.MonkeyPatch, rank: str | None, count: int, current: int, expected: str
) -> None:
    accelerator("cuda", count, current)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert default_map_location() == torch.device(expected)


@pytest.mark.parametrize("kind", ["xpu", "mps"])
def test_every_kind_of_accelerator_counts(accelerator: Any, kind: str) -> None:
    accelerator(kind, 1)
    assert default_map_location() == torch.device(kind, 0)
