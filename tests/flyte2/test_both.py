"""flytekit and Flyte 2 in one process, imported in either order: each check in an interpreter of its own."""

from __future__ import annotations

import subprocess
import textwrap
from pathlib import Path

import pytest
from runs import Runs

from torchferry.testing.forkserver import python
from torchferry.testing.servers import S3Server

CODE = """
    import sys
    import fsspec, torch
    import {first}
    import {second}
    import flyte, flyte.io, flyte.storage, flytekit
    import torchferry
    from flytekit.configuration import DataConfig, S3Config
    from flytekit.core.data_persistence import FileAccessProvider
    from flytekit.extras.pytorch import PyTorchCheckpoint
    import torchferry.flyte2
    from torchferry.flyte2 import LoadedCheckpoint
    from dataclasses import dataclass

    endpoint, key, secret, prefix, directory = sys.argv[1:]
    assert torchferry.flyte2.PyTorchCheckpoint is PyTorchCheckpoint

    @dataclass
    class Config:
        start: PyTorchCheckpoint

    env = flyte.TaskEnvironment(name="both")

    @env.task
    async def train2(steps: int) -> PyTorchCheckpoint:
        return PyTorchCheckpoint(torch.nn.Linear(2, 2), {{"steps": steps}})

    @env.task
    async def go_on2(checkpoint: PyTorchCheckpoint) -> Config:
        return Config(PyTorchCheckpoint(hyperparameters={{"steps": checkpoint["steps"] + 1}}))

    @flytekit.task
    def train1(steps: int) -> PyTorchCheckpoint:
        return PyTorchCheckpoint(torch.nn.Linear(2, 2), {{"steps": steps}})

    @flytekit.task
    def go_on1(checkpoint: PyTorchCheckpoint) -> Config:
        return Config(PyTorchCheckpoint(hyperparameters={{"steps": checkpoint["steps"] + 10}}))

    def run2(task, **inputs):
        context = flyte.with_runcontext(mode="local", raw_data_path=prefix)
        context._metadata_path = directory
        return tuple(context.run(task, **inputs).outputs())[0]

    flyte.init(storage=flyte.storage.S3(endpoint=endpoint, access_key_id=key, secret_access_key=secret))
    config = DataConfig(s3=S3Config(endpoint=endpoint, access_key_id=key, secret_access_key=secret))
    provider = FileAccessProvider(directory, prefix, data_config=config)
    context = flytekit.FlyteContextManager.current_context().with_file_access(provider)
    with flytekit.FlyteContextManager.with_context(context):
        one, two = train1(steps=1), run2(train2, steps=2)
        assert type(one) is type(two) is LoadedCheckpoint
        print(go_on1(checkpoint=two).start["steps"], run2(go_on2, checkpoint=one).start["steps"])
    options = {{"key": key, "secret": secret, "endpoint_url": endpoint}}
    # s3:// is whoever's it was; torchferry's URLs are s3fs's
    print(torchferry.load(one.uri, storage_options=options)["steps"], two.uri.startswith(prefix))
    # a value stored by one is not stored again by the other
    print(len(torchferry.storage.registry.open_backend(prefix + "/x", storage_options=options)[0]._fs.find(prefix)))
"""


@pytest.mark.parametrize("first", ["flytekit", "flyte"])
def test_one_value_goes_through_both(runs: Runs, s3_server: S3Server, tmp_path: Path, first: str) -> None:
    second = {"flytekit": "flyte", "flyte": "flytekit"}[first]
    arguments = [s3_server.endpoint, s3_server.key, s3_server.secret, runs.prefix, str(tmp_path / "local")]
    program = tmp_path / "program.py"  # flytekit looks at the source of tasks
    program.write_text(textwrap.dedent(CODE.format(first=first, second=second)))
    result = subprocess.run(
        [*python(), "-W", "ignore", str(program), *arguments],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.splitlines() == ["12 2", "1 True", "4"]
