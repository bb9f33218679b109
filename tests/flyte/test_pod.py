"""What happens in a pod: pyflyte-execute, with inputs and outputs on S3, and stock flytekit at the other end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import pod_tasks
import pytest
import torch
from flyteidl.core import dynamic_job_pb2, errors_pb2, literals_pb2
from flytekit import FlyteContext
from flytekit.configuration import SERIALIZED_CONTEXT_ENV_VAR, ImageConfig, SerializationSettings
from flytekit.core.type_engine import TypeEngine
from flytekit.models.dynamic_job import DynamicJobSpec
from flytekit.models.literals import LiteralMap

from torchferry.flyte import PyTorchCheckpoint
from torchferry.testing.forkserver import ForkServer
from torchferry.testing.servers import S3Server

ForkServers = Callable[[bool], ForkServer]

HERE = Path(__file__).parent
SERIALIZED = SerializationSettings(ImageConfig.auto(img_name="localhost/image:1"), version="v")


class Pods:
    """Runs tasks as Flyte's propeller has pods do it."""

    def __init__(self, context: FlyteContext, server: S3Server, servers: ForkServers, output: Path) -> None:
        self.context = context
        self.servers = servers
        self.output = output
        self.prefix = f"{context.file_access.raw_output_prefix}{uuid.uuid4().hex}"
        self.fs = context.file_access.raw_output_fs
        self.environment = {
            **os.environ,
            "FLYTE_AWS_ENDPOINT": server.endpoint,
            "FLYTE_AWS_ACCESS_KEY_ID": server.key,
            "FLYTE_AWS_SECRET_ACCESS_KEY": server.secret,
            "FLYTE_INTERNAL_EXECUTION_ID": "f0123",
            "FLYTE_INTERNAL_EXECUTION_PROJECT": "project",
            "FLYTE_INTERNAL_EXECUTION_DOMAIN": "development",
            "PYTHONWARNINGS": "ignore",
            SERIALIZED_CONTEXT_ENV_VAR: SERIALIZED.serialized_context,
        }

    def run(self, task: Any, inputs: LiteralMap, **kwargs: Any) -> LiteralMap:
        """Returns the outputs; raises what error.pb says."""
        prefix = self._execute(task, inputs, **kwargs)
        outputs = literals_pb2.LiteralMap.FromString(self.fs.cat_file(f"{prefix}/out/outputs.pb"))
        return LiteralMap.from_flyte_idl(outputs)

    def run_until_killed(self, task: Any, inputs: LiteralMap) -> str:
        """Returns what the next attempt is to be told of this one."""
        prefix = self._execute(task, inputs)
        assert not self.fs.exists(f"{prefix}/out/outputs.pb")
        return prefix

    def run_dynamic(self, task: Any, inputs: LiteralMap) -> DynamicJobSpec:
        """Returns what a dynamic task tells propeller to run."""
        prefix = self._execute(task, inputs)
        spec = dynamic_job_pb2.DynamicJobSpec.FromString(self.fs.cat_file(f"{prefix}/out/futures.pb"))
        return DynamicJobSpec.from_flyte_idl(spec)

    def _execute(
        self,
        task: Any,
        inputs: LiteralMap,
        *,
        stock: bool = False,
        index: int | None = None,
        killed_before: str | None = None,
    ) -> str:
        prefix = f"{self.prefix}/{uuid.uuid4().hex}"
        self.fs.pipe_file(f"{prefix}/inputs.pb", inputs.to_flyte_idl().SerializeToString())
        values = {
            "{{.input}}": f"{prefix}/inputs.pb",
            "{{.outputPrefix}}": f"{prefix}/out",
            "{{.rawOutputDataPrefix}}": f"{prefix}/raw",
            "{{.checkpointOutputPrefix}}": f"{prefix}/flytecheckpoints",
            "{{.prevCheckpointPrefix}}": f"{killed_before}/flytecheckpoints" if killed_before else '""',
        }
        command = [values.get(word, word) for word in task.get_command(SerializationSettings(ImageConfig.auto()))]
        environment = self.environment | {"TORCHFERRY_TAKE_OVER": "0" if stock else "1"}
        if index is not None:
            environment |= {"BATCH_JOB_ARRAY_INDEX_VAR_NAME": "INDEX", "INDEX": str(index)}
        program = str(Path(sys.executable).with_name(command[0]))
        command = [*self.servers(stock).command, program, *command[1:]]
        with self.output.open("w") as output:  # not a pipe, which what the pod starts might keep open
            pod = subprocess.run(
                command, cwd=HERE, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=False
            )
        self.fs.invalidate_cache()
        if pod.returncode == -signal.SIGKILL:
            return prefix
        if self.fs.exists(f"{prefix}/out/error.pb"):  # the process itself ends with 0 whatever happens
            document = errors_pb2.ErrorDocument.FromString(self.fs.cat_file(f"{prefix}/out/error.pb"))
            raise RuntimeError(document.error.message)
        assert pod.returncode == 0, self.output.read_text()[-3000:]
        return prefix

    def literals(self, **values: Any) -> LiteralMap:
        hints = {name: list[int] for name, value in values.items() if isinstance(value, list)}
        return TypeEngine.dict_to_literal_map(self.context, values, hints)

    def value(self, literals: LiteralMap, t: Any) -> Any:
        return TypeEngine.to_python_value(self.context, literals.literals["o0"], t)


@pytest.fixture(scope="module")
def servers() -> Iterator[ForkServers]:
    """Processes that have imported what a pod imports, with torchferry's plugin or without."""
    with ExitStack() as stack:

        @cache
        def start(stock: bool) -> ForkServer:
            environment = {**os.environ, "PYTHONWARNINGS": "ignore", "TORCHFERRY_TAKE_OVER": "0" if stock else "1"}
            modules = ("flytekit.bin.entrypoint", "flytekit.extras.pytorch", "torch.distributed.launcher.api", "s3fs")
            server = ForkServer(*modules, environment=environment)
            stack.callback(server.close)
            return server

        yield start


@pytest.fixture
def pods(s3_context: FlyteContext, s3_server: S3Server, servers: ForkServers, tmp_path: Path) -> Pods:
    return Pods(s3_context, s3_server, servers, tmp_path / "output.txt")


@pytest.fixture
def hand_over(pods: Pods) -> Callable[..., LiteralMap]:
    def run(outputs: LiteralMap) -> LiteralMap:
        return LiteralMap({"checkpoint": outputs.literals["o0"]})

    assert pods
    return run


def test_sync_and_async_tasks_hand_over_in_pods(pods: Pods, hand_over: Callable[..., LiteralMap]) -> None:
    trained = pods.run(pod_tasks.train, pods.literals(steps=5))
    assert pods.value(pods.run(pod_tasks.evaluate, hand_over(trained)), list[str]) == ["module_state_dict"]
    assert pods.value(pods.run(pod_tasks.read, hand_over(trained)), int) == 5


def test_execution_metadata_of_a_pod_arrives_on_the_object(pods: Pods) -> None:
    trained = pods.run(pod_tasks.train, pods.literals(steps=5))
    metadata = pods.fs.metadata(trained.literals["o0"].scalar.blob.uri)
    assert metadata["flyte-execution-project"] == "project"
    assert metadata["flyte-execution-name"] == "f0123"


def test_map_tasks_hand_over_in_pods(pods: Pods) -> None:
    trained = [pods.run(pod_tasks.train_many, pods.literals(steps=[1, 2]), index=index) for index in (0, 1)]
    uris = [outputs.literals["o0"].scalar.blob.uri for outputs in trained]
    for steps, uri in zip((1, 2), uris, strict=True):
        with pods.fs.open(uri) as file:
            assert torch.load(file)["steps"] == steps


def test_a_dynamic_passes_on_what_it_received_in_a_pod(pods: Pods, hand_over: Callable[..., LiteralMap]) -> None:
    trained = pods.run(pod_tasks.train, pods.literals(steps=5))
    uri = trained.literals["o0"].scalar.blob.uri
    spec = pods.run_dynamic(pod_tasks.pass_on, hand_over(trained))
    inputs = [{binding.var: binding.binding for binding in node.inputs} for node in spec.nodes]
    assert inputs[0]["checkpoint"].scalar.blob.uri == uri
    assert inputs[1]["checkpoint"].scalar.union.value.scalar.blob.uri == uri
    assert inputs[2]["checkpoint"].scalar.union.value.scalar.none_type is not None
    several = [node for node in inputs if "checkpoints" in node]
    assert several[0]["checkpoints"].collection.bindings[0].scalar.blob.uri == uri
    assert several[0]["checkpoints"].collection.bindings[1].promise.var == "o0"
    assert several[0]["named"].map.bindings["a"].scalar.blob.uri == uri
    assert [node["values"].map.bindings["steps"].scalar.primitive.integer for node in inputs if "values" in node] == [5]
    outputs = {binding.var: binding.binding for binding in spec.outputs}
    assert outputs["checkpoint"].scalar.blob.uri == uri
    assert outputs["maybe"].scalar.union.value.scalar.blob.uri == uri
    assert outputs["several"].collection.bindings[0].scalar.blob.uri == uri
    # what propeller hands to the tasks
    bound = LiteralMap({"checkpoint": inputs[0]["checkpoint"].to_literal_model()})
    assert pods.value(pods.run(pod_tasks.read, bound), int) == 5
    optional = LiteralMap({"checkpoint": inputs[1]["checkpoint"].to_literal_model()})
    assert pods.value(pods.run(pod_tasks.read_maybe, optional), int) == 5


def test_a_dynamic_without_tasks_returns_what_it_changed(pods: Pods, hand_over: Callable[..., LiteralMap]) -> None:
    trained = pods.run(pod_tasks.train, pods.literals(steps=5))
    changed = pods.run(pod_tasks.change, hand_over(trained))
    assert changed.literals["o0"].scalar.blob.uri != trained.literals["o0"].scalar.blob.uri
    assert pods.value(pods.run(pod_tasks.read, hand_over(changed)), int) == 6


def test_stock_flytekit_reads_what_torchferry_wrote(pods: Pods, hand_over: Callable[..., LiteralMap]) -> None:
    trained = pods.run(pod_tasks.train, pods.literals(steps=5))
    assert pods.value(pods.run(pod_tasks.read, hand_over(trained), stock=True), int) == 5


def test_torchferry_reads_what_stock_flytekit_wrote(pods: Pods, hand_over: Callable[..., LiteralMap]) -> None:
    trained = pods.run(pod_tasks.train, pods.literals(steps=5), stock=True)
    assert not trained.literals["o0"].scalar.blob.uri.endswith("/checkpoint.pt")  # stock's own names
    assert pods.value(pods.run(pod_tasks.read, hand_over(trained)), int) == 5


def test_ranks_of_an_elastic_task_return_a_ddp_module_in_a_pod(pods: Pods) -> None:
    trained = pods.run(pod_tasks.train_in_ranks, pods.literals(steps=5))
    checkpoint = pods.value(trained, PyTorchCheckpoint)
    assert checkpoint["steps"] == 5
    assert list(checkpoint.module_state_dict) == ["module.weight", "module.bias"]
    assert {*checkpoint.restore(module=torch.nn.Linear(4, 4))} == {"steps"}


def test_a_task_that_is_killed_resumes_in_its_next_attempt(pods: Pods) -> None:
    killed = pods.run_until_killed(pod_tasks.resumes, pods.literals(steps=5))
    resumed = pods.run(pod_tasks.resumes, pods.literals(steps=5), killed_before=killed)
    assert pods.value(resumed, list[int]) == [3, 5]


def test_a_refused_checkpoint_says_why_in_error_pb(pods: Pods) -> None:
    with pytest.raises(RuntimeError) as caught:
        pods.run(pod_tasks.refuse, pods.literals(steps=1))
    message = str(caught.value)
    assert ".." not in message.rsplit("Message:", 1)[1]
    assert re.search(r"Hyperparameter 'steps'\['nested'\] is a builtin_function.*stored all the same.*s3://", message)
