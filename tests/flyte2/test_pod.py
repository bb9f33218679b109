"""What happens in a pod: flyte's container entrypoint, with inputs and outputs on S3.

It runs without the controller, which starts other tasks through a cluster.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import uuid
from pathlib import Path
from typing import Any

import flyte2_pod_tasks as pod_tasks
import pytest
import torch
from flyte.types import TypeEngine
from flyteidl2.core import execution_pb2
from flyteidl2.core.literals_pb2 import Literal
from flyteidl2.task import common_pb2
from runs import Runs

from torchferry.flyte2 import PyTorchCheckpoint
from torchferry.testing.forkserver import python
from torchferry.testing.servers import S3Server

HERE = Path(__file__).parent


class Pods:
    """Runs tasks as Flyte's back end has pods do it."""

    def __init__(self, runs: Runs, server: S3Server) -> None:
        self.fs = runs.fs
        self.prefix = runs.prefix
        self.environment = {
            **os.environ,
            "FLYTE_AWS_ENDPOINT": server.endpoint,
            "FLYTE_AWS_ACCESS_KEY_ID": server.key,
            "FLYTE_AWS_SECRET_ACCESS_KEY": server.secret,
            "AWS_REGION": server.region,
            "FLYTE_CLUSTERED_WORKER": "1",  # which is run without a controller
            "PYTHONWARNINGS": "ignore",
        }

    def run(
        self, task: Any, *, attempt: int = 1, at: str = "", killed: bool = False, rank: int = 0, **inputs: Any
    ) -> Any:
        """Returns the literal of the output, if there is one; raises what error.pb says."""
        base = at or f"{self.prefix}/{uuid.uuid4().hex}"
        values = [common_pb2.NamedLiteral(name=name, value=literal(value)) for name, value in inputs.items()]
        self.fs.pipe_file(f"{base}/inputs.pb", common_pb2.Inputs(literals=values).SerializeToString())
        options = {
            "inputs": f"{base}/inputs.pb",
            "outputs-path": f"{base}/{attempt}",
            "run-base-dir": base,
            "raw-data-path": f"{base}/{attempt}/raw",
            "checkpoint-path": f"{base}/{attempt}/_flytecheckpoints",
            "prev-checkpoint": f"{base}/{attempt - 1}/_flytecheckpoints" if attempt > 1 else '""',
            "version": "v",
            "name": "a0",
            "run-name": "r0123",
            "project": "project",
            "domain": "development",
            "org": "org",
            "resolver": "flyte._internal.resolvers.default.DefaultTaskResolver",
        }
        pod = subprocess.run(
            [*python(), "-m", "flyte._bin.runtime", "a0"]
            + [word for name, value in options.items() for word in (f"--{name}", value)]
            + ["mod", pod_tasks.__name__, "instance", task.func.__name__],
            cwd=HERE, env={**self.environment, "RANK": str(rank)},
            capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        self.fs.invalidate_cache()
        if killed:
            assert pod.returncode < 0
            return None
        if self.fs.exists(f"{base}/{attempt}/error.pb"):
            document = execution_pb2.ErrorDocument.FromString(self.fs.cat_file(f"{base}/{attempt}/error.pb"))
            raise PodError(document)
        assert pod.returncode == 0, pod.stderr[-3000:]
        if rank:
            return None
        outputs = common_pb2.Outputs.FromString(self.fs.cat_file(f"{base}/{attempt}/outputs.pb"))
        return outputs.literals[0].value


class PodError(Exception):
    """What error.pb says."""

    def __init__(self, document: execution_pb2.ErrorDocument) -> None:
        super().__init__(document.error.message)
        self.code = document.error.code
        self.is_recoverable = document.error.kind == execution_pb2.ContainerError.RECOVERABLE
        self.origin = document.error.origin


def literal(value: Any) -> Literal:
    if isinstance(value, Literal):
        return value
    kind = type(value)
    return asyncio.run(TypeEngine.to_literal(value, kind, TypeEngine.to_literal_type(kind)))


def value_of(output: Literal, t: Any) -> Any:
    return asyncio.run(TypeEngine.to_python_value(output, t))


@pytest.fixture
def pods(runs: Runs, s3_server: S3Server) -> Pods:
    return Pods(runs, s3_server)


def test_tasks_hand_over_in_pods_and_report(pods: Pods) -> None:
    base = f"{pods.prefix}/reported"
    trained = pods.run(pod_tasks.train, at=base, steps=5)
    assert value_of(pods.run(pod_tasks.evaluate, checkpoint=trained), list[str]) == ["module_state_dict"]
    assert "torchferry-deck" in pods.fs.cat_file(f"{base}/1/report.html").decode()
    with pods.fs.open(trained.scalar.blob.uri) as file:
        assert torch.load(file)["steps"] == 5
    assert value_of(trained, PyTorchCheckpoint)["steps"] == 5


@pytest.mark.parametrize("task", [pod_tasks.refuse, pod_tasks.refuse_in_model], ids=["plain", "model"])
def test_a_value_that_no_load_would_take_is_stored_and_not_tried_again(pods: Pods, task: Any) -> None:
    with pytest.raises(PodError, match=r"builtin_function.*stored all the same.*s3://") as caught:
        pods.run(task, steps=1)
    assert not caught.value.is_recoverable
    assert caught.value.code == "Flyte2CheckpointValueError"


def test_a_task_that_is_killed_resumes_in_its_next_attempt(pods: Pods) -> None:
    base = f"{pods.prefix}/killed"
    pods.run(pod_tasks.resumes, at=base, killed=True, steps=5)
    assert value_of(pods.run(pod_tasks.resumes, at=base, attempt=2, steps=5), list[int]) == [3, 5]


def test_only_the_first_rank_of_a_clustered_task_saves(pods: Pods) -> None:
    base = f"{pods.prefix}/ranked"
    pods.run(pod_tasks.train, at=base, rank=1, steps=5)
    assert [path.rsplit("/", 1)[1] for path in pods.fs.find(base)] == ["inputs.pb"]
