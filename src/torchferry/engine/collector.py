"""Pauses Python's cyclic garbage collector."""

from __future__ import annotations

import gc
import os
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Generator

__all__ = ["collector_paused"]

_lock = threading.Lock()
_pauses = 0
_was_enabled = False


def _forget_pauses() -> None:
    """After a fork only the forking thread exists. A pause of its own ends here, too: the collector runs again."""
    global _lock, _pauses  # noqa: PLW0603 - there is one collector
    _lock = threading.Lock()
    if _pauses and _was_enabled:
        gc.enable()
    _pauses = 0


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_forget_pauses)


@contextmanager
def collector_paused() -> Generator[None]:
    """Pauses the collector of the process, for as long as any thread is in here.

    For work that makes very many objects, none of them garbage: a checkpoint of 100,000 tensors. Each of the
    collector's passes over them all stops every thread, and with them the event loop, for up to half a second, and
    together they double the time that the work takes.
    """
    global _pauses, _was_enabled  # noqa: PLW0603 - there is one collector
    with _lock:
        if not _pauses:
            _was_enabled = gc.isenabled()
            gc.disable()
        _pauses += 1
    try:
        yield
    finally:
        with _lock:
            _pauses = max(_pauses - 1, 0)
            if not _pauses and _was_enabled:
                gc.enable()
