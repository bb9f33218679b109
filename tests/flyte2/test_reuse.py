"""In Flyte 2: a checkpoint that is still what was loaded is not stored again; one that changed in any way is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import flyte
import pytest
import torch
from runs import Runs
from samples import CHANGES, make_checkpoint

from torchferry import LoadOptions, SaveOptions
from torchferry.flyte2 import LoadedCheckpoint, PyTorchCheckpoint

env = flyte.TaskEnvironment(name="reuse")

ModuleOnly = Annotated[PyTorchCheckpoint, LoadOptions(keys=("module_state_dict",))]


@env.task
async def make() -> PyTorchCheckpoint:
    return make_checkpoint()


@env.task
async def pass_on(checkpoint: PyTorchCheckpoint) -> PyTorchCheckpoint:
    return checkpoint


def received(runs: Runs) -> LoadedCheckpoint:
    loaded: LoadedCheckpoint = runs(make)
    return loaded


def test_reading_it_does_not_change_it(runs: Runs) -> None:
    @env.task
    async def read(checkpoint: PyTorchCheckpoint) -> PyTorchCheckpoint:
        other = make_checkpoint(seed=1)
        checkpoint.restore(module=other.module, optimizer=other.optimizer)
        return checkpoint

    loaded = received(runs)
    assert runs(read, checkpoint=loaded).uri == loaded.uri
    assert len(runs.stored()) == 1


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_checkpoint_is_stored_again(runs: Runs, change: Callable[[LoadedCheckpoint], None]) -> None:
    @env.task
    async def changes(checkpoint: PyTorchCheckpoint) -> PyTorchCheckpoint:
        change(checkpoint)
        return checkpoint

    loaded = received(runs)
    changed = runs(changes, checkpoint=loaded)
    assert changed.uri != loaded.uri
    change(loaded)
    torch.testing.assert_close(dict(changed), dict(loaded), rtol=0, atol=0)
    assert list(changed) == list(loaded)


def test_a_part_is_not_the_whole(runs: Runs) -> None:
    @env.task
    async def part_of(checkpoint: ModuleOnly) -> PyTorchCheckpoint:
        return checkpoint

    loaded = received(runs)
    part = runs(part_of, checkpoint=loaded)
    assert part.uri != loaded.uri
    assert list(part) == ["module_state_dict"]


def test_what_was_replaced_in_the_store_meanwhile_is_stored_again(runs: Runs) -> None:
    loaded = received(runs)
    with runs.fs.open(loaded.uri, "wb") as file:
        torch.save({"another": torch.ones(1)}, file)
    again = runs(pass_on, checkpoint=loaded)
    assert again.uri != loaded.uri
    torch.testing.assert_close(dict(again), dict(loaded), rtol=0, atol=0)


def test_what_was_deleted_from_the_store_meanwhile_is_stored_again(runs: Runs) -> None:
    loaded = received(runs)
    runs.fs.rm(loaded.uri)
    assert runs(pass_on, checkpoint=loaded).uri != loaded.uri


def test_metadata_of_its_own_means_an_object_of_its_own(runs: Runs) -> None:
    @env.task
    async def promote(checkpoint: PyTorchCheckpoint) -> Annotated[PyTorchCheckpoint, SaveOptions(metadata={"a": "b"})]:
        return checkpoint

    loaded = received(runs)
    promoted = runs(promote, checkpoint=loaded)
    assert promoted.uri != loaded.uri
    assert runs.fs.metadata(promoted.uri)["a"] == "b"


def test_without_crc32s_nothing_is_proved(runs: Runs) -> None:
    loaded = received(runs)
    torch.serialization.set_crc32_options(False)
    try:
        assert runs(pass_on, checkpoint=loaded).uri != loaded.uri
    finally:
        torch.serialization.set_crc32_options(True)


def test_what_torch_saved_is_recognized_too(runs: Runs) -> None:
    content: dict[str, Any] = {"module_state_dict": torch.nn.Linear(2, 2).state_dict(), "epochs": 3}
    uri = f"{runs.prefix}/stock.pt"
    with runs.fs.open(uri, "wb") as file:
        torch.save(content, file)
    assert runs(pass_on, checkpoint=LoadedCheckpoint(content, uri=uri)).uri == uri
