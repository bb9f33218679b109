"""The ``.metadata`` of a sharded checkpoint: read without running any of it, and what torchferry adds to it.

It is a pickle of ``torch.distributed.checkpoint.metadata.Metadata``. Its ``storage_data`` says where each item is:
``_StorageInfo(relative_path, offset, length)``. torchferry adds attributes that stock readers unpickle and ignore:

* to a ``_StorageInfo``: ``data_offset`` and ``crc32``, as in :class:`~torchferry.formats.item_stream.Written`;
* to ``storage_meta``: ``torchferry``, a dict: ``version``, ``url`` (where it was saved, without secrets), and
  ``shards``, which has size and ETag of each, by relative path; and, where one object was sharded, ``tree``: its dicts
  and lists, with the names of items for their values. DCP's own paths have keys as strings, and no empty dicts.

After the pickle comes its CRC32, which readers that unpickle it do not get to.
"""

from __future__ import annotations

import io
import math
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from isal import isal_zlib
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)

from torchferry.engine.collector import collector_paused
from torchferry.errors import CheckpointCorruptError, CheckpointFormatError, UnsafeCheckpointError
from torchferry.formats.graph import read_scanned_graph
from torchferry.formats.item_stream import Written
from torchferry.formats.opcodes import scan_pickle
from torchferry.formats.stand_ins import name_of
from torchferry.printable import printable

__all__ = [
    "Extras",
    "chunk_of",
    "extras_of",
    "is_transformed",
    "items_by_shard",
    "nest",
    "read_metadata",
    "require_plain",
    "shards_of",
    "storage_info",
    "tree_of",
    "write_metadata",
]

_VERSION = 1  # of what torchferry adds
_EACH = 32  # bytes that the values of a pickle of DCP's may take for each of its own: they take 17 to 23
_CRC32 = b" crc32 by torchferry: "  # and four bytes, little-endian, of what comes before
_DCP_VERSION = "1.0.0"  # as the stock writer says since torch 2.8; readers only look whether it is there

_ALLOWED = frozenset(
    {
        ("builtins", name)
        for name in ("dict", "list", "set", "frozenset", "tuple", "int", "float", "complex", "bytearray", "slice")
    }
    | {
        ("collections", "OrderedDict"),
        ("collections", "defaultdict"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("torch._utils", "_get_layout"),
        ("_codecs", "encode"),
    }
    | {
        (module, name)
        for module in ("pathlib", "pathlib._local")
        for name in ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
    }
    | {
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    }
    | {
        # Where torch had them up to 2.1.
        ("torch.distributed._shard.sharded_tensor.metadata", name)
        for name in ("MEM_FORMAT_ENCODING", "TensorProperties")
    }
    | {
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    }
)


@dataclass(frozen=True, slots=True)
class Extras:
    """What torchferry knows of a checkpoint that it wrote.

    Attributes:
        url: Where it was saved.
        shards: Size and ETag of each shard, by relative path.
        tree: How the items are nested; None where only DCP's own paths tell it.
    """

    url: str | None = None
    shards: Mapping[str, tuple[int, str | None]] = field(default_factory=dict)
    tree: dict[Any, Any] | None = None


def storage_info(relative_path: str, written: Written, *, is_as_planned: bool = True) -> _StorageInfo:
    """Where an item is, as stock readers want to know it, and what torchferry adds.

    Nothing is added to one that is another tensor than its plan says: its archive tells what it is.
    """
    info = _StorageInfo(relative_path, written.offset, written.length)
    if is_as_planned:
        vars(info).update(data_offset=written.data_offset, crc32=written.crc32)
    return info


@collector_paused()
def write_metadata(
    metadata: Metadata,
    storage_data: dict[MetadataIndex, Any],
    url: str,
    save: str,
    shards: Mapping[str, Any],
    tree: dict[Any, Any] | None = None,
) -> bytes:
    """Completes ``metadata``, and returns what is to be stored."""
    if "version" in Metadata.__dataclass_fields__:
        metadata.version = _DCP_VERSION
    metadata.storage_data = storage_data
    meta = StorageMeta(checkpoint_id=url, save_id=save)
    added = {"version": _VERSION, "url": url, "shards": dict(shards)}
    vars(meta)["torchferry"] = added if tree is None else {**added, "tree": tree}
    metadata.storage_meta = meta
    pickled = pickle.dumps(metadata)
    return pickled + _CRC32 + isal_zlib.crc32(pickled).to_bytes(4, "little")


@collector_paused()
def read_metadata(data: bytes, url: str, *, weights_only: bool, is_checked: bool = False) -> Metadata:
    """Unpickles a ``.metadata``.

    Args:
        data: What is stored.
        url: For messages.
        weights_only: Allow only the classes that DCP itself writes there. Without, it can run any code.
        is_checked: Whether another rank has unpickled it already, and found that it takes no more than others do.

    Raises:
        UnsafeCheckpointError: it needs others.
        CheckpointCorruptError: it is damaged.
        CheckpointFormatError: it is something else.
    """
    pickled = _without_crc32(data, url)
    if not is_checked:
        scan_pickle(pickled, url, each=_EACH)
        if weights_only:
            read_scanned_graph(pickled, url)  # looks at what its calls would take
    loaded = _unpickled(pickled, url, weights_only=weights_only)
    try:
        if not is_checked:
            _check_items(loaded)
        _check_places(loaded, url)
    except CheckpointFormatError:
        raise
    except Exception as error:
        raise CheckpointCorruptError(f"{url} is damaged: {printable(str(error))}") from error
    if getattr(loaded, "storage_meta", None) is None:
        loaded.storage_meta = StorageMeta()
    if pickled is data and getattr(loaded.storage_meta, "torchferry", None) is not None:
        raise CheckpointCorruptError(f"{url} is damaged: it lacks the CRC32 that torchferry gave it.")
    return loaded


def _unpickled(pickled: bytes, url: str, *, weights_only: bool) -> Metadata:
    try:
        loaded = _Unpickler(io.BytesIO(pickled), url).load() if weights_only else pickle.loads(pickled)
    except UnsafeCheckpointError:
        raise
    except Exception as error:
        raise CheckpointCorruptError(f"{url} is damaged: {type(error).__name__}: {printable(str(error))}") from error
    parts = [getattr(loaded, name, None) for name in ("state_dict_metadata", "storage_data")]
    if not isinstance(loaded, Metadata) or not all(isinstance(part, dict) for part in parts):
        raise CheckpointFormatError(
            f"{url} is not the metadata of a checkpoint that torch.distributed.checkpoint wrote."
        )
    return loaded


def _without_crc32(data: bytes, url: str) -> bytes:
    """The pickle alone, which is checked; ``data`` itself where it has no CRC32."""
    end = len(data) - len(_CRC32) - 4
    if data[max(end, 0) : -4] != _CRC32:
        return data
    if isal_zlib.crc32(data[:end]) != int.from_bytes(data[-4:], "little"):
        raise CheckpointCorruptError(f"{url} is damaged: its CRC32 does not match.")
    return data[:end]


def _check_items(metadata: Metadata) -> None:
    """Raises what says so, where an item is not what DCP makes of one: a flipped bit can change any of it."""
    for name, stored in metadata.state_dict_metadata.items():
        if not isinstance(name, str):
            raise TypeError(f"{name!r} is no name of an item.")
        if not isinstance(stored, BytesStorageMetadata):
            _check_tensor(name, stored)


def _check_tensor(name: str, stored: Any) -> None:
    if not isinstance(stored, TensorStorageMetadata) or not isinstance(stored.properties.dtype, torch.dtype):
        raise TypeError(f"{name} is neither a tensor nor bytes.")
    held = 0
    for chunk in stored.chunks:
        places = zip(chunk.offsets, chunk.sizes, stored.size, strict=True)
        if not all(offset >= 0 and size >= 0 and offset + size <= whole for offset, size, whole in places):
            raise ValueError(f"{name} has a part that is not within it.")
        held += math.prod(chunk.sizes)
    if held != math.prod(stored.size):
        raise ValueError(f"the parts of {name} have {held} elements, and it has {math.prod(stored.size)}.")


def _check_places(metadata: Metadata, url: str) -> None:
    """The same where a place is not within the checkpoint."""
    for index, info in metadata.storage_data.items():
        if index.fqn not in metadata.state_dict_metadata:
            raise ValueError(f"{index.fqn!r} is stored, and is no item.")
        if min(info.offset, info.length) < 0:
            raise ValueError(f"{index.fqn} is stored nowhere.")
    for path in shards_of(metadata):
        if not isinstance(path, str) or not path or path.startswith(("/", "\\")) or ".." in path.split("/"):
            raise CheckpointFormatError(
                f"{url} names a shard that is not within the checkpoint: {printable(str(path))}"
            )


def extras_of(metadata: Metadata) -> Extras:
    """What torchferry added; nothing where somebody else wrote the checkpoint."""
    added = getattr(metadata.storage_meta, "torchferry", None)
    if not isinstance(added, dict):
        return Extras()
    shards = {
        str(path): (int(size), None if etag is None else str(etag)) for path, (size, etag) in added["shards"].items()
    }
    tree = added.get("tree")
    return Extras(str(added.get("url")), shards, tree if isinstance(tree, dict) else None)


def tree_of(state: Mapping[Any, Any], names: Mapping[tuple[Any, ...], str], url: str) -> dict[Any, Any]:
    """The dicts and lists of a state dict, with the names of items for their values.

    Args:
        state: The state dict.
        names: Of the items, by DCP's paths.
        url: For messages.

    Raises:
        CheckpointFormatError: a key, or what is in a ``_metadata``, is nothing that a ``.metadata`` may hold.
    """

    def part(value: Any, path: tuple[Any, ...]) -> Any:
        if path in names:
            return names[path]
        if not isinstance(value, Mapping):
            return [part(item, (*path, number)) for number, item in enumerate(value)]
        tree = OrderedDict() if isinstance(value, OrderedDict) else {}
        beside = getattr(value, "_metadata", None) if isinstance(value, OrderedDict) else None
        for what in (*value, beside):
            if not _is_simple(what):
                raise CheckpointFormatError(
                    f"{url}: {printable('.'.join(map(str, path)))!r} has a {type(what).__name__} as a key or in its "
                    "_metadata, which a sharded checkpoint cannot keep: load it, and save it without."
                )
        for key, item in value.items():
            tree[key] = part(item, (*path, str(key)))
        if beside is not None:
            vars(tree)["_metadata"] = beside
        return tree

    made: dict[Any, Any] = part(state, ())
    return made


def _is_simple(value: Any) -> bool:
    if isinstance(value, Mapping):
        return type(value) in {dict, OrderedDict} and all(_is_simple((key, item)) for key, item in value.items())
    if type(value) in {tuple, list}:
        return all(map(_is_simple, value))
    return value is None or type(value) in {str, bool, int, float}


def nest(tree: dict[Any, Any], values: Mapping[str, Any], is_asked: Callable[[str], bool], url: str) -> dict[Any, Any]:
    """The values of items, nested as a tree says; of a list that not all is there of, a dict by index.

    Args:
        tree: What :func:`tree_of` has made, or somebody who is not to be trusted.
        values: By the names of the items; others are left out.
        is_asked: Whether an empty dict of a name is wanted.
        url: For messages.

    Raises:
        CheckpointCorruptError: something is in it twice, or is no part of a tree.
    """
    seen: set[int] = set()

    def part(tree: Any, name: str) -> tuple[Any, bool]:  # ``seen`` for nothing; whether all of it is there
        if isinstance(tree, str):
            return values.get(tree, seen), tree in values
        if id(tree) in seen or not isinstance(tree, dict | list):
            raise ValueError("what it says of nesting is no tree")
        seen.add(id(tree))
        before = f"{name}." if name else ""
        named = [*(dict.items(tree) if isinstance(tree, dict) else enumerate(tree))]
        parts = {key: part(below, before + name_of(key)) for key, below in named}
        there = {key: item for key, (item, _) in parts.items() if item is not seen}
        is_whole = all(whole for _, whole in parts.values())
        if not there and (named or (name and not is_asked(name))):
            return seen if name else there, False
        if isinstance(tree, list):
            return [*there.values()] if is_whole else there, is_whole
        if not isinstance(tree, OrderedDict):
            return there, is_whole
        ordered = OrderedDict(there)
        if (beside := vars(tree).get("_metadata")) is not None:
            vars(ordered)["_metadata"] = beside
        return ordered, is_whole

    try:
        made: dict[Any, Any] = part(tree, "")[0]
    except (RecursionError, ValueError) as error:
        raise CheckpointCorruptError(f"{url} is damaged: {error}.") from error
    return made


def shards_of(metadata: Metadata) -> list[str]:
    """The relative paths of all shards, each once."""
    return list(dict.fromkeys(info.relative_path for info in metadata.storage_data.values()))


def items_by_shard(metadata: Metadata) -> dict[str, list[tuple[MetadataIndex, Any]]]:
    """The items of each shard, by its relative path: index, and where it is."""
    found: dict[str, list[tuple[MetadataIndex, Any]]] = {}
    for index, info in metadata.storage_data.items():
        found.setdefault(info.relative_path, []).append((index, info))
    return found


def is_transformed(info: Any) -> bool:
    """Whether an item is stored as an extension of DCP's made it: compressed, say."""
    return bool(getattr(info, "transform_descriptors", None))


def require_plain(index: MetadataIndex, info: Any, url: str) -> None:
    """Raises a ``CheckpointFormatError`` where an item is transformed: nothing here can read or check it."""
    if is_transformed(info):
        raise CheckpointFormatError(
            f"{url}: {printable(index.fqn)} was transformed by an extension "
            f"({printable(str(info.transform_descriptors))}): only the stock reader reads it."
        )


def chunk_of(metadata: Metadata, index: MetadataIndex) -> tuple[torch.dtype, ChunkStorageMetadata]:
    """Dtype, and offsets and sizes of the piece of a tensor that an item holds."""
    stored = metadata.state_dict_metadata[index.fqn]
    assert isinstance(stored, TensorStorageMetadata)  # noqa: S101 - the caller knows
    chunks = stored.chunks
    if index.index is not None and index.index < len(chunks) and chunks[index.index].offsets == index.offset:
        return stored.properties.dtype, chunks[index.index]
    return stored.properties.dtype, _by_offset(chunks, index)


def _by_offset(chunks: Iterable[ChunkStorageMetadata], index: MetadataIndex) -> ChunkStorageMetadata:
    for chunk in chunks:
        if index.offset is None or chunk.offsets == index.offset:
            return chunk
    raise CheckpointCorruptError(f"The metadata knows no part of {printable(index.fqn)} at {index.offset}.")


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, url: str) -> None:
        super().__init__(file)
        self._url = url

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise UnsafeCheckpointError(
            f"{self._url} needs {printable(f'{module}.{name}')}, which metadata of torch.distributed.checkpoint does "
            "not contain by itself. If you trust whoever wrote it, weights_only=False loads it; that can run any code."
        )
