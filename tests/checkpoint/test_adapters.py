"""Which SDK is asked, where two are imported, and what is said where none is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from torchferry.checkpoint import PyTorchCheckpoint, adapters
from torchferry.checkpoint.adapters import Adapter, current_adapter, register_adapter
from torchferry.checkpoint.fields import load_field, save_field
from torchferry.errors import CheckpointValueError


class FirstError(CheckpointValueError):
    pass


class SecondError(CheckpointValueError):
    pass


def adapter(name: str, error: type[CheckpointValueError], is_current: Callable[[], bool]) -> Adapter:
    def save(_t: Any, checkpoint: Any) -> str:
        return f"{name}://{checkpoint}"

    def load(_t: Any, uri: str) -> Any:
        return name, uri

    return Adapter(PyTorchCheckpoint, error, save, load, is_current)


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Two SDKs; those named in the set run a task."""
    monkeypatch.setattr(adapters, "_adapters", [])
    names: set[str] = set()
    register_adapter(adapter("first", FirstError, lambda: "first" in names))
    register_adapter(adapter("second", SecondError, lambda: "second" in names))
    return names


def test_the_sdk_whose_task_runs_saves_and_loads_the_fields(running: set[str]) -> None:
    running.add("second")
    assert save_field(PyTorchCheckpoint, "x") == {"path": "second://x"}
    assert load_field(PyTorchCheckpoint, {"path": "second://x"}) == ("second", "second://x")
    running.clear()
    running.add("first")
    assert save_field(PyTorchCheckpoint, "x") == {"path": "first://x"}


@pytest.mark.usefixtures("running")
def test_outside_of_tasks_it_is_the_first() -> None:
    assert save_field(PyTorchCheckpoint, "x") == {"path": "first://x"}


def test_a_checkpoint_is_refused_with_the_error_of_the_sdk_whose_task_runs(running: set[str]) -> None:
    running.add("second")
    with pytest.raises(SecondError, match="at least one of"):
        PyTorchCheckpoint()


def test_without_an_sdk_a_field_is_refused_and_the_error_is_torchferrys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "_adapters", [])
    assert current_adapter() is None
    with pytest.raises(CheckpointValueError, match="no Flyte SDK is imported"):
        save_field(PyTorchCheckpoint, PyTorchCheckpoint(hyperparameters={"a": 1}))
