"""Loads, inspects and verifies safetensors files, and sets of them with an index."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from torchferry.engine.cancellation import in_thread
from torchferry.engine.reader import RangeReader, merge
from torchferry.engine.transfer import current
from torchferry.errors import (
    NotEnoughMemoryError,
    mask,
)
from torchferry.formats.archive import Record
from torchferry.formats.filling import Found, IncompatibleKeys, Target
from torchferry.formats.keys import is_asked
from torchferry.formats.layout import Layout, Run
from torchferry.formats.load_buffer import LoadBuffer
from torchferry.formats.picking import missing_keys
from torchferry.formats.places import TensorInfo
from torchferry.formats.safetensors import (
    Entry,
)
from torchferry.formats.safetensors_dtypes import torch_dtype
from torchferry.formats.selection import is_meta
from torchferry.manifest import Manifest
from torchferry.objects.reading import Job, fetch
from torchferry.objects.safetensors_opening import File

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torchferry.objects.requests import LoadRequest

__all__ = ["choose", "fill_safetensors", "inspect_safetensors", "load_safetensors"]

_ALIGNMENT = 4096
_FITS_ANY = 1 << 62


def inspect_safetensors(files: Sequence[File], source: RangeReader) -> Manifest:
    """What is in the files."""
    records, tensors, metadata = [], [], {}
    for file in files:
        prefix = f"{file.name}/" if file.name else ""
        metadata.update(file.header.metadata)
        for name, dtype, shape, start, stop in file.entries:
            record = Record(prefix + name, start, stop - start, None)
            records.append(record)
            dtype_here = torch_dtype(dtype, source.url)
            tensors.append(TensorInfo(name, dtype_here, shape, stop - start, record.name))
    sizes = {file.path: file.source.stat.size for file in files}
    size = sum(sizes.values()) + (0 if files and files[0].source is source else source.stat.size)
    return Manifest(
        mask(source.url),
        size,
        source.stat.etag,
        records,
        tuple(tensors),
        format="safetensors",
        metadata=metadata,
    )


async def load_safetensors(files: Sequence[File], request: LoadRequest, url: str) -> dict[str, torch.Tensor]:
    """The tensors, or those that are asked for, by name."""
    chosen = await in_thread(choose, files, request, url)
    if is_meta(request.map_location):
        return {
            entry.name: torch.empty(entry.shape, dtype=torch_dtype(entry.dtype, url), device="meta")
            for _, entries in chosen
            for entry in entries
        }
    loads = [await in_thread(_Load, file, entries) for file, entries in chosen if entries]
    await fetch([load.job() for load in loads])
    with current().stage("unpickling"):
        return await in_thread(_tensors, loads, request.map_location)


async def fill_safetensors(files: Sequence[File], request: LoadRequest, url: str, target: Target) -> IncompatibleKeys:
    """Fills tensors that exist with those of the same name."""
    chosen = await in_thread(choose, files, request, url)
    found = {
        name: Found(torch_dtype(dtype, url), shape, (start, stop), file.name)
        for file, entries in chosen
        for name, dtype, shape, start, stop in entries
    }
    target.check(found, {}, url, strict=request.strict)
    loads: list[_Load] = []
    filled: list[str] = []
    for file, entries in chosen:
        direct = target.direct({entry.name: found[entry.name] for entry in entries})
        filled += direct
        rest = [entry for entry in entries if entry.name not in direct and target.wants(entry.name)]
        loads.append(await in_thread(_Load, file, rest, dict(direct.values())))
    await fetch([load.job() for load in loads])
    return await in_thread(
        lambda: target.finish(_tensors(loads, request.map_location), filled, found, {}, url, strict=request.strict)
    )


def choose(files: Sequence[File], request: LoadRequest, url: str) -> list[tuple[File, list[Entry]]]:
    """The tensors of each file that are asked for: to be called in a thread, as it may ask a function of the user's.

    Raises:
        CheckpointKeyError: a key takes nothing.
    """
    keys, exclude = request.choice()
    chosen = [(file, [entry for entry in file.entries if is_asked(entry.name, keys, exclude)]) for file in files]
    if keys is not None and keys.unmatched:
        raise missing_keys(url, keys.unmatched, (entry.name for file in files for entry in file.entries))
    return chosen


class _Load:
    """The memory for some tensors of a file.

    Args:
        file: The file.
        entries: The tensors.
        direct: Memory for others, by first offset in the file.
    """

    def __init__(self, file: File, entries: Sequence[Entry], direct: Mapping[int, memoryview] | None = None) -> None:
        self._file = file
        self._direct = dict(direct or {})
        self.entries = entries
        self._extents = merge([(entry.start, entry.stop) for entry in entries if entry.stop > entry.start], _FITS_ANY)
        runs: list[Run] = []
        at = 0
        for start, stop in self._extents:
            at = -(-at // _ALIGNMENT) * _ALIGNMENT + _lead(start, file.header.start)
            runs.append(Run(start, stop, at))
            at += stop - start
        self._layout = Layout(max(at, 1), runs, lambda: iter(()))
        try:
            self._buffer = LoadBuffer(self._layout)
        except OSError as error:
            raise NotEnoughMemoryError(
                f"{file.source.url}: this machine has no memory for {at} bytes. keys= loads a part of them, into= "
                "fills tensors that exist."
            ) from error

    def job(self) -> Job:
        """What to read."""
        return Job(self._file.source, self._extents, load_buffer=self._buffer, direct=self._direct)

    def tensor(self, entry: Entry) -> torch.Tensor:
        """A tensor, once its bytes have arrived."""
        nbytes = entry.stop - entry.start
        dtype = torch_dtype(entry.dtype, self._file.source.url)
        if not nbytes:
            return torch.empty(entry.shape, dtype=dtype)
        (run,) = self._layout.parts(entry.start, entry.stop)
        flat = self._buffer.tensor(run.at, (nbytes,))
        if flat.data_ptr() % dtype.itemsize:
            flat = flat.clone()
        return flat.view(dtype).reshape(entry.shape)


def _lead(start: int, data_start: int) -> int:
    """Where in a page a run begins: so that tensors are aligned as they are among the file's tensors."""
    return (start - data_start) % _ALIGNMENT


def _tensors(loads: Iterable[_Load], map_location: Any) -> dict[str, torch.Tensor]:
    place = partial(_place, map_location=map_location)
    return {entry.name: place(load.tensor(entry)) for load in loads for entry in load.entries}


def _place(tensor: torch.Tensor, *, map_location: Any) -> torch.Tensor:
    """Puts a tensor where ``map_location`` says for one that was saved from the CPU, as in ``torch.load``."""
    if map_location is None:
        return tensor
    if callable(map_location):
        storage = map_location(tensor.untyped_storage(), "cpu")
        if storage is None:
            return tensor
        moved = torch.empty(0, dtype=tensor.dtype, device=storage.device)
        return moved.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())
    if isinstance(map_location, Mapping):
        map_location = map_location.get("cpu", "cpu")
    return tensor.to(map_location)
