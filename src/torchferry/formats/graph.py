"""What a checkpoint's pickle (data.pkl) refers to: its keys, tensors and storages, without running any of it.

Every global that the pickle names is replaced by a stand-in, which records what it is called with. So nothing of the
checkpoint's code runs, whatever it is, nothing needs to be installed, and all its storages are found, also those inside
sparse, quantized and other tensors. The layout of the calls is part of torch's file format: see the ``_rebuild_*``
functions in ``torch/_utils.py`` and ``persistent_id`` in ``torch/serialization.py``.
"""

from __future__ import annotations

import io
import math
import pickle
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch

from torchferry.errors import CheckpointCorruptError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Graph", "StorageRef", "TensorInfo", "read_graph"]

_STORAGE_DTYPES = {
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

_TENSORS = {
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_qtensor",
}
_PARAMETERS = {"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"}
_SUBCLASSES = {"torch._tensor._rebuild_from_type", "torch._tensor._rebuild_from_type_v2"}
_SPARSE = "torch._utils._rebuild_sparse_tensor"
_SPARSE_PARTS = {
    "torch.sparse_csr": ("crow_indices", "col_indices", "values"),
    "torch.sparse_bsr": ("crow_indices", "col_indices", "values"),
    "torch.sparse_csc": ("ccol_indices", "row_indices", "values"),
    "torch.sparse_bsc": ("ccol_indices", "row_indices", "values"),
}
_META = "torch._utils._rebuild_meta_tensor_no_storage"
_DICT = "collections.OrderedDict"

# What these make of a tensor does not depend on the tensor's values, and they keep nothing.
_TRANSPARENT = (
    _TENSORS
    | _PARAMETERS
    | {_DICT, "torch.Size", "torch.device", "torch.serialization._get_layout", "_codecs.encode"}
    | {f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("set", "frozenset", "complex")}
) - {"torch._utils._rebuild_qtensor"}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a checkpoint.

    Attributes:
        key: Where it is in the object: the keys of dicts, the indices of lists and tuples and the names of attributes
            that lead to it, with dots between, such as "module_state_dict.layer.weight". Empty if the object is itself
            a tensor. A sparse tensor is listed as the tensors that it is made of, such as "a.indices", "a.values".
        dtype: Of its elements.
        shape: Its sizes.
        nbytes: Bytes of its elements. Its storage may have more (a view of a larger tensor), and may be shared.
        record: The record that holds its storage, such as "data/0"; None for a meta tensor, which has none.
    """

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    record: str | None


@dataclass(frozen=True, slots=True)
class StorageRef:
    """A reference to a storage: its key, dtype and number of elements."""

    key: str
    dtype: torch.dtype
    numel: int

    @property
    def record(self) -> str:
        """The record that holds it."""
        return f"data/{self.key}"

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return self.numel * self.dtype.itemsize


_NOTHING: list[Any] = []  # most stand-ins hold no items, and there may be 100,000 of them


class _StandIn:
    """Stands for an object of a class, or what a function returned, that the pickle makes."""

    __slots__ = ("args", "items", "state")

    path = ""
    args: tuple[Any, ...]
    items: list[Any]
    state: Any

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        self = super().__new__(cls)
        self.args = (*args, *kwargs.values()) if kwargs else args
        self.items = _NOTHING
        self.state = None
        return self

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, *args: Any) -> _StandIn:
        return _StandIn(self, *args)

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.append((key, value))

    def append(self, item: Any) -> None:
        self.extend([item])

    add = append

    def extend(self, items: Any) -> None:
        if self.items is _NOTHING:
            self.items = []
        self.items += items


class _OrderedDict(dict[Any, Any]):
    """Stands for an OrderedDict; keeps order as every dict does. May have attributes, as a state dict has."""

    path = _DICT


class _Reader(pickle.Unpickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, encoding="utf-8", errors="surrogateescape")
        self.standins: dict[str, type] = {}
        self.storages: dict[str, StorageRef] = {}

    def find_class(self, module: str, name: str) -> type:
        path = f"{module}.{name}"
        if path not in self.standins:
            # A class of its own for each pickle: a pickle can set attributes of classes.
            base = _OrderedDict if path == _DICT else _StandIn
            self.standins[path] = type(name, (base,), {"path": path, "__slots__": ()})
        return self.standins[path]

    def persistent_load(self, pid: Any) -> StorageRef:
        kind, storage_type, key, _, numel = pid[:5]
        dtype = _STORAGE_DTYPES[storage_type.path.rpartition(".")[2]]
        if kind != "storage" or not isinstance(key, str) or not isinstance(numel, int):
            raise ValueError(f"{pid} is no storage")
        storage = StorageRef(key, dtype, numel)
        if self.storages.setdefault(key, storage).nbytes != storage.nbytes:
            raise ValueError(f"storage {key} has two sizes")
        return storage


@dataclass(frozen=True, slots=True)
class Graph:
    """A checkpoint's object, with stand-ins for all that is not a plain Python value.

    Attributes:
        url: For messages.
        root: The object.
        storages: The storages that it refers to, by key, in the order in which they occur in the pickle.
        globals: The globals that the pickle names, as "module.name".
    """

    url: str
    root: Any
    storages: dict[str, StorageRef]
    globals: frozenset[str]

    @property
    def is_transparent(self) -> bool:
        """Whether an object without values in the storages of some tensors is the same in all its other parts.

        So it is if all that the pickle calls is known to look at no tensor's values.
        """
        return all(_is_transparent(name) for name in self.globals)

    def storages_of(self, value: Any) -> dict[str, StorageRef]:
        """The storages that a part of the object refers to, by key."""
        return {leaf.key: leaf for _, leaf in _walk("", value, into_tensors=True) if isinstance(leaf, StorageRef)}

    def tensors(self) -> Iterator[TensorInfo]:
        """The tensors of the object, in the order of the pickle.

        A container that occurs several times is listed where it comes first.

        Raises:
            CheckpointCorruptError: a tensor is not made as torch makes it.
        """
        for key, leaf in _walk("", self.root, into_tensors=False):
            try:
                yield _tensor_info(key, leaf)
            except (AttributeError, IndexError, TypeError) as error:
                raise CheckpointCorruptError(f"{self.url}: the tensor {key} in data.pkl is none: {error}") from error


def read_graph(pickled: bytes | bytearray | memoryview, url: str) -> Graph:
    """Reads a checkpoint's pickle; nothing in it is run.

    Raises:
        CheckpointCorruptError: it is none, or none that torch would write.
    """
    reader = _Reader(io.BytesIO(pickled))
    try:
        root = reader.load()
    except Exception as error:  # what damaged pickles raise is anything
        raise CheckpointCorruptError(f"{url}: data.pkl cannot be read: {type(error).__name__}: {error}") from error
    return Graph(url, root, reader.storages, frozenset(reader.standins))


def _is_transparent(name: str) -> bool:
    module, _, attribute = name.rpartition(".")
    return (
        name in _TRANSPARENT
        or (module in {"torch", "torch.storage"} and attribute in _STORAGE_DTYPES)
        or (module == "torch" and isinstance(getattr(torch, attribute, None), torch.dtype))
    )


def _walk(key: str, root: Any, *, into_tensors: bool) -> Iterator[tuple[str, Any]]:
    """Yields the tensors (or the storages in them) of an object with their keys, depth first, without recursion."""
    stack = [(key, root)]
    seen: set[int] = set()
    while stack:
        key, value = stack.pop()
        if isinstance(value, StorageRef) or (not into_tensors and _is_tensor(value)):
            yield key, value
            continue
        if not isinstance(value, dict | list | tuple | set | frozenset | _StandIn) or id(value) in seen:
            continue
        seen.add(id(value))
        children = list(_children(value))
        children.reverse()
        stack += [(f"{key}.{name}" if key and name else key or name, child) for name, child in children]


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield str(key) if isinstance(key, str | int | float | bool | bytes) else type(key).__name__, item
        for key in value:
            yield "", key
        yield from getattr(value, "__dict__", {}).items()
    elif isinstance(value, list | tuple | set | frozenset):
        for number, item in enumerate(value):
            yield str(number), item
    elif value.path == _SPARSE and len(value.args) == 2:  # noqa: PLR2004 - layout and parts
        layout, parts = value.args
        yield from zip(_SPARSE_PARTS.get(_layout(layout), ("indices", "values")), parts, strict=False)
    else:
        # What wraps a tensor, as a parameter does, has its key.
        wrapper = value.path in _PARAMETERS | _SUBCLASSES
        yield "", value.state
        for number, item in enumerate(value.args):
            yield "" if wrapper else str(number), item
        for number, item in enumerate(value.items):
            yield (str(item[0]), item[1]) if isinstance(item, tuple) and len(item) == 2 else (str(number), item)  # noqa: PLR2004 - key and value


def _layout(value: Any) -> str:
    return str(value.args[0]) if isinstance(value, _StandIn) and value.args else ""


def _is_tensor(value: Any) -> bool:
    if not isinstance(value, _StandIn):
        return False
    if value.path in _TENSORS:
        return len(value.args) >= 4 and isinstance(value.args[0], StorageRef)  # noqa: PLR2004 - storage, offset, size, stride
    return value.path == _META


def _tensor_info(key: str, tensor: _StandIn | StorageRef) -> TensorInfo:
    if isinstance(tensor, StorageRef):
        return TensorInfo(key, tensor.dtype, (tensor.numel,), tensor.nbytes, tensor.record)
    if tensor.path == _META:
        dtype, shape, record = _dtype(tensor.args[0]), _shape(tensor.args[1]), None
    else:
        storage = tensor.args[0]
        dtype, shape, record = storage.dtype, _shape(tensor.args[2]), storage.record
        if tensor.path == "torch._utils._rebuild_tensor_v3":
            dtype = _dtype(tensor.args[6])
    return TensorInfo(key, dtype, shape, math.prod(shape) * dtype.itemsize, record)


def _dtype(standin: Any) -> torch.dtype:
    dtype = getattr(torch, standin.__name__)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{standin.__name__} is no dtype")
    return dtype


def _shape(size: Any) -> tuple[int, ...]:
    return tuple(size.args[0]) if isinstance(size, _StandIn) else tuple(size)
