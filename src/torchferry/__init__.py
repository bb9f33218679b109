"""torchferry ferries PyTorch checkpoints between memory and object storage.

No local file, no second copy in memory, never a half-written object. What it stores is byte for
byte what ``torch.save`` writes, and it loads whatever ``torch.save`` wrote. Each function has an async
twin; both run the same code.

Names are imported when they are first used: ``import torchferry`` costs milliseconds, and imports neither
torch nor flytekit nor a cloud library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchferry.copying import copy, copy_async
    from torchferry.engine.transfer import TransferReport
    from torchferry.engine.types import ObjectStat
    from torchferry.errors import (
        BackendNotInstalledError,
        ChangedWhileSavingError,
        CheckpointChangedError,
        CheckpointCorruptError,
        CheckpointFormatError,
        CheckpointKeyError,
        CheckpointNotFoundError,
        CheckpointValueError,
        NotEnoughMemoryError,
        StorageError,
        StoragePermissionError,
        StorageUnavailableError,
        TorchferryError,
        UnsafeCheckpointError,
        UnsupportedOptionError,
        UnsupportedURLError,
    )
    from torchferry.formats.archive import Record
    from torchferry.formats.graph import TensorInfo
    from torchferry.loading import Manifest, inspect, inspect_async, load, load_async, verify, verify_async
    from torchferry.options import LoadOptions, SaveOptions
    from torchferry.saving import save, save_async

_MODULES = {
    "torchferry.formats.archive": ("Record",),
    "torchferry.copying": ("copy", "copy_async"),
    "torchferry.errors": (
        "BackendNotInstalledError",
        "ChangedWhileSavingError",
        "CheckpointChangedError",
        "CheckpointCorruptError",
        "CheckpointFormatError",
        "CheckpointKeyError",
        "CheckpointNotFoundError",
        "CheckpointValueError",
        "NotEnoughMemoryError",
        "StorageError",
        "StoragePermissionError",
        "StorageUnavailableError",
        "TorchferryError",
        "UnsafeCheckpointError",
        "UnsupportedOptionError",
        "UnsupportedURLError",
    ),
    "torchferry.formats.graph": ("TensorInfo",),
    "torchferry.loading": (
        "Manifest",
        "inspect",
        "inspect_async",
        "load",
        "load_async",
        "verify",
        "verify_async",
    ),
    "torchferry.options": ("LoadOptions", "SaveOptions"),
    "torchferry.saving": ("save", "save_async"),
    "torchferry.engine.transfer": ("TransferReport",),
    "torchferry.engine.types": ("ObjectStat",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "BackendNotInstalledError",
    "ChangedWhileSavingError",
    "CheckpointChangedError",
    "CheckpointCorruptError",
    "CheckpointFormatError",
    "CheckpointKeyError",
    "CheckpointNotFoundError",
    "CheckpointValueError",
    "LoadOptions",
    "Manifest",
    "NotEnoughMemoryError",
    "ObjectStat",
    "Record",
    "SaveOptions",
    "StorageError",
    "StoragePermissionError",
    "StorageUnavailableError",
    "TensorInfo",
    "TorchferryError",
    "TransferReport",
    "UnsafeCheckpointError",
    "UnsupportedOptionError",
    "UnsupportedURLError",
    "copy",
    "copy_async",
    "inspect",
    "inspect_async",
    "load",
    "load_async",
    "save",
    "save_async",
    "verify",
    "verify_async",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
