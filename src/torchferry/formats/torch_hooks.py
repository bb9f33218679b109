"""The private functions of torch that torchferry calls, all of them; ``tests/test_torch_hooks.py`` tells of changes.

``torch.load(path, mmap=True)`` maps a file, and hands the mapping to ``torch.serialization._load`` as
``overall_storage``: every tensor becomes a view of it. A load buffer is no file, so that function is called directly.
Its parameters are the same from torch 2.7 to 2.14, but for ``weights_only``, which came with 2.14.
"""

from __future__ import annotations

import inspect
import pickle
from typing import TYPE_CHECKING, Any

import torch
from torch import _weights_only_unpickler, serialization

if TYPE_CHECKING:
    import mmap

__all__ = ["LOADS_IN_PLACE", "load_in_place"]

_PARAMETERS = set(inspect.signature(serialization._load).parameters)  # noqa: SLF001
_TAKES_WEIGHTS_ONLY = "weights_only" in _PARAMETERS  # from torch 2.14: it then checks the indices of sparse tensors

LOADS_IN_PLACE = {"zip_file", "map_location", "pickle_module", "overall_storage"} <= _PARAMETERS
"""Whether this torch has what :func:`load_in_place` calls."""


def load_in_place(memory: mmap.mmap, *, map_location: Any, weights_only: bool) -> Any:
    """What ``torch.load`` makes of the archive in ``memory``; the tensors are views of it and keep it alive."""
    storage = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    memory.seek(0)
    unpickler = _weights_only_unpickler if weights_only else pickle
    options = {"weights_only": weights_only} if _TAKES_WEIGHTS_ONLY else {}
    with serialization._open_zipfile_reader(memory) as reader:  # type: ignore[arg-type]  # noqa: SLF001
        return serialization._load(  # type: ignore[no-untyped-call]  # noqa: SLF001
            reader, map_location, unpickler, overall_storage=storage, encoding="utf-8", **options
        )
