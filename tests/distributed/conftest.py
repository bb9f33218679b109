"""Ranks for the tests of sharded checkpoints: processes that are started once, and used for many jobs."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

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
    """Processes that run the jobs of worker.py together; forked from one that has imported everything."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._pipes: dict[int, tuple[BinaryIO, BinaryIO]] = {}  # orders and answers, by rank
        self._control, theirs = socket.socketpair()
        with theirs:
            self._parent = subprocess.Popen(
                [sys.executable, str(WORKER), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def run(self, job: str, world: int, *, timeout: float = 60.0, **arguments: Any) -> list[Any]:
        """Runs a job on ranks 0 to ``world``; returns what each returned. A rank's error fails the test."""
        answers = self.try_to(job, world, timeout=timeout, **arguments)
        for answer in answers:
            assert not isinstance(answer, Failed), f"{answer.kind}: {answer.text}\n{answer.traceback}"
        return answers

    def try_to(self, job: str, world: int, *, timeout: float = 60.0, **arguments: Any) -> list[Any]:
        """The same; errors are returned as :class:`Failed`."""
        store = self._directory / uuid.uuid4().hex
        for rank in range(world):
            if rank not in self._pipes:
                self._pipes[rank] = self._fork()
        with ThreadPoolExecutor(world) as threads:
            orders = [(rank, (job, rank, world, str(store), timeout, arguments)) for rank in range(world)]
            return list(threads.map(lambda order: self._ask(*order), orders))

    def _fork(self) -> tuple[BinaryIO, BinaryIO]:
        their_orders, orders = os.pipe()
        answers, their_answers = os.pipe()
        socket.send_fds(self._control, [b"x"], [their_orders, their_answers])
        os.close(their_orders)
        os.close(their_answers)
        return os.fdopen(orders, "wb"), os.fdopen(answers, "rb")

    def _ask(self, rank: int, order: tuple[Any, ...]) -> Any:
        orders, answers = self._pipes[rank]
        pickle.dump(order, orders)
        orders.flush()
        try:
            outcome, answer = pickle.load(answers)
        except EOFError:
            for pipe in self._pipes.pop(rank):
                pipe.close()
            return Failed("killed")
        return answer if outcome == "done" else Failed(*answer)

    def close(self) -> None:
        """Ends the processes."""
        for pipes in self._pipes.values():
            for pipe in pipes:
                pipe.close()
        self._control.close()
        self._parent.wait(30)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Up to four ranks; they end with the file of tests, as each holds up to 640 MB."""
    group = Ranks(tmp_path_factory.mktemp("ranks"))
    yield group
    group.close()
