"""A training loop with a CheckpointManager is killed (SIGKILL) at random moments, and started again, and so on.

Right: every start resumes from the last whole checkpoint, of the steps whose ``save`` had returned at most one is not
there, and all losses are those of a run that nobody kills. "left behind" is what ``torchferry.clean`` leaves, and
checkpoints beyond those that are to be kept.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

import torchferry
from reliability.outcome import Outcome
from reliability.stores import Store
from reliability.works import MIB
from torchferry.testing import victims

KEPT = 3
_CLEANS = 50


class Place(Protocol):
    """Where the checkpoints are, and the way around torchferry to them."""

    url: str

    def names(self) -> list[str]:
        """The names of what is there."""

    def staged(self) -> int:
        """How many things are staged and not published."""


def train(url: str, options: dict[str, Any], steps: int, log: str | None, pace: float = 0.0) -> list[float]:
    """Trains; writes what happens to a file as it happens. Returns the losses."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = torch.nn.Linear(16, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    ballast = torch.zeros(6 * MIB // 4)
    losses = []
    with (
        Path(log or "/dev/null").open("a", buffering=1) as file,
        torchferry.CheckpointManager(
            url, max_to_keep=KEPT, best=("loss", "min"), part_size=5 * MIB, storage_options=options
        ) as manager,
    ):
        first = 1
        if (state := manager.resume()) is not None:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            ballast = state["ballast"]
            first = state["step"] + 1
            if not bool((ballast == state["step"]).all()):
                file.write("mixed\n")
        file.write(f"resumed {first - 1}\n")
        for step in range(first, steps + 1):
            batch = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
            loss = (model(batch) - batch.sum(1, keepdim=True)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ballast.fill_(step)
            losses.append(loss.item())
            file.write(f"loss {step} {loss.item()!r}\n")
            time.sleep(pace)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "ballast": ballast, "step": step}
            manager.save(step, state, {"loss": loss.item()})
            file.write(f"saved {step}\n")
    return losses


def run(
    place: Place, where: str, options: dict[str, Any], *, count: int, seed: int, say: Callable[[str], None]
) -> list[Outcome]:
    outcome = Outcome("kill of a training with a manager", where)
    randomly = random.Random(seed)
    steps = max(20, count * 2)
    with tempfile.TemporaryDirectory(prefix="managed-") as name:
        expected = train(str(Path(name) / "reference"), {}, steps, None)
        log, done, kills = Path(name) / "log", 0, 0
        while kills < count:
            whole = _steps(place)
            before, early = _resumes(log), randomly.random() < 0.1  # while it starts and resumes
            victim = victims.start(train, place.url, options, steps, str(log), 0.02)
            while not early and victim.is_alive() and _resumes(log) == before:
                time.sleep(0.01)
            victim.join(randomly.uniform(0.0, 2.0))
            victim.kill()
            victim.join()
            if victim.exitcode == 0:  # it was done before: begin anew
                done += 1
                outcome.notes["trainings that came to their end"] += 1
                torchferry.CheckpointManager(place.url, max_to_keep=1, storage_options=options).delete(steps)
                for step in _steps(place):
                    torchferry.CheckpointManager(place.url, storage_options=options).delete(step)
                log.unlink()
                continue
            kills += 1
            problem = _judge(log, before, whole, _steps(place), expected)
            if problem:
                outcome.add_wrong(problem)
            else:
                outcome.right += 1
            outcome.notes[f"{len(_steps(place))} checkpoints after the kill"] += 1
            say(f"{where} {kills}/{count}: {problem or 'right'}; steps {_steps(place)}")
        last = train(place.url, options, steps, str(log), 0.0)
        if last != expected[len(expected) - len(last) :]:
            outcome.add_wrong("the losses of the last run")
        outcome.notes[f"{len(_steps(place))} checkpoints at the end"] += 1
        for _ in range(_CLEANS):
            torchferry.clean(place.url, older_than=0, storage_options=options)
            if not place.staged():
                break
            time.sleep(0.1)
        outcome.left = place.staged() + max(0, len(_steps(place)) - KEPT - 1)
    return [outcome]


def _judge(log: Path, resumes_before: int, whole_before: list[int], whole: list[int], expected: list[float]) -> str:
    """What is wrong after a kill; "" where nothing is."""
    lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
    if ["mixed"] in lines:
        return "a checkpoint of two steps"
    for number, value in ((int(line[1]), float(line[2])) for line in lines if line[0] == "loss" and len(line) == 3):
        if value != expected[number - 1]:
            return f"the loss of step {number} is {value}, not {expected[number - 1]}"
    resumed = [int(line[1]) for line in lines if line[0] == "resumed"]
    if len(resumed) > resumes_before and resumed[-1] < max(whole_before, default=0):
        return f"resumed from {resumed[-1]}, and step {max(whole_before)} was whole"
    last_run = lines[max((i for i, line in enumerate(lines) if line[0] == "resumed"), default=0) :]
    saved = [int(line[1]) for line in last_run if line[0] == "saved"]
    if saved and max(whole, default=0) < max(saved) - 1:
        return f"step {max(saved)} was saved, and the latest is {max(whole, default=0)}"
    return ""


def _resumes(log: Path) -> int:
    return log.read_text().count("resumed") if log.exists() else 0


def _steps(place: Place) -> list[int]:
    return sorted(int(name[5:15]) for name in place.names() if name.startswith("step-") and name.endswith(".pt"))


class LocalPlace:
    """A directory."""

    def __init__(self, directory: Path) -> None:
        self.url = str(directory)
        self._directory = directory

    def names(self) -> list[str]:
        return [path.name for path in self._directory.iterdir()] if self._directory.exists() else []

    def staged(self) -> int:
        return len(list(self._directory.glob(".torchferry-*")))


class StorePlace:
    """A prefix of a cloud's stand-in."""

    def __init__(self, store: Store, prefix: str) -> None:
        self.url = store.url(prefix)
        self._store = store
        self._prefix = prefix

    def names(self) -> list[str]:
        return [name.removeprefix(f"{self._prefix}/") for name in self._store.names(f"{self._prefix}/")]

    def staged(self) -> int:
        return len(self._store.staged(self._prefix))
