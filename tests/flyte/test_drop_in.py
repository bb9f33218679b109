"""What flytekit promises of its own checkpoint, for whoever imports it from flytekit or from torchferry."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import flytekit.extras.pytorch
import flytekit.extras.pytorch.checkpoint
import pytest
import torch
from dataclasses_json import DataClassJsonMixin
from flytekit import FlyteContext, task, workflow
from flytekit.configuration import Image, ImageConfig, SerializationSettings
from flytekit.core.type_engine import TypeTransformerFailedError
from flytekit.tools.translator import get_serializable

import torchferry.flyte
import torchferry.flyte.checkpoint
from torchferry.flyte.values import FlytekitCheckpoint

Flytekits = flytekit.extras.pytorch.PyTorchCheckpoint
Submodules = flytekit.extras.pytorch.checkpoint.PyTorchCheckpoint
Torchferrys = torchferry.flyte.checkpoint.PyTorchCheckpoint

pytestmark = pytest.mark.usefixtures("context")


@dataclass
class Settings(DataClassJsonMixin):
    rounds: int
    error: float


class SettingsTuple(NamedTuple):
    rounds: int
    error: float


def build() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    module = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten(), torch.nn.Linear(8, 2))
    return module, torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)


def tasks(cls: Any) -> tuple[Any, Any, Any]:
    """The same tasks, with the class from each place it can be imported from."""

    def from_dict(settings: Settings) -> Any:
        module, optimizer = build()
        return cls(module=module, hyperparameters=asdict(settings), optimizer=optimizer)

    def from_tuple() -> Any:
        module, optimizer = build()
        return cls(module=module, hyperparameters=SettingsTuple(rounds=4, error=0.5), optimizer=optimizer)

    def receive(checkpoint: Any) -> int:
        module, optimizer = build()
        module.load_state_dict(checkpoint["module_state_dict"])
        optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
        assert checkpoint["error"] == 0.5
        return int(checkpoint["rounds"])

    from_dict.__annotations__["return"] = from_tuple.__annotations__["return"] = cls
    receive.__annotations__["checkpoint"] = cls
    return task(from_dict), task(from_tuple), task(receive)


PLACES = pytest.mark.parametrize(
    "cls",
    [Flytekits, Submodules, Torchferrys, FlytekitCheckpoint],
    ids=["flytekit", "flytekit's submodule", "torchferry", "flytekit, before torchferry"],
)


@PLACES
def test_hyperparameters_in_every_form_reach_the_next_task(cls: Any) -> None:
    from_dict, from_tuple, receive = tasks(cls)

    @workflow
    def wf() -> tuple[int, int]:
        settings = Settings(rounds=4, error=0.5)
        return receive(checkpoint=from_dict(settings=settings)), receive(checkpoint=from_tuple())

    assert tuple(wf()) == (4, 4)


@PLACES
def test_a_dataclass_and_a_module_alone_are_enough(cls: Any) -> None:
    @task
    def keys(checkpoint: Flytekits) -> list[str]:
        return list(checkpoint)

    module, _ = build()
    assert keys(checkpoint=cls(hyperparameters=Settings(4, 0.5))) == ["rounds", "error"]
    assert keys(checkpoint=cls(module=module)) == ["module_state_dict"]


def test_a_checkpoint_of_torchferry_is_one_of_flytekits_in_every_check() -> None:
    for checkpoint in (Torchferrys(hyperparameters={"a": 1}), torchferry.flyte.LoadedCheckpoint({"a": 1})):
        assert isinstance(checkpoint, FlytekitCheckpoint)
        assert isinstance(checkpoint, DataClassJsonMixin)
    assert issubclass(Torchferrys, FlytekitCheckpoint)
    assert not issubclass(dict, FlytekitCheckpoint)


@pytest.mark.parametrize("name", ["to_dict", "from_dict", "to_json", "from_json", "schema", "dataclass_json_config"])
def test_torchferrys_class_has_the_members_of_flytekits(name: str) -> None:
    ours, flytekits = getattr(Torchferrys, name), getattr(FlytekitCheckpoint, name)
    assert getattr(ours, "__func__", ours) is getattr(flytekits, "__func__", flytekits)


@PLACES
def test_an_empty_checkpoint_is_refused(cls: Any) -> None:
    with pytest.raises(TypeTransformerFailedError, match="at least one of module, hyperparameters"):
        cls()


@PLACES
def test_a_task_is_registered_with_flytekits_literal_type(cls: Any) -> None:
    _, from_tuple, _ = tasks(cls)
    image = Image(name="default", fqn="test", tag="tag")
    settings = SerializationSettings(ImageConfig(image, [image]), project="p", domain="d", version="v")
    template = get_serializable({}, settings, from_tuple).template
    assert template.interface.outputs["o0"].type.blob.format == "PyTorchCheckpoint"


@PLACES
def test_the_literal_is_flytekits(cls: Any, context: FlyteContext) -> None:
    transformer = torchferry.flyte.checkpoint.PyTorchCheckpointTransformer()
    literal_type = transformer.get_literal_type(cls)
    literal = transformer.to_literal(context, cls(hyperparameters={"a": 1}), cls, literal_type)
    assert literal.scalar.blob.metadata.type == literal_type.blob
    assert dict(transformer.to_python_value(context, literal, cls)) == {"a": 1}
