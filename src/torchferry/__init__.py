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
    from torchferry.background import BackgroundSave, save_in_background
    from torchferry.cleaning import CleanReport, clean, clean_async
    from torchferry.comparing import Diff, diff, diff_async
    from torchferry.converting import convert, convert_async
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
        CheckpointMismatchError,
        CheckpointNotFoundError,
        CheckpointValueError,
        InterpreterEndedError,
        NotEnoughMemoryError,
        RankFailedError,
        SaveUnderWayError,
        StorageError,
        StoragePermissionError,
        StorageUnavailableError,
        TorchferryError,
        UnsafeCheckpointError,
        UnsupportedOptionError,
        UnsupportedURLError,
    )
    from torchferry.formats.archive import Record
    from torchferry.formats.filling import IncompatibleKeys
    from torchferry.formats.places import TensorInfo
    from torchferry.loading import inspect, inspect_async, load, load_async, verify, verify_async
    from torchferry.manager import CheckpointManager
    from torchferry.manifest import Manifest
    from torchferry.options import LoadOptions, SaveOptions
    from torchferry.progress import RichCallback, TqdmCallback
    from torchferry.saving import save, save_async
    from torchferry.storage.base import Leftover

_MODULES = {
    "torchferry.background": ("BackgroundSave", "save_in_background"),
    "torchferry.formats.archive": ("Record",),
    "torchferry.cleaning": ("CleanReport", "clean", "clean_async"),
    "torchferry.comparing": ("Diff", "diff", "diff_async"),
    "torchferry.converting": ("convert", "convert_async"),
    "torchferry.copying": ("copy", "copy_async"),
    "torchferry.errors": (
        "BackendNotInstalledError",
        "ChangedWhileSavingError",
        "CheckpointChangedError",
        "CheckpointCorruptError",
        "CheckpointFormatError",
        "CheckpointKeyError",
        "CheckpointMismatchError",
        "CheckpointNotFoundError",
        "CheckpointValueError",
        "InterpreterEndedError",
        "NotEnoughMemoryError",
        "RankFailedError",
        "SaveUnderWayError",
        "StorageError",
        "StoragePermissionError",
        "StorageUnavailableError",
        "TorchferryError",
        "UnsafeCheckpointError",
        "UnsupportedOptionError",
        "UnsupportedURLError",
    ),
    "torchferry.formats.places": ("TensorInfo",),
    "torchferry.formats.filling": ("IncompatibleKeys",),
    "torchferry.manifest": ("Manifest",),
    "torchferry.loading": (
        "inspect",
        "inspect_async",
        "load",
        "load_async",
        "verify",
        "verify_async",
    ),
    "torchferry.manager": ("CheckpointManager",),
    "torchferry.options": ("LoadOptions", "SaveOptions"),
    "torchferry.progress": ("RichCallback", "TqdmCallback"),
    "torchferry.saving": ("save", "save_async"),
    "torchferry.storage.base": ("Leftover",),
    "torchferry.engine.transfer": ("TransferReport",),
    "torchferry.engine.types": ("ObjectStat",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "BackendNotInstalledError",
    "BackgroundSave",
    "ChangedWhileSavingError",
    "CheckpointChangedError",
    "CheckpointCorruptError",
    "CheckpointFormatError",
    "CheckpointKeyError",
    "CheckpointManager",
    "CheckpointMismatchError",
    "CheckpointNotFoundError",
    "CheckpointValueError",
    "CleanReport",
    "Diff",
    "IncompatibleKeys",
    "InterpreterEndedError",
    "Leftover",
    "LoadOptions",
    "Manifest",
    "NotEnoughMemoryError",
    "ObjectStat",
    "RankFailedError",
    "Record",
    "RichCallback",
    "SaveOptions",
    "SaveUnderWayError",
    "StorageError",
    "StoragePermissionError",
    "StorageUnavailableError",
    "TensorInfo",
    "TorchferryError",
    "TqdmCallback",
    "TransferReport",
    "UnsafeCheckpointError",
    "UnsupportedOptionError",
    "UnsupportedURLError",
    "clean",
    "clean_async",
    "convert",
    "convert_async",
    "copy",
    "copy_async",
    "diff",
    "diff_async",
    "inspect",
    "inspect_async",
    "load",
    "load_async",
    "save",
    "save_async",
    "save_in_background",
    "verify",
    "verify_async",
]


if not TYPE_CHECKING:  # a type checker shall not think that there is whatever one asks for

    def __getattr__(name: str) -> Any:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(_MODULE_OF[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
