"""Opens safetensors files, and sets of them with an index; and publishes such sets. Needs no torch."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from torchferry.engine.cancellation import in_thread, run_shielded
from torchferry.engine.loops import run_on
from torchferry.engine.reader import RangeReader
from torchferry.engine.tasks import task_group
from torchferry.engine.types import Chunk, ObjectStat
from torchferry.engine.writer import ABORT_PATIENCE
from torchferry.errors import (
    CheckpointCorruptError,
    CheckpointFormatError,
    CheckpointNotFoundError,
    StorageError,
)
from torchferry.formats.safetensors import (
    LENGTH_SIZE,
    LONGEST_INDEX,
    SUFFIX,
    Entry,
    Header,
    header_size,
    index_bytes,
    index_of,
    parse_header,
    parse_index,
    parse_shard_name,
    shard_names,
    split,
    stem_of,
)
from torchferry.printable import printable

if TYPE_CHECKING:
    from torchferry.storage.base import Backend

__all__ = [
    "File",
    "NamedFile",
    "find_files",
    "named_by",
    "open_file",
    "open_files",
    "publish",
    "publish_index",
    "publish_shards",
]

_HEAD = 64  # bytes, in which an index shows that it is JSON


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


class NamedFile(NamedTuple):
    """A file that an index names.

    Attributes:
        name: What it is called there.
        source: Its bytes.
        tensors: The names of those that are in it.
    """

    name: str
    source: RangeReader
    tensors: list[str]


async def find_files(backend: Backend, path: str, source: RangeReader) -> list[NamedFile]:
    """Reads an index, and looks the files up that it names, which lie beside it.

    Raises:
        CheckpointFormatError: it is no index.
        CheckpointCorruptError: the index is damaged.
        CheckpointNotFoundError: a file is missing.
    """
    size = source.stat.size
    if size > LONGEST_INDEX:
        raise CheckpointFormatError(f"{source.url} is JSON of {size} bytes: no index of safetensors files is so long.")
    index = await in_thread(parse_index, await source.read(0, size), source.url)
    wanted: dict[str, list[str]] = {}
    for tensor, file in index.files.items():
        wanted.setdefault(file, []).append(tensor)
    folder = _folder(path)
    found: dict[str, NamedFile] = {}

    async def find_one(name: str) -> None:
        try:
            stat = await run_on(backend.loop, backend.stat, folder + name)
        except CheckpointNotFoundError as error:
            raise CheckpointNotFoundError(f"{source.url} names a file that is not there: {error}") from error
        found[name] = NamedFile(name, RangeReader(backend, folder + name, stat), wanted[name])

    async with task_group() as group:
        for name in wanted:
            group.start_soon(find_one, name)
    return [found[name] for name in wanted]


async def open_files(backend: Backend, path: str, source: RangeReader) -> list[File]:
    """Reads an index, and the headers of the files that it names.

    Raises:
        CheckpointFormatError: it is no index.
        CheckpointCorruptError: the index or a header is damaged, or they contradict each other.
        CheckpointNotFoundError: a file is missing.
    """
    found = await find_files(backend, path, source)
    folder = _folder(path)
    opened: dict[str, File] = {}

    async def open_one(file: NamedFile) -> None:
        opened[file.name] = await open_file(file.source, folder + file.name, name=file.name)

    async with task_group() as group:
        for file in found:
            group.start_soon(open_one, file)
    return [_belonging(opened[file.name], file.tensors, source.url) for file in found]


def _belonging(file: File, names: list[str], url: str) -> File:
    by_name = {entry.name: entry for entry in file.header.entries}
    if missing := [name for name in names if name not in by_name]:
        raise CheckpointCorruptError(
            f"{url} is damaged, or of another version than {printable(file.name)}: that has no tensor "
            f"{printable(missing[0])!r}."
        )
    return File(file.name, file.path, file.source, file.header, tuple(by_name[name] for name in names))


async def named_by(backend: Backend, index: str) -> set[str]:
    """The paths of the files that an index names.

    Raises:
        CheckpointNotFoundError: it is not there.
        CheckpointFormatError: it is none.
    """
    source = RangeReader(backend, index, await run_on(backend.loop, backend.stat, index))
    size = source.stat.size
    if size > LONGEST_INDEX or not (await source.read(0, min(size, _HEAD))).lstrip().startswith(b"{"):
        raise CheckpointFormatError(f"{source.url} is no index of safetensors files.")
    files = await in_thread(parse_index, await source.read(0, size), source.url)
    return {_folder(index) + file for file in files.files.values()}


async def publish(
    backend: Backend,
    path: str,
    sizes: Mapping[str, int],
    most: int | None,
    write: Callable[[str, Sequence[str]], Awaitable[ObjectStat]],
) -> ObjectStat:
    """Writes a checkpoint: as one file, or as several and their index.

    Args:
        backend: Of the store.
        path: Of the file, or of the index.
        sizes: Bytes of each tensor.
        most: Bytes of a file, above which it becomes several. What is there in the other of the two forms is removed
            afterwards: else it would go on to be loaded by its name. None: nothing is looked for.
        write: Writes a file: its path, and the names of its tensors.

    Returns:
        The file, or the index.
    """
    total = sum(sizes.values())
    index = index_of(path)
    if path != index and (most is None or total <= most):
        stat = await write(path, list(sizes))
        if most is not None:
            await _delete_index(backend, index)
        return stat
    shards = split(sizes, total if most is None else most)

    async def publish_it(names: Sequence[str]) -> ObjectStat:
        pairs = [(member, name) for name, members in zip(names, shards, strict=True) for member in members]
        return await publish_index(backend, index, pairs, total)

    stat = await publish_shards(backend, index, len(shards), lambda at, shard: write(shard, shards[at]), publish_it)
    if most is not None:
        await _delete_all(backend, [stem_of(index) + SUFFIX if path == index else path])
    return stat


async def publish_shards(
    backend: Backend,
    index: str,
    count: int,
    write: Callable[[int, str], Awaitable[object]],
    publish_it: Callable[[Sequence[str]], Awaitable[ObjectStat]],
) -> ObjectStat:
    """Writes shards, and then their index; what is there already stays whole, and its own shards go afterwards.

    Args:
        backend: Of the store.
        index: Its path.
        count: Of the shards.
        write: Writes one: its number, from 0, and its path.
        publish_it: Writes the index, of shards with these names.
    """
    stem, folder = stem_of(index), _folder(index)
    before: set[str] = set()
    with suppress(CheckpointNotFoundError, CheckpointFormatError):
        before = await named_by(backend, index)
    paths = shard_names(stem, count)
    if before or await _any_is_there(backend, paths):
        paths = shard_names(stem, count, apart=True)
    written: list[str] = []
    try:
        for number, path in enumerate(paths):
            written.append(path)
            await write(number, path)
        stat = await publish_it([path[len(folder) :] for path in paths])
    except BaseException:
        # A cancel waits for it a moment; then it goes on by itself.
        await run_shielded(_take_back, backend, index, written, patience=ABORT_PATIENCE)
        raise
    await _delete_all(backend, _own(index, before) - {*paths})
    return stat


async def _any_is_there(backend: Backend, paths: Collection[str]) -> bool:
    there: list[str] = []

    async def look(path: str) -> None:
        with suppress(CheckpointNotFoundError):
            await run_on(backend.loop, backend.stat, path)
            there.append(path)

    async with task_group() as group:
        for path in paths:
            group.start_soon(look, path)
    return bool(there)


def _own(index: str, named: Collection[str]) -> set[str]:
    """Those of the files that an index names which are its shards by their names: others may be somebody else's."""
    stem = stem_of(index)
    return {path for path in named if (parsed := parse_shard_name(path)) is not None and parsed[0] == stem}


async def _take_back(backend: Backend, index: str, written: Collection[str]) -> None:
    """Deletes the shards of a save that failed, unless their index has come to be there, whatever was answered."""
    named: set[str] = set()
    try:
        named = await named_by(backend, index)
    except (CheckpointNotFoundError, CheckpointFormatError):
        pass
    except StorageError:
        return
    await _delete_all(backend, {*written} - named)


async def _delete_index(backend: Backend, index: str) -> None:
    """Deletes an index, if it is there, and then the shards that are its own."""
    with suppress(CheckpointFormatError, StorageError):
        named = await named_by(backend, index)
        await run_on(backend.loop, backend.delete, index)
        await _delete_all(backend, _own(index, named))


async def publish_index(backend: Backend, path: str, files: Sequence[tuple[str, str]], total: int) -> ObjectStat:
    """Writes an index, which makes the shards that it names a checkpoint."""
    data = await in_thread(index_bytes, files, total)
    return await backend.write(path, _one(data), plan=backend.upload_plan(len(data)), metadata=None)


async def _delete_all(backend: Backend, paths: Collection[str]) -> None:
    """Deletes what can be deleted of these."""
    for path in paths:
        with suppress(StorageError):
            await run_on(backend.loop, backend.delete, path)


def _folder(path: str) -> str:
    return path[: path.rfind("/") + 1]


async def _one(data: bytes) -> AsyncGenerator[Chunk]:
    yield Chunk(data)
