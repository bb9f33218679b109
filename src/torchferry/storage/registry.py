"""Finds the backend for a URL."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache, partial
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

import fsspec
from fsspec.core import url_to_fs
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.utils import get_protocol

from torchferry.engine.cancellation import ThreadPool
from torchferry.errors import (
    BackendNotInstalledError,
    CheckpointNotFoundError,
    StorageError,
    StoragePermissionError,
    UnsupportedOptionError,
    UnsupportedURLError,
)
from torchferry.storage.base import Backend

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

__all__ = ["ENTRY_POINT_GROUP", "open_backend"]

ENTRY_POINT_GROUP = "torchferry.storage_backends"

_PROTOCOLS = frozenset(fsspec.available_protocols()) - {"file", "local", "data"}
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure", "abfss": "azure"}


def open_backend(
    url: str | os.PathLike[str],
    *,
    storage_options: Mapping[str, Any] | None = None,
    filesystem: AbstractFileSystem | None = None,
) -> tuple[Backend, str]:
    """Finds the backend for ``url`` and the path in it.

    The backend is the entry point of the group ``torchferry.storage_backends`` that is named for the
    filesystem's protocol; files of this machine and every other fsspec filesystem have built-in ones.
    May import the store's library and so take a second: call it in a worker thread.

    Args:
        url: Any fsspec URL, or a local path.
        storage_options: Arguments for the fsspec filesystem.
        filesystem: An fsspec filesystem to use as it is, instead of ``storage_options``.

    Raises:
        UnsupportedURLError: fsspec knows no such protocol, or the URL is a directory's.
        BackendNotInstalledError: the protocol's library is not installed.
        UnsupportedOptionError: the options contradict each other, or the filesystem does not know one.
        StorageError: what a chained URL (``zip://x::file.zip``) starts from cannot be opened.
    """
    url = os.fspath(url)
    if url.endswith("/"):
        raise UnsupportedURLError(f"{url} names a directory: add the name of a file, such as {url}checkpoint.pt")
    if filesystem is None:
        filesystem, path = _filesystem_for(url, storage_options or {})
    elif storage_options:
        raise UnsupportedOptionError(f"{url}: pass storage_options or a filesystem, not both.")
    else:
        path = _path_in(filesystem, url)
    while isinstance(filesystem, DirFileSystem):  # a directory of a store is reached as the store is
        filesystem, path = filesystem.fs, filesystem._join(path)
    return _backend_class(filesystem).from_filesystem(filesystem), path


def _filesystem_for(url: str, storage_options: Mapping[str, Any]) -> tuple[AbstractFileSystem, str]:
    protocol, colon, rest = url.partition(":")
    if colon and protocol in _PROTOCOLS and not rest.startswith(("//", ":")):  # to fsspec, a local path
        raise UnsupportedURLError(f"{url} is no URL: use {protocol}://{rest.lstrip('/')}")
    try:
        return _make(url, storage_options)
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        hint = f"pip install 'torchferry[{extra}]'" if extra else f"install what fsspec needs for {protocol}://"
        raise BackendNotInstalledError(f"{url}: {error}. To use {protocol}:// URLs, {hint}.") from error
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(error.errno, f"{url}: {error}") from error
    except OSError as error:
        raise StorageError(error.errno, f"{url}: {error}") from error
    except TypeError as error:  # a setting that the filesystem needs, or does not know
        raise UnsupportedOptionError(f"{url}: {error}") from error
    except ValueError as error:
        if protocol in fsspec.available_protocols():
            raise UnsupportedOptionError(f"{url}: {error}") from error
        raise UnsupportedURLError(
            f"{url}: no filesystem is known for the protocol {protocol!r}. "
            "fsspec.available_protocols() lists those that are."
        ) from error
    except Exception as error:  # a client may raise anything, as when it connects
        about_credentials = type(error).__module__.startswith("google.auth.")
        kind = StoragePermissionError if about_credentials else StorageError
        raise kind(f"Cannot open {url}: {type(error).__name__}: {error}") from error


def _make(url: str, storage_options: Mapping[str, Any]) -> tuple[AbstractFileSystem, str]:
    protocol = get_protocol(url)
    make = partial(_make_here, url, protocol, storage_options)
    if protocol in {"file", "local"}:
        return make()
    try:
        made = _opener(protocol).executor.submit(make)
    except RuntimeError:  # the interpreter is about to end, and waits for the thread that this is in
        return make()
    return made.result()


def _make_here(url: str, protocol: str, storage_options: Mapping[str, Any]) -> tuple[AbstractFileSystem, str]:
    entry = _entry_points().get(protocol)
    kind = entry.load().filesystem_class() if entry and "::" not in url else None
    if kind is None:
        made: tuple[AbstractFileSystem, str] = url_to_fs(url, **storage_options)
        return made
    return kind(**{**kind._get_kwargs_from_urls(url), **storage_options}), kind._strip_protocol(url)


@cache
def _opener(protocol: str) -> ThreadPool:
    """The thread in which filesystems are made: up to fsspec 2026.3 each thread has its own, with its own connections.

    One for each protocol: making some connects them, which may take long.
    """
    return ThreadPool(1, f"torchferry-opener-{protocol}")


def _path_in(fs: AbstractFileSystem, url: str) -> str:
    path: str = fs._strip_protocol(url)
    if "://" in url and path != url and path.endswith(url):  # the local filesystem takes s3:// for a directory
        raise UnsupportedOptionError(f"{url} is not a URL of the filesystem that was given, {type(fs).__name__}.")
    return path


def _backend_class(fs: AbstractFileSystem) -> type[Backend]:
    protocols = (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)
    for protocol in protocols:
        if entry := _entry_points().get(protocol):
            backend_class: type[Backend] = entry.load()
            kind = backend_class.filesystem_class()
            if kind is None or isinstance(fs, kind):
                return backend_class
    if "file" in protocols:
        from torchferry.storage.local import LocalBackend

        return LocalBackend
    from torchferry.storage.generic import GenericBackend

    return GenericBackend


@cache
def _entry_points() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}
