"""The value classes as flytekit knows them: a checkpoint of ours is one of flytekit's, in every check and method."""

from __future__ import annotations

from dataclasses_json import DataClassJsonMixin, dataclass_json
from flytekit.core.type_engine import TypeTransformerFailedError
from flytekit.extras.pytorch.checkpoint import PyTorchCheckpoint as FlytekitCheckpoint

from torchferry.checkpoint.adapters import Adapter, register_adapter
from torchferry.checkpoint.values import IsDataclass, LoadedCheckpoint, PyTorchCheckpoint, RestoredHyperparameters
from torchferry.errors import CheckpointValueError
from torchferry.flyte.fields import in_flytekit, load_uri, save_uri

__all__ = [
    "FlyteCheckpointValueError",
    "FlytekitCheckpoint",
    "IsDataclass",
    "LoadedCheckpoint",
    "PyTorchCheckpoint",
    "RestoredHyperparameters",
]


class FlyteCheckpointValueError(CheckpointValueError, TypeTransformerFailedError):  # type: ignore[misc]  # flytekit has no types
    """A checkpoint cannot be made of this; flytekit's own class raises the second of its bases."""


def _teach() -> None:
    # flytekit's class is an abstract base class (by DataClassJsonMixin): ours becomes a subclass, and need not inherit.
    FlytekitCheckpoint.register(PyTorchCheckpoint)
    # What else flytekit's class has: to_json, from_json, to_dict, from_dict, schema.
    PyTorchCheckpoint.dataclass_json_config = DataClassJsonMixin.dataclass_json_config  # type: ignore[attr-defined]
    dataclass_json(PyTorchCheckpoint)
    register_adapter(Adapter(FlytekitCheckpoint, FlyteCheckpointValueError, save_uri, load_uri, in_flytekit))


_teach()
