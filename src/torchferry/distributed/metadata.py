"""The ``.metadata`` of a sharded checkpoint: read without running any of it, and what torchferry adds to it.

It is a pickle of ``torch.distributed.checkpoint.metadata.Metadata``. Its ``storage_data`` says where each item is:
``_StorageInfo(relative_path, offset, length)``. torchferry adds attributes that stock readers unpickle and ignore:

* to each ``_StorageInfo``: ``data_offset`` and ``crc32``, as in :class:`~torchferry.formats.item_stream.Written`;
* to ``storage_meta``: ``torchferry``, a dict: ``version``, ``url`` (where it was saved, without secrets), and
  ``shards``, which has size and ETag of each, by relative path.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
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
from torchferry.printable import printable

__all__ = [
    "Extras",
    "chunk_of",
    "extras_of",
    "items_by_shard",
    "read_metadata",
    "shards_of",
    "storage_info",
    "write_metadata",
]

_VERSION = 1  # of what torchferry adds
_EACH = 32  # bytes that the values of a pickle of DCP's may take for each of its own: they take 17 to 23
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
    """

    url: str | None = None
    shards: Mapping[str, tuple[int, str | None]] = field(default_factory=dict)


def storage_info(relative_path: str, written: Written) -> _StorageInfo:
    """Where an item is, as stock readers want to know it, and what torchferry adds."""
    info = _StorageInfo(relative_path, written.offset, written.length)
    vars(info).update(data_offset=written.data_offset, crc32=written.crc32)
    return info


@collector_paused()
def write_metadata(
    metadata: Metadata, storage_data: dict[MetadataIndex, Any], url: str, save: str, shards: Mapping[str, Any]
) -> bytes:
    """Completes ``metadata``, and returns what is to be stored."""
    if "version" in Metadata.__dataclass_fields__:
        metadata.version = _DCP_VERSION
    metadata.storage_data = storage_data
    meta = StorageMeta(checkpoint_id=url, save_id=save)
    vars(meta)["torchferry"] = {"version": _VERSION, "url": url, "shards": dict(shards)}
    metadata.storage_meta = meta
    return pickle.dumps(metadata)


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
    if not is_checked:
        scan_pickle(data, url, each=_EACH)
        if weights_only:
            read_scanned_graph(data, url)  # looks at what its calls would take
    try:
        loaded = _Unpickler(io.BytesIO(data), url).load() if weights_only else pickle.loads(data)
    except UnsafeCheckpointError:
        raise
    except Exception as error:
        raise CheckpointCorruptError(f"{url} is damaged: {type(error).__name__}: {printable(str(error))}") from error
    parts = [getattr(loaded, name, None) for name in ("state_dict_metadata", "storage_data")]
    if not isinstance(loaded, Metadata) or not all(isinstance(part, dict) for part in parts):
        raise CheckpointFormatError(
            f"{url} is not the metadata of a checkpoint that torch.distributed.checkpoint wrote."
        )
    for path in shards_of(loaded):
        if not isinstance(path, str) or not path or path.startswith(("/", "\\")) or ".." in path.split("/"):
            raise CheckpointFormatError(
                f"{url} names a shard that is not within the checkpoint: {printable(str(path))}"
            )
    if getattr(loaded, "storage_meta", None) is None:
        loaded.storage_meta = StorageMeta()
    return loaded


def extras_of(metadata: Metadata) -> Extras:
    """What torchferry added; nothing where somebody else wrote the checkpoint."""
    added = getattr(metadata.storage_meta, "torchferry", None)
    if not isinstance(added, dict):
        return Extras()
    shards = {
        str(path): (int(size), None if etag is None else str(etag)) for path, (size, etag) in added["shards"].items()
    }
    return Extras(str(added.get("url")), shards)


def shards_of(metadata: Metadata) -> list[str]:
    """The relative paths of all shards, each once."""
    return list(dict.fromkeys(info.relative_path for info in metadata.storage_data.values()))


def items_by_shard(metadata: Metadata) -> dict[str, list[tuple[MetadataIndex, Any]]]:
    """The items of each shard, by its relative path: index, and where it is."""
    found: dict[str, list[tuple[MetadataIndex, Any]]] = {}
    for index, info in metadata.storage_data.items():
        found.setdefault(info.relative_path, []).append((index, info))
    return found


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
