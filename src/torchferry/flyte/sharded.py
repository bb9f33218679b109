"""A sharded checkpoint as a value of Flyte tasks on several ranks (``flytekitplugins-kfpytorch``'s Elastic)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch.distributed as dist
from flytekit import FlyteContext, FlyteContextManager
from flytekit.extend import TypeEngine, TypeTransformer
from flytekit.models.core.types import BlobType
from flytekit.models.literals import Blob, BlobMetadata, Literal, Scalar
from flytekit.models.types import LiteralType

import torchferry
import torchferry.distributed as sharded
from torchferry.errors import mask
from torchferry.flyte.transfer import filesystem_for

if TYPE_CHECKING:
    from torch.distributed.checkpoint.planner import LoadPlanner, SavePlanner

__all__ = ["ShardedCheckpoint", "ShardedCheckpointTransformer"]

_FORMAT = "TorchDistributedCheckpoint"


@dataclass(frozen=True, slots=True)
class ShardedCheckpoint:
    """A checkpoint that many ranks have saved, each its part, and that any number of ranks load.

    Return it from a task on rank 0 (on all ranks, where that is easier): the next task receives the same.

    Attributes:
        url: The directory that it is in.
    """

    url: str

    @classmethod
    def save(
        cls,
        state_dict: dict[str, Any],
        *,
        process_group: dist.ProcessGroup | None = None,
        planner: SavePlanner | None = None,
        part_size: int | None = None,
    ) -> Self:
        """Saves ``state_dict`` below the raw output prefix of the task; to be called on every rank.

        Raises:
            TorchferryError: as :func:`torchferry.distributed.save` does, on every rank.
        """
        ctx = FlyteContextManager.current_context()
        place = [ctx.file_access.get_random_remote_directory()]
        if dist.is_available() and dist.is_initialized():
            source = dist.get_global_rank(process_group, 0) if process_group else 0
            dist.broadcast_object_list(place, src=source, group=process_group)
        filesystem = filesystem_for(ctx, place[0])
        sharded.save(
            state_dict,
            place[0],
            filesystem=filesystem,
            process_group=process_group,
            planner=planner,
            part_size=part_size,
        )
        return cls(place[0])

    def load(
        self,
        state_dict: dict[str, Any],
        *,
        process_group: dist.ProcessGroup | None = None,
        planner: LoadPlanner | None = None,
        weights_only: bool = True,
    ) -> None:
        """Fills ``state_dict``, in place; to be called on every rank.

        Raises:
            TorchferryError: as :func:`torchferry.distributed.load` does, on every rank.
        """
        filesystem = filesystem_for(FlyteContextManager.current_context(), self.url)
        sharded.load(
            state_dict,
            self.url,
            filesystem=filesystem,
            process_group=process_group,
            planner=planner,
            weights_only=weights_only,
        )

    def load_all(self, **options: Any) -> Any:
        """All of it, in this process: what :func:`torchferry.load` returns, which takes the same options."""
        filesystem = filesystem_for(FlyteContextManager.current_context(), self.url)
        return torchferry.load(self.url, filesystem=filesystem, **options)

    def __repr__(self) -> str:
        return f"ShardedCheckpoint({mask(self.url)!r})"


class ShardedCheckpointTransformer(TypeTransformer[ShardedCheckpoint]):  # type: ignore[misc]  # flytekit has no types
    """Passes the reference on: the ranks have saved what it names. The literal is a multipart blob."""

    def __init__(self) -> None:
        super().__init__(name="Sharded PyTorch checkpoint", t=ShardedCheckpoint)

    def get_literal_type(self, t: type[ShardedCheckpoint]) -> LiteralType:  # noqa: ARG002 - flytekit's signature
        """A multipart blob of a format of its own."""
        return LiteralType(blob=_blob_type())

    def to_literal(
        self,
        ctx: FlyteContext,  # noqa: ARG002 - the same
        python_val: ShardedCheckpoint,
        python_type: type[ShardedCheckpoint],  # noqa: ARG002 - the same
        expected: LiteralType,  # noqa: ARG002 - the same
    ) -> Literal:
        """The reference as a literal."""
        return Literal(scalar=Scalar(blob=Blob(metadata=BlobMetadata(type=_blob_type()), uri=python_val.url)))

    def to_python_value(
        self,
        ctx: FlyteContext,  # noqa: ARG002 - the same
        lv: Literal,
        expected_python_type: type[ShardedCheckpoint],  # noqa: ARG002 - the same
    ) -> ShardedCheckpoint:
        """The reference that a literal holds."""
        return ShardedCheckpoint(lv.scalar.blob.uri)

    def guess_python_type(self, literal_type: LiteralType) -> type[ShardedCheckpoint]:
        """``ShardedCheckpoint``, for its literal type.

        Raises:
            ValueError: it is another type.
        """
        if literal_type.blob is not None and literal_type.blob.format == _FORMAT:
            return ShardedCheckpoint
        raise ValueError(f"{self} cannot reverse {literal_type}: it is no sharded checkpoint's.")


def _blob_type() -> Any:
    return BlobType(format=_FORMAT, dimensionality=BlobType.BlobDimensionality.MULTIPART)


TypeEngine.register(ShardedCheckpointTransformer())
