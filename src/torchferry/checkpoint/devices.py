"""Decides where a task's tensors go."""

from __future__ import annotations

import os

import torch

__all__ = ["default_map_location"]


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
