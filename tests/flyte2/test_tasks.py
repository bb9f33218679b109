"""Everywhere a checkpoint can stand in Flyte 2, in local runs whose raw data is on S3."""

from __future__ import annotations

import copyreg
import io
import typing
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, Optional, Union

import flyte
import pytest
import torch
from flyte.types import TypeEngine
from pydantic import BaseModel
from runs import Runs
from samples import Progress, make_checkpoint

from torchferry import LoadOptions, SaveOptions
from torchferry.flyte2 import LoadedCheckpoint, PyTorchCheckpoint

env = flyte.TaskEnvironment(name="tests")

ModuleOnly = Annotated[PyTorchCheckpoint, LoadOptions(keys=("module_state_dict",))]


@env.task
def make(seed: int) -> PyTorchCheckpoint:
    return make_checkpoint(seed)


@env.task
async def make_async(seed: int) -> PyTorchCheckpoint:
    return make_checkpoint(seed)


@env.task
def epochs_of(checkpoint: PyTorchCheckpoint) -> int:
    return int(checkpoint["epochs"])


@env.task
async def epochs_of_async(checkpoint: PyTorchCheckpoint) -> int:
    return int(checkpoint["epochs"])


@env.task
async def train_on(checkpoint: PyTorchCheckpoint) -> PyTorchCheckpoint:
    start = make_checkpoint(seed=9)
    checkpoint.restore(module=start.module, optimizer=start.optimizer)
    progress = checkpoint.hyperparameters_as(Progress)
    return PyTorchCheckpoint(start.module, Progress(progress.epochs + 1), start.optimizer)


@env.task
async def keys_of(checkpoint: ModuleOnly) -> list[str]:
    return list(checkpoint)


def test_async_tasks_hand_it_over(runs: Runs) -> None:
    @env.task
    async def main() -> int:
        return await epochs_of_async(await train_on(await make_async(1)))

    assert runs(main) == 4
    assert len(runs.stored()) == 2


def test_sync_tasks_hand_it_over(runs: Runs) -> None:
    @env.task
    def main() -> int:
        return epochs_of(make(1))

    assert runs(main) == 3


def test_a_run_takes_and_returns_one(runs: Runs) -> None:
    returned = runs(train_on, checkpoint=make_checkpoint())
    assert isinstance(returned, LoadedCheckpoint)
    assert returned["epochs"] == 4


def test_what_is_stored_is_what_torch_save_writes(runs: Runs) -> None:
    returned = runs(make, seed=3)
    stored = torch.load(io.BytesIO(runs.fs.cat_file(returned.uri)), weights_only=True)
    assert stored["epochs"] == 3
    assert torch.equal(stored["module_state_dict"]["0.weight"], make_checkpoint(3).module.state_dict()["0.weight"])


def test_options_on_the_annotation_read_a_part(runs: Runs) -> None:
    assert runs(keys_of, checkpoint=make_checkpoint()) == ["module_state_dict"]


def test_options_on_the_annotation_say_how_to_save(runs: Runs) -> None:
    @env.task
    async def tagged() -> Annotated[PyTorchCheckpoint, SaveOptions(metadata={"stage": "test"})]:
        return make_checkpoint()

    assert runs.fs.metadata(runs(tagged).uri)["stage"] == "test"


def test_lists_and_dicts_hold_many(runs: Runs) -> None:
    @env.task
    async def make_many() -> tuple[list[PyTorchCheckpoint], dict[str, PyTorchCheckpoint]]:
        return [make_checkpoint(seed) for seed in range(12)], {"a": make_checkpoint(1), "b": make_checkpoint(2)}

    @env.task
    async def count(many: list[ModuleOnly], named: dict[str, ModuleOnly]) -> list[str]:
        return [key for checkpoint in [*many, *named.values()] for key in checkpoint]

    @env.task
    async def main() -> list[str]:
        many, named = await make_many()
        return await count(many, named)

    assert runs(main) == ["module_state_dict"] * 14


@pytest.mark.parametrize("given", [True, False])
def test_optional_ones_may_be_missing(runs: Runs, given: bool) -> None:
    @env.task
    async def maybe(given: bool) -> Optional[PyTorchCheckpoint]:  # noqa: UP045 - what users write
        return make_checkpoint() if given else None

    @env.task
    async def look(checkpoint: Optional[ModuleOnly] = None) -> list[str]:  # noqa: UP045
        return [] if checkpoint is None else list(checkpoint)

    @env.task
    async def main(given: bool) -> list[str]:
        return await look(await maybe(given))

    assert runs(main, given=given) == (["module_state_dict"] if given else [])


def test_unions_may_hold_one(runs: Runs) -> None:
    @env.task
    async def either(one: bool) -> Union[PyTorchCheckpoint, int]:  # noqa: UP007
        return make_checkpoint() if one else 5

    @env.task
    async def look(value: PyTorchCheckpoint | int) -> int:
        return value if isinstance(value, int) else int(value["epochs"])

    @env.task
    async def main() -> list[int]:
        return [await look(await either(True)), await look(await either(False))]

    assert runs(main) == [3, 5]


class Defaults(BaseModel):
    lr: float = 0.1


@pytest.mark.parametrize("other", [Defaults, bytes, dict[str, int], list, typing.Any])
def test_a_received_checkpoint_is_a_checkpoint_in_any_union(runs: Runs, other: Any) -> None:
    @env.task
    async def main() -> list[int]:
        received = LoadedCheckpoint({"module_state_dict": {"w": torch.ones(2)}, "epochs": 3})
        epochs = []
        for union in (Union[PyTorchCheckpoint, other], Union[other, PyTorchCheckpoint]):  # noqa: UP007
            literal = await TypeEngine.to_literal(received, union, TypeEngine.to_literal_type(union))
            epochs.append((await TypeEngine.to_python_value(literal, union))["epochs"])
        return epochs

    assert runs(main) == [3, 3]


@dataclass
class Config:
    name: str
    start: PyTorchCheckpoint
    part: ModuleOnly
    maybe: Optional[PyTorchCheckpoint] = None  # noqa: UP045


class Model(BaseModel):
    name: str
    start: PyTorchCheckpoint
    part: ModuleOnly
    several: list[PyTorchCheckpoint] = []


# not as a class: flyte 2.12 does not evaluate what is a string under "from __future__ import annotations"
Pair = NamedTuple("Pair", [("first", PyTorchCheckpoint), ("count", int)])  # noqa: UP014


def test_fields_of_dataclasses_hold_them(runs: Runs) -> None:
    @env.task
    async def configure() -> Config:
        return Config("x", make_checkpoint(1), make_checkpoint(2))

    @env.task
    async def look(config: Config) -> list[str]:
        return [str(config.start["epochs"]), *config.part, str(config.maybe)]

    @env.task
    async def main() -> list[str]:
        return await look(await configure())

    assert runs(main) == ["3", "module_state_dict", "None"]


def test_fields_of_pydantic_models_hold_them(runs: Runs) -> None:
    @env.task
    async def configure() -> Model:
        return Model(name="x", start=make_checkpoint(1), part=make_checkpoint(2), several=[make_checkpoint(3)])

    @env.task
    def look(model: Model) -> list[str]:
        return [str(model.start["epochs"]), *model.part, str(model.several[0]["epochs"])]

    @env.task
    async def main() -> list[str]:
        return await look.aio(await configure())

    assert runs(main) == ["3", "module_state_dict", "3"]


def test_named_tuples_hold_them(runs: Runs) -> None:
    @env.task
    async def both() -> Pair:
        return Pair(make_checkpoint(1), 2)

    @env.task
    async def look(pair: Pair) -> int:
        return int(pair.first["epochs"]) + pair.count

    @env.task
    async def main() -> int:
        pair = await both()
        return await look(Pair(pair[0], pair[1]))

    assert runs(main) == 5


def test_several_outputs_are_saved(runs: Runs) -> None:
    @env.task
    async def both() -> tuple[PyTorchCheckpoint, int, PyTorchCheckpoint]:
        return make_checkpoint(1), 2, make_checkpoint(3)

    first, count, second = runs(both)
    assert (first["epochs"], count, second["epochs"]) == (3, 2, 3)


def test_maps_make_and_take_many(runs: Runs) -> None:
    @env.task
    async def main() -> list[int]:
        made = [checkpoint async for checkpoint in flyte.map.aio(make, [1, 2, 3])]
        return [epochs async for epochs in flyte.map.aio(epochs_of, made)]

    assert runs(main) == [3, 3, 3]
    assert len(runs.stored()) == 3


def test_traces_record_them(runs: Runs) -> None:
    @flyte.trace
    async def step(checkpoint: PyTorchCheckpoint) -> PyTorchCheckpoint:
        checkpoint["epochs"] += 1
        return checkpoint

    @env.task
    async def main() -> int:
        checkpoint = await step(await make_async(1))
        return int((await step(checkpoint))["epochs"])

    assert runs(main) == 5


def test_a_checkpoint_that_is_passed_twice_is_saved_once(runs: Runs) -> None:
    @env.task
    async def look(one: PyTorchCheckpoint, other: PyTorchCheckpoint, many: list[PyTorchCheckpoint]) -> int:
        return int(one["epochs"] + other["epochs"] + len(many))

    @env.task
    async def main() -> int:
        checkpoint = make_checkpoint()
        return await look(checkpoint, checkpoint, [checkpoint]) + await epochs_of_async(checkpoint)

    assert runs(main) == 10
    assert len(runs.stored()) == 1


def test_a_checkpoint_that_trains_on_is_saved_again(runs: Runs) -> None:
    @env.task
    async def main() -> list[float]:
        checkpoint = make_checkpoint()
        await epochs_of_async(checkpoint)
        with torch.no_grad():
            checkpoint.module[0].weight.fill_(7)
        loaded = await first_weight(checkpoint)
        return [loaded]

    @env.task
    async def first_weight(checkpoint: PyTorchCheckpoint) -> float:
        return float(checkpoint["module_state_dict"]["0.weight"][0, 0])

    assert runs(main) == [7.0]
    assert len(runs.stored()) == 2


def test_one_that_is_returned_unchanged_is_not_saved_again(runs: Runs) -> None:
    @env.task
    async def passes(checkpoint: PyTorchCheckpoint) -> PyTorchCheckpoint:
        return checkpoint

    @env.task
    async def main() -> PyTorchCheckpoint:
        return await passes(await passes(await make_async(1)))

    assert runs(main)["epochs"] == 3
    assert len(runs.stored()) == 1


def test_cached_tasks_find_it_by_its_content(runs: Runs) -> None:
    calls: list[Any] = []

    @env.task(cache=flyte.Cache(behavior="override", version_override="1"))
    async def overriding(checkpoint: PyTorchCheckpoint) -> int:
        return int(checkpoint["epochs"])

    @env.task(cache=flyte.Cache(behavior="auto", version_override="1"))
    async def cached(
        checkpoint: PyTorchCheckpoint,
        maybe: Optional[PyTorchCheckpoint],  # noqa: UP045
        many: list[PyTorchCheckpoint],
    ) -> PyTorchCheckpoint:
        assert maybe is not None
        assert many
        calls.append(checkpoint)
        return train(checkpoint)

    @env.task
    async def main(seed: int) -> list[int]:
        results = [await cached(*(make_checkpoint(seed), make_checkpoint(seed)), [make_checkpoint(seed)])]
        return [int(result["epochs"]) for result in results]

    assert overriding
    assert runs(main, seed=1) == runs(main, seed=1) == [4]  # other objects, at other URIs
    assert len(calls) == 1
    runs(main, seed=2)
    assert len(calls) == 2


def train(checkpoint: typing.Any) -> PyTorchCheckpoint:
    return PyTorchCheckpoint(hyperparameters={"epochs": checkpoint["epochs"] + 1})


# ---------------------------------------------------------------- plain modules and tensors


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)


@env.task
async def make_net(seed: int) -> Net:
    torch.manual_seed(seed)
    return Net()


def test_modules_are_values_of_tasks(runs: Runs) -> None:
    @env.task
    async def look(module: torch.nn.Module, maybe: Optional[Net] = None) -> float:  # noqa: UP045
        assert isinstance(module, Net)
        assert maybe is None
        return float(module.layer.weight.detach().sum())

    @env.task
    async def main() -> float:
        return await look(await make_net(1))

    torch.manual_seed(1)
    expected = float(Net().layer.weight.detach().sum())
    assert runs(main) == pytest.approx(expected)
    assert [uri.rsplit("/", 1)[1] for uri in runs.stored()] == ["module.pt"]


class Labelled(torch.Tensor):
    """A tensor that weights_only=True does not know."""


def test_a_tensor_of_another_class_is_a_value_of_tasks_and_refused_where_options_say_so(runs: Runs) -> None:
    @env.task
    async def make_labelled() -> torch.Tensor:
        return torch.ones(3).as_subclass(Labelled)

    @env.task
    async def look(tensor: torch.Tensor) -> str:
        return type(tensor).__name__

    @env.task
    async def look_closely(tensor: Annotated[torch.Tensor, LoadOptions(verify=False)]) -> str:
        return type(tensor).__name__

    @env.task
    async def main(closely: bool) -> str:
        tensor = await make_labelled()
        return await look_closely(tensor) if closely else await look(tensor)

    assert runs(main, closely=False) == "Labelled"
    with pytest.raises(Exception, match="weights_only"):
        runs(main, closely=True)


def test_a_module_whose_class_cannot_be_imported_is_stored_by_value(runs: Runs) -> None:
    class Local(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) * 2

    @env.task
    async def make_local() -> torch.nn.Module:
        module = Local()
        module.scale = lambda x: x * 3  # type: ignore[assignment]  # no pickle takes it
        return module

    @env.task
    async def look(module: torch.nn.Module) -> bool:
        x = torch.ones(1, 4)
        assert type(module).__name__ == "Local"
        return torch.equal(module(x), module.layer(x) * 2) and module.scale(2) == 6  # type: ignore[operator]

    @env.task
    async def main() -> bool:
        return await look(await make_local())

    assert runs(main)


class Odd(Net):
    extra: Any = None


class Extended:
    """Pickled by a number that only this process knows: torchferry does not look into such a pickle."""


def test_a_module_that_nobody_looks_into_is_stored_and_loaded_all_the_same(runs: Runs) -> None:
    copyreg.add_extension(__name__, "Extended", 240)

    @env.task
    async def make_odd() -> Odd:
        net = Odd()
        net.extra = Extended
        return net

    @env.task
    async def main() -> bool:
        return (await make_odd()).extra is Extended

    try:
        assert runs(main) is True
    finally:
        copyreg.remove_extension(__name__, "Extended", 240)


def test_tensors_are_values_of_tasks(runs: Runs) -> None:
    @env.task
    async def make_tensors() -> tuple[torch.Tensor, list[torch.Tensor], dict[str, torch.Tensor]]:
        return torch.arange(4.0), [torch.ones(2), torch.zeros(3, dtype=torch.int8)], {"a": torch.eye(2)}

    @env.task
    async def look(one: torch.Tensor, many: list[torch.Tensor], named: dict[str, torch.Tensor]) -> list[str]:
        return [str(tensor.tolist()) for tensor in [one, *many, *named.values()]]

    @env.task
    async def main() -> list[str]:
        return await look(*await make_tensors())

    assert runs(main) == ["[0.0, 1.0, 2.0, 3.0]", "[1.0, 1.0]", "[0, 0, 0]", "[[1.0, 0.0], [0.0, 1.0]]"]


def test_cached_tasks_find_tensors_by_their_content(runs: Runs) -> None:
    calls: list[int] = []

    @env.task(cache=flyte.Cache(behavior="auto", version_override="1"))
    async def cached(tensor: torch.Tensor, maybe: Optional[torch.Tensor]) -> int:  # noqa: UP045
        calls.append(1)
        assert maybe is not None
        return len(tensor)

    @env.task
    async def main() -> int:
        first = await cached(torch.ones(3), torch.ones(1))
        return first + await cached(torch.ones(3), torch.ones(1))

    assert runs(main) == 6
    assert len(calls) == 1
