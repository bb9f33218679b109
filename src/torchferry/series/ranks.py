"""The ranks of a distributed training that share a series of checkpoints: the first decides, and all know."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from torchferry import errors
from torchferry.errors import RankFailedError, TorchferryError

if TYPE_CHECKING:
    import torch.distributed as dist

__all__ = ["Ranks"]


class Ranks:
    """The ranks of a process group. Its methods are collective: each rank calls them, in the same order.

    They talk over a gloo group of their own, so that they never get between the collectives of the training, and send
    JSON: no rank unpickles what another one sends, and numpy is not needed.

    Args:
        group: The ranks; None for all.

    Attributes:
        rank: This process's, from 0.
        size: How many there are.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        import torch.distributed as dist

        from torchferry.formats.torch_hooks import new_gloo_group

        self._group: Any = new_gloo_group(group)
        self.rank = dist.get_rank(self._group)
        self.size = dist.get_world_size(self._group)

    @classmethod
    def find(cls, group: dist.ProcessGroup | None = None) -> Ranks | None:
        """The ranks, where this process is one of several."""
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            return None
        return cls(group) if dist.get_world_size(group) > 1 else None

    def any(self, flag: bool) -> bool:
        """Whether some rank says so."""
        return self._extreme(int(flag), "MAX") == 1

    def from_first(self, value: Any, error: BaseException | None = None) -> Any:
        """What the first rank says: a value that JSON has. Or its error, which is raised on every rank."""
        said = self._broadcast({"value": value, "error": _said(error)} if self.rank == 0 else None, 0)
        if said["error"]:
            raise error or _error(said["error"], 0, self.size)
        return said["value"]

    def agree(self, error: BaseException | None) -> None:
        """Raises the error of the first rank that has one, on every rank."""
        failed = self._extreme(self.rank if error is not None else self.size, "MIN")
        if failed < self.size:
            said = self._broadcast(_said(error) if self.rank == failed else None, failed)
            raise error or _error(said, failed, self.size)

    def close(self) -> None:
        """Ends the group; one of some ranks stays (see ``new_gloo_group``)."""
        import torch.distributed as dist

        if dist.is_initialized() and self.size == dist.get_world_size():
            dist.destroy_process_group(self._group)

    def _extreme(self, number: int, which: str) -> int:
        import torch
        import torch.distributed as dist

        tensor = torch.tensor([number], dtype=torch.int64)
        dist.all_reduce(tensor, op=getattr(dist.ReduceOp, which), group=self._group)
        return int(tensor.item())

    def _broadcast(self, value: Any, source: int) -> Any:
        import torch
        import torch.distributed as dist

        data = json.dumps(value).encode() if self.rank == source else b""
        size = torch.tensor([len(data)], dtype=torch.int64)
        root = dist.get_global_rank(self._group, source)
        dist.broadcast(size, root, group=self._group)
        text = torch.tensor(list(data) or [0] * int(size.item()), dtype=torch.uint8)
        dist.broadcast(text, root, group=self._group)
        return json.loads(bytes(text.tolist()))


def _said(error: BaseException | None) -> list[str] | None:
    return None if error is None else [type(error).__name__, str(error)]


def _error(said: list[str], rank: int, size: int) -> TorchferryError:
    """The error of another rank, in the class that it has there where that is torchferry's own."""
    name, text = said
    kind = getattr(errors, name, None)
    if not (isinstance(kind, type) and issubclass(kind, TorchferryError)):
        return RankFailedError(f"Rank {rank} of {size} failed: {name}: {text}")
    return kind(f"Rank {rank} of {size} failed: {text}")
