"""torchferry, with its default settings; and another checkout of it, to compare two versions in one run."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.contenders import Load, Save, Task, loader, saver

MODULE = ("module_state_dict",)
OTHER = "torchferry, other checkout"
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


def environment_of(contender: str) -> dict[str, str]:
    """What the process of a measurement needs: another checkout comes first in its path."""
    if OTHER_CHECKOUT is None or not contender.endswith("other checkout"):
        return {}
    return {"PYTHONPATH": os.pathsep.join(str(Path(OTHER_CHECKOUT) / part) for part in ("src", "storage_backends"))}


def _save_safetensors(task: Task) -> Save:
    import torchferry

    def save(checkpoint: dict[str, Any], key: str) -> object:
        url = f"s3://{task.store.bucket}/{key}"
        state = checkpoint["module_state_dict"]
        return torchferry.save(state, url, format="safetensors", storage_options=task.store.storage_options)

    return save


saver("torchferry")(_save)
saver("torchferry (safetensors)")(_save_safetensors)
loader("torchferry (safetensors)", file_format="safetensors")(_load)
loader("torchferry")(_load)
loader("torchferry (module only)", keys=MODULE)(partial(_load, keys=MODULE))
if OTHER_CHECKOUT:
    saver(OTHER)(_save)
    loader(OTHER)(_load)
