"""The safetensors format: 8 bytes with the length of a JSON header, the header, and the tensors' bytes. No I/O.

The header names each tensor with its dtype, shape, and first and last offset in the bytes that follow; those cover them
without gaps. ``__metadata__`` in it is a table of strings. Large checkpoints are several such files and an index: a
JSON document that says which tensor is in which file.

What is written here is, byte for byte, what the safetensors library writes (0.8). Sources: the format's description in
its README, ``safetensors/src/tensor.rs``, and ``huggingface_hub/serialization/_base.py`` for the names of shards.
"""

from __future__ import annotations

import json
import math
import re
import secrets
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple

from torchferry.errors import CheckpointCorruptError, CheckpointFormatError, CheckpointValueError
from torchferry.formats.json_scan import JsonScanner
from torchferry.printable import printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = [
    "INDEX_SUFFIX",
    "LENGTH_SIZE",
    "LONGEST_INDEX",
    "SUFFIX",
    "Entry",
    "Header",
    "Index",
    "header_size",
    "index_bytes",
    "index_of",
    "item_size",
    "lay_out",
    "parse_header",
    "parse_index",
    "parse_shard_name",
    "shard_names",
    "split",
    "stem_of",
]

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
LENGTH_SIZE = 8
"""Bytes of the header's length, at the start of a file."""
LONGEST_INDEX = 64 << 20
"""Bytes that an index may have."""

_LONGEST_HEADER = 100_000_000  # bytes; the library's own limit
_METADATA = "__metadata__"
_FIELDS = {"dtype", "shape", "data_offsets"}
_INT64_MAX = (1 << 63) - 1  # elements, those of strides included
_MOST_DIMENSIONS = 1000  # as in the pickle of torch.save
_INDEX_NAME = re.compile(r"\.safetensors\.index(\.[^./]+)?\.json")  # with a variant: model.safetensors.index.fp16.json
_SHARD_NAME = re.compile(r"(.*?)(?:-(\d{8}T\d{6}Z-[0-9a-f]{8}))?-\d{5,}-of-\d{5,}\.safetensors", re.DOTALL)
_FILE_NAME = re.compile(r"(?!\.\.?$)[^/\\:\0]{1,255}")

_ITEM_SIZES = {
    # In the order of the library: the tensors of a file are sorted by it, the last ones first.
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "C64": 8,
    "F64": 8,
    "I64": 8,
    "U64": 8,
}
_KNOWN = {name: name for name in _ITEM_SIZES}  # each dtype's name is kept once
_ORDER = {name: number for number, name in enumerate(_ITEM_SIZES)}


def item_size(dtype: str) -> int:
    """Bytes of an element of a dtype that safetensors knows."""
    return _ITEM_SIZES[dtype]


class Entry(NamedTuple):
    """One tensor of a file.

    Attributes:
        name: Its name.
        dtype: Of its elements, as safetensors calls it: "F32".
        shape: Its sizes.
        start: Where its bytes start in the file.
        stop: Where they end.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Header(NamedTuple):
    """What a file holds.

    Attributes:
        entries: The tensors, in the order of the header.
        metadata: The strings of ``__metadata__``.
        start: Where the tensors' bytes start in the file.
    """

    entries: tuple[Entry, ...]
    metadata: dict[str, str]
    start: int


class Index(NamedTuple):
    """Which tensor is in which file.

    Attributes:
        files: The name of the file of each tensor, in the order of the index.
    """

    files: dict[str, str]


def header_size(head: bytes, size: int, url: str) -> int:
    """Bytes of the length and the header together.

    Args:
        head: The first 8 bytes of the file, or what it has of them.
        size: Of the file.
        url: For messages.

    Raises:
        CheckpointCorruptError: the header cannot be so long.
    """
    if len(head) < LENGTH_SIZE:
        raise CheckpointCorruptError(f"{url} is truncated: it has {len(head)} bytes.")
    length = int.from_bytes(head[:LENGTH_SIZE], "little")
    if length > _LONGEST_HEADER:
        raise CheckpointCorruptError(f"{url} is damaged: a header of {length} bytes is longer than any may be.")
    if LENGTH_SIZE + length > size:
        raise CheckpointCorruptError(f"{url} is truncated: it has {size} bytes, its header alone {length}.")
    return LENGTH_SIZE + length


def parse_header(data: bytes, size: int, url: str) -> Header:
    """Parses a header, and checks that it describes a file of this size.

    Takes memory for what the header lists, some 8 bytes for each of its own.

    Args:
        data: The file's bytes up to the end of the header.
        size: Of the file.
        url: For messages.

    Raises:
        CheckpointCorruptError: it is none, or contradicts itself or the file's size.
        CheckpointFormatError: a tensor has a dtype that is not known.
    """
    start = len(data)
    try:
        header = _parse(str(memoryview(data)[LENGTH_SIZE:], "utf-8"), start, url)
        _check_tiling(header, size)
    except CheckpointFormatError:
        raise
    except ValueError as error:
        raise CheckpointCorruptError(f"{url} is damaged: its safetensors header is none: {error}.") from error
    return header


def _parse(text: str, start: int, url: str) -> Header:
    scanner = JsonScanner(text)
    metadata: dict[str, str] = {}
    entries: dict[str, Entry] = {}
    has_metadata = False
    for name in scanner.members():
        if name in entries or (name == _METADATA and has_metadata):
            raise ValueError(f"it names {printable(name)!r} twice")
        has_metadata |= name == _METADATA
        if name == _METADATA:
            if scanner.null():  # as the library takes it
                continue
            for key in scanner.members():
                metadata[key] = scanner.string()
        else:
            entries[name] = _parse_entry(scanner, name, start, url)
    scanner.end()
    return Header(tuple(entries.values()), metadata, start)


def _parse_entry(scanner: JsonScanner, name: str, start: int, url: str) -> Entry:
    dtype: str | None = None
    shape: tuple[int, ...] | None = None
    offsets: tuple[int, ...] | None = None
    for key in scanner.members():
        if key == "dtype" and dtype is None:
            dtype = scanner.string()
        elif key == "shape" and shape is None:
            shape = scanner.integers(_MOST_DIMENSIONS)
        elif key == "data_offsets" and offsets is None:
            offsets = scanner.integers(2)
        elif key in _FIELDS:
            raise ValueError(f"tensor {printable(name)!r} has a field {printable(key)!r} twice")
        else:
            scanner.skip()  # as the library does
    if dtype is None or shape is None or offsets is None or len(offsets) != 2:  # noqa: PLR2004 - first and last
        raise ValueError(f"tensor {printable(name)!r} lacks its dtype, shape or data_offsets")
    if dtype not in _ITEM_SIZES:
        raise CheckpointFormatError(
            f"{url}: tensor {printable(name)!r} has the dtype {printable(dtype)!r}, which torchferry does not know: "
            "the safetensors library may."
        )
    first, last = offsets
    if min(shape, default=0) < 0 or math.prod(shape) * _ITEM_SIZES[dtype] != last - first:
        raise ValueError(f"tensor {printable(name)!r} has {last - first} bytes, which is not what its shape takes")
    if math.prod(max(size, 1) for size in shape) > _INT64_MAX:
        raise ValueError(f"tensor {printable(name)!r} has a shape that torch has not")
    return Entry(name, _KNOWN[dtype], shape, start + first, start + last)


def _check_tiling(header: Header, size: int) -> None:
    at = header.start
    for entry in sorted(header.entries, key=lambda entry: (entry.start, entry.stop)):
        if entry.start != at:
            raise ValueError(f"the bytes of tensor {printable(entry.name)!r} do not start where others end")
        at = entry.stop
    if at != size:
        raise ValueError(f"its tensors end at byte {at}, the file at {size}")


def lay_out(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    metadata: Mapping[str, str],
    order: Mapping[str, int] | None = None,
) -> tuple[bytes, Header]:
    """Lays a file out: the bytes before the tensors', and its header, with the tensors in the order of the file.

    Args:
        tensors: Dtype and shape of each.
        metadata: The strings of ``__metadata__``.
        order: The place of each in the file; by default the library's order.

    Raises:
        CheckpointValueError: a name that safetensors has for something else, or that is no text.
    """
    described: dict[str, object] = {_METADATA: dict(metadata)} if metadata else {}
    entries: list[Entry] = []
    at = 0
    if _METADATA in tensors:
        raise CheckpointValueError(f"safetensors has no room for a tensor named {_METADATA!r}: rename it.")
    by_library = {name: (-_ORDER[dtype], _encoded(name)) for name, (dtype, _) in tensors.items()}
    for name in sorted(tensors, key=by_library.__getitem__ if order is None else order.__getitem__):
        dtype, shape = tensors[name]
        size = math.prod(shape) * _ITEM_SIZES[dtype]
        described[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        entries.append(Entry(name, dtype, shape, at, at + size))
        at += size
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % LENGTH_SIZE)
    if len(text) > _LONGEST_HEADER:
        raise CheckpointValueError(f"The header would have {len(text)} bytes; safetensors allows {_LONGEST_HEADER}.")
    start = LENGTH_SIZE + len(text)
    placed = tuple(entry._replace(start=start + entry.start, stop=start + entry.stop) for entry in entries)
    return len(text).to_bytes(LENGTH_SIZE, "little") + text, Header(placed, dict(metadata), start)


def _encoded(name: str) -> bytes:
    try:
        return name.encode()
    except UnicodeEncodeError as error:
        raise CheckpointValueError(
            f"safetensors stores names as UTF-8, which {printable(name)!r} cannot be: rename it."
        ) from error


def split(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Names by shard, in their order: each shard has at most ``most`` bytes, or one tensor."""
    shards: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = most
        shards[-1].append(name)
        room -= size
    return shards or [[]]


def index_of(path: str) -> str:
    """The path of the index of a checkpoint that is saved to a path: of a file, or of the index itself."""
    return path if path.endswith(INDEX_SUFFIX) else path.removesuffix(SUFFIX) + INDEX_SUFFIX


def stem_of(index: str) -> str:
    """What the paths of an index's shards begin with: "model" for model.safetensors.index.json."""
    if found := _INDEX_NAME.search(index):
        return index[: found.start()] + (found[1] or "")
    return index.removesuffix(SUFFIX if index.endswith(SUFFIX) else ".json")


def shard_names(stem: str, count: int, *, apart: bool = False) -> list[str]:
    """The names of so many shards: Hugging Face's; or, ``apart``, names that no other save has."""
    if apart:
        stem = f"{stem}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}"
    return [f"{stem}-{number:05}-of-{count:05}{SUFFIX}" for number in range(1, count + 1)]


def parse_shard_name(name: str) -> tuple[str, str | None] | None:
    """The stem of a shard's name, and what tells its save from others, where it has that; None for another name."""
    found = _SHARD_NAME.fullmatch(name)
    return None if found is None else (found[1], found[2])


def index_bytes(files: Iterable[tuple[str, str]], total: int) -> bytes:
    """An index, as Hugging Face's libraries write it.

    Args:
        files: Names of tensors, with the names of the files that they are in.
        total: Bytes of all tensors.
    """
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files))}
    return json.dumps(index, indent=2).encode() + b"\n"


def parse_index(data: bytes, url: str) -> Index:
    """Parses an index.

    Raises:
        CheckpointCorruptError: it is none, or names a file elsewhere than beside it.
        CheckpointFormatError: it is some other JSON.
    """
    files: dict[str, str] = {}
    found = False
    try:
        scanner = JsonScanner(data.decode())
        for key in scanner.members():
            if key == "weight_map" and not found:
                found = True
                _read_files(scanner, files)
            else:
                scanner.skip()
        scanner.end()
    except ValueError as error:
        raise CheckpointCorruptError(f"{url} is damaged: it is no index of safetensors files: {error}.") from error
    if not found:
        raise CheckpointFormatError(f"{url} is JSON, but no index of safetensors files: it has no weight_map.")
    return Index(files)


def _read_files(scanner: JsonScanner, files: dict[str, str]) -> None:
    names: dict[str, str] = {}  # each file's name is kept once
    for name in scanner.members():
        file = scanner.string()
        if name in files:
            raise ValueError(f"it names {printable(name)!r} twice")
        if not _FILE_NAME.fullmatch(file):
            raise ValueError(f"it names the file {printable(file)!r}, which is not beside it")
        files[name] = names.setdefault(file, file)
