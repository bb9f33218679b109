"""Load planners: DCP's default, without running what a checkpoint contains."""

from __future__ import annotations

import io
from typing import Any

from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import ReadItem

from torchferry.formats.checked import load_bytes
from torchferry.formats.torch_hooks import torch_errors

__all__ = ["SafeLoadPlanner"]


class SafeLoadPlanner(DefaultLoadPlanner):
    """DCP's default planner; what is no tensor is loaded with ``weights_only``.

    Args:
        weights_only: As in ``torch.load``.
        **options: Those of ``DefaultLoadPlanner``.
    """

    def __init__(self, *, weights_only: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self._weights_only = weights_only

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Unpickles an item and puts it where it belongs."""
        name = read_item.dest_index.fqn
        with torch_errors(name, map_location=None, weights_only=self._weights_only, checked=True):
            loaded = load_bytes(value.getbuffer(), name, weights_only=self._weights_only)
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[name], loaded)
        else:
            self.state_dict[name] = loaded
