"""Memory that is lent out in pieces, each of which frees its own pages when it comes back."""

from __future__ import annotations

import ctypes
import mmap
import weakref
from contextlib import suppress
from typing import Any

__all__ = ["LENT_FROM", "lend"]

LENT_FROM = 1 << 20
"""Bytes from which a piece frees its own pages; smaller ones are not worth a system call."""


def lend(memory: mmap.mmap, at: int, nbytes: int) -> Any:
    """A buffer of ``nbytes`` bytes of private anonymous ``memory``, which keeps the memory alive.

    When it is gone, its whole pages are freed, though the rest of the memory lives on. Nobody else may use them.
    """
    lent = (ctypes.c_char * nbytes).from_buffer(memory, at)
    if nbytes >= LENT_FROM and hasattr(mmap, "MADV_DONTNEED"):
        weakref.finalize(lent, _free, memory, at, at + nbytes).atexit = False
    return lent


def _free(memory: mmap.mmap, start: int, stop: int) -> None:
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    length = stop // mmap.PAGESIZE * mmap.PAGESIZE - first
    if length > 0:
        with suppress(OSError, ValueError):
            memory.madvise(mmap.MADV_DONTNEED, first, length)
