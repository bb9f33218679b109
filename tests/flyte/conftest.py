"""Fixtures for Flyte: contexts whose raw output is on each kind of store, and checkpoints."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flytekit import FlyteContext, FlyteContextManager
from flytekit.configuration import DataConfig
from flytekit.core.data_persistence import FileAccessProvider

from torchferry.flyte import PyTorchCheckpoint
from torchferry.testing.servers import S3Server

sys.path += [str(Path(__file__).parent), str(Path(__file__).parent.with_name("checkpoint"))]

from checkpoints import data_config, make_checkpoint

os.environ["FLYTE_LOCAL_CACHE_ENABLED"] = "false"


def pytest_configure(config: pytest.Config) -> None:
    # flytekit 1.15 warns of itself whenever a task is declared
    config.addinivalue_line("filterwarnings", "ignore:`disable_deck` is deprecated:DeprecationWarning")


@pytest.fixture
def in_context(tmp_path: Path) -> Iterator[Callable[..., FlyteContext]]:
    """Makes a raw output prefix, and a configuration for it, those of the test."""
    contexts = []

    def enter(prefix: str, config: DataConfig | None = None, **kwargs: Any) -> FlyteContext:
        provider = FileAccessProvider(tmp_path / "sandbox", prefix, data_config=config or DataConfig(), **kwargs)
        context = FlyteContextManager.with_context(FlyteContextManager.current_context().with_file_access(provider))
        contexts.append(context)
        return context.__enter__()

    yield enter
    for context in reversed(contexts):
        context.__exit__(None, None, None)


@pytest.fixture
def s3_context(in_context: Callable[..., FlyteContext], s3_server: S3Server, s3_url: str) -> FlyteContext:
    """A Flyte context whose raw output goes to S3."""
    return in_context(s3_url, data_config(s3_server.endpoint, s3_server))


@pytest.fixture(params=["s3", "local", "memory"])
def context(request: pytest.FixtureRequest, in_context: Callable[..., FlyteContext], tmp_path: Path) -> FlyteContext:
    """Flyte contexts whose raw output goes to S3, to local files and to memory."""
    if request.param == "s3":
        context: FlyteContext = request.getfixturevalue("s3_context")
        return context
    prefixes = {"local": str(tmp_path / "raw"), "memory": f"memory://{uuid.uuid4().hex}"}
    return in_context(prefixes[request.param])


@pytest.fixture
def checkpoint() -> PyTorchCheckpoint:
    """A module and Adam after a step, and hyperparameters."""
    return make_checkpoint()
