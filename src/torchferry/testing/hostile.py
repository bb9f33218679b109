# ruff: noqa: E501 - a hostile pickle stands on one line
"""Files and values that somebody made to crash, hang, fill the memory or deceive, and what is tried with each.

``python -m torchferry.testing.hostile`` prints what became of them, as JSON. None may raise anything but torchferry's
errors, take 2 s of CPU time (4 s where two files are compared) or 64 MiB beyond its own size, or get a character to
people that acts on a terminal.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import itertools
import json
import shutil
import struct
import sys
import tempfile
import time
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import torchferry
from torchferry.checkpoint.deck import deck_of
from torchferry.checkpoint.values import LoadedCheckpoint
from torchferry.cli import run as command
from torchferry.formats.opcodes import scan_pickle

__all__ = [
    "FILES",
    "PICKLES",
    "SAFETENSORS",
    "UNWANTED",
    "VALUES",
    "acts",
    "archive_of",
    "legacy_of",
    "run",
    "saved",
    "taken",
]

UNWANTED = ("other error", "long", "memory", "acts on a terminal")
"""What no try may end with, in the report of :func:`run`."""

SLOW = 2.0
"""Seconds of CPU time; a try takes less."""

MEMORY = 64 << 20
"""Bytes beyond the file's own size; a try takes less."""

_DECK = 200_000  # characters
_LARGE = 100_000  # bytes of a file
_VERY_LARGE = 1_000_000
_SHARES = {False: 11, True: 22}  # of the entry points, one of so many in a short run: of files that are large or not


def saved(obj: Any, **options: Any) -> bytes:
    """What ``torch.save`` writes."""
    file = io.BytesIO()
    torch.save(obj, file, **options)
    return file.getvalue()


def archive_of(pickled: bytes, *storages: bytes) -> bytes:
    """A whole archive with right CRC32s around any pickle."""
    file = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(file)  # noqa: SLF001 - there is no other writer of such files
    records = {"data.pkl": pickled, "byteorder": b"little"} | {f"data/{i}": data for i, data in enumerate(storages)}
    for name, content in records.items():
        writer.write_record(name, content, len(content))
    writer.write_end_of_file()
    return file.getvalue()


def _put(index: int) -> bytes:
    return b"r" + index.to_bytes(4, "little")


def _text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + len(data).to_bytes(4, "little") + data


def _storage(key: bytes = _text("0"), numel: bytes = b"K\x04", kind: bytes = b"ctorch\nFloatStorage\n") -> bytes:
    return b"(" + _text("storage") + kind + key + _text("cpu") + numel + b"tQ"


def _tensor(
    shape: bytes = b"K\x04\x85", stride: bytes = b"K\x01\x85", of: bytes = _storage(), offset: bytes = b"K\0"
) -> bytes:
    hooks = b"ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + of + offset + shape + stride + b"\x89" + hooks + b"tR"


_DOUBLING = b")" + b"".join(_put(i) + b"h" + bytes([i]) + b"\x86" for i in range(40))  # y = (y, y), 40 times
_DEEP = b")" + b"\x85" * 200_000
_EMPTY = b"ccollections\nOrderedDict\n)R"


def _pickled(*values: bytes) -> bytes:
    """A pickle of a dict with these values."""
    items = b"".join(_text(f"k{i}") + value for i, value in enumerate(values))
    return b"\x80\x02}(" + items + b"u."


PICKLES: dict[str, bytes] = {
    "memo index": b"\x80\x02]" + _put(1 << 27) + b".",
    "memo index as text": b"\x80\x02]p4000000000\n.",
    "shape is text": _pickled(_tensor(shape=_text("abcd" * 1000))),
    "shape is a list": _pickled(_tensor(shape=b"](K\x04e")),
    "shape is a list of text": _pickled(_tensor(shape=b"](" + _text("a" * 5000) + b"e")),
    "shape is negative": _pickled(_tensor(shape=b"J\xff\xff\xff\xff\x85")),
    "shape of large numbers": _pickled(_tensor(shape=b"(" + (b"\x8a\xff" + b"\x7f" * 255) * 3000 + b"t")),
    "number of elements is text": _pickled(_tensor(of=_storage(numel=_text("4" * 1000)))),
    "number of elements is negative": _pickled(_tensor(of=_storage(numel=b"J\xff\xff\xff\xff"))),
    "number of elements is huge": _pickled(_tensor(of=_storage(numel=b"\x8b\x00\x40\0\0" + b"\x7f" * 0x4000))),
    "offset is huge": _pickled(_tensor(offset=b"\x8a\x07" + b"\x7f" * 7)),
    "key is a number": _pickled(_tensor(of=_storage(key=b"K\0"))),
    "nested keys": b"\x80\x02" + (b"}(" + _text("t") + _tensor() + _text("k" * 2000)) * 2000 + b"N" + b"u" * 2000 + b".",
    "nested keys of emoji": b"\x80\x02" + (b"}(" + _text("t") + _tensor() + _text("\U0001f600" * 500)) * 2000 + b"N" + b"u" * 2000 + b".",
    "nested lists": b"\x80\x02" + b"]" * 100_000 + _tensor() + b"a" * 100_000 + b".",
    "shared tuples as key": b"\x80\x02}" + _DOUBLING + b"Ns.",
    "shared tuples as value": _pickled(_DOUBLING),
    "shared tuples as persistent id": b"\x80\x02" + _DOUBLING + b"Q.",
    "shared tuples as storage key": _pickled(_tensor(of=_storage(key=_DOUBLING))),
    "shared tuples as shape": _pickled(_tensor(shape=_DOUBLING)),
    "shared tuples as layout": _pickled(b"ctorch._utils\n_rebuild_sparse_tensor\n(" + _DOUBLING + _DOUBLING + b"tR"),
    "shared tuples in a set": b"\x80\x02c__builtin__\nset\n](" + _DOUBLING + b"e\x85R.",
    "shared lists in a tensor": b"\x80\x02ctorch\nFloatTensor\n](K\x01e" + b"".join(_put(i) + b"]h" + bytes([i]) + b"ah" + bytes([i]) + b"a" for i in range(30)) + b"\x85R.",
    "200,000 keys of shared tuples": b"\x80\x02}(" + (b")" + b"".join(_put(i) + b"h" + bytes([i]) + b"\x86" for i in range(15))) + _put(99) + b"N" + b"h\x63N" * 200_000 + b"u.",
    "deep tuple": b"\x80\x02" + _DEEP + b".",
    "deep tuple as key": b"\x80\x02}" + _DEEP + b"Ns.",
    "deep tuple as persistent id": b"\x80\x02" + _DEEP + b"Q.",
    "600,000 lists": b"\x80\x02](" + b"]" * 600_000 + b"e.",
    "600,000 sets": b"\x80\x04](" + b"\x8f" * 600_000 + b"e.",
    "200,000 globals": b"\x80\x02](" + b"".join(b"ca\nb%d\n" % i for i in range(200_000)) + b"e.",
    "bytearray of a size": _pickled(b"c__builtin__\nbytearray\n\x8a\x05\0\0\0\0\x01\x85R"),
    "bytearray of a size, popped": _pickled(b"c__builtin__\nbytearray\n\x8a\x05\0\0\0\0\x01\x85R0N"),
    "bytearray through a tensor": _pickled(b"ctorch._tensor\n_rebuild_from_type_v2\n(c__builtin__\nbytearray\nctorch\nTensor\n\x8a\x05\0\0\0\0\x01\x85}tR"),
    "bytearray8 of a size": b"\x80\x05\x96\0\0\0\0\x04\0\0\0.",
    "bytes of a size": b"\x80\x04\x8e\0\0\0\0\x04\0\0\0.",
    "tensor of a size": _pickled(b"ctorch\nFloatTensor\n\x8a\x06\0\0\0\0\0\x01\x85R"),
    "storage of a size": _pickled(b"ctorch.storage\nUntypedStorage\n\x8a\x06\0\0\0\0\0\x01\x85R"),
    "punycode": _pickled(b"c_codecs\nencode\n" + _text("\xfc" * 300_000) + _text("punycode") + b"\x86R"),
    "repeated values, copied": _pickled(
        b"ctorch._utils\n_rebuild_device_tensor_from_cpu_tensor\n("
        + _tensor(shape=b"\x8a\x05\0\0\0\0\x01\x85", stride=b"K\0\x85")
        + b"ctorch\nfloat64\n" + _text("cpu") + b"\x89tR"
    ),
    "half of a surrogate pair as key": _pickled(_tensor(of=_storage(key=_text("\ud800")))),
    "half of a surrogate pair as global": b"\x80\x04" + _text("\ud800") + _text("a\nb") + b"\x93.",
    "number of a million digits": b"\x80\x02L" + b"9" * 1_000_000 + b"L\n.",
    "set attribute of a class": b"\x80\x02ccollections\nOrderedDict\nN}(" + _text("path") + b"K\x01u\x86b.",
    "set dict of a class": b"\x80\x02ctorch\nTensor\n}(" + _text("path") + b"K\x01ub.",
    "dtype that is none": _pickled(b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n(ctorch\n_dynamo\nK\x04\x85K\x01\x85\x89tR"),
    "meta tensor that is huge": _pickled(b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n(ctorch\nfloat32\n(" + b"\x8a\x07" + b"\x7f" * 7 + b"\x8a\x07" + b"\x7f" * 7 + b"tK\x01\x85\x89tR"),
    "call of nothing": b"\x80\x02N)R.",
    "stack that is empty": b"\x80\x02RRR.",
    "memo that is empty": b"\x80\x02h\x05.",
    "no end": b"\x80\x02]",
    "no opcode": b"\x80\x02\xff.",
    "extension code": b"\x80\x02\x82\x01.",
    "nothing": b"",
    "tensors shared 100,000 times": b"\x80\x02](" + _tensor() + _put(0) + b"h\x00" * 100_000 + b"e.",
    "byte of a list": _pickled(b"c__builtin__\nbytearray\n](K\x01K\x02e\x85R"),
}  # fmt: skip

_ESCAPES = "a\x1b[2J\x1b]0;title\x07\r\n  b  float32  9 x 9\u202egpj.\u2066\x9b1m\ud800\u200b"
PICKLES |= {
    "keys that act on a terminal": b"\x80\x02}(" + _text(_ESCAPES) + _tensor() + b"c__builtin__\nset\n](K\x01e\x85R" + _tensor() + b"u.",
    "key of a storage that acts on a terminal": _pickled(_tensor(of=_storage(key=_text(_ESCAPES)))),
    "global that acts on a terminal": b"\x80\x04" + _text(_ESCAPES) + _text(_ESCAPES) + b"\x93.",
    "dtype that acts on a terminal": _pickled(b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n(\x8c\x05torch" + _text(_ESCAPES) + b"\x93K\x04\x85K\x01\x85\x89tR"),
    "device that acts on a terminal": _pickled(_tensor(of=b"(" + _text("storage") + b"ctorch\nFloatStorage\n" + _text("0") + _text(_ESCAPES) + b"K\x04tQ")),
    "value that is text with escapes": _pickled(_text(_ESCAPES)),
    "list that holds itself": b"\x80\x02]" + _put(0) + b"(h\x00h\x00" + _tensor() + b"e.",
    "dict that holds itself": b"\x80\x02}" + _put(0) + b"(" + _text("a") + b"h\x00" + _text("b") + _tensor() + b"u.",
    "lists that double": b"\x80\x02]" + _put(0) + _tensor() + b"a" + b"".join(_put(i) + b"]" + _put(i + 1) + b"(h" + bytes([i]) + b"h" + bytes([i]) + b"e" for i in range(60)) + b".",
    "dicts that double": b"\x80\x02}" + _text("t") + _tensor() + b"s" + b"".join(_put(i) + b"}" + _put(i + 1) + b"(K\0h" + bytes([i]) + b"K\1h" + bytes([i]) + b"u" for i in range(60)) + b".",
    "deep dicts": b"\x80\x02" + (b"}" + _text("k")) * 50_000 + _tensor() + b"s" * 50_000 + b".",
    "deep lists and dicts": b"\x80\x02" + (b"]}" + _text("k")) * 20_000 + _tensor() + b"sa" * 20_000 + b".",
    "a key 100,000 characters long": b"\x80\x02}(" + _text("k" * 100_000) + _tensor() + b"u.",
    "a number of 4,000 bytes": _pickled(b"\x8b\x00\x10\0\0" + b"\x7f" * 4096),
    "a number of 4,000 bytes as key": b"\x80\x02}\x8b\x00\x10\0\0" + b"\x7f" * 4096 + _tensor() + b"s.",
    "a float that is none": b"\x80\x02F1e\n.",
    "a text with a bad escape": b"\x80\x02V\\uzzzz\n.",
    "a string with a bad quote": b"\x80\x02S'a\n.",
    "a string that is no UTF-8": b"\x80\x02U\x01\xff.",
    "a text that is no UTF-8": b"\x80\x02X\x01\0\0\0\xff.",
    "a global that is no UTF-8": b"\x80\x02c\xff\n\xff\n.",
    "an integer that is none": b"\x80\x02Ix\n.",
    "a dict with a list as key": b"\x80\x02}]Ns.",
    "a set of lists": b"\x80\x04\x8f(]\x90.",
    "a tensor of strides alone": _pickled(b"ctorch._utils\n_rebuild_tensor_v2\n(" + _storage() + b"K\0)K\x01\x85\x89)tR"),
    "a tensor beyond its storage": _pickled(_tensor(offset=b"K\xff")),
    "a tensor of a negative stride": _pickled(_tensor(stride=b"J\xff\xff\xff\xff\x85")),
    "a tensor of 65 dimensions": _pickled(_tensor(shape=b"(" + b"K\x01" * 65 + b"t", stride=b"(" + b"K\x01" * 65 + b"t")),
    "a tensor of no storage": _pickled(_tensor(of=b"N")),
    "a tensor of text": _pickled(_tensor(of=_text("a"))),
    "a tensor of a tensor": _pickled(_tensor(of=_tensor())),
    "a sparse tensor of numbers": _pickled(b"ctorch._utils\n_rebuild_sparse_tensor\n(K\1K\2tR"),
    "a quantized tensor of nothing": _pickled(b"ctorch._utils\n_rebuild_qtensor\n(" + _storage() + b"K\0)))\x89" + _EMPTY + b"tR"),
    "a parameter of a number": _pickled(b"ctorch._utils\n_rebuild_parameter\n(K\1\x88" + _EMPTY + b"tR"),
    "a type that is rebuilt from nothing": _pickled(b"ctorch._tensor\n_rebuild_from_type_v2\n)R"),
    "a subclass of a subclass": _pickled((b"ctorch._tensor\n_rebuild_from_type_v2\n(" * 200) + b"N" + b"tR" * 200),
    "a persistent id of two": b"\x80\x02(" + _text("storage") + b"NtQ.",
    "a persistent id that is a number": b"\x80\x02K\1Q.",
    "a persistent id as text": b"\x80\x02Pabc\n.",
    "hooks that are no dict": _pickled(b"ctorch._utils\n_rebuild_tensor_v2\n(" + _storage() + b"K\0K\4\x85K\1\x85\x89NtR"),
    "a counter of a number": _pickled(b"ccollections\nCounter\nK\x01\x85R"),
    "a size of text": _pickled(b"ctorch\nSize\n" + _text("abc") + b"\x85R"),
    "a device of nothing": _pickled(b"ctorch\ndevice\n)R"),
    "a complex of text": _pickled(b"c__builtin__\ncomplex\n" + _text("x") + b"\x85R"),
    "an ordered dict of a number": _pickled(b"ccollections\nOrderedDict\nK\1\x85R"),
    "an ordered dict with a state that is none": _pickled(_EMPTY + b"K\1b"),
    "a build of a tuple": b"\x80\x02)}b.",
    "a blocked module": b"\x80\x02cposix\nsystem\n" + _text("true") + b"\x85R.",
    "300,000 marks": b"\x80\x02" + b"(" * 300_000 + b"N.",
    "50,000 memo entries": b"\x80\x02]" + b"".join(_put(i) for i in range(50_000)) + b".",
    "150,000 pops": b"\x80\x02" + b"N0" * 150_000 + b"N.",
    "a gigabyte in a frame": b"\x80\x04\x95\0\0\0\x40\0\0\0\0N.",
}  # fmt: skip


def legacy_of(pickled: bytes, *, whole: bool = True) -> bytes:
    """A file in the legacy format around any pickle, with 16 bytes for the storage "0"."""
    data = saved({"a": torch.ones(4)}, _use_new_zipfile_serialization=False)
    start = 0
    for _ in range(3):
        start = scan_pickle(data, "", start)
    keys = b"\x80\x02](X\x01\0\0\x000e."
    return data[:start] + pickled + (keys + struct.pack("<q", 4) + bytes(16) if whole else b"")


def _torchscript_of(pickled: bytes) -> bytes:
    file = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(file)  # noqa: SLF001 - as above
    for name, content in {"data.pkl": pickled, "constants.pkl": b"\x80\x02)."}.items():
        writer.write_record(name, content, len(content))
    writer.write_end_of_file()
    return file.getvalue()


def _zip_of(names: Iterator[str], *, mode: int = 0, filler: int = 0) -> bytes:
    """A zip archive of empty records after those of a checkpoint, written without zipfile, which is slow."""
    out, directory, count = io.BytesIO(), io.BytesIO(), 0
    needed = {"a/data.pkl": b"\x80\x02}.", "a/version": b"3\n", "a/byteorder": b"little"}
    for name in itertools.chain(needed, names):
        path, content = name.encode("utf-8", "surrogatepass"), needed.get(name, b"")
        sizes = (zlib.crc32(content), len(content), len(content), len(path))
        header = out.tell()
        out.write(
            struct.pack("<4sHHHHHIIIHH", b"PK\3\4", 20, 0x800, 0, 0, 0, *sizes, 0) + path + content + bytes(filler)
        )
        directory.write(
            struct.pack("<4sHHHHHHIIIHHHHHII", b"PK\1\2", 20, 20, 0x800, 0, 0, 0, *sizes, 0, 0, 0, 0, mode, header)
            + path
        )
        count += 1
    start, size = out.tell(), directory.tell()
    out.write(directory.getvalue())
    out.write(struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, start))
    out.write(struct.pack("<4sIQI", b"PK\6\7", 0, start + size, 1))
    out.write(struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0))
    return out.getvalue()


def _directory_as_large_as_the_file() -> bytes:
    data = bytes(8 << 20)
    end = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 1, 1, len(data), 0, 0)
    return b"PK\3\4" + data[4:] + end


_SMALL = saved({"a": torch.ones(4)})


def _safetensors_of(header: str, data: bytes = bytes(16)) -> bytes:
    content = header.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(content)) + content + data


_F32 = '{"dtype":"F32","shape":[4],"data_offsets":[0,16]}'
_JSON_ESCAPES = json.dumps(_ESCAPES)

SAFETENSORS: dict[str, Callable[[], bytes]] = {
    "a name that acts on a terminal": lambda: _safetensors_of(f"{{{_JSON_ESCAPES}:{_F32}}}"),
    "metadata that acts on a terminal": lambda: _safetensors_of(
        f'{{"__metadata__":{{{_JSON_ESCAPES}:{_JSON_ESCAPES}}},"a":{_F32}}}'
    ),
    "a dtype that acts on a terminal": lambda: _safetensors_of(f'{{"a":{{"dtype":{_JSON_ESCAPES},"shape":[4]}}}}'),
    "a million brackets": lambda: _safetensors_of("[" * 1_000_000),
    "deep metadata": lambda: _safetensors_of('{"__metadata__":' * 100_000),
    "a million numbers": lambda: _safetensors_of('{"a":{"dtype":"F32","shape":[' + "1," * 1_000_000 + "4]}}"),
    "5,000 tensors of nothing": lambda: _safetensors_of(
        "{" + ",".join(f'"{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(5_000)) + "}", b""
    ),
    "a shape of huge numbers": lambda: _safetensors_of(
        '{"a":{"dtype":"F32","shape":[9223372036854775807,9223372036854775807],"data_offsets":[0,16]}}'
    ),
    "a number of a million digits": lambda: _safetensors_of('{"a":{"dtype":"F32","shape":[' + "9" * 1_000_000 + "]}}"),
    "a negative shape": lambda: _safetensors_of('{"a":{"dtype":"F32","shape":[-4],"data_offsets":[0,16]}}'),
    "offsets beyond the file": lambda: _safetensors_of('{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,1600]}}'),
    "offsets that overlap": lambda: _safetensors_of(f'{{"a":{_F32},"b":{_F32}}}'),
    "a name twice": lambda: _safetensors_of(f'{{"a":{_F32},"a":{_F32}}}'),
    "a name of a million characters": lambda: _safetensors_of(f'{{"{"k" * 1_000_000}":{_F32}}}'),
    "a shape of text": lambda: _safetensors_of('{"a":{"dtype":"F32","shape":"4","data_offsets":[0,16]}}'),
    "a tensor that is null": lambda: _safetensors_of('{"a":null}'),
    "not a number": lambda: _safetensors_of('{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,16]}}'),
    "an escape that is none": lambda: _safetensors_of(f'{{"\\q":{_F32}}}'),
    "half of a surrogate pair": lambda: _safetensors_of(f'{{"\\ud800":{_F32}}}'),
    "a header that is no UTF-8": lambda: struct.pack("<Q", 2) + b"\xff\xff",
    "a header of 2**60 bytes": lambda: struct.pack("<Q", 1 << 60) + b"{}",
    "a header of spaces": lambda: _safetensors_of(" " * 1_000_000),
}

_SHARDED = (
    *("memo index", "shared tuples as key", "deep tuple", "nested keys", "600,000 sets", "200,000 globals"),
    *("bytearray of a size", "bytes of a size", "punycode", "keys that act on a terminal", "a blocked module"),
    *("global that acts on a terminal", "a set of lists", "no end", "nothing", "call of nothing"),
)
_METADATA = ".metadata"  # of a sharded checkpoint

FILES: dict[str, Callable[[], bytes]] = {
    **{f"{name}, zip": partial(archive_of, data, bytes(16)) for name, data in PICKLES.items()},
    **{f"{name}, legacy": partial(legacy_of, data) for name, data in PICKLES.items()},
    **{
        f"{name}, TorchScript": partial(_torchscript_of, PICKLES[name])
        for name in ("memo index", "shared tuples as key", "deep tuple", "keys that act on a terminal", "no end")
    },
    **{f"{name}, sharded": partial(bytes, PICKLES[name]) for name in _SHARDED},
    "a legacy pickle without its storages": lambda: legacy_of(PICKLES["nested lists"], whole=False),
    "a legacy magic number alone": lambda: legacy_of(b"")[:20],
    "records that act on a terminal": lambda: _zip_of(iter([f"a/{_ESCAPES}"])),
    "no checkpoint, with names that act on a terminal": lambda: _zip_of(iter([f"{_ESCAPES}/x"])),
    "a folder that acts on a terminal": lambda: _zip_of(iter([f"a/{_ESCAPES[:20]}"]), mode=16),
    "100,000 records": lambda: _zip_of(f"a/data/{i}" for i in range(100_000)),
    "100,000 records with filler": lambda: _zip_of((f"a/data/{i}" for i in range(100_000)), filler=3),
    "a record twice": lambda: _zip_of(iter(["a/x", "a/x"])),
    "a directory as large as the file": _directory_as_large_as_the_file,
    "an end record alone": lambda: b"PK\5\6" + bytes(18),
    "a beginning of a zip archive alone": lambda: b"PK\3\4",
    "nothing but signatures": lambda: b"PK\3\4" + b"PK\1\2PK\5\6PK\6\6PK\6\7" * 5000,
    "a zip64 end that points to itself": lambda: (
        _SMALL[:-22] + struct.pack("<4sIQI", b"PK\6\7", 0, 2**63, 1) + _SMALL[-22:]
    ),
    "one byte": lambda: b"\x80",
    "a plain pickle": lambda: PICKLES["memo index"],
    **{f"{name}, safetensors": make for name, make in SAFETENSORS.items()},
    "safetensors of nothing": lambda: struct.pack("<Q", 2) + b"{}",
    "text that acts on a terminal": lambda: _ESCAPES.encode("utf-8", "surrogatepass") * 100,
}
"""Makes each file."""


def _doubling(kind: Callable[[Any, Any], Any], times: int) -> Any:
    value: Any = torch.ones(1)
    for _ in range(times):
        value = kind(value, value)
    return value


def _deep(kind: Callable[[Any], Any], times: int) -> Any:
    value: Any = torch.ones(1)
    for _ in range(times):
        value = kind(value)
    return value


def _cycle(value: Any) -> Any:
    if isinstance(value, dict):
        value["itself"] = value
    else:
        value.append(value)
    return value


class _Odd:
    """A value whose text acts on a terminal."""

    def __repr__(self) -> str:
        return _ESCAPES


class _Raising:
    """A value that raises whatever is done with it."""

    def __repr__(self) -> str:
        raise MemoryError

    def __len__(self) -> int:
        raise ValueError


VALUES: dict[str, Callable[[], Any]] = {
    "lists that double": lambda: _doubling(lambda a, b: [a, b], 60),
    "tuples that double": lambda: _doubling(lambda a, b: (a, b), 25),
    "dicts that double": lambda: _doubling(lambda a, b: {"a": a, "b": b}, 60),
    "ordered dicts that double": lambda: _doubling(lambda a, b: OrderedDict(a=a, b=b), 30),
    "a list that holds itself": lambda: _cycle([torch.ones(1)]),
    "a dict that holds itself": lambda: _cycle({"a": torch.ones(1)}),
    "deep lists": lambda: _deep(lambda value: [value], 100_000),
    "deep tuples": lambda: _deep(lambda value: (value,), 10_000),
    "deep dicts": lambda: _deep(lambda value: {"k": value}, 100_000),
    "deep dicts with long keys": lambda: _deep(lambda value: {"k" * 2000: value}, 5000),
    "wide and deep lists": lambda: _deep(lambda value: [value] * 8, 8),
    "a million numbers": lambda: list(range(1_000_000)),
    "a million keys": lambda: dict.fromkeys(range(1_000_000)),
    "a million of one tensor": lambda: [torch.ones(1)] * 1_000_000,
    "an ordered dict of a million": lambda: OrderedDict.fromkeys(range(300_000)),
    "keys that act on a terminal": lambda: {_ESCAPES: torch.ones(1), (_ESCAPES, 1): torch.ones(1)},
    "text that acts on a terminal": lambda: _ESCAPES * 1000,
    "HTML": lambda: {"<script>alert(1)</script>": "<img src=x onerror=alert(1)>", "&": torch.ones(1)},
    "a value whose text acts on a terminal": _Odd,
    "a value that raises": lambda: [_Raising(), {"params": _Raising()}],
    "a number of a million digits": lambda: 1 << 3_000_000,
    "bytes": lambda: bytes(100 << 20),
    "a key that is a deep tuple": lambda: {(1, (2, (3, (4, (5, (6,)))))): torch.ones(1)},
}
"""Makes each value, for the Deck."""


def acts(url: str, target: str, options: Mapping[str, Any] | None = None) -> dict[str, Callable[[], Any]]:
    """What is tried with a file: each entry point. Returns what people see of it, where they see anything.

    Args:
        url: The file.
        target: Where to copy it.
        options: The storage options of both. Where they are no JSON (a token of Google's library), the command is left
            out: nobody could say them to it.
    """
    more: dict[str, Any] = {"storage_options": options} if options else {}
    both: dict[str, Any] = {"source_storage_options": options, "target_storage_options": options} if options else {}

    def load(**arguments: Any) -> None:
        torchferry.load(url, **arguments, **more)

    def deck() -> str:
        return deck_of(LoadedCheckpoint({"hyper": torchferry.load(url, **more)}))

    found: dict[str, Callable[[], Any]] = {
        "load": load,
        "load, verify=False": lambda: load(verify=False),
        "load, keys": lambda: load(keys=["k0"]),
        "load, meta": lambda: load(map_location="meta"),
        "load, into": lambda: load(into={"k0": torch.zeros(4)}, strict=False),
        "inspect": lambda: repr(torchferry.inspect(url, **more)),
        "inspect, in a notebook": lambda: torchferry.inspect(url, **more)._repr_html_(),
        "verify": lambda: torchferry.verify(url, **more) and None,
        "copy": lambda: torchferry.copy(url, target, **both) and None,
        "copy, verify=False": lambda: torchferry.copy(url, target, verify=False, **both) and None,
        "diff": lambda: str(torchferry.diff(url, url, first_storage_options=options, second_storage_options=options)),
        "convert": lambda: torchferry.convert(url, f"{target}.safetensors", **both) and None,
        "Deck": deck,
    }
    try:
        shell = ["--storage-options", json.dumps(options)] if options else []
    except TypeError:
        return found
    return found | {
        "torchferry inspect": lambda: _output("inspect", url, *shell),
        "torchferry inspect --all": lambda: _output("inspect", url, "--all", *shell),
        "torchferry inspect --depth": lambda: _output("inspect", url, "--depth", "100000", *shell),
        "torchferry inspect --json": lambda: _output("inspect", url, "--json", *shell),
        "torchferry verify": lambda: _output("verify", url, *shell),
        "torchferry copy": lambda: _output("copy", url, target, *shell),
        "torchferry ls": lambda: _output("ls", "--long", url, *shell),
        "torchferry diff": lambda: _output("diff", url, url, *shell),
        "torchferry convert": lambda: _output("convert", url, f"{target}.safetensors", *shell),
    }


class _Terminal(io.TextIOBase):
    """Takes what is printed, and keeps the characters that a terminal would act on."""

    def __init__(self) -> None:
        super().__init__()
        self.unfit: set[str] = set()

    def write(self, text: str) -> int:
        self.unfit.update(_unfit(text))
        return len(text)


def _output(*arguments: str) -> str:
    """What the command prints that a terminal would act on."""
    terminal = _Terminal()
    with contextlib.redirect_stdout(terminal), contextlib.redirect_stderr(terminal):
        command(arguments)
    return "".join(terminal.unfit)


@dataclass(frozen=True, slots=True)
class Taken:
    """What became of a try: "right", "clear error", or one of :data:`UNWANTED`; what exactly; and what it took."""

    outcome: str
    detail: str
    seconds: float
    nbytes: int


def taken(act: Callable[[], Any], size: int, *, files: int = 1) -> Taken:
    """Tries something with a file of so many bytes, which is read as so many files."""
    began, before = time.process_time(), _reset_peak()
    outcome, detail = "right", ""
    try:
        shown = act()
        if isinstance(shown, str):
            detail = ", ".join(map(repr, sorted(_unfit(shown))))
    except torchferry.TorchferryError as error:
        shown = "\n".join([str(error), *getattr(error, "__notes__", [])])
        outcome, detail = "clear error", ", ".join(map(repr, sorted(_unfit(shown))))
    except Exception as error:  # noqa: BLE001 - that is what is looked for
        outcome, detail = "other error", f"{type(error).__name__}: {error}"[:200]
    seconds, nbytes = time.process_time() - began, _peak() - before - size
    if outcome != "other error" and detail:
        outcome = "acts on a terminal"
    elif outcome != "other error" and seconds > SLOW * files:
        outcome, detail = "long", f"{seconds:.1f} s"
    elif outcome != "other error" and nbytes > MEMORY:
        outcome, detail = "memory", f"{nbytes >> 20} MiB"
    return Taken(outcome, detail, seconds, nbytes)


def _unfit(text: str) -> set[str]:
    """What people must not see of a text."""
    return {char for char in set(text) if not char.isprintable() and char not in "\n\t"}


def _reset_peak() -> int:
    with contextlib.suppress(OSError):  # not Linux
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(field: str) -> int:
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return int(text.partition(f"{field}:")[2].split(None, 1)[0]) << 10


def run(
    put: Callable[[str, bytes], str] | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    only: Callable[[str], bool] = lambda _: True,
    short: bool = False,
    say: Callable[[str], object] = lambda _: None,
) -> dict[str, Any]:
    """Tries every file with every entry point, and every value with the Deck.

    Args:
        put: Stores a file under a name, and returns its URL; by default, in a directory of this machine.
        options: The storage options of these URLs.
        only: Which files and values.
        short: Whether files get only some of the entry points each, in turn: two, or one where they are large.
        say: Called with the name of each before it is tried.

    Returns:
        How many tries there were, and how many ended in each way; and those that ended in an unwanted one.
    """
    report: dict[str, Any] = {"tried": 0, "right": 0, "clear error": 0, "slowest": 0.0} | {
        kind: [] for kind in UNWANTED
    }

    def note(what: str, result: Taken) -> None:
        report["tried"] += 1
        report["slowest"] = max(report["slowest"], result.seconds)
        if result.outcome in UNWANTED:
            report[result.outcome].append(f"{what}: {result.detail}")
        else:
            report[result.outcome] += 1

    directory = Path(tempfile.mkdtemp())
    try:
        with warnings.catch_warnings(action="ignore"):
            _warm(directory)
            gc.collect()
            gc.freeze()  # so that the collector's passes take no time for what is there anyway
            turns = {is_large: itertools.count() for is_large in _SHARES}
            for name, make in FILES.items():
                if not only(name):
                    continue
                say(name)
                data = make()
                place = f"sharded/{_METADATA}" if name.endswith(", sharded") else "x.pt"
                path = directory / place
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(data)
                url = (str(path) if put is None else put(place, data)).removesuffix(f"/{_METADATA}")
                target = str(directory / "copy.pt") if put is None else f"{url}.copy"
                size = len(data)
                del data
                if size >= _VERY_LARGE:
                    _give_back()
                share = _SHARES[size >= _LARGE] if short else 1
                turn = next(turns[size >= _LARGE]) % share
                for act, tried in itertools.islice(acts(url, target, options).items(), turn, None, share):
                    note(f"{name}, {act}", taken(tried, size, files=2 if "diff" in act else 1))
            for name, make in VALUES.items() if put is None else ():
                if only(name):
                    say(name)
                    value = content = checkpoint = None  # the one before
                    _give_back()
                    value = make()
                    content = {
                        "module_state_dict": value,
                        "optimizer_state_dict": {"param_groups": [value, {"a": value}]},
                    }
                    for checkpoint in ({"hyper": value}, content):
                        note(f"{name}, Deck", taken(partial(_deck, checkpoint), 0))
    finally:
        gc.unfreeze()
        shutil.rmtree(directory)
    return report


def _give_back() -> None:
    """Has the memory of what was tried go back to the system, which malloc would keep in pieces."""
    gc.collect()
    with contextlib.suppress(AttributeError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def _deck(content: dict[str, Any]) -> str:
    page = deck_of(LoadedCheckpoint(content))
    if len(page) > _DECK or "<script" in page or "<img" in page:
        raise ValueError(f"a Deck of {len(page)} characters")
    return page


def _warm(directory: Path) -> None:
    """Has everything imported, and the threads started."""
    path = directory / "small.pt"
    path.write_bytes(_SMALL)
    for act in acts(str(path), str(directory / "copy.pt")).values():
        with contextlib.suppress(torchferry.TorchferryError):
            act()


def main() -> None:
    """Prints the report of a run; of the files whose names have the argument in them, where there is one."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--short"]

    def say(name: str) -> None:
        print(name, file=sys.stderr, flush=True)  # noqa: T201 - for who finds the process dead

    part = (*arguments, "")[0]
    report = run(only=lambda name: part in name, short="--short" in sys.argv, say=say)
    print(json.dumps(report, indent=1))  # noqa: T201 - the result


if __name__ == "__main__":
    main()
