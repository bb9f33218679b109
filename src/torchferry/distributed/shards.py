"""The shards of a checkpoint, opened: where the bytes of any part of any tensor are, and what CRC32s are known."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from isal import isal_zlib
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from torchferry.distributed.archives import StoredTensor, contiguous_strides
from torchferry.distributed.assemble import Assembly, Data, Script
from torchferry.distributed.fetch import Files
from torchferry.distributed.metadata import items_by_shard
from torchferry.distributed.placing import Where, where_stored
from torchferry.distributed.reader import StorageReader
from torchferry.distributed.slices import Direct, Piece, cut
from torchferry.distributed.whole import Contents, checksums_of
from torchferry.engine.memory import BLOCK_SIZE, EVERYTHING_ELSE
from torchferry.engine.reader import RangeReader
from torchferry.engine.transfer import current
from torchferry.errors import CheckpointCorruptError, CheckpointFormatError
from torchferry.formats.checksum import Checksums
from torchferry.printable import printable

__all__ = ["Shards"]


class Shards:
    """What :meth:`open` has found.

    Attributes:
        found: The checkpoint.
        files: Its shards; of those in which the tensors are.
    """

    def __init__(
        self, found: Contents, paths: Sequence[str], files: Files, stored: Mapping[tuple[int, int], StoredTensor]
    ) -> None:
        self.found = found
        self.files = files
        self._numbers = {path: number for number, path in enumerate(paths)}
        self._stored = stored

    @classmethod
    async def open(cls, found: Contents, names: Collection[str]) -> Shards:
        """Looks up the shards that some tensors are in, and into archives of somebody else's writer.

        Args:
            found: The checkpoint.
            names: Of the tensors; other names do not matter.
        """
        metadata, place = found.metadata, found.place
        tensors = {name for name in names if isinstance(metadata.state_dict_metadata[name], TensorStorageMetadata)}
        items = [(index, info) for index, info in metadata.storage_data.items() if index.fqn in tensors]
        paths = list(dict.fromkeys(info.relative_path for _, info in items))
        numbers = {path: number for number, path in enumerate(paths)}
        reader = StorageReader.at(place)
        stats = await reader.versions(place, metadata, paths)
        files = Files(place.backend, [(place.at(path), stat) for path, stat in zip(paths, stats, strict=True)])
        places = [(numbers[info.relative_path], info, index) for index, info in items]
        return cls(found, paths, files, await reader.look_into_archives(files, stats, metadata, places))

    async def checksums(self, names: Collection[str]) -> list[Checksums]:
        """The CRC32s of the items of some tensors, of each file: what a stream of just these is checked by."""
        chosen = {*names}
        items = items_by_shard(self.found.metadata)
        return [
            await checksums_of(
                self.found,
                [(index, info) for index, info in items[path] if index.fqn in chosen],
                RangeReader(self.found.place.backend, file, stat),
                only_tensors=True,
            )
            for path, (file, stat) in zip(self._numbers, self.files.files, strict=True)
        ]

    def parts(self, key: str, offsets: Sequence[int], target: torch.Tensor) -> list[tuple[int, Direct | Piece]]:
        """Where a part of a tensor is: file, and range. Each chunk that was saved has some of it.

        Args:
            key: Of the tensor.
            offsets: Of the part.
            target: The memory for it.

        Raises:
            CheckpointFormatError: it is not stored as plain bytes.
        """
        return list(self._parts(key, offsets, target))

    def _parts(self, key: str, offsets: Sequence[int], target: torch.Tensor) -> Iterator[tuple[int, Direct | Piece]]:
        entry = self._tensor(key)
        for index, chunk in enumerate(entry.chunks):
            firsts = [max(a, b) for a, b in zip(offsets, chunk.offsets, strict=True)]
            lasts = [
                min(a + n, b + m) for a, n, b, m in zip(offsets, target.shape, chunk.offsets, chunk.sizes, strict=True)
            ]
            if any(first >= last for first, last in zip(firsts, lasts, strict=True)):
                continue
            part = target
            for dim, (first, last) in enumerate(zip(firsts, lasts, strict=True)):
                part = part.narrow(dim, first - offsets[dim], last - first)
            number, info, where = self._where(key, index)
            if where is None:
                raise CheckpointFormatError(
                    f"{printable(key)} in {printable(info.relative_path)} is not stored as plain bytes: load and save "
                    "it."
                )
            moves = zip(firsts, chunk.offsets, where.strides, strict=True)
            start = where.start + sum((first - at) * stride for first, at, stride in moves) * where.dtype.itemsize
            yield from ((number, piece) for piece in cut(part, start, where.strides, where.dtype))

    def crc32(self, key: str) -> int | None:
        """The CRC32 of a tensor's bytes, where its items have one each, and it is one item or was split by rows."""
        entry = self._tensor(key)
        dtype, row = entry.properties.dtype, entry.size[1:]
        total, at = 0, 0
        for index, chunk in sorted(enumerate(entry.chunks), key=lambda numbered: tuple(numbered[1].offsets)):
            nbytes = chunk.sizes.numel() * dtype.itemsize
            if not nbytes:
                continue
            if chunk.sizes[1:] != row or (chunk.offsets and chunk.offsets[0] != at):
                return None
            _, _, where = self._where(key, index)
            if where is None or where.dtype != dtype or where.record[:2] != (where.start, nbytes):
                return None
            strides = zip(chunk.sizes, where.strides, contiguous_strides(chunk.sizes), strict=True)
            if where.record[2] is None or any(size > 1 and here != usual for size, here, usual in strides):
                return None
            total = isal_zlib.crc32_combine(total, where.record[2], nbytes)
            at += chunk.sizes[0] if chunk.sizes else 1
        return total if at == (entry.size[0] if entry.size else 1) or not entry.size.numel() else None

    async def read_crc32s(self, keys: Sequence[str]) -> dict[str, int]:
        """Reads tensors, in bounded memory; their bytes are counted as moved.

        Raises:
            CheckpointFormatError: one is not stored as plain bytes.
        """
        script = Script()
        for key in keys:
            entry = self._tensor(key)
            data = Data(key, entry.properties.dtype, tuple(entry.size), script.size)
            script.entries.append(data)
            script.size += data.nbytes
        claim = await EVERYTHING_ELSE.claim_async(2 * BLOCK_SIZE, piece=BLOCK_SIZE)
        try:
            assembly = Assembly(script, self.parts, self.files, [None] * len(self._numbers), claim)
            async with assembly.running():
                async for chunk in assembly:
                    current().moved(len(chunk))
                    del chunk
        finally:
            claim.close()
        return {data.key: data.crc32 for data in script.entries if isinstance(data, Data)}

    def _tensor(self, key: str) -> TensorStorageMetadata:
        entry = self.found.metadata.state_dict_metadata[key]
        assert isinstance(entry, TensorStorageMetadata)  # noqa: S101 - only tensors are asked for
        return entry

    def _where(self, key: str, index: int) -> tuple[int, Any, Where | None]:
        """File, and place in it, of a chunk."""
        entry = self._tensor(key)
        chunk = entry.chunks[index]
        try:
            info = self.found.metadata.storage_data[MetadataIndex(key, chunk.offsets, index)]
        except KeyError:
            raise CheckpointCorruptError(
                f"{self.found.place.url}: the metadata does not say where {printable(key)} is."
            ) from None
        number = self._numbers[info.relative_path]
        stored = self._stored.get((number, info.offset))
        return number, info, where_stored(info, entry.properties.dtype, chunk, stored)
