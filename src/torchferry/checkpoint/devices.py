"""Where a task's tensors go."""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch

__all__ = ["default_map_location", "give_memory"]


def default_map_location() -> torch.device:
    """The device for the tensors of this process: its rank's accelerator, or the CPU where there is none.

    The rank on this machine comes from ``LOCAL_RANK``, which every torch launcher sets; ranks beyond the number of
    devices start over (a launcher may show each process only its own). Without a rank it is the device that is
    current in this thread.
    """
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return torch.device("cpu")
    rank = os.environ.get("LOCAL_RANK", "")
    if rank.isdecimal():
        return torch.device(accelerator.type, int(rank) % torch.accelerator.device_count())
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def give_memory(module: torch.nn.Module, state: Mapping[str, Any]) -> None:
    """Gives what a module has on the meta device memory, where ``state`` is to fill it, on the device of that.

    The tensors stay the same objects: an optimizer that has them keeps them, and tied ones stay tied.
    """
    named = chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
    for name, tensor in list(named):
        saved = state.get(name)
        if not tensor.is_meta or not isinstance(saved, torch.Tensor):
            continue
        filled = torch.empty_like(tensor.detach(), device=saved.device)
        if isinstance(tensor, torch.nn.Parameter):
            filled = torch.nn.Parameter(filled, requires_grad=tensor.requires_grad)
        torch.utils.swap_tensors(tensor, filled)  # type: ignore[no-untyped-call]  # torch has no annotation
