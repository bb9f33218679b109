"""What a load asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torchferry.formats.keys import Keys
from torchferry.formats.selection import is_meta
from torchferry.formats.torch_hooks import NO_MODES, TorchModes

__all__ = ["LoadRequest"]


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """The arguments of a load that say what is loaded; see :func:`torchferry.load`."""

    keys: tuple[str, ...] | Callable[[str], bool] | None
    exclude: tuple[str, ...] | Callable[[str], bool] | None
    map_location: Any
    weights_only: bool
    verify: bool
    strict: bool = True
    modes: TorchModes = NO_MODES

    @property
    def leaves_values_out(self) -> bool:
        """Whether the tensors are to have no values: on the meta device, fake ones, or under ``skip_data``."""
        return is_meta(self.map_location) or self.modes.leave_values_out

    @property
    def is_part(self) -> bool:
        """Whether only a part is asked for."""
        return self.keys is not None or self.exclude is not None

    def choice(self) -> tuple[Keys | None, Keys | None]:
        """What is asked for, and what is left out of that."""
        return (
            None if self.keys is None else Keys(self.keys),
            None if self.exclude is None else Keys(self.exclude),
        )
