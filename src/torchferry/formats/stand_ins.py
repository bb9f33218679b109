"""Stand-ins for what a checkpoint's pickle makes: they record what it is called with, and run nothing.

The layout of the calls is part of torch's file format: see the ``_rebuild_*`` functions in ``torch/_utils.py`` and
``persistent_id`` in ``torch/serialization.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import torch

__all__ = [
    "CONTAINERS",
    "META",
    "ORDERED_DICT",
    "PARAMETERS",
    "SPARSE",
    "STORAGE_DTYPES",
    "SUBCLASSES",
    "TENSORS",
    "OrderedStandIn",
    "Pair",
    "StandIn",
    "StorageRef",
    "children",
    "is_leaf",
    "is_tensor",
    "is_tensor_leaf",
    "name_of",
]

_LONGEST_INT = 4096  # bits of a key that is shown

STORAGE_DTYPES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "QInt32Storage": torch.qint32,
    "QInt8Storage": torch.qint8,
    "QUInt2x4Storage": torch.quint2x4,
    "QUInt4x2Storage": torch.quint4x2,
    "QUInt8Storage": torch.quint8,
    "ShortStorage": torch.int16,
    "UntypedStorage": torch.uint8,
}

TENSORS = {
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_qtensor",
}
PARAMETERS = {"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"}
SUBCLASSES = {"torch._tensor._rebuild_from_type", "torch._tensor._rebuild_from_type_v2"}
SPARSE = "torch._utils._rebuild_sparse_tensor"
_SPARSE_PARTS = {
    "torch.sparse_csr": ("crow_indices", "col_indices", "values"),
    "torch.sparse_bsr": ("crow_indices", "col_indices", "values"),
    "torch.sparse_csc": ("ccol_indices", "row_indices", "values"),
    "torch.sparse_bsc": ("ccol_indices", "row_indices", "values"),
}
META = "torch._utils._rebuild_meta_tensor_no_storage"
ORDERED_DICT = "collections.OrderedDict"


@dataclass(frozen=True, slots=True)
class StorageRef:
    """A reference to a storage.

    Attributes:
        key: Its name in the pickle.
        dtype: Of its elements.
        numel: Their number.
        record: The record that holds it.
        kind: Module and name of its class.
        location: The device that it was on, as torch names it; None if the pickle has something else there.
    """

    key: str
    dtype: torch.dtype
    numel: int
    record: str
    kind: tuple[str, str] = ("torch", "UntypedStorage")
    location: str | None = "cpu"

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return self.numel * self.dtype.itemsize


_NO_ATTRIBUTES: dict[str, Any] = {}
_NOTHING: list[Any] = []  # most stand-ins hold no items, and there may be 100,000 of them


class Pair(NamedTuple):
    """A key and a value that the pickle set in a stand-in."""

    key: Any
    value: Any


class StandIn:
    """Stands for an object of a class, or what a function returned, that the pickle makes.

    Attributes:
        path: The class or function, as "module.name".
        args: What it was called with.
        items: What was appended to it, and the :class:`Pair` of what was set.
        state: What it was given as its state.
        was_called: Whether the class or function was called; otherwise its ``__new__`` was.
        is_odd: Whether it was made in a way that these do not tell.
    """

    __slots__ = ("args", "is_odd", "items", "state", "was_called")

    path = ""
    module = ""
    name = ""
    filled: ClassVar[set[str]] = set()
    args: tuple[Any, ...]
    items: list[Any]
    state: Any
    was_called: bool
    is_odd: bool

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:  # noqa: D102
        self = super().__new__(cls)
        self.args = (*args, *kwargs.values()) if kwargs else args
        self.items = _NOTHING
        self.state = None
        self.was_called = False
        self.is_odd = bool(kwargs)
        return self

    def __init__(self, *_: Any, **__: Any) -> None:
        self.was_called = True

    def __call__(self, *args: Any) -> StandIn:  # noqa: D102
        return StandIn(self, *args)

    def __setstate__(self, state: Any) -> None:
        self.is_odd |= self.state is not None
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.append(Pair(key, value))

    def append(self, item: Any) -> None:
        """Called by the unpickler."""
        self.extend([item])

    def add(self, item: Any) -> None:
        """Called by the unpickler."""
        self.is_odd = True
        self.append(item)

    def extend(self, items: Any) -> None:
        """Called by the unpickler."""
        if self.items is _NOTHING:
            self.items = []
            self.filled.add(self.path)
        self.items += items


class OrderedStandIn(dict[Any, Any]):
    """Stands for an OrderedDict; keeps order as every dict does.

    Attributes:
        attributes: Those that it was given, as a state dict has ``_metadata``.
    """

    path = ORDERED_DICT
    module, _, name = ORDERED_DICT.rpartition(".")
    count_hashed: Callable[[Any], None]  # raises where an argument stands for too many values
    attributes: dict[str, Any] = _NO_ATTRIBUTES

    def __init__(self, pairs: Any = ()) -> None:
        self.count_hashed(pairs)  # Python 2 pickled its items as an argument
        super().__init__(pairs)

    def __setstate__(self, state: Any) -> None:
        self.attributes = {**self.attributes, **state}


CONTAINERS = (dict, list, tuple, set, frozenset, StandIn)


def children(value: Any) -> Iterator[tuple[str, Any]]:
    """What a container holds, with the names that lead there; "" for what has the container's own name."""
    if isinstance(value, dict):
        for key, item in dict.items(value):
            yield name_of(key), item
        for key in dict.keys(value):
            yield "", key
        if isinstance(value, OrderedStandIn):
            yield from value.attributes.items()
    elif isinstance(value, list | tuple | set | frozenset):
        for number, item in enumerate(value):
            yield str(number), item
    elif value.path == SPARSE and len(value.args) == 2:  # noqa: PLR2004 - layout and parts
        layout, parts = value.args
        yield from zip(_SPARSE_PARTS.get(_layout(layout), ("indices", "values")), parts, strict=False)
    else:
        # What wraps a tensor, as a parameter does, has its key.
        wrapper = value.path in PARAMETERS | SUBCLASSES
        yield "", value.state
        for number, item in enumerate(value.args):
            yield "" if wrapper else str(number), item
        for number, item in enumerate(value.items):
            yield (name_of(item[0]), item[1]) if isinstance(item, tuple) and len(item) == 2 else (str(number), item)  # noqa: PLR2004 - key and value


def name_of(key: Any) -> str:
    """What a key of a dict is called in names."""
    if isinstance(key, int) and key.bit_length() > _LONGEST_INT:
        return f"an int of {key.bit_length()} bits"  # of very long ones, Python makes no text
    return str(key) if isinstance(key, str | int | float | bool | bytes) else type(key).__name__


def is_leaf(value: Any) -> bool:
    """Whether a value has no parts with names of their own: a tensor, with what wraps it, or a plain value."""
    if isinstance(value, StandIn):
        if value.path in PARAMETERS | SUBCLASSES or is_tensor(value):
            return True
        return value.path != SPARSE and value.state is None and not value.items
    return not isinstance(value, dict | list | tuple)


def _layout(value: Any) -> str:
    return str(value.args[0]) if isinstance(value, StandIn) and value.args else ""


def is_tensor(value: Any) -> bool:
    """Whether a value is a tensor with a storage, or a meta tensor."""
    if not isinstance(value, StandIn):
        return False
    if value.path in TENSORS:
        return len(value.args) >= 4 and isinstance(value.args[0], StorageRef)  # noqa: PLR2004 - storage, offset, size, stride
    return value.path == META


def is_tensor_leaf(leaf: Any) -> bool:
    """Whether a leaf is a tensor of any kind, or has one."""
    if isinstance(leaf, StandIn):
        return is_tensor(leaf) or leaf.path in PARAMETERS | SUBCLASSES
    return isinstance(leaf, StorageRef)
