"""Ranks for the tests of sharded checkpoints: processes that are started once, and used for many jobs."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

WORKER = Path(__file__).with_name("worker.py")


@dataclass(frozen=True, slots=True)
class Failed:
    """How a rank failed.

    Attributes:
        kind: The name of the error's class; "killed" where the process ended.
        text: Its message.
        failures: The names of the classes of all ranks' errors, by rank, as the error knows them.
        traceback: Where it was raised.
    """

    kind: str
    text: str = ""
    failures: Any = None
    traceback: str = ""


class Ranks:
    """Processes that run the jobs of worker.py together."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._workers: list[subprocess.Popen[bytes]] = []

    def run(self, job: str, world: int, *, timeout: float = 60.0, **arguments: Any) -> list[Any]:
        """Runs a job on ranks 0 to ``world``; returns what each returned. A rank's error fails the test."""
        answers = self.try_to(job, world, timeout=timeout, **arguments)
        for answer in answers:
            assert not isinstance(answer, Failed), f"{answer.kind}: {answer.text}\n{answer.traceback}"
        return answers

    def try_to(self, job: str, world: int, *, timeout: float = 60.0, **arguments: Any) -> list[Any]:
        """The same; errors are returned as :class:`Failed`."""
        self._start(world)
        store = self._directory / uuid.uuid4().hex
        with ThreadPoolExecutor(world) as threads:
            return list(
                threads.map(
                    lambda rank: self._ask(rank, (job, rank, world, str(store), timeout, arguments)), range(world)
                )
            )

    def _start(self, world: int) -> None:
        for index, worker in enumerate(self._workers):
            if worker.poll() is not None:
                self._workers[index] = _start()
        while len(self._workers) < world:
            self._workers.append(_start())

    def _ask(self, rank: int, order: tuple[Any, ...]) -> Any:
        worker = self._workers[rank]
        assert worker.stdin is not None
        assert worker.stdout is not None
        pickle.dump(order, worker.stdin)
        worker.stdin.flush()
        try:
            outcome, answer = pickle.load(worker.stdout)
        except EOFError:
            worker.wait()
            return Failed("killed")
        return answer if outcome == "done" else Failed(*answer)

    def close(self) -> None:
        """Ends the processes."""
        for worker in self._workers:
            worker.kill()
            worker.communicate()


def _start() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, str(WORKER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISTRIBUTED_DEBUG": "OFF"},
    )


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Up to four ranks."""
    group = Ranks(tmp_path_factory.mktemp("ranks"))
    yield group
    group.close()
