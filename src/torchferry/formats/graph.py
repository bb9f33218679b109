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
import pickle
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING  # as torch imports them
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from types import GeneratorType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self, TypeAlias

from torchferry.errors import CheckpointCorruptError, CheckpointFormatError
from torchferry.formats.calls import NUMPY_DTYPE, Hashed, check_call, is_checked, is_transparent_global
from torchferry.formats.opcodes import UnusualPickleError, scan_pickle
from torchferry.formats.places import TensorInfo, tensor_info
from torchferry.formats.stand_ins import (
    CONTAINERS,
    ORDERED_DICT,
    PARAMETERS,
    SPARSE,
    STORAGE_DTYPES,
    OrderedStandIn,
    Pair,
    StandIn,
    StorageRef,
    children,
    is_tensor,
    is_tensor_leaf,
    name_of,
)
from torchferry.printable import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["MOST_PLAIN", "Aspect", "Content", "Graph", "Kind", "read_graph", "read_scanned_graph"]

_INT64_MAX = (1 << 63) - 1
_MOST_GLOBALS = 10_000  # distinct ones in a pickle: the class that stands for one takes 1.2 kB
_LONGEST_KEY = 1 << 18  # characters of the key of a tensor
_WIDE = 1000  # values in a container whose children are not listed at once
_LISTED = (8 << 20, 6)  # bytes of memory that the list of tensors may take, and so many for each byte of the pickle
_PLAIN_VISITS = 1 << 16  # values that are looked at for plain ones
MOST_PLAIN = 1000
_SHORT = 16  # values in a list of plain ones that is worth listing
_LONGEST_PLAIN = 200  # characters
_WIDEST_INTEGER = 64  # bits
_INFO_COST = 250  # bytes of a TensorInfo
_WIDEST = 4  # bytes of a character, in text that is not ASCII
_HASHED = (1 << 20, 16)  # values that calls may hash, and so many for each byte of the pickle
_LONGEST_CODE = 20  # characters of the code of one of numpy's types

_VISITS = (1 << 16, 1)  # values that are listed, and so many for each byte of the pickle
_SETS = {"builtins.set", "builtins.frozenset"}  # as protocol 2 stores them: called with a list
_PARAMETER_STATE = 3  # after the tensor, whether it requires a gradient, and its hooks
_NAMED_BY_VALUE = (int, float, bytes, type(None))

_WALKED = (*CONTAINERS, StorageRef)

Aspect: TypeAlias = Literal["value", "kind", "attribute"]
"""What is told of an object: its values; what its containers and keys are; what state dicts have beside their items."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What a container, a key or a class is."""

    name: str


class Content(NamedTuple):
    """One thing in an object: its name, a tensor (as a stand-in) or another value or a :class:`Kind`."""

    name: str
    value: Any
    aspect: Aspect


class _CheckedStandIn(StandIn):
    """Stands for what could take long, or much memory, with some arguments; remembers itself in ``calls``."""

    __slots__ = ()

    calls: list[StandIn]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        self = super().__new__(cls, *args, **kwargs)
        self.calls.append(self)
        return self


class _Reader(pickle.Unpickler):
    def __init__(self, pickled: bytes) -> None:
        super().__init__(io.BytesIO(pickled), encoding="utf-8", errors="surrogateescape")
        self.standins: dict[str, type] = {}
        self.storages: dict[str, StorageRef] = {}
        self.filled: set[str] = set()
        self._calls: list[StandIn] = []  # that must be checked
        self._hashed = Hashed(_HASHED[0] + _HASHED[1] * len(pickled))

    def read(self) -> Any:
        """Reads the object.

        Raises:
            Exception: whatever the unpickler raises, for a pickle that is none; and what the stand-ins do.
        """
        root = self.load()
        for call in self._calls:
            check_call(call.path, call.args, self._hashed)
        return root

    @property
    def numpy_dtypes(self) -> frozenset[str]:
        """The codes of numpy's types."""
        codes = (call.args[0] for call in self._calls if call.path == NUMPY_DTYPE and call.args)
        return frozenset(code for code in codes if isinstance(code, str) and len(code) <= _LONGEST_CODE)

    def find_class(self, module: str, name: str) -> type:
        # Names of Python 2 are those of Python 3 to weights_only=True, whatever the protocol.
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        path = f"{module}.{name}"
        if path not in self.standins:
            if len(self.standins) >= _MOST_GLOBALS:
                raise ValueError(f"it names more than {_MOST_GLOBALS} classes and functions")
            # A class of its own for each pickle: a pickle can set attributes of classes.
            base = OrderedStandIn if path == ORDERED_DICT else _CheckedStandIn if is_checked(path) else StandIn
            namespace: dict[str, Any] = {
                "path": path,
                "module": module,
                "name": name,
                "calls": self._calls,
                "count_hashed": self._hashed.count,
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
        dtype = STORAGE_DTYPES[storage_type.path.rpartition(".")[2]]
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

    def storages_beside_tensors(self) -> dict[str, StorageRef]:
        """The storages that the object refers to elsewhere than in tensors that dicts and lists alone lead to, by key.

        Whoever takes such tensors out, and pickles the rest, looks into no others.

        Raises:
            CheckpointCorruptError: the object is not made as torch makes it.
        """
        beside: list[Any] = []
        stack = [self.root]
        seen: set[int] = set()
        while stack:
            value = stack.pop()
            if isinstance(value, dict | list):
                if id(value) not in seen:
                    seen.add(id(value))
                    stack += dict.values(value) if isinstance(value, dict) else value
                    beside += dict.keys(value) if isinstance(value, dict) else ()
            elif not (isinstance(value, StandIn) and is_tensor_leaf(value)):
                beside.append(value)
        return self.storages_of(beside)

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
                yield tensor_info(path.key() if path else "", leaf)

    def contents(self, part: Any) -> Iterator[Content]:
        """All that is in a part of the object, in the order of the pickle: nothing is left out for its length.

        What is there several times comes under each of its names, and two things may have one name.

        Raises:
            CheckpointFormatError: containers hold each other so often, or themselves, that nobody can list it all.
            CheckpointCorruptError: the object is not made as torch makes it.
        """
        room, held = _VISITS[0] + _VISITS[1] * self.nbytes, 0
        stack: list[tuple[int, Iterator[Content]]] = [(0, iter([Content("", part, "value")]))]
        with self.damage_told():
            while stack:
                content = next(stack[-1][1], None)
                if content is None:
                    held -= stack.pop()[0]
                    continue
                name, value, aspect = content
                room -= 1 + len(name) // 64
                if room < 0 or held > _LISTED[0]:
                    raise CheckpointFormatError(
                        f"{self.url}: its containers hold each other too often, or themselves, to look at all of it."
                    )
                if isinstance(value, type):
                    yield Content(name, Kind(getattr(value, "path", value.__name__)), aspect)
                elif is_tensor(value) or not isinstance(value, CONTAINERS):
                    yield content
                else:
                    if kind := _kind_of(value):
                        yield Content(name, Kind(kind), "kind" if aspect == "value" else aspect)
                    size = _WIDEST * len(name)
                    held += size
                    stack.append((size, _contents_of(name, value, aspect)))

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
        except CheckpointFormatError:
            raise
        except Exception as error:  # what stand-ins in odd places raise is anything
            raise CheckpointCorruptError(f"{self.url}: data.pkl is none that torch writes: {_cause(error)}.") from error


def read_graph(pickled: bytes, url: str) -> Graph:
    """Reads a checkpoint's pickle; nothing in it is run.

    Raises:
        CheckpointCorruptError: it is none, or it would take too much time or memory (:func:`scan_pickle`).
        UnusualPickleError: it does what torch's own pickles do not, so that this cannot tell what it refers to.
    """
    scan_pickle(pickled, url)
    return read_scanned_graph(pickled, url)


def read_scanned_graph(pickled: bytes, url: str) -> Graph:
    """As :func:`read_graph`, for a pickle that :func:`scan_pickle` has found to cost what it may."""
    reader = _Reader(pickled)
    try:
        root = reader.read()
    except Exception as error:  # what damaged pickles raise is anything
        raise UnusualPickleError(f"{url}: data.pkl cannot be read: {_cause(error)}.") from error
    names = frozenset(reader.standins)
    return Graph(url, root, reader.storages, names, len(pickled), frozenset(reader.filled) & names, reader.numpy_dtypes)


def _is_plain(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= _LONGEST_PLAIN
    if isinstance(value, int):
        return value.bit_length() <= _WIDEST_INTEGER
    return value is None or isinstance(value, float)


def _kind_of(value: Any) -> str:
    """What a container is; "" for a dict with items and for what wraps a tensor, which their items tell."""
    if isinstance(value, StandIn):
        return "" if value.path in PARAMETERS else value.path
    if isinstance(value, dict):
        return "" if value else "an empty dict"
    return type(value).__name__


def _contents_of(name: str, value: Any, aspect: Aspect) -> Iterator[Content]:
    """What a container holds, with whole names."""
    if isinstance(value, dict):
        yield from _items_of(name, value, aspect)
    elif isinstance(value, StandIn) and value.path not in _SETS:
        for part, item in _parts_of(value):
            if isinstance(item, Pair):
                if type(item.key) is not str:
                    yield _key_of(_joined(name, part), item.key, aspect)
                item = item.value  # noqa: PLW2901 - as it stands in the container
            if part or item is not None:
                yield Content(_joined(name, part), item, aspect)
    else:
        if not isinstance(value, list | tuple):
            value = sorted(chain(*value.args) if isinstance(value, StandIn) else value, key=_order_of)
        for number, item in enumerate(value):
            yield Content(_joined(name, str(number)), item, aspect)


def _items_of(name: str, value: dict[Any, Any], aspect: Aspect) -> Iterator[Content]:
    for key, item in dict.items(value):
        whole = _joined(name, name_of(key))
        if type(key) is not str:
            yield _key_of(whole, key, aspect)
        yield Content(whole, item, aspect)
    attributes = value.attributes if isinstance(value, OrderedStandIn) else getattr(value, "__dict__", {})
    for attribute, item in attributes.items():
        yield Content(_joined(name, attribute), item, "attribute")


def _parts_of(value: StandIn) -> Iterator[tuple[str, Any]]:
    """As :func:`children`, of an object; with all that a sparse tensor is made of, and keys of any type."""
    if value.path in PARAMETERS:
        yield from (("", item) for item in (value.args[0], *value.args[_PARAMETER_STATE:], value.state))
        return
    if value.path == SPARSE:
        layout, parts = value.args
        yield from children(value)
        yield "layout", layout
        yield from ((str(number), item) for number, item in enumerate(parts[2:], 2))
        return
    pairs = [item for item in value.items if isinstance(item, Pair)]
    yield from (
        children(value) if not pairs else (("", value.state), *((str(n), arg) for n, arg in enumerate(value.args)))
    )
    yield from ((name_of(pair.key), pair) for pair in pairs)


def _key_of(whole: str, key: Any, aspect: Aspect) -> Content:
    """What tells a key that is no string from others of its name."""
    beside: Aspect = "kind" if aspect == "value" else aspect
    if isinstance(key, _NAMED_BY_VALUE):
        return Content(whole, Kind(f"a key of type {type(key).__name__}"), beside)
    return Content(f"{whole} (its key)", key, beside)


def _joined(name: str, part: str) -> str:
    return f"{name}.{part}" if name and part else name or part


def _order_of(item: Any) -> tuple[str, Any]:
    """Sorts plain values in a set, whose order is by chance."""
    return (type(item).__name__, item) if isinstance(item, str | int | float | bytes) else ("", 0)


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {printable(str(error))}"


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
        elif isinstance(value, StorageRef) or (not into_tensors and is_tensor(value)):
            yield path, value
        elif isinstance(value, CONTAINERS) and id(value) not in seen:
            seen.add(id(value))
            children = _walked(path, value)
            if (len(value.args) + len(value.items) if isinstance(value, StandIn) else len(value)) > _WIDE:
                stack.append((path, children))
            else:
                stack += reversed(list(children))


def _walked(path: _Path | None, value: Any) -> Iterator[tuple[_Path | None, Any]]:
    return ((_longer(path, name), child) for name, child in children(value) if isinstance(child, _WALKED))
