"""A checkpoint that is still what was loaded is not uploaded again; one that changed in any way is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import pytest
import torch
from checkpoints import make_checkpoint, stored_files
from flytekit import FlyteContext
from samples import CHANGES

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


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
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
