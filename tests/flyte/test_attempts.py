"""Checkpoints that the attempts of a task leave for each other."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from checkpoints import make_checkpoint
from flytekit import FlyteContext, FlyteContextManager, map_task, task, workflow
from flytekit.core.checkpointer import SyncCheckpoint
from flytekit.core.type_engine import TypeEngine

from torchferry.flyte import LoadedCheckpoint, PyTorchCheckpoint, task_checkpoints
from torchferry.testing.forkserver import python

ROOT = Path(__file__).parents[2]


Attempt = Callable[[int, int | None], AbstractContextManager[FlyteContext]]


@pytest.fixture
def attempt(context: FlyteContext) -> Iterator[Attempt]:
    """Makes the context of an attempt, as the pod's entry point does: of this number, after that one."""
    checkpoints = []

    def make(number: int, before: int | None) -> AbstractContextManager[FlyteContext]:
        prefix = f"{context.file_access.raw_output_prefix.rstrip('/')}/attempts"
        source = None if before is None else f"{prefix}/{before}"
        checkpoints.append(SyncCheckpoint(checkpoint_dest=f"{prefix}/{number}", checkpoint_src=source))
        parameters = context.user_space_params.builder()
        parameters.checkpoint = checkpoints[-1]
        state = context.execution_state.with_params(user_space_params=parameters.build())
        entered: AbstractContextManager[FlyteContext] = FlyteContextManager.with_context(
            context.with_execution_state(state)
        )
        return entered

    yield make
    for checkpoint in checkpoints:
        checkpoint._td.cleanup()


def test_attempt_goes_on_from_the_last_attempt_that_saved_something(attempt: Attempt) -> None:
    with attempt(0, None), task_checkpoints(max_to_keep=1) as checkpoints:
        assert checkpoints.resume() is None
        for step in (1, 2):
            assert checkpoints.save(step, make_checkpoint())
    for number in (1, 2):  # an attempt that is killed before it saves anything, and the next one
        with attempt(number, number - 1), task_checkpoints() as checkpoints:
            found = checkpoints.resume()
            assert isinstance(found, LoadedCheckpoint)
            assert checkpoints.restored_step == 2
            assert checkpoints.latest_step() == 2
            assert found.restore(make_checkpoint(seed=1).module)["epochs"] == 3
    with attempt(2, 1), task_checkpoints() as checkpoints:
        checkpoints.save(3, {"step": 3})
        checkpoints.wait_until_finished()
        assert checkpoints.resume() == {"step": 3}


@task
def last_step_of(k: int) -> int:
    """Goes on from what is there, and saves ``k`` steps."""
    with task_checkpoints() as checkpoints:
        found = checkpoints.resume()
        step = 0 if found is None else int(found["epochs"])
        for each in range(step + 1, step + k + 1):
            checkpoints.save(each, PyTorchCheckpoint(hyperparameters={"epochs": each}))
    return step + k


@workflow
def sweep() -> list[int]:
    return map_task(last_step_of)(k=[1, 2, 3])


@pytest.mark.usefixtures("context")
def test_elements_of_a_map_that_runs_locally_never_go_on_from_each_other() -> None:
    assert sweep() == [1, 2, 3]


def test_checkpoint_that_the_task_has_stored_is_not_uploaded_again_as_its_output(attempt: Attempt) -> None:
    with attempt(0, None) as ctx:
        checkpoint = make_checkpoint()
        with task_checkpoints() as checkpoints:
            checkpoints.save(1, checkpoint)
        literal_type = TypeEngine.to_literal_type(PyTorchCheckpoint)
        literal = TypeEngine.to_literal(ctx, checkpoint, PyTorchCheckpoint, literal_type)
        assert literal.scalar.blob.uri == f"{checkpoints.url}/step-0000000001.pt"
        assert checkpoint.module is not None
        with torch.no_grad():
            next(checkpoint.module.parameters()).add_(1)
        changed = TypeEngine.to_literal(ctx, checkpoint, PyTorchCheckpoint, literal_type)
        assert changed.scalar.blob.uri != literal.scalar.blob.uri


async def test_asynchronous_task_saves_checkpoints_too(attempt: Attempt) -> None:
    with attempt(0, None):
        async with task_checkpoints() as checkpoints:
            assert await checkpoints.save_async(1, make_checkpoint())
            assert isinstance(await checkpoints.resume_async(), LoadedCheckpoint)


def test_outside_of_a_task_it_says_what_to_do() -> None:
    with pytest.raises(RuntimeError, match="inside a task"):
        task_checkpoints()


def test_task_that_is_killed_goes_on_when_it_is_retried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The example, which runs two attempts as pods do."""
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    done = subprocess.run(
        [*python(), "examples/flyte_resume.py"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert re.findall("starts from step (.*)", done.stdout) == ["0", "20"], done.stdout + done.stderr
    assert "attempt 1 ended with -9" in done.stdout
    assert "attempt 2 ended with 0" in done.stdout
    assert "stored: ['step-0000000040.pt', 'step-0000000050.pt']" in done.stdout
    assert "uploaded as an output: 0" in done.stdout
