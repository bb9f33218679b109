"""What a checkpoint's pickle (data.pkl) refers to: its keys, tensors and storages, without running any of it.

Every global that the pickle names is replaced by a stand-in, which records what it is called with. So no code of the
checkpoint runs, nothing needs to be installed, and all its storages are found, also those inside sparse, quantized and
other tensors. The layout of the calls is part of torch's file format: see the ``_rebuild_*`` functions in
``torch/_utils.py`` and ``persistent_id`` in ``torch/serialization.py``.

The pickle may be hostile. Its opcodes are scanned first (:mod:`torchferry.formats.opcodes`), and every value that is
used here is checked to be what torch writes.
"""

from __future__ import annotations

import io
import math
import pickle
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING  # as torch imports them
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import GeneratorType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import torch

from torchferry.errors import CheckpointCorruptError
from torchferry.formats.archive import Record
from torchferry.formats.opcodes import UnusualPickleError, scan_pickle
from torchferry.printable import printable

if TYPE_CHECKING:
    import mmap
    from collections.abc import Iterator

__all__ = [
    "MOST_PLAIN",
    "Graph",
    "OrderedStandIn",
    "Pair",
    "StandIn",
    "StorageRef",
    "TensorInfo",
    "TensorPlace",
    "check_legacy",
    "children",
    "is_leaf",
    "is_tensor_leaf",
    "is_transparent_global",
    "name_of",
    "place_of",
    "read_graph",
    "read_legacy",
]

_INT64_MAX = (1 << 63) - 1
_MOST_GLOBALS = 10_000  # distinct ones in a pickle: the class that stands for one takes 1.2 kB
_LEGACY_PICKLES = 5  # a magic number, a version, facts about the machine, the object, and the keys of its storages
_LEGACY_LENGTH = 8  # bytes before a storage: how many elements it has
_LONGEST_INT = 4096  # bits of a key that is shown
_LONGEST_KEY = 1 << 18  # characters of the key of a tensor
_WIDE = 1000  # values in a container whose children are not listed at once
_LISTED = (8 << 20, 6)  # bytes of memory that the list of tensors may take, and so many for each byte of the pickle
_PLAIN_VISITS = 1 << 16  # values that are looked at for plain ones
MOST_PLAIN = 1000
_SHORT = 16  # values in a list of plain ones that is worth listing
_LONGEST_PLAIN = 200  # characters
_WIDEST_INTEGER = 64  # bits
_INFO_COST = 250  # bytes of a TensorInfo
_MOST_DIMENSIONS = 1000  # of a tensor; most of torch stops at 64
_WIDEST = 4  # bytes of a character, in text that is not ASCII
_HASHED = (1 << 20, 16)  # values that calls may hash, and so many for each byte of the pickle
_LONGEST_CODE = 20  # characters of the code of one of numpy's types
_ENCODINGS = {"latin1", "latin-1", "utf-8", "utf8", "ascii"}  # others take quadratic time (punycode)

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
_NUMPY_DTYPE = "numpy.dtype"
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


class _CheckedStandIn(StandIn):
    """Stands for what could take long, or much memory, with some arguments; remembers itself in ``calls``."""

    __slots__ = ()

    calls: list[StandIn]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        self = super().__new__(cls, *args, **kwargs)
        self.calls.append(self)
        return self


class OrderedStandIn(dict[Any, Any]):
    """Stands for an OrderedDict; keeps order as every dict does.

    Attributes:
        attributes: Those that it was given, as a state dict has ``_metadata``.
    """

    path = _DICT
    module, _, name = _DICT.rpartition(".")
    hashed: _Hashed
    attributes: dict[str, Any] = _NO_ATTRIBUTES

    def __init__(self, pairs: Any = ()) -> None:
        self.hashed.count(pairs)  # Python 2 pickled its items as an argument
        super().__init__(pairs)

    def __setstate__(self, state: Any) -> None:
        self.attributes = {**self.attributes, **state}


_CONTAINERS = (dict, list, tuple, set, frozenset, StandIn)
_WALKED = (*_CONTAINERS, StorageRef)


class _Reader(pickle.Unpickler):
    def __init__(self, pickled: bytes) -> None:
        super().__init__(io.BytesIO(pickled), encoding="utf-8", errors="surrogateescape")
        self.standins: dict[str, type] = {}
        self.storages: dict[str, StorageRef] = {}
        self.filled: set[str] = set()
        self._calls: list[StandIn] = []  # that must be checked
        self._hashed = _Hashed(_HASHED[0] + _HASHED[1] * len(pickled))

    def read(self) -> Any:
        """Reads the object.

        Raises:
            Exception: whatever the unpickler raises, for a pickle that is none; and what the stand-ins do.
        """
        root = self.load()
        for call in self._calls:
            _check_call(call.path, call.args, self._hashed)
        return root

    @property
    def numpy_dtypes(self) -> frozenset[str]:
        """The codes of numpy's types."""
        codes = (call.args[0] for call in self._calls if call.path == _NUMPY_DTYPE and call.args)
        return frozenset(code for code in codes if isinstance(code, str) and len(code) <= _LONGEST_CODE)

    def find_class(self, module: str, name: str) -> type:
        # Names of Python 2 are those of Python 3 to weights_only=True, whatever the protocol.
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        path = f"{module}.{name}"
        if path not in self.standins:
            if len(self.standins) >= _MOST_GLOBALS:
                raise ValueError(f"it names more than {_MOST_GLOBALS} classes and functions")
            # A class of its own for each pickle: a pickle can set attributes of classes.
            base = OrderedStandIn if path == _DICT else _CheckedStandIn if _is_checked(path) else StandIn
            namespace: dict[str, Any] = {
                "path": path,
                "module": module,
                "name": name,
                "calls": self._calls,
                "hashed": self._hashed,
                "filled": self.filled,
                "__slots__": (),
            }
            self.standins[path] = type("StandIn", (base,), namespace)
        return self.standins[path]

    def persistent_load(self, pid: Any) -> StorageRef:
        if pid[0] == "module":  # of the legacy format: a class, and the source code of it
            standin: StorageRef = pid[1]  # not a storage, but what torch returns for it
            return standin
        kind, storage_type, key, location, numel = pid[:5]
        if kind != "storage" or type(key) is not str or type(numel) is not int or not 0 <= numel <= _INT64_MAX:
            raise ValueError("a persistent id in it names no storage")
        storage = self.storages.get(key)
        dtype = _STORAGE_DTYPES[storage_type.path.rpartition(".")[2]]
        if storage is None:
            place = location if type(location) is str and len(pid) == len(pid[:5]) else None
            storage = StorageRef(key, dtype, numel, f"data/{key}", (storage_type.module, storage_type.name), place)
            self.storages[key] = storage
        elif storage.nbytes != numel * dtype.itemsize:
            raise ValueError("a storage in it has two sizes")
        elif storage.dtype != dtype:
            storage = replace(storage, dtype=dtype, numel=numel, kind=(storage_type.module, storage_type.name))
        return storage


@dataclass(frozen=True, slots=True)
class Graph:
    """A checkpoint's object, with stand-ins for all that is not a plain Python value.

    Attributes:
        url: For messages.
        root: The object.
        storages: The storages that it refers to, by key, in the order in which they occur in the pickle.
        globals: The globals that the pickle names, as "module.name".
        nbytes: Bytes of the pickle.
        filled: Those of the globals that make containers which the pickle puts values into, one by one.
        numpy_dtypes: The codes of numpy's types in it, such as "f8".
    """

    url: str
    root: Any
    storages: dict[str, StorageRef]
    globals: frozenset[str]
    nbytes: int
    filled: frozenset[str] = frozenset()
    numpy_dtypes: frozenset[str] = frozenset()

    @property
    def is_transparent(self) -> bool:
        """Whether an object without values in the storages of some tensors is the same in all its other parts.

        So it is if all that the pickle calls is known to look at no tensor's values.
        """
        return all(is_transparent_global(name) for name in self.globals)

    def storages_of(self, value: Any) -> dict[str, StorageRef]:
        """The storages that a part of the object refers to, by key.

        Raises:
            CheckpointCorruptError: the object is not made as torch makes it.
        """
        with self.damage_told():
            return {leaf.key: leaf for _, leaf in _walk(value, into_tensors=True) if isinstance(leaf, StorageRef)}

    def tensors(self) -> Iterator[TensorInfo]:
        """The tensors of the object, in the order of the pickle.

        A container that occurs several times is listed where it comes first.

        Raises:
            CheckpointCorruptError: a tensor is not made as torch makes it, or the list takes more than 8 MiB and
                6 bytes for each of the pickle, as it may if keys are nested deep or tensors shared very often.
        """
        room = _LISTED[0] + _LISTED[1] * self.nbytes
        with self.damage_told():
            for path, leaf in _walk(self.root, into_tensors=False):
                room -= _INFO_COST + (path.nbytes if path else 0)
                if room < 0:
                    raise ValueError("the list of its tensors would take more memory than its length allows")
                yield _tensor_info(path.key() if path else "", leaf)

    def plain_values(self) -> dict[str, bool | int | float | str | None]:
        """The first 1000 plain values in dicts, short lists and tuples, by name: no bytes, and no long strings."""
        found: dict[str, bool | int | float | str | None] = {}
        stack: list[tuple[str, Any]] = [("", self.root)]
        room = _PLAIN_VISITS
        while stack and room > 0 and len(found) < MOST_PLAIN:
            name, value = stack.pop()
            room -= 1 + len(name) // 64
            if _is_plain(value):
                found[name] = value
            elif isinstance(value, dict | list | tuple) and len(value) <= (room if isinstance(value, dict) else _SHORT):
                items = dict.items(value) if isinstance(value, dict) else enumerate(value)
                named = [(f"{name}.{name_of(key)}" if name else name_of(key), item) for key, item in items]
                stack += reversed(named)
        return found

    @contextmanager
    def damage_told(self) -> Iterator[None]:
        """Raises a CheckpointCorruptError for whatever stand-ins in odd places raise."""
        try:
            yield
        except Exception as error:  # what stand-ins in odd places raise is anything
            raise CheckpointCorruptError(f"{self.url}: data.pkl is none that torch writes: {_cause(error)}.") from error


def read_graph(pickled: bytes, url: str) -> Graph:
    """Reads a checkpoint's pickle; nothing in it is run.

    Raises:
        CheckpointCorruptError: it is none, or it would take too much time or memory (:func:`scan_pickle`).
        UnusualPickleError: it does what torch's own pickles do not, so that this cannot tell what it refers to.
    """
    scan_pickle(pickled, url)
    reader = _Reader(pickled)
    try:
        root = reader.read()
    except Exception as error:  # what damaged pickles raise is anything
        raise UnusualPickleError(f"{url}: data.pkl cannot be read: {_cause(error)}.") from error
    names = frozenset(reader.standins)
    return Graph(url, root, reader.storages, names, len(pickled), frozenset(reader.filled) & names, reader.numpy_dtypes)


def read_legacy(data: bytes, size: int, url: str) -> tuple[Graph, list[Record]]:
    """Reads the pickles of a checkpoint in the legacy format; nothing in them is run.

    Args:
        data: Its beginning, with all of its pickles.
        size: Bytes of the whole file.
        url: For messages.

    Returns:
        The graph, and a record without a CRC32 for each storage. They follow the pickles, each after its length.

    Raises:
        CutOffPickleError: the pickles end after ``data``.
        CheckpointCorruptError: they are damaged, would take too much time or memory, or the file is too short.
        UnusualPickleError: as :func:`read_graph`.
    """
    stops = _legacy_pickles(data, url)
    graph = read_graph(data[stops[3] : stops[4]], url)
    keys = read_graph(data[stops[4] : stops[5]], url).root
    at = stops[5]
    records: list[Record] = []
    for key in keys if isinstance(keys, list) else ():
        storage = graph.storages.get(key) if isinstance(key, str) else None
        if storage is None:
            raise CheckpointCorruptError(f"{url} is damaged: it has a storage that none of its tensors refers to.")
        records.append(Record(storage.record, at + _LEGACY_LENGTH, storage.nbytes, None))
        at = records[-1].end
    if len(records) != len(graph.storages) or len(records) != len({record.name for record in records}):
        raise CheckpointCorruptError(f"{url} is damaged: its tensors refer to storages that it does not have.")
    if at > size:
        raise CheckpointCorruptError(f"{url} is truncated: its storages end at byte {at}, the file at byte {size}.")
    return graph, records


def _legacy_pickles(data: bytes | mmap.mmap, url: str) -> list[int]:
    """Where the pickles of a checkpoint in the legacy format begin, and the last one ends."""
    stops = [0]
    for _ in range(_LEGACY_PICKLES):
        stops.append(scan_pickle(data, url, stops[-1]))
    return stops


def check_legacy(data: bytes | mmap.mmap, url: str, *, weights_only: bool) -> Graph | None:
    """Checks the pickles of a checkpoint in the legacy format; nothing in them is run.

    Returns:
        The graph, where there is to be ``weights_only``.

    Raises:
        CheckpointCorruptError: they are damaged, would take too much time or memory, or refer to storages that the
            file is too short for.
    """
    stops = _legacy_pickles(data, url)
    if not weights_only:
        return None
    graph = read_graph(data[stops[3] : stops[4]], url)
    if sum(storage.nbytes for storage in graph.storages.values()) > len(data):
        raise CheckpointCorruptError(f"{url} is damaged: it refers to storages that are longer than the file.")
    return graph


def _is_plain(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= _LONGEST_PLAIN
    if isinstance(value, int):
        return value.bit_length() <= _WIDEST_INTEGER
    return value is None or isinstance(value, float)


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {printable(str(error))}"


def is_transparent_global(name: str) -> bool:
    """Whether what a global makes of tensors does not depend on their values, and it keeps nothing."""
    module, _, attribute = name.rpartition(".")
    return (
        name in _TRANSPARENT
        or (module in {"torch", "torch.storage"} and attribute in _STORAGE_DTYPES)
        or (module == "torch" and isinstance(vars(torch).get(attribute), torch.dtype))
    )


# What weights_only=True allows to be called, and could take much time or memory.
_SETS = {f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("set", "frozenset")}
_BYTEARRAYS = {"builtins.bytearray", "__builtin__.bytearray"}
_ENCODE = "_codecs.encode"
_COUNTER = "collections.Counter"
_FROM_CPU = "torch._utils._rebuild_device_tensor_from_cpu_tensor"


def _is_checked(path: str) -> bool:
    calls = {_ENCODE, _COUNTER, _FROM_CPU, _NUMPY_DTYPE}
    return path in _SETS | _BYTEARRAYS | _SUBCLASSES | calls or _is_tensor_class(path)


def _is_tensor_class(path: str) -> bool:
    module, _, name = path.rpartition(".")
    return module.partition(".")[0] == "torch" and name.endswith(("Tensor", "Storage"))


class _Hashed:
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


def _check_call(path: str, args: Any, hashed: _Hashed) -> None:
    """Raises a ValueError if a call would take much more time or memory than its arguments do."""
    if path in _SETS or path == _COUNTER:
        hashed.count(args)
    elif path in _BYTEARRAYS or path == _ENCODE:
        # Not of a number, which would be a size.
        if not all(isinstance(arg, str | bytes | StandIn) for arg in args) or (
            len(args) > 1 and args[1] not in _ENCODINGS
        ):
            raise ValueError(f"{path} is called as torch.save does not call it")
    elif path in _SUBCLASSES:
        function, _, given, *_ = args
        if not isinstance(function, type) or not issubclass(function, StandIn | OrderedStandIn):
            raise ValueError(f"{path} gets no function")
        if issubclass(function, StandIn):
            _check_call(function.path, given, hashed)
    elif path == _FROM_CPU:
        if _tensor_info("", args[0]).nbytes > args[0].args[0].nbytes:
            raise ValueError(f"{path} gets a tensor that repeats its values")
    elif _is_tensor_class(path) and not all(isinstance(arg, StandIn | StorageRef) for arg in args):
        raise ValueError(f"{path} is called, which would make a tensor of any size")


class _Path(NamedTuple):
    """Where a value is: the last part of its key, and the path before. The parts are joined for tensors only."""

    before: _Path | None
    name: str
    length: int  # of the whole key, in characters
    is_ascii: bool

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the whole key takes at most."""
        return self.length if self.is_ascii else _WIDEST * self.length

    def key(self) -> str:
        """The whole key."""
        names: list[str] = []
        path: _Path | None = self
        while path is not None:
            names.append(path.name)
            path = path.before
        names.reverse()
        return ".".join(names)


def _longer(before: _Path | None, name: str) -> _Path | None:
    if not name:
        return before
    if before is None:
        return _Path(None, name, len(name), name.isascii())
    if before.length > _LONGEST_KEY:
        raise ValueError("values in it are nested too deep")
    return _Path(before, name, before.length + 1 + len(name), before.is_ascii and name.isascii())


def _walk(root: Any, *, into_tensors: bool) -> Iterator[tuple[_Path | None, Any]]:
    """Yields the tensors (or the storages in them) of an object with their keys, depth first, without recursion."""
    stack: list[tuple[_Path | None, Any]] = [(None, root)]
    seen: set[int] = set()
    while stack:
        path, value = stack.pop()
        if isinstance(value, GeneratorType):  # the children of a wide container: one after the other
            child = next(value, None)
            if child is not None:
                stack += ((path, value), child)
        elif isinstance(value, StorageRef) or (not into_tensors and _is_tensor(value)):
            yield path, value
        elif isinstance(value, _CONTAINERS) and id(value) not in seen:
            seen.add(id(value))
            children = _walked(path, value)
            if (len(value.args) + len(value.items) if isinstance(value, StandIn) else len(value)) > _WIDE:
                stack.append((path, children))
            else:
                stack += reversed(list(children))


def _walked(path: _Path | None, value: Any) -> Iterator[tuple[_Path | None, Any]]:
    return ((_longer(path, name), child) for name, child in children(value) if isinstance(child, _WALKED))


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
            yield (name_of(item[0]), item[1]) if isinstance(item, tuple) and len(item) == 2 else (str(number), item)  # noqa: PLR2004 - key and value


def name_of(key: Any) -> str:
    """What a key of a dict is called in names."""
    if isinstance(key, int) and key.bit_length() > _LONGEST_INT:
        return f"an int of {key.bit_length()} bits"  # of very long ones, Python makes no text
    return str(key) if isinstance(key, str | int | float | bool | bytes) else type(key).__name__


def is_leaf(value: Any) -> bool:
    """Whether a value has no parts with names of their own: a tensor, with what wraps it, or a plain value."""
    if isinstance(value, StandIn):
        if value.path in _PARAMETERS | _SUBCLASSES or _is_tensor(value):
            return True
        return value.path != _SPARSE and value.state is None and not value.items
    return not isinstance(value, dict | list | tuple)


def _layout(value: Any) -> str:
    return str(value.args[0]) if isinstance(value, StandIn) and value.args else ""


def _is_tensor(value: Any) -> bool:
    if not isinstance(value, StandIn):
        return False
    if value.path in _TENSORS:
        return len(value.args) >= 4 and isinstance(value.args[0], StorageRef)  # noqa: PLR2004 - storage, offset, size, stride
    return value.path == _META


def _tensor_info(key: str, tensor: StandIn | StorageRef) -> TensorInfo:
    if isinstance(tensor, StorageRef):
        return TensorInfo(key, tensor.dtype, (tensor.numel,), tensor.nbytes, tensor.record)
    if tensor.path == _META:
        dtype, shape, record = _dtype(tensor.args[0]), _shape(tensor.args[1]), None
    else:
        storage = tensor.args[0]
        dtype, shape, record = storage.dtype, _shape(tensor.args[2]), storage.record
        if tensor.path == "torch._utils._rebuild_tensor_v3":
            dtype = _dtype(tensor.args[6])
    return TensorInfo(key, dtype, shape, _nbytes(shape, dtype), record)


class TensorPlace(NamedTuple):
    """How a tensor lies in its storage.

    Attributes:
        storage: The storage.
        dtype: Of the tensor's elements.
        shape: Its sizes.
        stride: Its strides, in elements.
        offset: Its first element.
        is_plain: Whether it is a tensor as it lies there, no view that is conjugated and the like.
    """

    storage: StorageRef
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    is_plain: bool

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return _nbytes(self.shape, self.dtype)

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements lie one after the other, within the storage."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return 0 in self.shape
            expected *= size
        return (self.offset + expected) * self.dtype.itemsize <= self.storage.nbytes


def place_of(leaf: Any) -> TensorPlace | None:
    """How a tensor, or the tensor in a parameter, lies in its storage; None for other kinds of tensors and values.

    Raises:
        Exception: it is not made as torch makes it; whatever that leads to.
    """
    if isinstance(leaf, StandIn) and leaf.path in _PARAMETERS:
        leaf = leaf.args[0]
    if isinstance(leaf, StorageRef) or not _is_tensor(leaf) or leaf.path == _META or leaf.path.endswith("_qtensor"):
        return None
    info = _tensor_info("", leaf)
    storage, offset, _, stride = leaf.args[:4]
    strides = _shape(stride)
    if type(offset) is not int or not 0 <= offset <= _INT64_MAX or len(strides) != len(info.shape):
        raise ValueError("a tensor is at no place of its storage")
    is_plain = not any(leaf.args[7 if leaf.path.endswith("_v3") else 6 :])
    return TensorPlace(storage, info.dtype, info.shape, strides, offset, is_plain)


def is_tensor_leaf(leaf: Any) -> bool:
    """Whether a leaf is a tensor of any kind, or has one."""
    if isinstance(leaf, StandIn):
        return _is_tensor(leaf) or leaf.path in _PARAMETERS | _SUBCLASSES
    return isinstance(leaf, StorageRef)


def _nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    if len(shape) > _MOST_DIMENSIONS or (nbytes := math.prod(shape) * dtype.itemsize) > _INT64_MAX:
        raise ValueError("a tensor is too large")
    return nbytes


def _dtype(standin: Any) -> torch.dtype:
    name = standin.path.rpartition(".")[2]
    dtype = vars(torch).get(name)  # getattr would import what torch imports late
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name} is no dtype")
    return dtype


def _shape(size: Any) -> tuple[int, ...]:
    sizes = size.args[0] if isinstance(size, StandIn) else size
    if not isinstance(sizes, tuple | list) or not all(type(n) is int and 0 <= n <= _INT64_MAX for n in sizes):
        raise TypeError("the shape of a tensor is none")
    return tuple(sizes)
