"""Opens safetensors files, and sets of them with an index; and publishes such sets. Needs no torch."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torchferry.engine.cancellation import in_thread, run_shielded
from torchferry.engine.loops import run_on
from torchferry.engine.reader import RangeReader
from torchferry.engine.tasks import task_group
from torchferry.engine.types import Chunk, ObjectStat
from torchferry.errors import (
    CheckpointCorruptError,
    CheckpointFormatError,
    CheckpointNotFoundError,
    StorageError,
)
from torchferry.formats.safetensors import (
    INDEX_SUFFIX,
    LENGTH_SIZE,
    LONGEST_INDEX,
    Entry,
    Header,
    header_size,
    index_bytes,
    parse_header,
    parse_index,
    shard_names,
)
from torchferry.printable import printable

if TYPE_CHECKING:
    from torchferry.storage.base import Backend

__all__ = ["File", "delete_all", "open_file", "open_files", "prepare", "publish_files", "publish_index", "take_back"]

_ABORT_PATIENCE = 0.7  # seconds that a cancel waits for files to be deleted


@dataclass(frozen=True, slots=True)
class File:
    """One file of a checkpoint.

    Attributes:
        name: What it is called in the index; "" for a single file.
        path: Its path in the store.
        source: Its bytes.
        header: What it holds.
        entries: Those of its tensors that belong to the checkpoint.
    """

    name: str
    path: str
    source: RangeReader
    header: Header
    entries: tuple[Entry, ...]


async def open_file(source: RangeReader, path: str, *, name: str = "") -> File:
    """Reads a file's header.

    Raises:
        CheckpointCorruptError: the header is damaged.
    """
    size = source.stat.size
    head = await source.read(0, min(size, LENGTH_SIZE))
    length = await in_thread(header_size, head, size, source.url)
    header = await in_thread(parse_header, await source.read(0, length), size, source.url)
    return File(name, path, source, header, header.entries)


async def open_files(backend: Backend, path: str, source: RangeReader) -> list[File]:
    """Reads an index, and the headers of the files that it names, which lie beside it.

    Raises:
        CheckpointFormatError: it is no index.
        CheckpointCorruptError: the index or a header is damaged, or they contradict each other.
        CheckpointNotFoundError: a file is missing.
    """
    size = source.stat.size
    if size > LONGEST_INDEX:
        raise CheckpointFormatError(f"{source.url} is JSON of {size} bytes: no index of safetensors files is so long.")
    index = await in_thread(parse_index, await source.read(0, size), source.url)
    wanted: dict[str, list[str]] = {}
    for tensor, file in index.files.items():
        wanted.setdefault(file, []).append(tensor)
    folder = path[: path.rfind("/") + 1]
    opened: dict[str, File] = {}

    async def open_one(name: str) -> None:
        try:
            stat = await run_on(backend.loop, backend.stat, folder + name)
        except CheckpointNotFoundError as error:
            raise CheckpointNotFoundError(f"{source.url} names a file that is not there: {error}") from error
        reader = RangeReader(backend, folder + name, stat)
        opened[name] = await open_file(reader, folder + name, name=name)

    async with task_group() as group:
        for name in wanted:
            group.start_soon(open_one, name)
    return [_belonging(opened[name], names, source.url) for name, names in wanted.items()]


def _belonging(file: File, names: list[str], url: str) -> File:
    by_name = {entry.name: entry for entry in file.header.entries}
    if missing := [name for name in names if name not in by_name]:
        raise CheckpointCorruptError(
            f"{url} is damaged, or of another version than {printable(file.name)}: that has no tensor "
            f"{printable(missing[0])!r}."
        )
    return File(file.name, file.path, file.source, file.header, tuple(by_name[name] for name in names))


async def prepare(backend: Backend, path: str, count: int) -> tuple[list[str], str, set[str]]:
    """Chooses the paths of shards so that what is there already stays whole until their index replaces its index.

    Returns:
        The paths of the shards, that of the index, and the paths of the shards that an index there names now.
    """
    names, index = shard_names(path, count)
    try:
        stat = await run_on(backend.loop, backend.stat, index)
    except CheckpointNotFoundError:
        return names, index, set()
    stem = index.removesuffix(INDEX_SUFFIX)
    names, _ = shard_names(f"{stem}-{secrets.token_hex(4)}", count)
    if stat.size > LONGEST_INDEX:
        return names, index, set()
    data = await RangeReader(backend, index, stat).read(0, stat.size)
    with suppress(CheckpointFormatError):
        folder = index[: index.rfind("/") + 1]
        return names, index, {folder + file for file in parse_index(data, stat.url).files.values()}
    return names, index, set()


async def publish_files(
    backend: Backend,
    path: str,
    shards: Sequence[Sequence[str]],
    total: int,
    write: Callable[[str, Sequence[str]], Awaitable[object]],
) -> ObjectStat:
    """Writes files, and then their index; what is there already stays whole until then, and is removed afterwards.

    Args:
        backend: Of the store.
        path: Of the index, or of the file that is made into several.
        shards: The names of the tensors of each file.
        total: Bytes of all tensors.
        write: Writes a file: its path, and the names.

    Returns:
        The index.
    """
    names, index, replaced = await prepare(backend, path, len(shards))
    written: list[str] = []
    try:
        for name, members in zip(names, shards, strict=True):
            written.append(name)
            await write(name, members)
        pairs = [
            (member, name[name.rfind("/") + 1 :])
            for name, members in zip(names, shards, strict=True)
            for member in members
        ]
        stat = await publish_index(backend, index, pairs, total)
    except BaseException:
        await take_back(backend, written)
        raise
    await delete_all(backend, replaced - {*names})
    return stat


async def publish_index(backend: Backend, path: str, files: Sequence[tuple[str, str]], total: int) -> ObjectStat:
    """Writes an index, which makes the shards that it names a checkpoint."""
    data = await in_thread(index_bytes, files, total)
    return await backend.write(path, _one(data), plan=backend.upload_plan(len(data)), metadata=None)


async def delete_all(backend: Backend, paths: Collection[str]) -> None:
    """Deletes what can be deleted of these."""
    for path in paths:
        with suppress(StorageError):
            await run_on(backend.loop, backend.delete, path)


async def take_back(backend: Backend, written: Collection[str]) -> None:
    """Deletes the files of a save that failed. A cancel waits for it a moment; then it goes on by itself."""
    await run_shielded(delete_all, backend, written, patience=lambda: _ABORT_PATIENCE)


async def _one(data: bytes) -> AsyncGenerator[Chunk]:
    yield Chunk(data)
