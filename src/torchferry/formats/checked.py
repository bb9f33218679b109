"""``torch.load`` of bytes that nobody has looked at yet: the items of a sharded checkpoint."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from torchferry.formats.archive import LEGACY_FORMAT, SNIFF_SIZE, ZIP_FORMAT, read_archive, sniff
from torchferry.formats.graph import read_graph
from torchferry.formats.legacy import check_legacy
from torchferry.formats.opcodes import UnusualPickleError, scan_pickle
from torchferry.formats.selection import check_allowed, check_graph
from torchferry.formats.torch_hooks import torch_load

if TYPE_CHECKING:
    from torchferry.engine.types import Buffer

__all__ = ["check_bytes", "load_bytes"]


def load_bytes(content: Buffer, url: str, *, map_location: Any = None, weights_only: bool = True) -> Any:
    """What ``torch.load`` makes of them, once they have been checked (:func:`check_bytes`).

    Raises:
        Exception: what torch raises.
    """
    check_bytes(content, url, weights_only=weights_only)
    return torch_load(io.BytesIO(content), map_location=map_location, weights_only=weights_only)


def check_bytes(content: Buffer, url: str, *, weights_only: bool) -> None:
    """Checks a file of torch's before torch sees it; nothing in it is run.

    Raises:
        CheckpointCorruptError: it is damaged, or would take too much time or memory.
        UnsafeCheckpointError: it needs globals that ``weights_only=True`` does not allow.
    """
    data = bytes(content)
    looks = sniff(data[:SNIFF_SIZE])
    if looks == LEGACY_FORMAT:
        graph = check_legacy(data, url, weights_only=weights_only)
        if graph is not None:
            check_allowed(graph)
        return
    archive = read_archive(data, url) if looks == ZIP_FORMAT else None
    if archive is None:
        return  # torch says what it is not
    record = archive.get("data.pkl")
    pickled = b"" if record is None else data[record.offset : record.end]
    try:
        check_graph(read_graph(pickled, url), archive, weights_only=weights_only)
    except UnusualPickleError:
        if weights_only:
            raise
        scan_pickle(pickled, url)
