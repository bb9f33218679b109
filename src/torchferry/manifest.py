"""What ``inspect`` and ``verify`` return."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from torchferry.engine.html import html_table

if TYPE_CHECKING:
    from torchferry.formats.archive import Record
    from torchferry.formats.places import TensorInfo

__all__ = ["Manifest", "PlainValue"]

_SHOWN = 40  # in a notebook

PlainValue: TypeAlias = "bool | int | float | str | None"


@dataclass(frozen=True, slots=True, repr=False)
class Manifest:
    """What is in a checkpoint.

    Attributes:
        url: Where it is, without the secrets of a URL.
        size: Bytes of the object; of several files, of all of them.
        etag: Names the version of the object, where the store has such names.
        records: The records of the archive, in the order of the file; of the legacy format, its storages; in
            safetensors, one for each tensor; in sharded checkpoints, one for each item of a shard.
        tensors: The tensors of the saved object, in its order. Several may share a storage, and so a record.
        format: "torch", "safetensors" or "sharded".
        values: Plain values beside the tensors, such as an epoch or a learning rate, by name: the first 1000.
        metadata: The strings of ``__metadata__`` in safetensors.
    """

    url: str
    size: int
    etag: str | None
    records: Sequence[Record]
    tensors: tuple[TensorInfo, ...]
    format: str = "torch"
    values: Mapping[str, PlainValue] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def storage_nbytes(self) -> int:
        """Bytes of all storages, each counted once."""
        if self.format != "torch":
            return sum(record.size for record in self.records)
        return sum(record.size for record in self.records if record.name.startswith("data/"))

    def _repr_html_(self) -> str:
        """A table of the first tensors, for notebooks."""
        rows = [
            (
                tensor.key,
                str(tensor.dtype).removeprefix("torch."),
                " x ".join(map(str, tensor.shape)) or "scalar",
                f"{tensor.nbytes:,}",
            )
            for tensor in self.tensors[:_SHOWN]
        ]
        if len(self.tensors) > _SHOWN:
            rows.append((f"... and {len(self.tensors) - _SHOWN:,} more", "", "", ""))
        rows += [(f"{name} = {value!r}"[:200], "", "", "") for name, value in [*self.values.items()][:_SHOWN]]
        return html_table(repr(self)[1:-1], rows, ("name", "dtype", "shape", "bytes"))

    def __repr__(self) -> str:
        return (
            f"<Manifest of {self.url}: {self.format}, {self.size:,} bytes, {len(self.tensors):,} tensors, "
            f"{len(self.records):,} records>"
        )
