"""Fixtures for Flyte 2: local runs whose raw data is on S3."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import fsspec
import obstore.fsspec
import pytest
from adlfs import AzureBlobFileSystem
from flyte._persistence._db import LocalDB
from gcsfs import GCSFileSystem
from s3fs import S3FileSystem

from torchferry.testing.servers import S3Server

if TYPE_CHECKING:
    from collections.abc import Iterator

sys.path += [str(Path(__file__).parent), str(Path(__file__).parent.with_name("checkpoint"))]

from runs import Runs, init

FILESYSTEMS = {"s3": S3FileSystem, "gs": GCSFileSystem, "abfs": AzureBlobFileSystem, "abfss": AzureBlobFileSystem}


def register_again() -> None:
    """Registers the filesystems that fsspec has of itself: importing flyte has put obstore's in their place."""
    for protocol, kind in FILESYSTEMS.items():
        fsspec.register_implementation(protocol, kind, clobber=True)


register_again()  # for the tests beside these


@pytest.fixture(autouse=True)
def _filesystems_of_flyte() -> Iterator[None]:
    obstore.fsspec.register(list(FILESYSTEMS), asynchronous=True)  # as flyte.storage does
    yield
    register_again()


def pytest_configure(config: pytest.Config) -> None:
    # flyte 2.12's own models, when they are first imported
    config.addinivalue_line("filterwarnings", "ignore:Support for class-based `config` is deprecated")
    # flyte 2.12 leaves the template of its report open
    config.addinivalue_line("filterwarnings", "ignore:unclosed file .*_template.html:ResourceWarning")


@pytest.fixture
def runs(s3_server: S3Server, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    """Runs tasks with their raw data on S3."""
    # flyte makes directories named "s3:" where it runs, and keeps its cache in the home
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(LocalDB, "_get_db_path", staticmethod(lambda: str(tmp_path / "cache.db")))
    for name, value in {"_conn": None, "_conn_sync": None, "_initialized": False}.items():
        monkeypatch.setattr(LocalDB, name, value)
    init(s3_server, s3_server.endpoint)
    # flyte registers another class for s3://
    return Runs(s3_url, tmp_path / "metadata", S3FileSystem(**s3_server.storage_options))
