"""torchferry, with its default settings."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.contenders import Load, Save, Task, loader, saver

if TYPE_CHECKING:
    from torchferry.storage.base import Plane

MODULE = ("module_state_dict",)


def _save(task: Task, plane: Plane = "auto") -> Save:
    import torchferry

    def save(checkpoint: dict[str, Any], key: str) -> object:
        url = f"s3://{task.store.bucket}/{key}"
        return torchferry.save(checkpoint, url, storage_options=task.store.storage_options, plane=plane)

    return save


def _load(task: Task, plane: Plane = "auto", keys: tuple[str, ...] | None = None) -> Load:
    import torchferry

    def load(key: str) -> Any:
        url = f"s3://{task.store.bucket}/{key}"
        return torchferry.load(url, storage_options=task.store.storage_options, plane=plane, keys=keys)

    return load


saver("torchferry")(_save)
saver("torchferry (fsspec plane)")(partial(_save, plane="fsspec"))
loader("torchferry")(_load)
loader("torchferry (fsspec plane)")(partial(_load, plane="fsspec"))
loader("torchferry (module only)", keys=MODULE)(partial(_load, keys=MODULE))
