"""Proves that a checkpoint is still what is stored somewhere, so that it need not be uploaded again; names its content.

The proof is in the archive's own CRC32s: the object is saved once more, into nothing, and checked against the records
of the archive in the store. The first of them is the pickle, which holds all structure and every value that is no
tensor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from torchferry.engine.cancellation import in_thread
from torchferry.engine.loops import own_loop, run_on
from torchferry.errors import CheckpointCorruptError, TorchferryError
from torchferry.formats.checksum import Checksums
from torchferry.formats.torch_stream import TorchStream
from torchferry.loading import inspect_async

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

    from torchferry.manifest import Manifest

__all__ = ["fingerprint", "manifest_if_unchanged"]


def fingerprint(manifest: Manifest) -> str | None:
    """A name for what is stored: the same for the same content, wherever it lies; None where it has no CRC32s.

    It is made of the names, sizes and CRC32s of the archive's records; reads nothing.
    """
    digest = hashlib.sha256()
    for record in manifest.records:
        if record.crc32 is None:
            return None
        digest.update(f"{record.name} {record.size} {record.crc32:08x}\n".encode())
    return digest.hexdigest()[:32]


async def manifest_if_unchanged(
    content: dict[str, Any],
    uri: str,
    filesystem: AbstractFileSystem | None = None,
    *,
    storage_options: Mapping[str, Any] | None = None,
) -> Manifest | None:
    """What is stored at ``uri``, if that is what ``content``, saved, would be; None if not.

    Reads at most 2 MiB of the object. A checkpoint whose structure or plain values changed is found out before any
    tensor is looked at.

    Args:
        content: What would be saved.
        uri: Where it was loaded from.
        filesystem: Reaches the store.
        storage_options: Reach the store, where there is no ``filesystem``.
    """
    try:
        manifest = await inspect_async(uri, filesystem=filesystem, storage_options=storage_options)
    except TorchferryError:
        return None  # gone, replaced by something else, or out of reach: nothing can be proved
    # torch.serialization.set_crc32_options(False), there or here: nothing can be proved.
    if any(record.crc32 is None for record in manifest.records) or not torch.serialization.get_crc32_options():
        return None
    return manifest if await run_on(own_loop(None), _saves_as, content, manifest) else None


async def _saves_as(content: dict[str, Any], manifest: Manifest) -> bool:
    checksums = Checksums(manifest.records, manifest.url)
    size = 0
    try:
        async with TorchStream(content).running() as stream:
            async for chunk in stream:
                await in_thread(checksums.add, size, chunk.data)
                size += len(chunk)
        checksums.finish()
    except CheckpointCorruptError:
        return False
    return size == manifest.size
