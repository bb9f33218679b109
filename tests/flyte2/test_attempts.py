"""What one attempt of a task leaves for the next, in local runs whose raw data is on S3."""

from __future__ import annotations

import flyte
import pytest
import torch
from runs import Runs

from torchferry.flyte2 import PyTorchCheckpoint, task_checkpoint

env = flyte.TaskEnvironment(name="attempts")


def test_the_next_attempt_goes_on_from_what_this_one_saved(runs: Runs) -> None:
    begun: list[int] = []

    @env.task(retries=2)
    async def resumes(steps: int) -> int:
        place = task_checkpoint()
        module = torch.nn.Linear(2, 2)
        loaded = await place.load_async()
        step = 0 if loaded is None else int(loaded.restore(module=module)["step"])
        begun.append(step)
        while step < steps:
            step += 1
            await place.save_async(PyTorchCheckpoint(module, {"step": step}))
            if step == 2 * len(begun):
                raise ConnectionError("killed")
        return step

    @env.task
    async def main() -> int:
        assert await task_checkpoint().load_async() is None  # another task's is not its own
        return await resumes(5)

    assert runs(main) == 5
    assert begun == [0, 2, 4]
    assert len(runs.stored()) == 1


def test_a_series_goes_on_too(runs: Runs) -> None:
    begun: list[int | None] = []

    @env.task(retries=1)
    def resumes(steps: int) -> list[int]:
        with task_checkpoint().manager(max_to_keep=2) as manager:
            loaded = manager.restore()
            begun.append(manager.restored_step)
            for step in range(0 if loaded is None else loaded["step"] + 1, steps):
                manager.save(step, {"step": step, "weights": torch.ones(4)})
                if loaded is None and step == 3:
                    manager.wait_until_finished()
                    raise ConnectionError("killed")
            manager.wait_until_finished()
            return manager.all_steps()

    assert runs(resumes, steps=7) == [5, 6]
    assert begun == [None, 3]


def test_outside_of_tasks_there_is_none() -> None:
    with pytest.raises(RuntimeError, match="inside a task"):
        task_checkpoint()
