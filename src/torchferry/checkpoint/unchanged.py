"""Proves that a checkpoint is still what it was when it was loaded, so that it need not be uploaded again.

The proof is in the archive's own CRC32s: the object is saved once more, into nothing, and checked against the records
of the archive in the store. The first of them is the pickle, which holds all structure and every value that is no
tensor.
"""

from __future__ import annotations

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

    from torchferry.loading import Manifest

__all__ = ["is_unchanged"]


async def is_unchanged(content: dict[str, Any], uri: str, filesystem: AbstractFileSystem) -> bool:
    """Whether ``content``, saved, would be what is stored at ``uri``.

    Reads at most 2 MiB of the object. A checkpoint whose structure or plain values changed is found out before any
    tensor is looked at.

    Args:
        content: What would be saved.
        uri: Where it was loaded from.
        filesystem: Reaches the store.
    """
    try:
        manifest = await inspect_async(uri, filesystem=filesystem)
    except TorchferryError:
        return False  # gone, replaced by something else, or out of reach: nothing can be proved
    # torch.serialization.set_crc32_options(False), there or here: nothing can be proved.
    if any(record.crc32 is None for record in manifest.records) or not torch.serialization.get_crc32_options():
        return False
    return await run_on(own_loop(None), _saves_as, content, manifest)


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
