"""What one attempt of a task leaves for the next, in local runs whose raw data is on S3."""

from __future__ import annotations

import flyte
import pytest
import torch
from runs import Runs

from torchferry.flyte2 import PyTorchCheckpoint, task_checkpoints

env = flyte.TaskEnvironment(name="attempts")


def test_the_next_attempt_goes_on_from_what_this_one_saved(runs: Runs) -> None:
    begun: list[int] = []

    @env.task(retries=2)
    async def resumes(steps: int) -> int:
        module = torch.nn.Linear(2, 2)
        async with task_checkpoints(max_to_keep=1) as checkpoints:
            loaded = await checkpoints.resume_async()
            step = 0 if loaded is None else int(loaded.restore(module=module)["step"])
            begun.append(step)
            while step < steps:
                step += 1
                await checkpoints.save_async(step, PyTorchCheckpoint(module, {"step": step}))
                if step == 2 * len(begun):
                    raise ConnectionError("killed")
        return step

    @env.task
    async def main() -> int:
        assert await task_checkpoints().resume_async() is None  # another task's is not its own
        return await resumes(5)

    assert runs(main) == 5
    assert begun == [0, 2, 4]
    assert len(runs.stored()) == 1


def test_a_task_returns_what_it_saved_last_without_a_second_upload(runs: Runs) -> None:
    begun: list[int | None] = []

    @env.task(retries=1)
    def resumes(steps: int) -> PyTorchCheckpoint:
        module = torch.nn.Linear(2, 2)
        with task_checkpoints(max_to_keep=2) as checkpoints:
            loaded = checkpoints.resume()
            begun.append(checkpoints.restored_step)
            for step in range(1 if loaded is None else loaded.restore(module)["step"] + 1, steps + 1):
                checkpoint = PyTorchCheckpoint(module, {"step": step})
                checkpoints.save(step, checkpoint)
                if loaded is None and step == 3:
                    checkpoints.wait_until_finished()
                    raise ConnectionError("killed")
            checkpoints.wait_until_finished()
            assert checkpoints.all_steps() == [5, 6]
        return checkpoint

    assert runs(resumes, steps=6)["step"] == 6
    assert begun == [None, 3]
    assert not [path for path in runs.stored() if path.endswith("/checkpoint.pt")]  # what is stored is not stored again


def test_outside_of_tasks_there_is_none() -> None:
    with pytest.raises(RuntimeError, match="inside a task"):
        task_checkpoints()
