"""The file formats that contenders load: the same tensors in each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def _torch(checkpoint: dict[str, Any], path: Path) -> None:
    torch.save(checkpoint, path)


def _dcp(checkpoint: dict[str, Any], path: Path) -> None:
    from torch.distributed import checkpoint as dcp

    dcp.save(checkpoint["module_state_dict"], storage_writer=dcp.FileSystemWriter(path.parent), no_dist=True)


def _tensorizer(checkpoint: dict[str, Any], path: Path) -> None:
    from tensorizer import TensorSerializer

    serializer = TensorSerializer(str(path))
    serializer.write_state_dict(checkpoint["module_state_dict"])
    serializer.close()


def _safetensors(checkpoint: dict[str, Any], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(checkpoint["module_state_dict"], path)


_WRITERS: dict[str, tuple[str, Callable[[dict[str, Any], Path], None]]] = {
    "torch": ("checkpoint.pt", _torch),
    "dcp": ("", _dcp),  # a directory
    "tensorizer": ("model.tensors", _tensorizer),
    "safetensors": ("model.safetensors", _safetensors),
}


def write(file_format: str, checkpoint: dict[str, Any], directory: Path) -> None:
    """Writes a checkpoint of tensors into an empty directory. All but "torch" take its module alone."""
    name, writer = _WRITERS[file_format]
    writer(checkpoint, directory / (name or "_"))


def key(file_format: str, prefix: str) -> str:
    """What a loader is given, where the directory was published as ``prefix``."""
    return f"{prefix}/{_WRITERS[file_format][0]}".rstrip("/")
