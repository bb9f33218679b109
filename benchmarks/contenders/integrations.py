"""Other libraries with torchferry, beside what they do by themselves."""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks.contenders import Load, Save, Task, loader, saver

LIGHTNING = "Lightning"
LIGHTNING_FERRY = "Lightning, torchferry"


def _io(task: Task, *, ferry: bool) -> Any:
    if ferry:
        from torchferry.integrations.lightning import TorchferryCheckpointIO

        return TorchferryCheckpointIO(background=False, storage_options=task.store.storage_options)
    from fsspec.config import conf
    from lightning.fabric.plugins.io import TorchCheckpointIO

    conf["s3"] = dict(task.store.storage_options)  # it takes no options
    return TorchCheckpointIO()


def _save(task: Task, *, ferry: bool) -> Save:
    io = _io(task, ferry=ferry)

    def save(checkpoint: dict[str, Any], key: str) -> object:
        return io.save_checkpoint(checkpoint, f"s3://{task.store.bucket}/{key}")

    return save


def _load(task: Task, *, ferry: bool) -> Load:
    io = _io(task, ferry=ferry)

    def load(key: str) -> Any:
        return io.load_checkpoint(f"s3://{task.store.bucket}/{key}")

    return load


for _name, _ferry in ((LIGHTNING_FERRY, True), (LIGHTNING, False)):
    saver(_name)(partial(_save, ferry=_ferry))
    loader(_name)(partial(_load, ferry=_ferry))
