"""Everywhere a checkpoint can stand in Flyte."""

from __future__ import annotations

import json
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Optional, Union

import pytest
from checkpoints import Progress, make_checkpoint, sandbox_files, stored_files
from flytekit import FlyteContext, HashMethod, conditional, dynamic, eager, map_task, task, workflow
from flytekit.core.local_cache import LocalTaskCache
from flytekit.core.type_engine import TypeEngine, TypeTransformer
from flytekit.extras.pytorch import PyTorchCheckpoint
from flytekit.models.literals import Literal, Scalar
from flytekit.utils.asyn import run_sync
from google.protobuf.struct_pb2 import Struct
from mashumaro.mixins.json import DataClassJSONMixin
from pydantic import BaseModel

from torchferry import LoadOptions, SaveOptions
from torchferry.flyte import LoadedCheckpoint

# flytekit resolves annotations of tasks at run time
ModuleOnly = Annotated[PyTorchCheckpoint, LoadOptions(keys=("module_state_dict",))]
Tagged = Annotated[PyTorchCheckpoint, SaveOptions(metadata={"stage": "test"})]

pytestmark = pytest.mark.usefixtures("context")


@task
def make(seed: int) -> PyTorchCheckpoint:
    return make_checkpoint(seed)


@task
async def make_async(seed: int) -> PyTorchCheckpoint:
    return make_checkpoint(seed)


@task
def epochs_of(checkpoint: PyTorchCheckpoint) -> int:
    return int(checkpoint["epochs"])


@task
async def epochs_of_async(checkpoint: PyTorchCheckpoint) -> int:
    return int(checkpoint["epochs"])


@task
def train_on(checkpoint: PyTorchCheckpoint) -> PyTorchCheckpoint:
    start = make_checkpoint(seed=9)
    checkpoint.restore(module=start.module, optimizer=start.optimizer)
    progress = checkpoint.hyperparameters_as(Progress)
    return PyTorchCheckpoint(
        module=start.module, hyperparameters=Progress(progress.epochs + 1), optimizer=start.optimizer
    )


@task
def keys_of(checkpoint: ModuleOnly) -> list[str]:
    return list(checkpoint)


def test_sync_tasks_hand_it_over() -> None:
    @workflow
    def wf() -> int:
        return epochs_of(checkpoint=train_on(checkpoint=make(seed=1)))

    assert wf() == 4


def test_async_tasks_hand_it_over() -> None:
    @workflow
    def wf() -> int:
        return run_sync(epochs_of_async, checkpoint=run_sync(make_async, seed=1))

    assert wf() == 3


async def test_an_eager_workflow_hands_it_over() -> None:
    @eager
    async def wf() -> int:
        checkpoint = await make_async(seed=1)
        assert isinstance(checkpoint, LoadedCheckpoint)
        return await epochs_of_async(checkpoint=checkpoint)

    assert await wf() == 3


def test_an_eager_workflow_uploads_nothing_twice(context: FlyteContext) -> None:
    @eager
    async def wf() -> int:
        checkpoint = await make_async(seed=1)
        first = await epochs_of_async(checkpoint=checkpoint)
        return first + await epochs_of_async(checkpoint=checkpoint)

    assert run_sync(wf) == 6
    assert len(stored_files(context)) == 1


def test_a_dynamic_workflow_hands_it_over() -> None:
    @dynamic
    def rounds(checkpoint: PyTorchCheckpoint, n: int) -> PyTorchCheckpoint:
        for _ in range(n):
            checkpoint = train_on(checkpoint=checkpoint)
        return checkpoint

    @workflow
    def wf() -> int:
        return epochs_of(checkpoint=rounds(checkpoint=make(seed=1), n=3))

    assert wf() == 6


def test_map_tasks_make_and_take_many() -> None:
    @workflow
    def wf() -> list[int]:
        return map_task(epochs_of)(checkpoint=map_task(make)(seed=[1, 2, 3]))

    assert wf() == [3, 3, 3]


def test_subworkflows_and_conditions_hand_it_over() -> None:
    @workflow
    def sub(checkpoint: PyTorchCheckpoint) -> PyTorchCheckpoint:
        return train_on(checkpoint=checkpoint)

    @workflow
    def wf(more: bool) -> int:
        made = make(seed=1)
        chosen = (
            conditional("more").if_(more.is_true()).then(sub(checkpoint=made)).else_().then(train_on(checkpoint=made))
        )
        return epochs_of(checkpoint=chosen)

    assert wf(more=True) == wf(more=False) == 4


def test_a_workflow_takes_and_returns_one() -> None:
    @workflow
    def wf(checkpoint: PyTorchCheckpoint) -> PyTorchCheckpoint:
        return train_on(checkpoint=checkpoint)

    returned = wf(checkpoint=make_checkpoint())
    assert isinstance(returned, LoadedCheckpoint)
    assert returned["epochs"] == 4


class Outputs(NamedTuple):
    first: PyTorchCheckpoint
    second: PyTorchCheckpoint
    count: int


def test_several_outputs_are_saved() -> None:
    @task
    def make_two() -> Outputs:
        return Outputs(make_checkpoint(1), make_checkpoint(2), 2)

    @workflow
    def wf() -> tuple[int, int]:
        made = make_two()
        return epochs_of(checkpoint=made.first), epochs_of(checkpoint=made.second)

    assert tuple(wf()) == (3, 3)


def test_lists_and_dicts_hold_many(context: FlyteContext) -> None:
    @task
    def make_many() -> tuple[list[PyTorchCheckpoint], dict[str, PyTorchCheckpoint]]:
        return [make_checkpoint(seed) for seed in range(12)], {"a": make_checkpoint(1), "b": make_checkpoint(2)}

    @task
    def count(many: list[ModuleOnly], named: dict[str, ModuleOnly]) -> list[str]:
        return [key for checkpoint in [*many, *named.values()] for key in checkpoint]

    @workflow
    def wf() -> list[str]:
        many, named = make_many()
        return count(many=many, named=named)

    assert wf() == ["module_state_dict"] * 14
    assert len(stored_files(context)) == 14


@pytest.mark.parametrize("given", [True, False])
def test_optional_ones_may_be_missing(given: bool) -> None:
    @task
    def maybe(given: bool) -> Optional[PyTorchCheckpoint]:  # noqa: UP045 - what flytekit's users write
        return make_checkpoint() if given else None

    @task
    def look(checkpoint: Optional[ModuleOnly]) -> list[str]:  # noqa: UP045
        return [] if checkpoint is None else list(checkpoint)

    @workflow
    def wf(given: bool) -> list[str]:
        return look(checkpoint=maybe(given=given))

    assert wf(given=given) == (["module_state_dict"] if given else [])


def test_unions_may_hold_one() -> None:
    @task
    def either(one: bool) -> Union[PyTorchCheckpoint, int]:  # noqa: UP007
        return make_checkpoint() if one else 5

    @task
    def look(value: Union[int, PyTorchCheckpoint]) -> int:  # noqa: UP007
        return value if isinstance(value, int) else int(value["epochs"])

    @workflow
    def wf(one: bool) -> int:
        return look(value=either(one=one))

    assert (wf(one=True), wf(one=False)) == (3, 5)


@pytest.mark.parametrize("other", [bytes, dict[str, int], typing.Any])
def test_a_received_checkpoint_is_a_checkpoint_in_any_union(context: FlyteContext, other: Any) -> None:
    prefix = context.file_access.raw_output_prefix  # flytekit knows the literals of equal values in a process
    received = LoadedCheckpoint({"module_state_dict": {}, "epochs": 3, "prefix": prefix})
    for union in (Union[PyTorchCheckpoint, other], Union[other, PyTorchCheckpoint]):  # noqa: UP007
        literal = TypeEngine.to_literal(context, received, union, TypeEngine.to_literal_type(union))
        back = TypeEngine.to_python_value(context, literal, union)
        assert (type(back), back["epochs"]) == (LoadedCheckpoint, 3)


def test_options_stand_on_inputs_and_outputs(context: FlyteContext) -> None:
    @task
    def make_tagged() -> Tagged:
        return make_checkpoint()

    @workflow
    def wf() -> list[str]:
        return keys_of(checkpoint=make_tagged())

    assert wf() == ["module_state_dict"]
    fs = context.file_access.raw_output_fs
    if "s3" in fs.protocol:
        assert fs.metadata(stored_files(context)[0]) == {"stage": "test"}


def test_contradictory_options_are_an_error_when_the_task_is_declared() -> None:
    with pytest.raises(ValueError, match="contradict each other"):

        @task
        def two(checkpoint: Annotated[ModuleOnly, LoadOptions(keys=("epochs",))]) -> int:
            return len(checkpoint)


# ---------------------------------------------------------------- fields


@dataclass
class Trained:
    name: str
    whole: PyTorchCheckpoint
    part: Optional[ModuleOnly] = None  # noqa: UP045
    many: Optional[list[PyTorchCheckpoint]] = None  # noqa: UP045


class Model(BaseModel):
    name: str
    whole: PyTorchCheckpoint
    part: Optional[ModuleOnly] = None  # noqa: UP045
    many: Optional[list[PyTorchCheckpoint]] = None  # noqa: UP045


@task
def make_dataclass() -> Trained:
    return Trained("dataclass", make_checkpoint(1), make_checkpoint(2), [make_checkpoint(3)])


@task
def make_model() -> Model:
    return Model(name="model", whole=make_checkpoint(1), part=make_checkpoint(2), many=[make_checkpoint(3)])


@task
def look_at_dataclass(value: Trained) -> list[str]:
    assert value.part is not None
    assert value.many is not None
    return [value.name, *value.part, *(str(one["epochs"]) for one in (value.whole, *value.many))]


@task
def look_at_model(value: Model) -> list[str]:
    assert value.part is not None
    assert value.many is not None
    return [value.name, *value.part, *(str(one["epochs"]) for one in (value.whole, *value.many))]


def test_a_dataclass_has_checkpoints_as_fields(context: FlyteContext) -> None:
    @workflow
    def wf() -> tuple[list[str], int]:
        value = make_dataclass()
        return look_at_dataclass(value=value), epochs_of(checkpoint=value.whole)

    assert tuple(wf()) == (["dataclass", "module_state_dict", "3", "3"], 3)
    assert len(stored_files(context)) == 3


@dataclass
class Encoded(DataClassJSONMixin):
    whole: PyTorchCheckpoint


@task
def make_encoded() -> Encoded:
    return Encoded(make_checkpoint(1))


@task
def look_at_encoded(value: Encoded) -> int:
    return int(value.whole["epochs"])


def test_a_dataclass_with_mashumaros_mixin_has_checkpoints_as_fields() -> None:
    @workflow
    def wf() -> int:
        return look_at_encoded(value=make_encoded())

    assert wf() == 3


def test_a_dataclass_from_the_console_has_checkpoints_as_fields(context: FlyteContext) -> None:
    literal = TypeEngine.to_literal(context, make_checkpoint(1), PyTorchCheckpoint, None)
    struct = Struct()
    struct.update({"whole": {"path": literal.scalar.blob.uri}, "name": "console"})
    value = TypeEngine.to_python_value(context, Literal(scalar=Scalar(generic=struct)), Trained)
    assert isinstance(value.whole, LoadedCheckpoint)
    assert value.whole["epochs"] == 3


def test_a_pydantic_model_has_checkpoints_as_fields(context: FlyteContext) -> None:
    @workflow
    def wf() -> tuple[list[str], int]:
        value = make_model()
        return look_at_model(value=value), epochs_of(checkpoint=value.whole)

    assert tuple(wf()) == (["model", "module_state_dict", "3", "3"], 3)
    assert len(stored_files(context)) == 3


def test_a_field_that_was_received_is_passed_on_without_an_upload(context: FlyteContext) -> None:
    @task
    def make_one() -> Trained:
        return Trained("one", make_checkpoint())

    @task
    def rename(value: Trained) -> Trained:
        return Trained("two", value.whole)

    @workflow
    def wf() -> Trained:
        return rename(value=make_one())

    assert wf().name == "two"
    assert len(stored_files(context)) == 1


@pytest.mark.skipif(not hasattr(TypeTransformer, "schema_match"), reason="this flytekit does not ask transformers")
@pytest.mark.parametrize("owner", [Trained, Model])
def test_flytekit_guesses_the_type_of_a_field(owner: type) -> None:
    guessed: Any = TypeEngine.guess_python_type(TypeEngine.to_literal_type(owner))
    hints = typing.get_type_hints(guessed)
    assert hints["whole"] is PyTorchCheckpoint
    assert hints["part"] == Optional[PyTorchCheckpoint]  # noqa: UP045


def test_a_model_describes_its_checkpoints() -> None:
    described = Model.model_json_schema()["properties"]["whole"]
    assert (described["title"], described["required"]) == ("PyTorchCheckpoint", ["path"])


def test_a_model_uploads_only_what_becomes_json(context: FlyteContext) -> None:
    checkpoint = make_checkpoint()
    model = Model(name="x", whole=checkpoint)
    assert model.whole is checkpoint
    dumped = model.model_dump()
    assert dumped["whole"] is checkpoint
    assert Model(**dumped).whole is checkpoint
    assert stored_files(context) == []
    path = json.loads(model.model_dump_json())["whole"]["path"]
    assert path.startswith(context.file_access.raw_output_prefix)


def test_a_model_refuses_another_value() -> None:
    with pytest.raises(ValueError, match="saved as its path"):
        Model(name="x", whole=3)  # type: ignore[arg-type]


# ---------------------------------------------------------------- caches


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("FLYTE_LOCAL_CACHE_ENABLED", "true")
    monkeypatch.setattr("flytekit.core.local_cache.CACHE_LOCATION", str(tmp_path / "cache"))
    LocalTaskCache.initialize()
    yield
    LocalTaskCache._cache.close()
    LocalTaskCache._initialized = False


@pytest.mark.usefixtures("cache")
def test_a_cached_task_gives_the_stored_checkpoint(context: FlyteContext) -> None:
    @task(cache=True, cache_version="1")
    def make_cached(seed: int) -> PyTorchCheckpoint:
        return make_checkpoint(seed)

    @workflow
    def wf() -> int:
        return epochs_of(checkpoint=make_cached(seed=1))

    assert wf() == wf() == 3
    assert len(stored_files(context)) == 1


def fingerprint(checkpoint: Any) -> str:
    return str(checkpoint.module.state_dict()["0.weight"].sum().item())


@pytest.mark.usefixtures("cache")
def test_a_hash_method_decides_what_is_the_same() -> None:
    calls = []

    @task
    def make_hashed(seed: int) -> Annotated[PyTorchCheckpoint, HashMethod(fingerprint), SaveOptions(part_size=1 << 23)]:
        return make_checkpoint(seed)

    @task(cache=True, cache_version="1")
    def once(checkpoint: PyTorchCheckpoint) -> int:
        calls.append(checkpoint)
        return int(checkpoint["epochs"])

    @workflow
    def wf() -> int:
        return once(checkpoint=make_hashed(seed=1))

    assert wf() == wf() == 3  # two objects with two URIs, and one hash
    assert len(calls) == 1


# ---------------------------------------------------------------- nothing is left behind


def test_twenty_tasks_leave_nothing_in_the_sandbox(context: FlyteContext) -> None:
    @dynamic
    def rounds(n: int) -> PyTorchCheckpoint:
        checkpoint = make(seed=1)
        for _ in range(n):
            checkpoint = train_on(checkpoint=checkpoint)
        return checkpoint

    @workflow
    def wf() -> PyTorchCheckpoint:
        return rounds(n=19)

    assert wf()["epochs"] == 22
    assert sandbox_files(context) == []
    assert len(stored_files(context)) == 20
