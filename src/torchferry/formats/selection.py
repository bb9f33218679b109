"""Decides what a load needs of an archive: which records, hence which bytes."""

from __future__ import annotations

import io
import reprlib
import zipfile
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch.serialization import default_restore_location, get_unsafe_globals_in_checkpoint

from torchferry.errors import (
    CheckpointCorruptError,
    CheckpointFormatError,
    CheckpointKeyError,
    UnsafeCheckpointError,
)
from torchferry.formats.printable import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from torchferry.formats.archive import Archive, Record
    from torchferry.formats.graph import Graph

__all__ = ["Selection", "check_graph", "check_keys", "everything", "is_meta", "select", "unsafe_message"]

_SHOWN_KEYS = 50  # in the message about one that is not there
_SHOWN_GLOBALS = 20
_SHORT = reprlib.Repr()  # of a key, which may be a tuple of many others
_SHORT.maxlevel = 2
_SHORT.maxstring = _SHORT.maxother = 200


@dataclass(frozen=True, slots=True)
class Selection:
    """What a load needs of an object.

    Attributes:
        extents: The byte ranges.
        records: The records that lie in them.
        map_location: What ``torch.load`` is to be given: that of the caller, or one that leaves out the storages that
            are not needed.
    """

    extents: Sequence[tuple[int, int]]
    records: Sequence[Record]
    map_location: Any


def check_graph(graph: Graph, archive: Archive, *, weights_only: bool) -> None:
    """Checks that the archive has all that its pickle refers to, and that it may be loaded.

    Raises:
        CheckpointCorruptError: a storage's record is missing, or is not as long as the storage.
        UnsafeCheckpointError: the pickle names globals that ``weights_only=True`` does not allow.
    """
    for storage in graph.storages.values():
        record = archive.get(storage.record)
        if record is None or record.size != storage.nbytes:
            found = "is missing" if record is None else f"has {record.size} bytes, not {storage.nbytes}"
            raise CheckpointCorruptError(f"{archive.url} is damaged: record {printable(storage.record)} {found}.")
    if weights_only and (unsafe := _unsafe_globals(graph)):
        raise UnsafeCheckpointError(unsafe_message(archive.url, unsafe))


def check_keys(checkpoint: Any, keys: Sequence[str], url: str) -> None:
    """Checks that a checkpoint is a dict with these keys.

    Raises:
        CheckpointFormatError: it is no dict.
        CheckpointKeyError: it lacks a key.
    """
    if not isinstance(checkpoint, dict):
        raise CheckpointFormatError(f"{url} holds no dict, so it has no keys to choose from: load it without keys=.")
    if missing := [key for key in keys if key not in checkpoint]:
        those = ", ".join(map(_SHORT.repr, islice(checkpoint, _SHOWN_KEYS)))
        more = f" and {len(checkpoint) - _SHOWN_KEYS} more" if len(checkpoint) > _SHOWN_KEYS else ""
        raise CheckpointKeyError(f"{url} has no key {', '.join(map(repr, missing))}; its keys are {those}{more}.")


def select(graph: Graph, archive: Archive, keys: Sequence[str] | None, map_location: Any) -> Selection:
    """What a load needs: of some top-level keys, or of everything.

    With ``map_location="meta"`` no storage is needed. With ``keys``, the storages that their values refer to, if that
    can be told; otherwise all.

    Raises:
        CheckpointFormatError: there are keys, and the checkpoint is no dict.
        CheckpointKeyError: it lacks a key.
    """
    if keys is not None and (graph.is_transparent or isinstance(graph.root, dict)):
        check_keys(graph.root, keys, archive.url)
    if is_meta(map_location):
        return _selection(archive, set(), map_location)
    if keys is None or not graph.is_transparent:  # then its root may be a dict of some kind, such as a Counter
        return everything(archive, map_location)
    needed = {storage.record for key in keys for storage in graph.storages_of(graph.root[key]).values()}
    selection = _selection(archive, needed, map_location)
    first = next((archive.get(storage.record) for storage in graph.storages.values() if storage.nbytes), None)
    if first is None:
        return selection
    offsets = {record.offset for record in selection.records}
    return replace(selection, map_location=_restore_only(offsets, first.offset, map_location))


def everything(archive: Archive, map_location: Any) -> Selection:
    """All of an archive."""
    return Selection([(0, archive.start)], archive.records, map_location)


def _selection(archive: Archive, needed: Collection[str], map_location: Any) -> Selection:
    """These records, and all that hold no storage."""
    names = ((index, archive.records.name(index)) for index in range(len(archive.records)))
    records = [archive.records[index] for index, name in names if name in needed or not name.startswith("data/")]
    return Selection([(record.offset, record.end) for record in records], records, map_location)


def is_meta(map_location: Any) -> bool:
    """Whether a ``map_location`` is the meta device, whose tensors have no values; by the same rule as in torch."""
    return isinstance(map_location, str | torch.device) and torch.device(map_location).type == "meta"


def unsafe_message(url: str, unsafe: Collection[str]) -> str:
    """Says which globals ``weights_only=True`` does not allow, and how to allow them."""
    names = ", ".join(map(printable, sorted(unsafe)[:_SHOWN_GLOBALS]))
    if len(unsafe) > _SHOWN_GLOBALS:
        return (
            f"{url} needs {names} and {len(unsafe) - _SHOWN_GLOBALS} others, which weights_only=True does not allow. "
            "weights_only=False runs any code that the checkpoint contains: only if you trust whoever wrote it."
        )
    return (
        f"{url} needs {names}, which weights_only=True does not allow. If you trust whoever wrote it, allow these with "
        f"torch.serialization.add_safe_globals([{names}]), or load with weights_only=False, which runs any code that "
        "the checkpoint contains."
    )


def _unsafe_globals(graph: Graph) -> list[str]:
    """Those of the pickle's globals that torch does not allow, as the caller has set it up."""
    if graph.is_transparent:
        return []
    # No class or function has such a name, and it could not be written to the file below.
    odd = [name for name in graph.globals if not name.isprintable() or " " in name]
    if odd:
        return odd
    # torch answers this for a file only: here is the least file that names the same globals.
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        pairs = (name.rpartition(".") for name in graph.globals)
        calls = "".join(f"c{module}\n{name}\n" for module, _, name in pairs)
        archive.writestr("archive/data.pkl", b"\x80\x02" + calls.encode() + b".")
        archive.writestr("archive/version", b"3\n")
    file.seek(0)
    return get_unsafe_globals_in_checkpoint(file)


def _restore_only(
    offsets: Collection[int], first_offset: int, map_location: Any
) -> Callable[[torch.UntypedStorage, str], Any]:
    """A ``map_location`` that does as the given one for the storages at these offsets, and drops all others.

    The others become meta storages: nothing is read of them, and nothing is moved to a device.

    torch tells a ``map_location`` neither the key nor the offset of a storage. But it is a slice of the mapped file,
    and the first one that is not empty is that of the pickle: so its address gives that of the mapping.
    """
    base: int | None = None

    def restore(storage: torch.UntypedStorage, location: str) -> Any:
        nonlocal base
        if storage.nbytes():
            if base is None:
                base = storage.data_ptr() - first_offset
            if storage.data_ptr() - base not in offsets:
                return torch.UntypedStorage(storage.nbytes(), device="meta")  # type: ignore[no-untyped-call]
        if callable(map_location):
            return map_location(storage, location)
        if isinstance(map_location, dict):
            location = map_location.get(location, location)
        elif map_location is not None:
            location = str(map_location)
        return default_restore_location(storage, location)  # type: ignore[no-untyped-call]

    return restore
