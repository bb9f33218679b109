"""Pickles a part of a checkpoint's object again: the least pickle from which torch makes that part, and no more.

Written from :mod:`torchferry.formats.stand_ins`, without importing anything that the checkpoint names, in protocol 2,
as ``torch.save`` writes it. So the rules of ``weights_only`` are applied by torch itself, and to this part only.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from torchferry.formats.stand_ins import OrderedStandIn, Pair, StandIn, StorageRef

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["NotPlainError", "Repickled", "repickle"]

_BATCH = 1000  # items in one SETITEMS or APPENDS, as in CPython
_UINT8, _UINT16 = 1 << 8, 1 << 16
_INT32 = 1 << 31
_LONG1 = 255  # bytes of an integer


class NotPlainError(Exception):
    """The part holds what was pickled in a way that the stand-ins do not tell."""


class Repickled:
    """A pickle of a part of an object.

    Attributes:
        pickled: The pickle.
        storages: The storages that it refers to, by key.
        globals: The globals that it names, as "module.name".
    """

    def __init__(self) -> None:
        self.pickled = b""
        self.storages: dict[str, StorageRef] = {}
        self.globals: set[str] = set()


def repickle(part: Any) -> Repickled:
    """Pickles a part.

    Raises:
        NotPlainError: it holds what cannot be told.
    """
    writer = _Writer()
    try:
        writer.save(part)
    except RecursionError as error:
        raise NotPlainError("its values are nested too deep") from error
    writer.result.pickled = b"\x80\x02" + bytes(writer.out) + b"."
    return writer.result


class _Writer:
    def __init__(self) -> None:
        self.result = Repickled()
        self.out = bytearray()
        self._memo: dict[int, bytes] = {}  # by id: what gets the value from the memo
        self._keep: list[Any] = []  # so that no id is used again
        self._globals: dict[tuple[str, str], bytes] = {}
        self._strings: dict[str, bytes] = {}
        self._savers: dict[type, Callable[[Any], None]] = {
            type(None): lambda _: self._emit(b"N"),
            bool: lambda value: self._emit(b"\x88" if value else b"\x89"),
            int: self._save_int,
            float: lambda value: self._emit(b"G" + struct.pack(">d", value)),
            str: self._save_str,
            bytes: self._save_bytes,
            bytearray: lambda value: self._call("builtins", "bytearray", (bytes(value),), value),
            complex: lambda value: self._call("builtins", "complex", (value.real, value.imag), value),
            tuple: self._save_tuple,
            list: self._save_list,
            dict: self._save_dict,
            set: lambda value: self._call("builtins", "set", ([*value],), value),
            frozenset: lambda value: self._call("builtins", "frozenset", ([*value],), value),
            StorageRef: self._save_storage,
        }

    def save(self, value: Any) -> None:
        kind = type(value)
        saver = self._savers.get(kind)
        if saver is not None:
            saver(value)
        elif (got := self._memo.get(id(value))) is not None:
            self._emit(got)
        elif isinstance(value, OrderedStandIn):
            self._save_ordered(value)
        elif isinstance(value, StandIn):
            self._save_standin(value)
        elif isinstance(value, type) and issubclass(value, StandIn | OrderedStandIn):
            self._global(value.module, value.name)
        else:
            raise NotPlainError(f"it holds a {kind.__name__}")

    def _emit(self, data: bytes) -> None:
        self.out += data

    def _put(self, value: Any) -> None:
        """Puts what is on top of the stack into the memo, as ``value``.

        Raises:
            NotPlainError: it is there already, as it holds itself; what refers to it would get another value.
        """
        if id(value) in self._memo:
            raise NotPlainError("a value in it that cannot change holds itself")
        self._memo[id(value)] = self._remember()
        self._keep.append(value)

    def _remember(self) -> bytes:
        number = len(self._memo) + len(self._globals) + len(self._strings)
        index = bytes([number]) if number < _UINT8 else struct.pack("<I", number)
        self.out += (b"q" if number < _UINT8 else b"r") + index
        return (b"h" if number < _UINT8 else b"j") + index

    def _save_int(self, value: int) -> None:
        if 0 <= value < _UINT8:
            self.out += bytes((0x4B, value))
        elif 0 <= value < _UINT16:
            self.out += b"M" + struct.pack("<H", value)
        elif -_INT32 <= value < _INT32:
            self.out += b"J" + struct.pack("<i", value)
        else:
            data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            if len(data) > _LONG1:
                raise NotPlainError("it holds a very large integer")
            self.out += bytes((0x8A, len(data))) + data

    def _save_str(self, value: str) -> None:
        if (got := self._strings.get(value)) is not None:
            self.out += got
            return
        data = value.encode("utf-8", "surrogatepass")
        self.out += b"X" + struct.pack("<I", len(data)) + data
        self._strings[value] = self._remember()

    def _save_bytes(self, value: bytes) -> None:
        if value:
            self._call("_codecs", "encode", (value.decode("latin1"), "latin1"), value)
        else:
            self._call("builtins", "bytes", (), value)

    def _save_tuple(self, value: tuple[Any, ...]) -> None:
        if not value:
            self.out += b")"
            return
        if (got := self._memo.get(id(value))) is not None:
            self.out += got
            return
        if len(value) > 3:  # noqa: PLR2004 - as many as have an opcode of their own
            self.out += b"("
        for item in value:
            self.save(item)
        self.out += (b"\x85", b"\x86", b"\x87")[len(value) - 1] if len(value) <= 3 else b"t"  # noqa: PLR2004
        self._put(value)

    def _save_list(self, value: list[Any]) -> None:
        if (got := self._memo.get(id(value))) is not None:
            self.out += got
            return
        self.out += b"]"
        self._put(value)
        self._appends(value)

    def _save_dict(self, value: dict[Any, Any]) -> None:
        if (got := self._memo.get(id(value))) is not None:
            self.out += got
            return
        self.out += b"}"
        self._put(value)
        self._set_items([*dict.items(value)])

    def _save_ordered(self, value: OrderedStandIn) -> None:
        self._global(value.module, value.name)
        self.out += b")R"
        self._put(value)
        self._set_items([*dict.items(value)])
        if value.attributes:
            self.save(value.attributes)
            self.out += b"b"

    def _save_storage(self, value: StorageRef) -> None:
        if value.location is None:
            raise NotPlainError("it holds a storage of no known place")
        self.result.storages.setdefault(value.key, value)
        self.out += b"("
        self._save_str("storage")
        self._global(*value.kind)
        self._save_str(value.key)
        self._save_str(value.location)
        self._save_int(value.numel)
        self.out += b"tQ"

    def _save_standin(self, value: StandIn) -> None:
        if value.is_odd or not value.path:
            raise NotPlainError(f"it holds a {value.path} that was made in an unusual way")
        self._global(value.module, value.name)
        self._save_tuple(value.args)
        self.out += b"R" if value.was_called else b"\x81"
        self._put(value)
        pairs = [item for item in value.items if isinstance(item, Pair)]
        if pairs and len(pairs) < len(value.items):
            raise NotPlainError(f"it holds a {value.path} of items of two kinds")
        if pairs:
            self._set_items(pairs)
        else:
            self._appends(value.items)
        if value.state is not None:
            self.save(value.state)
            self.out += b"b"

    def _call(self, module: str, name: str, args: tuple[Any, ...], value: Any) -> None:
        if (got := self._memo.get(id(value))) is not None:
            self.out += got
            return
        self._global(module, name)
        self._save_tuple(args)
        self.out += b"R"
        self._put(value)

    def _global(self, module: str, name: str) -> None:
        if (got := self._globals.get((module, name))) is not None:
            self.out += got
            return
        self.result.globals.add(f"{module}.{name}")
        text = f"{module}\n{name}"
        if "." in name or text.count("\n") != 1 or not text.isascii():
            raise NotPlainError(f"it holds a {text!r}, which protocol 2 has no name for")
        self.out += b"c" + text.encode() + b"\n"
        self._globals[module, name] = self._remember()

    def _appends(self, items: Sequence[Any]) -> None:
        for first in range(0, len(items), _BATCH):
            self.out += b"("
            for item in items[first : first + _BATCH]:
                self.save(item)
            self.out += b"e"

    def _set_items(self, items: Sequence[tuple[Any, Any]]) -> None:
        for first in range(0, len(items), _BATCH):
            self.out += b"("
            for key, item in items[first : first + _BATCH]:
                self.save(key)
                self.save(item)
            self.out += b"u"
