"""The transformer: its documented surface, what it stores, what it gives back, and what it refuses."""

from __future__ import annotations

import asyncio
import inspect
import pickle
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Optional

import fsspec
import msgpack
import pytest
import torch
from checkpoints import Progress, make_checkpoint, sandbox_files, stored_files
from flytekit import FlyteContext
from flytekit.configuration import DataConfig
from flytekit.core.data_persistence import FileAccessProvider
from flytekit.core.type_engine import TypeEngine, TypeTransformerFailedError
from flytekit.models.core.types import BlobType
from flytekit.models.literals import Binary, Literal, Primitive, Scalar
from flytekit.models.types import LiteralType
from flytekit.utils.asyn import loop_manager
from google.protobuf.struct_pb2 import Struct

import torchferry
import torchferry.flyte.checkpoint as module
from torchferry import LoadOptions, SaveOptions
from torchferry.checkpoint import transfer
from torchferry.flyte import LoadedCheckpoint, PyTorchCheckpoint, PyTorchCheckpointTransformer
from torchferry.flyte.transfer import filesystem_for
from torchferry.flyte.values import FlytekitCheckpoint

transformer = PyTorchCheckpointTransformer()
literal_type = transformer.get_literal_type(PyTorchCheckpoint)


class Hyper(NamedTuple):
    epochs: int
    loss: float


def save(context: FlyteContext, value: Any, t: Any = PyTorchCheckpoint) -> Literal:
    return transformer.to_literal(context, value, t, literal_type)


def load(context: FlyteContext, literal: Literal, t: Any = PyTorchCheckpoint) -> Any:
    return transformer.to_python_value(context, literal, t)


def read_with_torch(context: FlyteContext, literal: Literal) -> Any:
    with context.file_access.raw_output_fs.open(literal.scalar.blob.uri) as file:
        return torch.load(file, weights_only=True)


def assert_same(loaded: Any, saved: Any) -> None:
    torch.testing.assert_close(loaded, saved, rtol=0, atol=0)


# ---------------------------------------------------------------- the documented surface


@pytest.mark.parametrize(
    "name",
    [
        *("Any", "Blob", "BlobMetadata", "DataClassJsonMixin", "FlyteContext", "IsDataclass", "Literal", "LiteralType"),
        *("Protocol", "Scalar", "TypeEngine", "TypeTransformer", "TypeTransformerFailedError", "NamedTuple"),
        *("PyTorchCheckpoint", "PyTorchCheckpointTransformer", "asdict", "dataclass", "fields", "is_dataclass"),
    ],
)
def test_every_name_that_flytekits_module_documents_can_be_imported(name: str) -> None:
    assert name in module.__all__
    assert getattr(module, name) is not None


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("assert_type", ["t", "v"]),
        ("from_binary_idl", ["binary_idl_object", "expected_python_type"]),
        ("from_generic_idl", ["generic", "expected_python_type"]),
        ("get_literal_type", ["t"]),
        ("guess_python_type", ["literal_type"]),
        ("isinstance_generic", ["obj", "generic_alias"]),
        ("to_html", ["ctx", "python_val", "expected_python_type"]),
        ("to_literal", ["ctx", "python_val", "python_type", "expected"]),
        ("async_to_literal", ["ctx", "python_val", "python_type", "expected"]),
        ("to_python_value", ["ctx", "lv", "expected_python_type"]),
        ("async_to_python_value", ["ctx", "lv", "expected_python_type"]),
    ],
)
def test_every_documented_method_takes_its_documented_parameters(method: str, parameters: list[str]) -> None:
    assert list(inspect.signature(getattr(transformer, method)).parameters) == parameters


def test_the_properties_are_the_documented_ones() -> None:
    assert transformer.is_async
    assert transformer.name == "PyTorch Checkpoint"
    assert transformer.python_type is PyTorchCheckpoint
    assert transformer.type_assertions_enabled


def test_a_checkpoint_is_a_dataclass_with_json() -> None:
    checkpoint = PyTorchCheckpoint(hyperparameters={"epochs": 3})
    assert [field.name for field in module.fields(checkpoint)] == ["module", "hyperparameters", "optimizer"]
    assert checkpoint.to_dict() == {"module": None, "hyperparameters": {"epochs": 3}, "optimizer": None}
    assert PyTorchCheckpoint.from_dict(checkpoint.to_dict()) == checkpoint
    assert PyTorchCheckpoint.from_json(checkpoint.to_json()) == checkpoint
    assert PyTorchCheckpoint(None, {"epochs": 3}, None) == checkpoint


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # of dataclasses_json and marshmallow
def test_a_checkpoint_has_a_marshmallow_schema() -> None:
    assert sorted(PyTorchCheckpoint.schema().fields) == ["hyperparameters", "module", "optimizer"]


def test_the_literal_type_is_flytekits() -> None:
    blob = BlobType(format="PyTorchCheckpoint", dimensionality=BlobType.BlobDimensionality.SINGLE)
    assert literal_type == LiteralType(blob=blob)
    assert transformer.guess_python_type(literal_type) is PyTorchCheckpoint


def test_another_literal_type_is_not_guessed() -> None:
    csv = BlobType(format="csv", dimensionality=BlobType.BlobDimensionality.SINGLE)
    with pytest.raises(ValueError, match="cannot reverse"):
        transformer.guess_python_type(LiteralType(blob=csv))


# ---------------------------------------------------------------- there and back again


def test_a_checkpoint_comes_back_on_every_store(context: FlyteContext, checkpoint: PyTorchCheckpoint) -> None:
    loaded = load(context, save(context, checkpoint))
    assert_same(loaded["module_state_dict"], checkpoint.module.state_dict())
    assert_same(loaded["optimizer_state_dict"]["state"], checkpoint.optimizer.state_dict()["state"])
    assert (loaded["epochs"], loaded["loss"]) == (3, 0.25)
    assert list(loaded) == ["module_state_dict", "epochs", "loss", "optimizer_state_dict"]
    assert sandbox_files(context) == []
    assert len(stored_files(context)) == 1


def test_what_is_stored_is_what_torch_save_writes(s3_context: FlyteContext, checkpoint: PyTorchCheckpoint) -> None:
    literal = save(s3_context, checkpoint)
    stored = read_with_torch(s3_context, literal)
    assert_same(stored["module_state_dict"], checkpoint.module.state_dict())
    assert literal.scalar.blob.uri.startswith(s3_context.file_access.raw_output_prefix)
    assert literal.scalar.blob.uri.endswith("/checkpoint.pt")


@pytest.mark.parametrize(
    "hyperparameters",
    [{"epochs": 3, "loss": 0.25}, Hyper(3, 0.25), Progress(3, 0.25)],
    ids=["dict", "NamedTuple", "dataclass"],
)
def test_hyperparameters_come_in_every_form(context: FlyteContext, hyperparameters: Any) -> None:
    loaded = load(context, save(context, PyTorchCheckpoint(hyperparameters=hyperparameters)))
    assert loaded == {"epochs": 3, "loss": 0.25}
    assert loaded.hyperparameters_as(Hyper) == Hyper(3, 0.25)
    assert loaded.hyperparameters_as(Progress) == Progress(3, 0.25)


def test_flytekits_own_class_is_saved_too(s3_context: FlyteContext) -> None:
    linear = torch.nn.Linear(2, 2)
    value = FlytekitCheckpoint(module=linear, hyperparameters=Hyper(1, 0.5))
    assert_same(load(s3_context, save(s3_context, value, FlytekitCheckpoint))["module_state_dict"], linear.state_dict())


def test_a_received_checkpoint_can_be_returned(context: FlyteContext, checkpoint: PyTorchCheckpoint) -> None:
    first = load(context, save(context, checkpoint))
    first["epochs"] = 4
    second = load(context, save(context, first))
    assert second["epochs"] == 4
    assert_same(second["module_state_dict"], checkpoint.module.state_dict())


class Empty(torch.nn.ModuleList):
    """len() is 0."""


class Undecided(torch.nn.Linear):
    def __bool__(self) -> bool:
        raise RuntimeError("no truth in a module")


@pytest.mark.parametrize("owner", [Empty(), Undecided(2, 2)], ids=["empty", "without truth"])
def test_a_module_without_truth_is_saved(s3_context: FlyteContext, owner: torch.nn.Module) -> None:
    loaded = load(s3_context, save(s3_context, PyTorchCheckpoint(module=owner)))
    assert_same(loaded["module_state_dict"], owner.state_dict())
    loaded.restore(module=owner)


def test_tensors_among_hyperparameters_are_not_copied_and_may_require_grad(s3_context: FlyteContext) -> None:
    @dataclass
    class WithTensor:
        weights: torch.Tensor
        nested: list[Progress] = field(default_factory=lambda: [Progress()])

    weights = torch.ones(3, requires_grad=True) * 2  # dataclasses.asdict cannot copy this one
    loaded = load(s3_context, save(s3_context, PyTorchCheckpoint(hyperparameters=WithTensor(weights))))
    assert_same(loaded["weights"].detach(), weights.detach())
    assert loaded["nested"] == [{"epochs": 3, "loss": 0.25}]


# ---------------------------------------------------------------- from every kind of thread


def round_trip(context: FlyteContext) -> int:
    loaded: LoadedCheckpoint = load(context, save(context, make_checkpoint()))
    return int(loaded["epochs"])


def test_the_sync_methods_work_in_a_thread_without_a_loop(context: FlyteContext) -> None:
    results: list[int] = []
    thread = threading.Thread(target=lambda: results.append(round_trip(context)))
    thread.start()
    thread.join(60)
    assert results == [3]


async def test_the_sync_methods_work_where_a_loop_runs(context: FlyteContext) -> None:
    assert round_trip(context) == 3


def test_the_sync_methods_work_on_flytekits_own_loop(context: FlyteContext) -> None:
    async def on_loop() -> int:
        return round_trip(context)

    assert loop_manager.run_sync(on_loop) == 3


async def test_the_async_methods_work_on_any_loop(context: FlyteContext, checkpoint: PyTorchCheckpoint) -> None:
    literal = await transformer.async_to_literal(context, checkpoint, PyTorchCheckpoint, literal_type)
    loaded = await transformer.async_to_python_value(context, literal, PyTorchCheckpoint)
    assert loaded["epochs"] == 3


def test_loops_that_come_and_go_do_no_harm(context: FlyteContext, checkpoint: PyTorchCheckpoint) -> None:
    async def there_and_back() -> Any:
        literal = await transformer.async_to_literal(context, checkpoint, PyTorchCheckpoint, literal_type)
        return await transformer.async_to_python_value(context, literal, PyTorchCheckpoint)

    assert [asyncio.run(there_and_back())["epochs"] for _ in range(3)] == [3, 3, 3]


async def test_25_checkpoints_are_saved_at_once(s3_context: FlyteContext) -> None:
    values = [make_checkpoint(seed) for seed in range(25)]
    literals = await asyncio.gather(
        *(transformer.async_to_literal(s3_context, value, PyTorchCheckpoint, literal_type) for value in values)
    )
    assert len({literal.scalar.blob.uri for literal in literals}) == 25
    for value, literal in zip(values, literals, strict=True):
        loaded = await transformer.async_to_python_value(s3_context, literal, PyTorchCheckpoint)
        assert_same(loaded["module_state_dict"], value.module.state_dict())


# ---------------------------------------------------------------- the annotations


def test_keys_choose_what_is_loaded(context: FlyteContext, checkpoint: PyTorchCheckpoint) -> None:
    t = Annotated[PyTorchCheckpoint, LoadOptions(keys=("module_state_dict",))]
    loaded = load(context, save(context, checkpoint), t)
    assert list(loaded) == ["module_state_dict"]
    with pytest.raises(KeyError, match="optimizer_state_dict"):
        _ = loaded.optimizer_state_dict


def test_map_location_follows_the_annotation(s3_context: FlyteContext, checkpoint: PyTorchCheckpoint) -> None:
    loaded = load(
        s3_context, save(s3_context, checkpoint), Annotated[PyTorchCheckpoint, LoadOptions(map_location="meta")]
    )
    assert loaded["module_state_dict"]["0.weight"].is_meta


def test_without_a_map_location_tensors_go_to_the_device_of_this_process(
    s3_context: FlyteContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    literal = save(s3_context, make_checkpoint())
    monkeypatch.setattr(transfer, "default_map_location", lambda: torch.device("meta"))
    loaded = load(s3_context, literal)
    assert {tensor.device.type for tensor in loaded["module_state_dict"].values()} == {"meta"}


def test_options_are_joined(s3_context: FlyteContext, checkpoint: PyTorchCheckpoint) -> None:
    module_only = Annotated[PyTorchCheckpoint, LoadOptions(keys=("module_state_dict",))]
    t = Annotated[module_only, LoadOptions(map_location="meta")]
    loaded = load(s3_context, save(s3_context, checkpoint, t), t)
    assert list(loaded) == ["module_state_dict"]
    assert loaded.module_state_dict["0.weight"].is_meta


@pytest.mark.parametrize(
    "t",
    [
        Annotated[PyTorchCheckpoint, LoadOptions(keys=("a",)), LoadOptions(keys=("b",))],
        Annotated[PyTorchCheckpoint, SaveOptions(give_up_after=1.0), SaveOptions(give_up_after=2.0)],
        Optional[Annotated[PyTorchCheckpoint, SaveOptions(part_size=1 << 23), SaveOptions(part_size=1 << 24)]],  # noqa: UP045 - flytekit's users write it
        list[Annotated[PyTorchCheckpoint, LoadOptions(map_location="cpu"), LoadOptions(map_location="meta")]],
    ],
    ids=["keys", "give up after", "in Optional", "in list"],
)
def test_options_that_contradict_each_other_are_an_error_when_the_type_is_declared(t: Any) -> None:
    with pytest.raises(ValueError, match="contradict each other"):
        TypeEngine.to_literal_type(t)


def test_no_message_shows_storage_options() -> None:
    """They are credentials, and flytekit prints a type, its annotations too, where a value cannot be converted."""
    one, other = ({"secret": f"TOPSECRET{number}"} for number in range(2))
    for kind in (SaveOptions, LoadOptions):
        assert "TOPSECRET" not in repr(kind(storage_options=one))
        twice = Annotated[PyTorchCheckpoint, kind(storage_options=one), kind(storage_options=other)]
        with pytest.raises(ValueError, match="contradict each other: storage_options") as caught:
            transformer.get_literal_type(twice)
        assert "TOPSECRET" not in str(caught.value)


def test_storage_options_of_the_annotation_are_used_instead_of_flytekits(
    in_context: Callable[..., FlyteContext],
    s3_url: str,
    s3_storage_options: dict[str, Any],
    checkpoint: PyTorchCheckpoint,
) -> None:
    context = in_context(s3_url)  # flytekit itself has no credentials here
    saved = Annotated[PyTorchCheckpoint, SaveOptions(storage_options=s3_storage_options)]
    loaded = Annotated[PyTorchCheckpoint, LoadOptions(storage_options=s3_storage_options)]
    assert load(context, save(context, checkpoint, saved), loaded)["epochs"] == 3


# ---------------------------------------------------------------- what is not accepted


class Mine(PyTorchCheckpoint):
    pass


@pytest.mark.parametrize(
    ("t", "value"),
    [
        (PyTorchCheckpoint, make_checkpoint()),
        (FlytekitCheckpoint, make_checkpoint()),
        (PyTorchCheckpoint, FlytekitCheckpoint(hyperparameters={"a": 1})),
        (FlytekitCheckpoint, FlytekitCheckpoint(hyperparameters={"a": 1})),
        (PyTorchCheckpoint, LoadedCheckpoint({"a": 1})),
        (FlytekitCheckpoint, LoadedCheckpoint({"a": 1})),
        (Mine, Mine(hyperparameters={"a": 1})),
        (PyTorchCheckpoint, Mine(hyperparameters={"a": 1})),
        (Mine, LoadedCheckpoint({"a": 1})),
        (Annotated[PyTorchCheckpoint, LoadOptions()], make_checkpoint()),
    ],
)
def test_checkpoints_of_every_kind_are_accepted(t: Any, value: Any) -> None:
    transformer.assert_type(t, value)


@pytest.mark.parametrize(
    ("t", "value"),
    [(PyTorchCheckpoint, {"a": 1}), (PyTorchCheckpoint, None), (Mine, make_checkpoint()), (Annotated[Mine, 1], 3)],
)
def test_other_values_are_not_accepted(t: Any, value: Any) -> None:
    with pytest.raises(TypeTransformerFailedError, match=f"given: a {type(value).__qualname__}"):
        transformer.assert_type(t, value)


@pytest.mark.parametrize("value", [3, "text", None, [1], torch.nn.Linear(1, 1), PyTorchCheckpoint, Progress])
def test_hyperparameters_of_another_kind_are_refused(value: Any) -> None:
    with pytest.raises(TypeTransformerFailedError, match="given: "):
        PyTorchCheckpoint(hyperparameters=value)


def test_the_refusal_says_what_was_given() -> None:
    with pytest.raises(TypeTransformerFailedError, match="given: list"):
        PyTorchCheckpoint(hyperparameters=[1])  # type: ignore[arg-type]
    with pytest.raises(TypeTransformerFailedError, match=r"given: module=None, hyperparameters=\{\}, optimizer=None"):
        PyTorchCheckpoint(hyperparameters={})


@pytest.mark.parametrize("reserved", ["module_state_dict", "optimizer_state_dict"])
def test_a_hyperparameter_with_a_reserved_name_is_refused_and_the_rest_is_stored(
    s3_context: FlyteContext, reserved: str
) -> None:
    value = PyTorchCheckpoint(module=torch.nn.Linear(1, 1), hyperparameters={reserved: 1})
    with pytest.raises(TypeTransformerFailedError, match=f"cannot be named '{reserved}'.*stored all the same"):
        save(s3_context, value)
    assert len(stored_files(s3_context)) == 1


@dataclass
class Found:
    when: datetime
    where: list[Path]
    h: dict[str, Hyper]


class Plain:
    pass


class Words(str):
    __slots__ = ()


@pytest.mark.parametrize(
    ("hyperparameters", "path", "kind"),
    [
        ({"steps": range(3)}, "Hyperparameter 'steps'", "range"),
        ({"a": [1, {"what": Words("x")}]}, r"Hyperparameter 'a'\[1\]\['what'\]", "Words"),
        ({"h": {"x": Hyper(1, Plain())}}, r"Hyperparameter 'h'\['x'\]\['loss'\]", "Plain"),
        ({"o": Plain()}, "Hyperparameter 'o'", "Plain"),
        ({"s": slice(1)}, "Hyperparameter 's'", "slice"),
    ],
    ids=["range", "nested str of a class", "object in a NamedTuple", "object", "slice"],
)
def test_hyperparameters_that_could_not_be_loaded_are_an_error_and_the_checkpoint_is_stored(
    s3_context: FlyteContext, hyperparameters: dict[str, Any], path: str, kind: str
) -> None:
    linear = torch.nn.Linear(2, 2)
    expected = f"{path} is a .*{kind}.*add_safe_globals.*weights_only=False"
    with pytest.raises(TypeTransformerFailedError, match=expected) as refusal:
        save(s3_context, PyTorchCheckpoint(module=linear, hyperparameters=hyperparameters))
    [file] = stored_files(s3_context)
    uri = f"s3://{file}"
    assert f"torchferry.load('{uri}', weights_only=False) reads it" in str(refusal.value)
    stored = torchferry.load(uri, filesystem=s3_context.file_access.raw_output_fs, weights_only=False)
    assert_same(stored["module_state_dict"], linear.state_dict())
    assert list(stored) == ["module_state_dict", *hyperparameters]


def test_the_advice_to_allow_a_type_is_given_only_where_it_helps(s3_context: FlyteContext) -> None:
    value = defaultdict(list)  # torch wants `list` allowed, too, and then refuses it
    with pytest.raises(TypeTransformerFailedError, match=r"defaultdict.*weights_only=False") as refusal:
        save(s3_context, PyTorchCheckpoint(hyperparameters={"d": value}))
    assert "in every task that loads it" not in str(refusal.value)


def test_a_hyperparameter_that_cannot_be_pickled_is_left_out_of_what_is_stored(s3_context: FlyteContext) -> None:
    value = PyTorchCheckpoint(module=torch.nn.Linear(2, 2), hyperparameters={"l": [lambda: None], "epochs": 3})
    with pytest.raises(
        TypeTransformerFailedError, match=r"Hyperparameter 'l'\[0\] is a function, and cannot be saved"
    ) as refusal:
        save(s3_context, value)
    message = str(refusal.value)
    [file] = stored_files(s3_context)
    assert f"stored all the same, without 'l': torchferry.load('s3://{file}') reads it" in message
    assert "add_safe_globals" not in message
    assert ".." not in message
    stored = torchferry.load(f"s3://{file}", filesystem=s3_context.file_access.raw_output_fs)
    assert list(stored) == ["module_state_dict", "epochs"]


def test_where_nothing_can_be_pickled_nothing_is_stored(s3_context: FlyteContext) -> None:
    with pytest.raises(TypeTransformerFailedError, match="'l' is a function, and cannot be saved"):
        save(s3_context, PyTorchCheckpoint(hyperparameters={"l": lambda: None}))
    assert stored_files(s3_context) == []


def test_an_option_of_the_optimizer_that_could_not_be_loaded_is_refused(s3_context: FlyteContext) -> None:
    linear = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1)
    optimizer.param_groups[0]["note"] = Path("x")
    with pytest.raises(TypeTransformerFailedError, match=r"optimizer_state_dict\['param_groups'\]\[0\]\['note'\]"):
        save(s3_context, PyTorchCheckpoint(module=linear, optimizer=optimizer))


def test_safe_globals_allow_a_type(s3_context: FlyteContext) -> None:
    with torch.serialization.safe_globals([Plain]):
        loaded = load(s3_context, save(s3_context, PyTorchCheckpoint(hyperparameters={"o": Plain()})))
    assert isinstance(loaded["o"], Plain)


def test_small_objects_become_plain_values_and_come_back(s3_context: FlyteContext) -> None:
    when = datetime.now(UTC)
    given = {"when": when, "where": [Path("/x")], "h": {"x": Hyper(1, 2.0)}}
    loaded = load(s3_context, save(s3_context, PyTorchCheckpoint(hyperparameters=given)))
    assert loaded == {"when": when.isoformat(), "where": ["/x"], "h": {"x": {"epochs": 1, "loss": 2.0}}}
    assert loaded.hyperparameters_as(Found) == Found(when, [Path("/x")], {"x": Hyper(1, 2.0)})


def test_weights_only_false_on_both_sides_allows_every_type(s3_context: FlyteContext) -> None:
    t = Annotated[PyTorchCheckpoint, LoadOptions(weights_only=False)]
    when = datetime.now(UTC)
    literal = save(s3_context, PyTorchCheckpoint(hyperparameters={"when": when}), t)
    assert load(s3_context, literal, t)["when"] == when
    plain = load(s3_context, save(s3_context, PyTorchCheckpoint(hyperparameters={"when": when})))
    assert plain["when"] == when.isoformat()
    with pytest.raises(TypeTransformerFailedError, match="datetime"):
        load(s3_context, literal)


@pytest.mark.parametrize(
    "value",
    [
        {"a": (1, 2.5, "x", None, True, b"b", 1j), "s": {1, 2}, "o": OrderedDict(k=[1]), "d": torch.float16},
        {
            "z": torch.Size([1]),
            "p": torch.nn.Parameter(torch.ones(2)),
            "dev": torch.device("cpu"),
            "b": bytearray(b"x"),
        },
    ],
)
def test_plain_values_and_tensors_are_not_refused(s3_context: FlyteContext, value: dict[str, Any]) -> None:
    loaded = load(s3_context, save(s3_context, PyTorchCheckpoint(hyperparameters=value)))
    assert list(loaded) == list(value)


def test_values_that_contain_themselves_are_saved(s3_context: FlyteContext) -> None:
    loop: list[Any] = [1]
    loop.append(loop)
    loaded = load(s3_context, save(s3_context, PyTorchCheckpoint(hyperparameters={"loop": loop})))
    assert loaded["loop"][1] is loaded["loop"]


def test_a_module_without_a_state_is_refused(s3_context: FlyteContext) -> None:
    for wrong in ([torch.ones(1)], torch.nn.Linear):
        with pytest.raises(TypeTransformerFailedError, match=r"an object with a state_dict\(\)"):
            save(s3_context, PyTorchCheckpoint(module=wrong))  # type: ignore[arg-type]


# ---------------------------------------------------------------- odd literals, unions


@pytest.mark.parametrize(
    "literal",
    [
        Literal(scalar=Scalar(primitive=Primitive(integer=1))),
        Literal(scalar=Scalar(binary=Binary(value=msgpack.dumps({"x": 1}), tag="msgpack"))),
        Literal(scalar=Scalar(binary=Binary(value=b"?", tag="other"))),
        Literal(),
    ],
    ids=["integer", "another dict", "another format", "nothing"],
)
def test_a_literal_that_is_no_checkpoint_is_refused(s3_context: FlyteContext, literal: Literal) -> None:
    with pytest.raises(TypeTransformerFailedError, match="this literal is not"):
        load(s3_context, literal)


@pytest.mark.parametrize("value", [None, 3, {"a": 1}, [torch.ones(1)]])
def test_other_values_in_a_union_are_refused_at_once(s3_context: FlyteContext, value: Any) -> None:
    with pytest.raises(TypeTransformerFailedError, match="Expected a PyTorchCheckpoint"):
        save(s3_context, value)
    assert stored_files(s3_context) == []


def test_an_attribute_names_a_checkpoint(s3_context: FlyteContext, checkpoint: PyTorchCheckpoint) -> None:
    uri = save(s3_context, checkpoint).scalar.blob.uri
    binary = Binary(value=msgpack.dumps({"path": uri}), tag="msgpack")
    struct = Struct()
    struct.update({"path": uri})
    from_binary = transformer.from_binary_idl(binary, PyTorchCheckpoint)
    from_generic = transformer.from_generic_idl(struct, PyTorchCheckpoint)
    assert from_binary["epochs"] == from_generic["epochs"] == 3


def test_an_object_that_is_no_dict_is_refused(s3_context: FlyteContext, checkpoint: PyTorchCheckpoint) -> None:
    literal = save(s3_context, checkpoint)
    with s3_context.file_access.raw_output_fs.open(literal.scalar.blob.uri, "wb") as file:
        torch.save([1, 2], file)
    with pytest.raises(TypeTransformerFailedError, match="holds a list"):
        load(s3_context, literal)


def test_inputs_may_lie_on_another_store_than_outputs(
    s3_context: FlyteContext, tmp_path: Path, checkpoint: PyTorchCheckpoint
) -> None:
    path = tmp_path / "elsewhere.pt"
    torch.save({"epochs": 7}, path)
    memory = "memory://elsewhere.pt"
    with fsspec.open(memory, "wb") as file:
        torch.save({"epochs": 8}, file)
    literal = save(s3_context, checkpoint)
    for uri, epochs in ((str(path), 7), (f"file://{path}", 7), (memory, 8)):
        literal.scalar.blob._uri = uri
        assert load(s3_context, literal)["epochs"] == epochs


def test_s3a_is_the_s3_that_flytekit_is_configured_for(s3_context: FlyteContext, checkpoint: PyTorchCheckpoint) -> None:
    literal = save(s3_context, checkpoint)
    literal.scalar.blob._uri = literal.scalar.blob.uri.replace("s3://", "s3a://")
    assert load(s3_context, literal)["epochs"] == 3


def test_az_is_the_azure_that_flytekit_is_configured_for(
    context: FlyteContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLYTE_AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("FLYTE_AZURE_STORAGE_ACCOUNT_KEY", "a2V5")
    access = FileAccessProvider(context.file_access.local_sandbox_dir, "/tmp/raw", DataConfig.auto())
    configured = context.with_file_access(access).build()
    assert filesystem_for(configured, "az://c/x").account_name == "account"


def test_a_checkpoint_pickles(checkpoint: PyTorchCheckpoint) -> None:
    copy = pickle.loads(pickle.dumps(checkpoint))
    assert_same(copy.module.state_dict(), checkpoint.module.state_dict())
    assert "Sequential" in repr(copy)
