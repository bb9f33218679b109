"""torchferry, with its default settings; and another checkout of it, to compare two versions in one run."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.contenders import Load, Save, Task, loader, saver

MODULE = ("module_state_dict",)
OTHER_CHECKOUT = os.environ.get("BENCH_OTHER_CHECKOUT")


def _save(task: Task) -> Save:
    import torchferry

    def save(checkpoint: dict[str, Any], key: str) -> object:
        url = f"s3://{task.store.bucket}/{key}"
        return torchferry.save(checkpoint, url, storage_options=task.store.storage_options)

    return save


def _load(task: Task, keys: tuple[str, ...] | None = None) -> Load:
    import torchferry

    def load(key: str) -> Any:
        url = f"s3://{task.store.bucket}/{key}"
        return torchferry.load(url, storage_options=task.store.storage_options, keys=keys)

    return load


def _take_other_checkout() -> None:
    """Each measurement has a process of its own: there, nothing of torchferry is imported yet."""
    assert OTHER_CHECKOUT is not None
    assert "torchferry" not in sys.modules
    sys.path[:0] = [str(Path(OTHER_CHECKOUT) / part) for part in ("src", "storage_backends")]


def _save_other(task: Task) -> Save:
    _take_other_checkout()
    return _save(task)


def _load_other(task: Task) -> Load:
    _take_other_checkout()
    return _load(task)


saver("torchferry")(_save)
loader("torchferry")(_load)
loader("torchferry (module only)", keys=MODULE)(partial(_load, keys=MODULE))
if OTHER_CHECKOUT:
    saver("torchferry, other checkout")(_save_other)
    loader("torchferry, other checkout")(_load_other)
