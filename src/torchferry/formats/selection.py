"""Decides what a load needs of an archive: which records, hence which bytes, and where they go in memory."""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch
from torch._weights_only_unpickler import _blocklisted_modules
from torch.serialization import get_unsafe_globals_in_checkpoint

from torchferry.errors import (
    CheckpointCorruptError,
    CheckpointFormatError,
    CheckpointKeyError,
    UnsafeCheckpointError,
)
from torchferry.formats.calls import is_transparent_global
from torchferry.formats.layout import Layout, whole
from torchferry.formats.picking import pick
from torchferry.formats.repickle import NotPlainError, repickle
from torchferry.formats.stand_ins import StandIn
from torchferry.formats.subset import subset
from torchferry.printable import printable

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from torchferry.formats.archive import Archive, Record
    from torchferry.formats.graph import Graph
    from torchferry.formats.keys import Keys
    from torchferry.formats.stand_ins import StorageRef

__all__ = [
    "BLOCKED_MODULES",
    "Selection",
    "check_allowed",
    "check_graph",
    "everything",
    "is_meta",
    "legacy",
    "of_part",
    "select",
    "unsafe_message",
]

_SHOWN_GLOBALS = 20
BLOCKED_MODULES = frozenset(_blocklisted_modules)
"""Modules whose functions and classes ``weights_only=True`` never allows."""

_FILLABLE = frozenset({"builtins.dict", "builtins.list", "collections.OrderedDict", "collections.Counter"})


@dataclass(frozen=True, slots=True)
class Selection:
    """What a load needs of an object.

    Attributes:
        extents: The byte ranges.
        records: The records that lie in them.
        layout: Where they go in memory.
        is_final: Whether what torch makes of that memory is what was asked for; otherwise :func:`.take` takes it.
    """

    extents: Sequence[tuple[int, int]]
    records: Sequence[Record]
    layout: Layout
    is_final: bool = True


def check_graph(graph: Graph, archive: Archive, *, weights_only: bool) -> None:
    """Checks that the archive has all that its pickle refers to, and that it may be loaded.

    Raises:
        CheckpointCorruptError: a storage's record is missing, or is not as long as the storage.
        UnsafeCheckpointError: the pickle names globals that ``weights_only=True`` does not allow.
    """
    _check(graph, archive, graph.storages.values(), graph.globals, weights_only=weights_only)


def _check(
    graph: Graph, archive: Archive, storages: Iterable[StorageRef], names: Collection[str], *, weights_only: bool
) -> None:
    for storage in storages:
        record = archive.get(storage.record)
        if record is None or record.size != storage.nbytes:
            found = "is missing" if record is None else f"has {record.size} bytes, not {storage.nbytes}"
            raise CheckpointCorruptError(f"{archive.url} is damaged: record {printable(storage.record)} {found}.")
    if weights_only:
        check_allowed(graph, names)


def check_allowed(graph: Graph, names: Collection[str] | None = None) -> None:
    """Raises an UnsafeCheckpointError where ``weights_only=True`` does not allow all globals of a pickle.

    Args:
        graph: What is in the pickle.
        names: The globals that matter; all by default.
    """
    unsafe = _unsafe_globals(graph.globals if names is None else names)
    if unsafe:
        has_numpy = any(name.partition(".")[0] == "numpy" for name in names or graph.globals)
        dtypes = graph.numpy_dtypes if has_numpy else ()
        raise UnsafeCheckpointError(unsafe_message(graph.url, unsafe, filled=graph.filled, numpy_dtypes=dtypes))


def select(
    graph: Graph,
    archive: Archive,
    size: int,
    keys: Keys | None,
    exclude: Keys | None,
    *,
    meta: bool,
    weights_only: bool,
) -> Selection:
    """What a load needs: of what some keys take, or of everything.

    Args:
        graph: The object.
        archive: Its archive.
        size: Bytes of the whole.
        keys: What is asked for; None for everything.
        exclude: What is left out of that.
        meta: Whether all goes to the meta device, so that no storage is needed.
        weights_only: As in ``torch.load``.

    Raises:
        CheckpointFormatError: there are keys, and the checkpoint has no names.
        CheckpointKeyError: a key takes nothing.
        CheckpointCorruptError: what is needed is missing, or is not as long as it should be.
        UnsafeCheckpointError: what is asked for needs globals that ``weights_only=True`` does not allow.
    """
    if keys is None and exclude is None:
        check_graph(graph, archive, weights_only=weights_only)
        if not meta:
            return everything(archive, size)
        records = _control_records(archive)
        return Selection(_extents(records), records, archive.whole(size))
    try:
        part = pick(graph, keys, exclude)
        selection = of_part(graph, part, archive, meta=meta, weights_only=weights_only)
    except (CheckpointKeyError, CheckpointFormatError, NotPlainError) as error:
        # Some objects can be taken apart only once they are loaded, such as a Counter.
        if isinstance(error, CheckpointCorruptError) or not (
            isinstance(error, NotPlainError) or isinstance(graph.root, StandIn)
        ):
            raise
        check_graph(graph, archive, weights_only=weights_only)
        return everything(archive, size, is_final=False)
    return selection


def of_part(graph: Graph, part: Any, archive: Archive, *, meta: bool, weights_only: bool) -> Selection:
    """What is needed of a part of the object.

    Raises:
        NotPlainError: the part cannot be told from the rest.
    """
    pickled = repickle(part)
    _check(graph, archive, pickled.storages.values(), pickled.globals, weights_only=weights_only)
    names = {storage.record for storage in pickled.storages.values()}
    layout = subset(archive, pickled.pickled, names, empty=meta)
    names.add("byteorder")
    records = [] if meta else [record for name in names if (record := archive.get(name)) is not None]
    records.sort(key=lambda record: record.offset)
    return Selection(_extents(records), records, layout)


def everything(archive: Archive, size: int, *, is_final: bool = True) -> Selection:
    """All of an archive."""
    return Selection([(0, archive.start)], archive.records, archive.whole(size), is_final)


def legacy(size: int, *, is_final: bool) -> Selection:
    """All of an object of ``size`` bytes in the legacy format."""
    return Selection([(0, size)], (), whole(size), is_final)


def _control_records(archive: Archive) -> list[Record]:
    """The records that hold no storage."""
    names = ((index, archive.records.name(index)) for index in range(len(archive.records)))
    return [archive.records[index] for index, name in names if not name.startswith("data/")]


def _extents(records: Sequence[Record]) -> list[tuple[int, int]]:
    return [(record.offset, record.end) for record in records]


def is_meta(map_location: Any) -> bool:
    """Whether a ``map_location`` is the meta device, whose tensors have no values; by the same rule as in torch."""
    return isinstance(map_location, str | torch.device) and torch.device(map_location).type == "meta"


def unsafe_message(
    url: str,
    unsafe: Collection[str],
    *,
    filled: Collection[str] = (),
    numpy_dtypes: Collection[str] = (),
) -> str:
    """Says which globals ``weights_only=True`` does not allow, and how to allow them, where that would help.

    Args:
        url: Of the checkpoint.
        unsafe: The globals.
        filled: Classes whose instances the pickle fills one value after the other. torch does so with its own four
            only, whatever is allowed.
        numpy_dtypes: Codes of numpy's types: their classes must be allowed too, and no pickle names them.
    """
    named = ", ".join(map(printable, sorted(unsafe)[:_SHOWN_GLOBALS]))
    run_any_code = "weights_only=False runs any code that the checkpoint contains: only if you trust whoever wrote it."
    if len(unsafe) > _SHOWN_GLOBALS:
        others = len(unsafe) - _SHOWN_GLOBALS
        return f"{url} needs {named} and {others} others, which weights_only=True does not allow. {run_any_code}"
    needs = f"{url} needs {named}, which weights_only=True does not allow."
    if blocked := sorted(name for name in unsafe if name.partition(".")[0] in BLOCKED_MODULES):
        return f"{needs} torch lets nobody allow {', '.join(map(printable, blocked))}. {run_any_code}"
    if odd := sorted(name for name in unsafe if name in filled and name not in _FILLABLE):
        return (
            f"{needs} To allow them does not help: torch fills no {', '.join(map(printable, odd))}, but dict, "
            f"OrderedDict, Counter and list. Save one of these in its place. {run_any_code}"
        )
    allowed = ", ".join(dict.fromkeys([*map(_as_argument, sorted(unsafe)), *_numpy_classes(numpy_dtypes)]))
    return (
        f"{needs} If you trust whoever wrote it, allow these with torch.serialization.add_safe_globals([{allowed}]), "
        "or load with weights_only=False, which runs any code that the checkpoint contains."
    )


def _as_argument(name: str) -> str:
    """What ``add_safe_globals`` is to be given for a global."""
    name = printable(name)
    for here, there in (("numpy._core.", "numpy.core."), ("numpy.core.", "numpy._core.")):
        is_other = name.startswith(there) and _numpy_is_2() == (here == "numpy._core.")
        if is_other:  # numpy 2 renamed its modules
            return f"({here}{name.removeprefix(there)}, {name!r})"
    return name.removeprefix("builtins.")


def _numpy_is_2() -> bool:
    try:
        return not version("numpy").startswith("1.")
    except PackageNotFoundError:
        return True


def _numpy_classes(codes: Collection[str]) -> list[str]:
    """The classes of numpy's types with these codes: ``numpy.dtypes.Float64DType`` for "f8"."""
    if not codes:
        return []
    try:
        import numpy as np  # torch works without

        kinds = [type(np.dtype(code)) for code in sorted(codes)]
    except Exception:  # noqa: BLE001 - no numpy, or a code that is none: there is nothing to advise
        return []
    return [f"{kind.__module__}.{kind.__qualname__}" for kind in kinds]


def _unsafe_globals(names: Collection[str]) -> list[str]:
    """Those of a pickle's globals that torch does not allow, as the caller has set it up."""
    if all(map(is_transparent_global, names)):
        return []
    # No class or function has such a name, and it could not be written to the file below.
    odd = [name for name in names if not name.isprintable() or " " in name]
    if odd:
        return odd
    # torch answers this for a file only: here is the least file that names the same globals.
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        pairs = (name.rpartition(".") for name in names)
        calls = "".join(f"c{module}\n{name}\n" for module, _, name in pairs)
        archive.writestr("archive/data.pkl", b"\x80\x02" + calls.encode() + b".")
        archive.writestr("archive/version", b"3\n")
    file.seek(0)
    return get_unsafe_globals_in_checkpoint(file)
