"""A checkpoint that is still what was loaded is not uploaded again; one that changed in any way is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import pytest
import torch
from checkpoints import make_checkpoint, stored_files
from flytekit import FlyteContext

from torchferry import LoadOptions, SaveOptions
from torchferry.flyte import LoadedCheckpoint, PyTorchCheckpoint, PyTorchCheckpointTransformer

transformer = PyTorchCheckpointTransformer()
literal_type = transformer.get_literal_type(PyTorchCheckpoint)


def uri_of(context: FlyteContext, value: Any, t: Any = PyTorchCheckpoint) -> str:
    return str(transformer.to_literal(context, value, t, literal_type).scalar.blob.uri)


def received(context: FlyteContext, t: Any = PyTorchCheckpoint) -> LoadedCheckpoint:
    literal = transformer.to_literal(context, make_checkpoint(), PyTorchCheckpoint, literal_type)
    loaded: LoadedCheckpoint = transformer.to_python_value(context, literal, t)
    return loaded


def test_an_unchanged_checkpoint_is_stored_once(context: FlyteContext) -> None:
    loaded = received(context)
    assert uri_of(context, loaded) == loaded.uri
    assert uri_of(context, loaded) == loaded.uri
    assert len(stored_files(context)) == 1


def test_reading_it_does_not_change_it(context: FlyteContext) -> None:
    loaded = received(context)
    checkpoint = make_checkpoint(seed=1)
    loaded.restore(module=checkpoint.module, optimizer=checkpoint.optimizer)
    assert uri_of(context, loaded) == loaded.uri


def in_place(loaded: LoadedCheckpoint) -> None:
    loaded.module_state_dict["0.weight"][3, 3] += 1


def through_an_alias(loaded: LoadedCheckpoint) -> None:
    loaded.module_state_dict["0.weight"].view(-1)[7:9].zero_()


def under_inference_mode(loaded: LoadedCheckpoint) -> None:
    with torch.inference_mode():
        loaded.module_state_dict["2.bias"].mul_(2)


def through_data(loaded: LoadedCheckpoint) -> None:
    loaded.optimizer_state_dict["state"][0]["exp_avg"].data[0] = 9


def another_hyperparameter(loaded: LoadedCheckpoint) -> None:
    loaded["epochs"] = 4


def a_hyperparameter_of_another_type(loaded: LoadedCheckpoint) -> None:
    loaded["epochs"] = 3.0


def one_hyperparameter_more(loaded: LoadedCheckpoint) -> None:
    loaded["more"] = None


def one_key_less(loaded: LoadedCheckpoint) -> None:
    del loaded["optimizer_state_dict"]


def another_order(loaded: LoadedCheckpoint) -> None:
    loaded["epochs"] = loaded.pop("epochs")


def another_type(loaded: LoadedCheckpoint) -> None:
    state = loaded.module_state_dict
    state["0.weight"] = state["0.weight"].to(torch.float64)


def another_shape(loaded: LoadedCheckpoint) -> None:
    state = loaded.module_state_dict
    state["0.weight"] = state["0.weight"].view(4, -1)


def two_tensors_swapped(loaded: LoadedCheckpoint) -> None:
    state = loaded.optimizer_state_dict["state"][0]
    state["exp_avg"], state["exp_avg_sq"] = state["exp_avg_sq"], state["exp_avg"]


@pytest.mark.parametrize(
    "change",
    [
        *(in_place, through_an_alias, under_inference_mode, through_data, another_hyperparameter, another_order),
        *(a_hyperparameter_of_another_type, one_hyperparameter_more, one_key_less, another_type, another_shape),
        two_tensors_swapped,
    ],
    ids=lambda change: change.__name__,
)
def test_a_changed_checkpoint_is_uploaded(s3_context: FlyteContext, change: Callable[[LoadedCheckpoint], None]) -> None:
    loaded = received(s3_context)
    change(loaded)
    uri = uri_of(s3_context, loaded)
    assert uri != loaded.uri
    again = transformer.to_python_value(
        s3_context, transformer.to_literal(s3_context, loaded, PyTorchCheckpoint, literal_type), PyTorchCheckpoint
    )
    torch.testing.assert_close(dict(again), dict(loaded), rtol=0, atol=0)


def test_a_part_is_not_the_whole(s3_context: FlyteContext) -> None:
    loaded = received(s3_context, Annotated[PyTorchCheckpoint, LoadOptions(keys=("module_state_dict",))])
    assert uri_of(s3_context, loaded) != loaded.uri


def test_what_was_replaced_in_the_store_meanwhile_is_uploaded(s3_context: FlyteContext) -> None:
    loaded = received(s3_context)
    with s3_context.file_access.raw_output_fs.open(loaded.uri, "wb") as file:
        torch.save({"another": torch.ones(1)}, file)
    assert uri_of(s3_context, loaded) != loaded.uri


def test_what_was_deleted_from_the_store_meanwhile_is_uploaded(s3_context: FlyteContext) -> None:
    loaded = received(s3_context)
    s3_context.file_access.raw_output_fs.rm(loaded.uri)
    assert uri_of(s3_context, loaded) != loaded.uri


def test_what_was_loaded_from_a_store_that_flytekit_cannot_reach_is_uploaded(s3_context: FlyteContext) -> None:
    loaded = LoadedCheckpoint(received(s3_context), uri="abfs://container/checkpoint.pt")  # flytekit has no account
    assert uri_of(s3_context, loaded).startswith(s3_context.file_access.raw_output_prefix)


def test_metadata_of_its_own_means_an_object_of_its_own(s3_context: FlyteContext) -> None:
    loaded = received(s3_context)
    t = Annotated[PyTorchCheckpoint, SaveOptions(metadata={"stage": "prod"})]
    uri = uri_of(s3_context, loaded, t)
    assert uri != loaded.uri
    assert s3_context.file_access.raw_output_fs.metadata(uri) == {"stage": "prod"}


def test_without_crc32s_nothing_is_proved(s3_context: FlyteContext) -> None:
    loaded = received(s3_context)
    torch.serialization.set_crc32_options(False)
    try:
        assert uri_of(s3_context, loaded) != loaded.uri
    finally:
        torch.serialization.set_crc32_options(True)


def test_what_stock_flytekit_wrote_is_recognized_too(s3_context: FlyteContext) -> None:
    uri = f"{s3_context.file_access.raw_output_prefix}4a5bd2c8f1e04c3e8d3e0f0c8c1b2a39.pt"
    content = {"module_state_dict": torch.nn.Linear(2, 2).state_dict(), "epochs": 3}
    with s3_context.file_access.raw_output_fs.open(uri, "wb") as file:
        torch.save(content, file)
    assert uri_of(s3_context, LoadedCheckpoint(content, uri=uri)) == uri
