"""Staging: what an asynchronous save copies before the caller goes on."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.checkpoint.metadata import STATE_DICT_TYPE
from torch.distributed.tensor import DTensor

__all__ = ["Stager"]


class Stager:
    """The members of DCP's runtime protocol ``AsyncStager``: a writer that has them stages for itself."""

    _synchronize_after_execute = False

    def __init__(self) -> None:
        super().__init__()
        self._memory: dict[Any, torch.Tensor] = {}

    @property
    def should_synchronize_after_execute(self) -> bool:
        """Whether DCP has to wait for the copies: they are there when :meth:`stage` returns."""
        return self._synchronize_after_execute

    def stage(self, state_dict: STATE_DICT_TYPE) -> STATE_DICT_TYPE:
        """A copy of ``state_dict`` on the CPU, in memory that the next save uses again."""
        return _copy(state_dict, ())

    def synchronize_staging(self) -> None:
        """Nothing is left to wait for."""

    def close(self) -> None:
        """Frees the memory."""


def _copy(value: Any, path: tuple[Any, ...]) -> Any:
    if isinstance(value, DTensor):
        local = _copy(value.to_local().detach(), path)
        return DTensor.from_local(
            local, value.device_mesh, value.placements, run_check=False, shape=value.shape, stride=value.stride()
        )
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copy(item, (*path, key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        copies = [_copy(item, (*path, index)) for index, item in enumerate(value)]
        return type(value)(*copies) if hasattr(value, "_fields") else type(value)(copies)
    return value
