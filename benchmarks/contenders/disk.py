"""A file on the local disk: torchferry beside torch, which is made to wait for the disk as torchferry does.

And another checkout of torchferry, as in ferry.py.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from benchmarks.contenders import Load, Save, Task, loader, saver
from benchmarks.contenders.ferry import OTHER_CHECKOUT


@saver("torchferry to a file", remote=False)
def ferry_save(task: Task) -> Save:
    import torchferry

    return lambda checkpoint, key: torchferry.save(checkpoint, task.store.path(key))


@saver("torch.save + fsync", remote=False)
def torch_save(task: Task) -> Save:
    def save(checkpoint: dict[str, Any], key: str) -> None:
        path = task.store.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(checkpoint, path)
        _fsync(path)
        _fsync(path.parent)

    return save


@loader("torchferry from a file", remote=False)
def ferry_load(task: Task) -> Load:
    import torchferry

    return lambda key: torchferry.load(task.store.path(key))


@loader("torch.load", remote=False)
def torch_load(task: Task) -> Load:
    return lambda key: torch.load(task.store.path(key))


if OTHER_CHECKOUT:
    saver("torchferry to a file, other checkout", remote=False)(ferry_save)
    loader("torchferry from a file, other checkout", remote=False)(ferry_load)


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
