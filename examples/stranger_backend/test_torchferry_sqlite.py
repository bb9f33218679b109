"""What a backend's tests are: its store for the conformance suite, and what is peculiar about it."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

import torchferry
from torchferry.errors import StorageError, UnsupportedOptionError
from torchferry.storage import open_backend
from torchferry.testing import BackendConformance, StoreUnderTest


class SqliteStore(StoreUnderTest):
    keeps_metadata = True

    def __init__(self, database: Path) -> None:
        self.options = {"storage_options": {"database": str(database)}}
        self.backend, self._prefix = open_backend("sqlite://prefix", **self.options)
        self._database = database

    def path(self, name: str) -> str:
        return f"{self._prefix}/{name}"

    def raw_write(self, path: str, data: bytes) -> None:
        version = int.from_bytes(os.urandom(7))
        self._execute("DELETE FROM part WHERE version IN (SELECT version FROM object WHERE name = ?)", path)
        self._execute("INSERT INTO part VALUES (?, 0, ?)", version, data)
        self._execute("INSERT OR REPLACE INTO object VALUES (?, ?, ?, '{}')", path, version, len(data))

    def raw_read(self, path: str) -> bytes:
        query = "SELECT data FROM part WHERE version IN (SELECT version FROM object WHERE name = ?) ORDER BY start"
        return b"".join(row[0] for row in self._execute(query, path))

    def raw_exists(self, path: str) -> bool:
        return bool(self._execute("SELECT 1 FROM object WHERE name = ?", path))

    def leftovers(self) -> list[str]:
        rows = self._execute("SELECT DISTINCT version FROM part WHERE version NOT IN (SELECT version FROM object)")
        return [str(row[0]) for row in rows]

    def _execute(self, query: str, *values: Any) -> list[Any]:
        with closing(sqlite3.connect(self._database, timeout=60)) as connection, connection:
            return connection.execute(query, values).fetchall()


class TestSqlite(BackendConformance):
    @pytest.fixture
    def store(self, tmp_path: Path) -> SqliteStore:
        return SqliteStore(tmp_path / "checkpoints.db")


def test_installing_it_is_enough(tmp_path: Path) -> None:
    options = {"database": str(tmp_path / "checkpoints.db")}
    torchferry.save({"weight": torch.arange(5)}, "sqlite://run/step-1.pt", storage_options=options)
    loaded: Any = torchferry.load("sqlite://run/step-1.pt", storage_options=options)
    assert torch.equal(loaded["weight"], torch.arange(5))


def test_what_is_no_database_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("no database " * 100)
    with pytest.raises(StorageError, match="not a database"):
        open_backend("sqlite://key", storage_options={"database": str(tmp_path / "text.db")})


def test_obstore_plane_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedOptionError, match="sqlite://"):
        open_backend("sqlite://key", storage_options={"database": str(tmp_path / "x.db")}, plane="obstore")
