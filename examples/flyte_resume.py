"""A Flyte task that is killed while it trains, and goes on from its last checkpoint when Flyte runs it again.

    python examples/flyte_resume.py

runs two attempts of the task in processes of their own, as pods do (pyflyte-execute), on files of this machine. The
first attempt kills itself after step 25. On a cluster, nothing but the task is needed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from flytekit import FlyteContextManager, task
from flytekit.configuration import ImageConfig, SerializationSettings
from flytekit.core.type_engine import TypeEngine
from flytekit.extras.pytorch import PyTorchCheckpoint

from torchferry.flyte import task_checkpoints


@task(retries=3)
def train(steps: int) -> PyTorchCheckpoint:
    torch.manual_seed(0)
    model = torch.nn.Linear(32, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    with task_checkpoints(save_interval_steps=10, max_to_keep=2, handle_preemption=True) as checkpoints:
        saved = checkpoint = checkpoints.resume()
        step = 0 if saved is None else saved.restore(model, optimizer)["step"]
        print(f"starts from step {step}", flush=True)
        ends = False
        while step < steps and not ends:
            step += 1
            batch = torch.randn(16, 32, generator=torch.Generator().manual_seed(step))
            loss = (model(batch) - batch.sum(1, keepdim=True)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            checkpoint = PyTorchCheckpoint(module=model, hyperparameters={"step": step}, optimizer=optimizer)
            ends = checkpoints.reached_preemption()  # before the save, which then sees any SIGTERM that ends the loop
            checkpoints.save(step, checkpoint)
            if saved is None and step == 25:  # a node that is lost
                checkpoints.wait_until_finished()
                os.kill(os.getpid(), signal.SIGKILL)
    return checkpoint  # it is stored already, and not uploaded again


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="flyte-resume-") as name:
        place = Path(name)
        context = FlyteContextManager.current_context()
        inputs = TypeEngine.dict_to_literal_map(context, {"steps": 50})
        (place / "inputs.pb").write_bytes(inputs.to_flyte_idl().SerializeToString())
        previous = '""'
        for attempt in range(2):
            here = place / f"attempt-{attempt}"
            values = {
                "{{.input}}": place / "inputs.pb",
                "{{.outputPrefix}}": here / "out",
                "{{.rawOutputDataPrefix}}": here / "raw",
                "{{.checkpointOutputPrefix}}": here / "checkpoints",
                "{{.prevCheckpointPrefix}}": previous,
            }
            command = [str(values.get(word, word)) for word in _command()]
            done = subprocess.run(
                [Path(sys.executable).with_name(command[0]), *command[1:]], cwd=Path(__file__).parent, check=False
            )
            print(f"attempt {attempt + 1} ended with {done.returncode}", flush=True)
            previous = str(here / "checkpoints")
        print(f"stored: {sorted(path.name for path in (here / 'checkpoints').glob('step-*'))}")
        print(f"uploaded as an output: {len([path for path in (here / 'raw').rglob('*') if path.is_file()])}")


def _command() -> list[str]:
    import flyte_resume

    command: list[str] = flyte_resume.train.get_command(SerializationSettings(ImageConfig.auto()))
    return command


if __name__ == "__main__":
    main()
