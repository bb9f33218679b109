"""Processes that are killed while they save: started in milliseconds, with everything imported."""

from __future__ import annotations

import multiprocessing
import os
import signal
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from torchferry.engine.loops import run, run_on
from torchferry.engine.types import MIB, Chunk
from torchferry.storage.registry import open_backend

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping
    from multiprocessing.context import ForkServerContext, ForkServerProcess

__all__ = ["stage_until_killed", "start"]

_IMPORTED = ("torch", "torchferry.saving", "torchferry.loading", "torchferry.storage.local", __name__)
_CLOUDS = ("torchferry_s3", "torchferry_gcs", "torchferry_azure")


@cache
def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*_IMPORTED, *_CLOUDS])  # a cloud whose library is not installed is left out
    return context


def start(func: Callable[..., object], /, *args: object) -> ForkServerProcess:
    """Starts a process that runs ``func(*args)``, a function of an importable module.

    It is forked from one without threads that has imported torchferry, torch and the clouds.
    """
    process: ForkServerProcess = _context().Process(target=func, args=args)
    process.start()
    return process


def stage_until_killed(url: str, storage_options: Mapping[str, Any] | None = None) -> None:
    """Writes 20 MiB to ``url``, and kills this process (SIGKILL) when the store shows that some of it is staged."""
    backend, path = open_backend(url, storage_options=storage_options)

    async def chunks() -> AsyncIterator[Chunk]:
        for _ in range(20):
            yield Chunk(bytes(MIB))
        while True:
            async for _ in backend.leftovers(path):
                os.kill(os.getpid(), signal.SIGKILL)

    run(partial(run_on, backend.loop, backend.write, path, chunks(), plan=backend.upload_plan(50 * MIB, 5 * MIB)))
