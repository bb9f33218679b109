"""What a checkpoint's pickle may call, and with which arguments: some would take much more time or memory than they.

``weights_only=True`` allows these calls whatever their arguments are.
"""

from __future__ import annotations

from typing import Any

import torch

from torchferry.formats.places import tensor_info
from torchferry.formats.stand_ins import (
    ORDERED_DICT,
    PARAMETERS,
    STORAGE_DTYPES,
    SUBCLASSES,
    TENSORS,
    OrderedStandIn,
    StandIn,
    StorageRef,
)

__all__ = ["NUMPY_DTYPE", "Hashed", "check_call", "is_checked", "is_transparent_global"]

_ENCODINGS = {"latin1", "latin-1", "utf-8", "utf8", "ascii"}  # others take quadratic time (punycode)

NUMPY_DTYPE = "numpy.dtype"
_SETS = {f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("set", "frozenset")}
_BYTEARRAYS = {"builtins.bytearray", "__builtin__.bytearray"}
_ENCODE = "_codecs.encode"
_COUNTER = "collections.Counter"
_FROM_CPU = "torch._utils._rebuild_device_tensor_from_cpu_tensor"

# What these make of a tensor does not depend on the tensor's values, and they keep nothing.
_TRANSPARENT = (
    TENSORS
    | PARAMETERS
    | {ORDERED_DICT, "torch.Size", "torch.device", "torch.serialization._get_layout", "_codecs.encode"}
    | {f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("set", "frozenset", "complex")}
) - {"torch._utils._rebuild_qtensor"}


def is_transparent_global(name: str) -> bool:
    """Whether what a global makes of tensors does not depend on their values, and it keeps nothing."""
    module, _, attribute = name.rpartition(".")
    return (
        name in _TRANSPARENT
        or (module in {"torch", "torch.storage"} and attribute in STORAGE_DTYPES)
        or (module == "torch" and isinstance(vars(torch).get(attribute), torch.dtype))
    )


def is_checked(path: str) -> bool:
    """Whether :func:`check_call` has something to check of this class or function."""
    calls = {_ENCODE, _COUNTER, _FROM_CPU, NUMPY_DTYPE}
    return path in _SETS | _BYTEARRAYS | SUBCLASSES | calls or _is_tensor_class(path)


def _is_tensor_class(path: str) -> bool:
    module, _, name = path.rpartition(".")
    return module.partition(".")[0] == "torch" and name.endswith(("Tensor", "Storage"))


class Hashed:
    """Counts values, those in tuples and lists each time that they occur, as far as some limit."""

    def __init__(self, room: int) -> None:
        self._room = room

    def count(self, value: Any) -> None:
        """Counts the values in this one.

        Raises:
            ValueError: there is no room for so many.
        """
        stack = [value]
        while stack:
            value = stack.pop()
            if isinstance(value, list | tuple | frozenset):
                self._room -= len(value)
                if self._room < 0:
                    raise ValueError("an argument in it stands for too many values")
                stack += value


def check_call(path: str, args: Any, hashed: Hashed) -> None:
    """Raises a ValueError if a call would take much more time or memory than its arguments do."""
    if path in _SETS or path == _COUNTER:
        hashed.count(args)
    elif path in _BYTEARRAYS or path == _ENCODE:
        # Not of a number, which would be a size.
        if not all(isinstance(arg, str | bytes | StandIn) for arg in args) or (
            len(args) > 1 and args[1] not in _ENCODINGS
        ):
            raise ValueError(f"{path} is called as torch.save does not call it")
    elif path in SUBCLASSES:
        function, _, given, *_ = args
        if not isinstance(function, type) or not issubclass(function, StandIn | OrderedStandIn):
            raise ValueError(f"{path} gets no function")
        if issubclass(function, StandIn):
            check_call(function.path, given, hashed)
    elif path == _FROM_CPU:
        if tensor_info("", args[0]).nbytes > args[0].args[0].nbytes:
            raise ValueError(f"{path} gets a tensor that repeats its values")
    elif _is_tensor_class(path) and not all(isinstance(arg, StandIn | StorageRef) for arg in args):
        raise ValueError(f"{path} is called, which would make a tensor of any size")
