"""What a task receives: the dict that was saved, that can do more."""

from __future__ import annotations

import copy
import io
import json
import pickle
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, NamedTuple, Optional

import pytest
import torch
from samples import Progress, make_checkpoint

from torchferry.checkpoint import LoadedCheckpoint, PyTorchCheckpoint
from torchferry.checkpoint.content import content_of
from torchferry.errors import CheckpointKeyError, CheckpointValueError


@pytest.fixture
def loaded(checkpoint: PyTorchCheckpoint) -> LoadedCheckpoint:
    return LoadedCheckpoint(content_of(checkpoint), uri="s3://bucket/key.pt")


def other() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    checkpoint = make_checkpoint(seed=1)
    assert checkpoint.module is not None
    assert checkpoint.optimizer is not None
    return checkpoint.module, checkpoint.optimizer


def test_it_is_the_dict_that_was_saved(loaded: LoadedCheckpoint, checkpoint: PyTorchCheckpoint) -> None:
    content = content_of(checkpoint)
    assert isinstance(loaded, dict)
    assert list(loaded) == list(content)
    assert {**loaded}.keys() == content.keys()
    assert json.dumps(LoadedCheckpoint({"a": 1})) == '{"a": 1}'
    assert LoadedCheckpoint({"a": 1}) == {"a": 1}


def test_it_is_a_checkpoint(loaded: LoadedCheckpoint) -> None:
    assert isinstance(loaded, PyTorchCheckpoint)
    assert loaded.module is None
    assert loaded.hyperparameters == {"epochs": 3, "loss": 0.25}


def test_its_parts_have_names(loaded: LoadedCheckpoint) -> None:
    assert loaded.module_state_dict is loaded["module_state_dict"]
    assert loaded.optimizer_state_dict is loaded["optimizer_state_dict"]
    assert loaded.uri == "s3://bucket/key.pt"


@pytest.mark.parametrize("name", ["module_state_dict", "optimizer_state_dict"])
def test_a_part_that_is_not_there_is_a_key_error(name: str) -> None:
    with pytest.raises(CheckpointKeyError, match=rf"{name}.*LoadOptions\(keys"):
        getattr(LoadedCheckpoint({"a": 1}), name)


def test_restore_fills_existing_objects_and_returns_the_hyperparameters(
    loaded: LoadedCheckpoint, checkpoint: PyTorchCheckpoint
) -> None:
    module, optimizer = other()
    restored = loaded.restore(module=module, optimizer=optimizer)
    assert restored == {"epochs": 3, "loss": 0.25}
    assert restored.missing_keys == restored.unexpected_keys == []
    assert checkpoint.module is not None
    torch.testing.assert_close(module.state_dict(), checkpoint.module.state_dict(), rtol=0, atol=0)
    state = loaded.optimizer_state_dict["state"]
    torch.testing.assert_close(optimizer.state_dict()["state"], state, rtol=0, atol=0)


def test_restore_fills_only_what_is_given(loaded: LoadedCheckpoint) -> None:
    module, optimizer = other()
    before = copy.deepcopy(optimizer.state_dict())
    del loaded["optimizer_state_dict"]
    loaded.restore(module=module)
    torch.testing.assert_close(optimizer.state_dict(), before, rtol=0, atol=0)
    assert loaded.restore() == loaded.hyperparameters


def test_keys_that_do_not_match_are_torchs_error(loaded: LoadedCheckpoint) -> None:
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "weight"'):
        loaded.restore(module=torch.nn.Linear(2, 2))


def test_without_strict_they_are_reported_as_torch_does(loaded: LoadedCheckpoint) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 4))
    expected = module.load_state_dict(loaded.module_state_dict, strict=False)
    restored = loaded.restore(module=module, strict=False)
    assert (restored.missing_keys, restored.unexpected_keys) == (expected.missing_keys, expected.unexpected_keys)
    assert (restored.missing_keys, restored.unexpected_keys) == (["1.weight", "1.bias"], ["2.weight", "2.bias"])


def test_restoring_nothing_is_an_error_without_strict_too(loaded: LoadedCheckpoint) -> None:
    with pytest.raises(CheckpointKeyError, match=r"Nothing was restored: .*'0.weight'.* Linear \('weight', 'bias'\)"):
        loaded.restore(module=torch.nn.Linear(2, 2), strict=False)
    assert loaded.restore(module=torch.nn.ReLU(), strict=False).unexpected_keys == list(loaded.module_state_dict)
    LoadedCheckpoint({"module_state_dict": {}}).restore(module=torch.nn.Linear(2, 2), strict=False)


def test_nothing_is_half_restored_when_a_part_is_missing(loaded: LoadedCheckpoint) -> None:
    del loaded["optimizer_state_dict"]
    module, optimizer = other()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(CheckpointKeyError, match="optimizer_state_dict"):
        loaded.restore(module=module, optimizer=optimizer)
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)


def test_hyperparameters_can_be_replaced(loaded: LoadedCheckpoint) -> None:
    loaded.hyperparameters = Progress(epochs=9)
    assert loaded.hyperparameters == {"epochs": 9, "loss": 0.25}
    loaded.hyperparameters = {"only": 1}
    assert list(loaded) == ["module_state_dict", "optimizer_state_dict", "only"]
    loaded.hyperparameters = None
    assert list(loaded) == ["module_state_dict", "optimizer_state_dict"]


@pytest.mark.parametrize("reserved", ["module_state_dict", "optimizer_state_dict"])
def test_hyperparameters_never_replace_a_state(loaded: LoadedCheckpoint, reserved: str) -> None:
    before = dict(loaded)
    with pytest.raises(CheckpointValueError, match=reserved):
        loaded.hyperparameters = {"epochs": 9, reserved: {}}
    assert list(loaded) == list(before)
    assert all(loaded[key] is before[key] for key in before)


# ---------------------------------------------------------------- dataclasses and NamedTuples


@dataclass
class Inner:
    name: str
    size: int = 1


class Pair(NamedTuple):
    first: int
    second: str = "x"


@dataclass
class Outer:
    inner: Inner
    many: list[Inner]
    named: dict[str, Inner]
    shape: tuple[int, Inner]
    maybe: Optional[Inner] = None  # noqa: UP045 - both spellings
    other: Inner | None = None
    noted: Annotated[Inner | None, "note"] = None
    count: int = 0
    derived: int = field(default=0, init=False)


def test_a_dataclass_is_rebuilt_whole() -> None:
    outer = Outer(
        Inner("a"), [Inner("b", 2)], {"k": Inner("c")}, (1, Inner("d")), Inner("e"), Inner("f"), Inner("g"), 5
    )
    outer.derived = 7
    content = content_of(PyTorchCheckpoint(hyperparameters=outer))
    assert content == asdict(outer)
    assert LoadedCheckpoint(content).hyperparameters_as(Outer) == outer


def test_a_named_tuple_is_rebuilt_with_its_defaults() -> None:
    assert LoadedCheckpoint({"first": 1}).hyperparameters_as(Pair) == Pair(1, "x")


@pytest.mark.parametrize(
    ("content", "message"),
    [({}, "missing a required argument: 'name'"), ({"name": "a", "colour": 1}, "unexpected keyword argument 'colour'")],
)
def test_hyperparameters_that_do_not_fit_are_a_type_error(content: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=rf"do not fit Inner\(name, size\): .*{message}"):
        LoadedCheckpoint(content).hyperparameters_as(Inner)


def test_annotations_that_cannot_be_resolved_are_a_type_error() -> None:
    @dataclass
    class Config:
        inner: "Missing"  # type: ignore[name-defined]  # noqa: F821, UP037

    with pytest.raises(TypeError, match="'Missing' is not defined"):
        LoadedCheckpoint({"inner": {}}).hyperparameters_as(Config)


@pytest.mark.parametrize("name", ["module", "optimizer"])
def test_a_module_assigned_to_it_is_refused_and_not_lost(loaded: LoadedCheckpoint, name: str) -> None:
    with pytest.raises(AttributeError, match=f"{name}_state_dict"):
        setattr(loaded, name, getattr(make_checkpoint(1), name))


@pytest.mark.parametrize("cls", [dict, int, "Inner"])
def test_only_dataclasses_and_named_tuples_can_be_asked_for(cls: Any) -> None:
    with pytest.raises(TypeError, match="a dataclass or a NamedTuple, not"):
        LoadedCheckpoint({"a": 1}).hyperparameters_as(cls)


# ---------------------------------------------------------------- copies, reprs


def test_torch_save_of_a_received_checkpoint_makes_a_plain_file(loaded: LoadedCheckpoint) -> None:
    buffer = io.BytesIO()
    torch.save(loaded, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=True)
    assert not isinstance(again, LoadedCheckpoint)
    assert list(again) == list(loaded)


def test_it_survives_pickling_and_copying(loaded: LoadedCheckpoint) -> None:
    for again in (
        pickle.loads(pickle.dumps(loaded)),
        pickle.loads(pickle.dumps(loaded, protocol=5)),
        copy.copy(loaded),
        copy.deepcopy(loaded),
        loaded.copy(),
    ):
        assert isinstance(again, LoadedCheckpoint)
        assert again.uri == loaded.uri
        torch.testing.assert_close(again.module_state_dict, loaded.module_state_dict, rtol=0, atol=0)


def test_a_deep_copy_shares_no_tensor(loaded: LoadedCheckpoint) -> None:
    copy.deepcopy(loaded).module_state_dict["0.weight"].zero_()
    assert loaded.module_state_dict["0.weight"].any()


class Loud(torch.nn.Linear):
    def __repr__(self) -> str:
        raise AssertionError("a repr must not ask the module for its own")


def test_reprs_are_short_and_name_what_is_there(loaded: LoadedCheckpoint) -> None:
    parts = "module_state_dict, optimizer_state_dict, dict(epochs, loss)"
    assert repr(loaded) == f"LoadedCheckpoint('s3://bucket/key.pt', {parts})"
    checkpoint = PyTorchCheckpoint(module=Loud(1, 1), hyperparameters=Progress())
    assert repr(checkpoint) == "PyTorchCheckpoint(module=Loud, hyperparameters=Progress(epochs, loss), optimizer=None)"
    with pytest.raises(CheckpointValueError, match="given"):
        PyTorchCheckpoint(hyperparameters=7)  # type: ignore[arg-type]
