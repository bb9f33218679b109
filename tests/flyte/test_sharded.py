"""Sharded checkpoints of tasks that run on two ranks, really launched on this machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_ranks_save_their_parts_and_other_tasks_load_them(
    in_context: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")
    in_context(str(tmp_path / "raw"))
    from sharded_tasks import WHOLE, evaluate, resume, train

    checkpoint = train()
    assert evaluate(checkpoint=checkpoint) == float(WHOLE.sum())
    assert resume(checkpoint=checkpoint) == float(WHOLE.sum())
    assert len(list(Path(checkpoint.url).rglob("*.distcp"))) == 2
