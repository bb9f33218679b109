"""The legacy format (before torch 1.6): five pickles, and then the storages, each after its length. No I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchferry.errors import CheckpointCorruptError
from torchferry.formats.archive import Record
from torchferry.formats.graph import read_scanned_graph
from torchferry.formats.opcodes import scan_pickle

if TYPE_CHECKING:
    import mmap

    from torchferry.formats.graph import Graph

__all__ = ["check_legacy", "read_legacy"]

_PICKLES = 5  # a magic number, a version, facts about the machine, the object, and the keys of its storages
_LENGTH = 8  # bytes before a storage: how many elements it has


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
        UnusualPickleError: as :func:`.read_graph`.
    """
    stops = _pickles(data, url)
    graph = read_scanned_graph(data[stops[3] : stops[4]], url)
    keys = read_scanned_graph(data[stops[4] : stops[5]], url).root
    at = stops[5]
    records: list[Record] = []
    for key in keys if isinstance(keys, list) else ():
        storage = graph.storages.get(key) if isinstance(key, str) else None
        if storage is None:
            raise CheckpointCorruptError(f"{url} is damaged: it has a storage that none of its tensors refers to.")
        records.append(Record(storage.record, at + _LENGTH, storage.nbytes, None))
        at = records[-1].end
    if len(records) != len(graph.storages) or len(records) != len({record.name for record in records}):
        raise CheckpointCorruptError(f"{url} is damaged: its tensors refer to storages that it does not have.")
    if at > size:
        raise CheckpointCorruptError(f"{url} is truncated: its storages end at byte {at}, the file at byte {size}.")
    return graph, records


def _pickles(data: bytes | mmap.mmap, url: str) -> list[int]:
    """Where the pickles of a checkpoint in the legacy format begin, and the last one ends."""
    stops = [0]
    for _ in range(_PICKLES):
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
    stops = _pickles(data, url)
    if not weights_only:
        return None
    graph = read_scanned_graph(data[stops[3] : stops[4]], url)
    if sum(storage.nbytes for storage in graph.storages.values()) > len(data):
        raise CheckpointCorruptError(f"{url} is damaged: it refers to storages that are longer than the file.")
    return graph
