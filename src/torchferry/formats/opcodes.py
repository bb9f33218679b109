"""Scans a pickle's opcodes before anything is unpickled, and refuses those that would take all memory or time.

A pickle of 1 kB can ask for a memo of 2**27 entries (2 GiB), build a tuple of 2**30 values out of 30 that are shared,
and use it as a key of a dict, whose hash then takes minutes; or nest tuples so deep that their hash overflows the
stack. The scan runs the pickle's stack machine on numbers in place of values, and adds up what the values would cost.
What a usual pickle costs is proportional to its length, and so are the limits.

Sources: CPython's ``Lib/pickle.py`` and ``Modules/_pickle.c``; sizes of objects are those of CPython 3.11 on 64 bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torchferry.errors import CheckpointCorruptError

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["CutOffPickleError", "UnusualPickleError", "scan_pickle"]

# A limit is a number for any pickle, and one for each byte of it.
_MEMORY = 32 << 20  # bytes of all values; for each byte of the pickle as many more as scan_pickle is told
_NODES = (1 << 18, 4)  # values in a tuple, with those of tuples in it each time that they occur
_HASHED = (1 << 20, 16)  # values that are hashed: keys of dicts, items of sets
_DEPTH = 2000  # tuples in tuples; a hash takes some 100 bytes of stack for each, and a stack may have 512 KiB
_INDEX = (256, 0.25)  # of the memo; what puts a value there takes 5 bytes from the 257th on
_LONGEST = 1 << 28  # bytes that a pickle is taken to have at most, where more follows it
_STEP = 1 << 16  # opcodes between two looks at the memory

# A value is a number: how many values its hash visits, and above these bits, how deep they are nested.
_DEPTH_SHIFT = 40
_WEIGHT = (1 << _DEPTH_SHIFT) - 1

# Bytes of memory, for a value with its place on the stack.
_PLACE = 8
_MEMO_COST = 16
_STRING_COST = 64
_TUPLE_COST = 64
_OBJECT_COST = 120  # what a call returns
_ENTRY_COST = 32  # of a dict or a set
_WIDEST = 4  # of a character, if any of its string is beyond 16 bits

# Opcodes that push a value: how many bytes follow; or in how many bytes their number is.
_FIXED = dict.fromkeys(b"N\x88\x89)]}\x8f", 0) | {0x4B: 1, 0x4D: 2, 0x4A: 4, 0x47: 8}
_COUNTED = dict.fromkeys(b"UC\x8a\x8c", 1) | dict.fromkeys(b"XTB\x8b", 4) | dict.fromkeys(b"\x8d\x8e\x96", 8)
_COSTS = [_PLACE] * 256
for _op, _cost in {0x5D: 80, 0x7D: 80, 0x8F: 240, 0x4D: 40, 0x4A: 40, 0x47: 32}.items():
    _COSTS[_op] = _cost
_BINGET, _LONG_BINGET, _BINPUT, _LONG_BINPUT, _MARK, _TUPLE, _STOP = b"hjqr(t."
_TUPLES = {0x85: 1, 0x86: 2, 0x87: 3}


class UnusualPickleError(CheckpointCorruptError):
    """The pickle is not one that is understood, though it would take no more than others do: torch may know better."""


class CutOffPickleError(CheckpointCorruptError):
    """The pickle ends too early: more may follow what is there; or it takes values that are not."""


class _RefusedError(Exception):
    """Says why a pickle is refused."""


def scan_pickle(pickled: bytes | mmap.mmap, url: str, start: int = 0, *, each: int = 16) -> int:
    """Reads the opcodes of a pickle, and checks what unpickling it would cost; about 6 million opcodes a second.

    Args:
        pickled: The pickle; more may follow.
        url: For messages.
        start: Where it begins.
        each: Bytes that its values may take for each byte of it: an integer of 3 takes 32, and 8 in its list.

    Returns:
        Where it ends.

    Raises:
        CheckpointCorruptError: its values would take more than that and 32 MiB; or it is none.
        UnusualPickleError: it uses extension codes, which only the process that wrote it can know.
    """
    machine = _Machine(pickled, start, each)
    try:
        stop = machine.run()
    except (IndexError, OverflowError) as error:
        where = f"it ends too early, or lacks a value, at byte {machine.at - start}"
        raise CutOffPickleError(f"{url}: data.pkl cannot be read: {where}.") from error
    except _RefusedError as error:
        raise CheckpointCorruptError(f"{url}: data.pkl is refused: {error}.") from error
    if machine.uses_extensions:
        raise UnusualPickleError(f"{url}: data.pkl uses extension codes of the process that wrote it.")
    return stop


class _Machine:
    """The stack machine that runs a pickle, on numbers.

    Attributes:
        at: How far it is, in bytes; as of the last opcode that is not a usual one.
        uses_extensions: Whether an extension code occurred.
    """

    def __init__(self, data: bytes | mmap.mmap, start: int, each: int) -> None:
        self.at = self._start = start
        self._each = each
        self.uses_extensions = False
        self._data = data
        length = min(len(data) - start, _LONGEST)
        self._most_nodes, self._most_hashed, self._most_index = (
            int(base + each * length) for base, each in (_NODES, _HASHED, _INDEX)
        )
        self._stack: list[int] = []
        self._marks: list[int] = []
        self._memo: list[int] = []
        self._memory = 0
        self._hashed = 0
        self._tuples: dict[int, int] = {}  # the numbers of tuples of plain values, by length

    def run(self) -> int:  # noqa: C901, PLR0912, PLR0915 - one loop, for speed: a call for each opcode would double its time
        """Runs to the end of the pickle, and returns where that is."""
        data, at = self._data, self.at
        stack, marks, memo, push = self._stack, self._marks, self._memo, self._stack.append
        fixed, counted, tuples, costs, known = _FIXED, _COUNTED, _TUPLES, _COSTS, self._tuples
        memory = 0
        while True:
            for _ in range(_STEP):
                op = data[at]
                at += 1
                if op in fixed:
                    push(1)
                    at += fixed[op]
                    memory += costs[op]
                elif op == _BINGET:
                    push(memo[data[at]])
                    at += 1
                elif op == _LONG_BINPUT:
                    index = int.from_bytes(data[at : at + 4], "little")
                    at += 4
                    if index == len(memo):
                        memo.append(stack[-1])
                        memory += _MEMO_COST
                    else:
                        self._put_at(index)
                elif op == _BINPUT:
                    self._put(data[at])
                    at += 1
                elif op == _MARK:
                    marks.append(len(stack))
                elif op == _TUPLE or op in tuples:
                    first = marks.pop() if op == _TUPLE else len(stack) - tuples[op]
                    if first < 0:
                        raise IndexError
                    values = stack[first:]
                    size = len(values)
                    memory += _TUPLE_COST + _PLACE * size
                    stack[first:] = (
                        (known[size],) if size in known and values.count(1) == size else (self._tuple(values),)
                    )
                elif op in counted:
                    first = at + counted[op]
                    at = first + int.from_bytes(data[at:first], "little")
                    if at > len(data):
                        raise IndexError
                    push(1)
                    size = at - first
                    memory += _STRING_COST + (size if size < _STRING_COST else size * self._width(first, at))
                elif op == _LONG_BINGET:
                    push(memo[int.from_bytes(data[at : at + 4], "little")])
                    at += 4
                else:
                    self.at = at
                    if op == _STOP:
                        stack.pop()
                        break
                    self._run_other(op)
                    at = self.at
            else:
                op = 0
            self.at = at
            most = _MEMORY + self._each * (at - self._start)
            if memory + self._memory > most:
                raise _RefusedError(f"its values would take more than {most >> 20} MiB")
            if op:
                return at

    def _run_other(self, op: int) -> None:
        handler = self._HANDLERS.get(op)
        if handler is None:
            raise _RefusedError(f"byte {self.at - 1} of it is no opcode")
        handler(self)

    def _width(self, start: int, stop: int) -> int:
        """How many bytes a character of this string takes at most."""
        return 1 if self._data[start:stop].isascii() else _WIDEST

    def _put_at(self, index: int) -> None:
        if not 0 <= index <= self._most_index:
            raise _RefusedError(f"it puts a value into its memo as number {index}, more than its length allows")
        self._put(index)

    def _put(self, index: int) -> None:
        memo, value = self._memo, self._stack[-1]
        self._memory += _MEMO_COST
        if index >= len(memo):
            memo += [1] * (index + 1 - len(memo))
        memo[index] = value

    def _tuple(self, values: Sequence[int]) -> int:
        """The number of a tuple, or a frozenset, of these values."""
        weight = 1 + sum(value & _WEIGHT for value in values)
        depth = 1 + max((value >> _DEPTH_SHIFT for value in values), default=0)
        if weight > self._most_nodes:
            raise _RefusedError(f"a tuple in it stands for more than {self._most_nodes} values")
        if depth > _DEPTH:
            raise _RefusedError(f"tuples in it are nested more than {_DEPTH} deep")
        number = depth << _DEPTH_SHIFT | weight
        if depth == 1 and len(self._tuples) < _STEP:
            self._tuples[len(values)] = number  # so that all have the same one, not one each
        return number

    def _hash(self, keys: Sequence[int]) -> None:
        """Counts values that are hashed, and stored in a dict or a set."""
        self._memory += _ENTRY_COST * len(keys)
        if keys.count(1) < len(keys):
            self._hashed += sum(key & _WEIGHT for key in keys)
            if self._hashed > self._most_hashed:
                raise _RefusedError(f"the keys of its dicts and sets stand for more than {self._most_hashed} values")

    def _pop_to_mark(self) -> list[int]:
        mark = self._marks.pop()
        values = self._stack[mark:]
        del self._stack[mark:]
        return values

    def _line(self) -> bytes:
        start = self.at
        self._skip_line()
        return self._data[start : self.at - 1]

    def _skip_line(self) -> None:
        stop = self._data.find(b"\n", self.at) + 1
        if not stop:
            raise IndexError
        self.at = stop

    def _line_number(self) -> int:
        try:
            return int(self._line()[:20])
        except ValueError:
            raise _RefusedError(f"byte {self.at} of it is no number") from None

    # What each of the other opcodes does.

    def _on_memoize(self) -> None:
        self._put(len(self._memo))

    def _on_put(self) -> None:
        self._put_at(self._line_number())

    def _on_get(self) -> None:
        self._stack.append(self._memo[self._line_number()])

    def _on_append(self) -> None:
        self._stack.pop()

    def _on_appends(self) -> None:
        self._pop_to_mark()

    def _on_setitem(self) -> None:
        self._stack.pop()
        self._hash([self._stack.pop()])

    def _on_setitems(self) -> None:
        self._hash(self._pop_to_mark()[::2])

    def _on_additems(self) -> None:
        self._hash(self._pop_to_mark())

    def _on_list(self) -> None:
        values = self._pop_to_mark()
        self._memory += 80 + _PLACE * len(values)
        self._stack.append(1)

    def _on_dict(self) -> None:
        self._memory += 80
        self._hash(self._pop_to_mark()[::2])
        self._stack.append(1)

    def _on_frozenset(self) -> None:
        values = self._pop_to_mark()
        self._memory += 240
        self._hash(values)
        self._memory += _PLACE * len(values)
        self._stack.append(self._tuple(values))

    def _on_reduce(self) -> None:
        self._call(2)

    def _on_newobj_ex(self) -> None:
        self._call(3)

    def _call(self, taken: int) -> None:
        if len(self._stack) < taken:
            raise IndexError
        self._stack[-taken:] = [1]
        self._memory += _OBJECT_COST

    def _on_build(self) -> None:
        self._stack.pop()

    def _on_global(self) -> None:
        self._skip_line()
        self._skip_line()
        self._stack.append(1)

    def _on_stack_global(self) -> None:
        self._call(2)

    def _on_inst(self) -> None:
        self._skip_line()
        self._skip_line()
        self._pop_to_mark()
        self._stack.append(1)
        self._memory += _OBJECT_COST

    def _on_obj(self) -> None:
        self._pop_to_mark()
        self._stack.append(1)
        self._memory += _OBJECT_COST

    def _on_binpersid(self) -> None:
        self._hash([self._stack.pop()])
        self._stack.append(1)
        self._memory += _OBJECT_COST

    def _on_line(self) -> None:
        line = self._line()
        self._memory += _STRING_COST + _WIDEST * len(line)
        self._stack.append(1)

    def _on_pop(self) -> None:
        if self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        else:
            self._stack.pop()

    def _on_dup(self) -> None:
        self._stack.append(self._stack[-1])

    def _extension(self, size: int) -> None:
        self.uses_extensions = True
        self.at += size
        self._stack.append(1)

    def _on_ext1(self) -> None:
        self._extension(1)

    def _on_ext2(self) -> None:
        self._extension(2)

    def _on_ext4(self) -> None:
        self._extension(4)

    def _on_proto(self) -> None:
        self.at += 1

    def _on_frame(self) -> None:
        self.at += 8

    _HANDLERS: ClassVar[Mapping[int, Callable[[_Machine], object]]] = {
        ord("0"): _on_pop,
        ord("1"): _pop_to_mark,
        ord("2"): _on_dup,
        ord("F"): _on_line,
        ord("I"): _on_line,
        ord("L"): _on_line,
        ord("P"): _on_line,
        ord("S"): _on_line,
        ord("V"): _on_line,
        ord("Q"): _on_binpersid,
        ord("R"): _on_reduce,
        ord("a"): _on_append,
        ord("b"): _on_build,
        ord("c"): _on_global,
        ord("d"): _on_dict,
        ord("e"): _on_appends,
        ord("g"): _on_get,
        ord("i"): _on_inst,
        ord("l"): _on_list,
        ord("o"): _on_obj,
        ord("p"): _on_put,
        ord("s"): _on_setitem,
        ord("u"): _on_setitems,
        0x80: _on_proto,
        0x81: _on_reduce,
        0x82: _on_ext1,
        0x83: _on_ext2,
        0x84: _on_ext4,
        0x90: _on_additems,
        0x91: _on_frozenset,
        0x92: _on_newobj_ex,
        0x93: _on_stack_global,
        0x94: _on_memoize,
        0x95: _on_frame,
    }
