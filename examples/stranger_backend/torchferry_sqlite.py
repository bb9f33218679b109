"""Checkpoints in an SQLite database: ``sqlite://any/key`` with ``storage_options={"database": "/path/to/file.db"}``.

A worked example of a backend that torchferry knows nothing of. docs/writing-a-backend.md goes through it.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

from fsspec import AbstractFileSystem

from torchferry.engine.cancellation import in_thread
from torchferry.errors import (
    CheckpointChangedError,
    CheckpointNotFoundError,
    StorageError,
    StoragePermissionError,
    StorageUnavailableError,
    UnsupportedOptionError,
)
from torchferry.storage import MIB, Backend, Chunk, ObjectStat, Plane

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Iterator, Mapping

__all__ = ["SqliteBackend", "SqliteFileSystem"]

SCHEMA = """
CREATE TABLE IF NOT EXISTS object (name TEXT PRIMARY KEY, version INTEGER, size INTEGER, metadata TEXT);
CREATE TABLE IF NOT EXISTS part (version INTEGER, start INTEGER, data BLOB, PRIMARY KEY (version, start));
"""
LARGEST_PART = 4 * MIB


class SqliteFileSystem(AbstractFileSystem):
    """How users name a database; everything else is up to the backend.

    Args:
        database: The path of the database, which is made if need be.
    """

    protocol = "sqlite"

    def __init__(self, database: str, **options: Any) -> None:
        super().__init__(database=database, **options)
        self.database = database


class SqliteBackend(Backend):
    """Objects as rows: parts are inserted as they come, and belong to no object until the last transaction.

    A version is a random number, new with every write.
    """

    plane = "fsspec"

    def __init__(self, database: str) -> None:
        self._database = database
        with self._transaction("sqlite://", "open") as connection:
            connection.executescript(SCHEMA)

    @classmethod
    def from_filesystem(cls, fs: AbstractFileSystem, plane: Plane) -> Backend:
        if plane == "obstore":
            raise UnsupportedOptionError("The obstore plane does not reach sqlite:// URLs: use plane='auto'.")
        assert isinstance(fs, SqliteFileSystem)
        return cls(fs.database)

    def url(self, path: str) -> str:
        return f"sqlite://{path}"

    async def stat(self, path: str) -> ObjectStat:
        return await in_thread(self._stat, path)

    async def read(self, path: str, start: int, stop: int, stat: ObjectStat) -> Chunk:
        return await in_thread(self._read, path, start, stop, stat)

    async def write(
        self,
        path: str,
        chunks: AsyncIterable[Chunk],
        *,
        size_hint: int,
        part_size: int | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> ObjectStat:
        del size_hint, part_size  # a database has no parts whose number is limited
        version = secrets.randbits(62)
        size = 0
        try:
            async for chunk in chunks:
                await in_thread(self._insert, path, version, size, chunk)
                size += len(chunk)
            await in_thread(self._publish, path, version, size, dict(metadata or {}))
        except BaseException:  # a failure anywhere, or a cancellation
            await in_thread(self._discard, path, version)
            raise
        return ObjectStat(self.url(path), size, str(version), dict(metadata or {}))

    async def delete(self, path: str) -> None:
        await in_thread(self._delete, path)

    # Everything below blocks, and runs in a thread.

    def _stat(self, path: str) -> ObjectStat:
        with self._transaction(path, "stat") as connection:
            found = connection.execute("SELECT version, size, metadata FROM object WHERE name = ?", [path]).fetchone()
        if found is None:
            raise CheckpointNotFoundError(f"Cannot stat {self.url(path)}: there is no such object.")
        return ObjectStat(self.url(path), found[1], str(found[0]), json.loads(found[2]))

    def _read(self, path: str, start: int, stop: int, stat: ObjectStat) -> Chunk:
        now = self._stat(path)
        if now.etag != stat.etag:
            raise CheckpointChangedError(f"{self.url(path)} was replaced while it was being read.")
        query = (
            "SELECT start, data FROM part WHERE version = ? AND start < ? AND start + length(data) > ? ORDER BY start"
        )
        data = bytearray()
        with self._transaction(path, "read") as connection:
            for offset, part in connection.execute(query, [int(now.etag or 0), stop, start]):
                data += part[max(0, start - offset) : stop - offset]
        if len(data) != stop - start:
            raise StorageError(f"Cannot read the bytes {start} to {stop} of {self.url(path)}: it has {stat.size}.")
        return data

    def _insert(self, path: str, version: int, offset: int, chunk: Chunk) -> None:
        view = memoryview(chunk)
        with self._transaction(path, "write") as connection:
            for start in range(0, len(view), LARGEST_PART):
                row = [version, offset + start, view[start : start + LARGEST_PART]]
                connection.execute("INSERT INTO part VALUES (?, ?, ?)", row)

    def _publish(self, path: str, version: int, size: int, metadata: dict[str, str]) -> None:
        with self._transaction(path, "write") as connection:
            connection.execute("DELETE FROM part WHERE version IN (SELECT version FROM object WHERE name = ?)", [path])
            row = [path, version, size, json.dumps(metadata)]
            connection.execute("INSERT OR REPLACE INTO object VALUES (?, ?, ?, ?)", row)

    def _discard(self, path: str, version: int) -> None:
        # Cancelled in its last moment, it may be published all the same.
        query = "DELETE FROM part WHERE version = ? AND version NOT IN (SELECT version FROM object)"
        with self._transaction(path, "clean up") as connection:
            connection.execute(query, [version])

    def _delete(self, path: str) -> None:
        with self._transaction(path, "delete") as connection:
            connection.execute("DELETE FROM part WHERE version IN (SELECT version FROM object WHERE name = ?)", [path])
            connection.execute("DELETE FROM object WHERE name = ?", [path])

    @contextmanager
    def _transaction(self, path: str, verb: str) -> Iterator[sqlite3.Connection]:
        """A connection of its own: all is done, or nothing; errors are torchferry's."""
        what = f"Cannot {verb} {self.url(path)} in {self._database}"
        try:
            connection = sqlite3.connect(self._database, timeout=60, isolation_level="IMMEDIATE")
            with closing(connection), connection:
                yield connection
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode == sqlite3.SQLITE_BUSY:
                raise StorageUnavailableError(f"{what}: {error}") from error
            if error.sqlite_errorcode in {sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_CANTOPEN}:
                raise StoragePermissionError(f"{what}: {error}") from error
            raise StorageError(f"{what}: {error}") from error
        except sqlite3.Error as error:
            raise StorageError(f"{what}: {error}") from error
