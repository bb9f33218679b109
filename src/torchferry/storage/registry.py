"""Finds the backend for a URL."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import cache, partial
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_to_bytes

import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.cached import CachingFileSystem
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.registry import registry
from fsspec.utils import get_protocol

from torchferry.arguments import require_mapping, require_path
from torchferry.engine.cancellation import ThreadPool, in_thread
from torchferry.errors import (
    BackendNotInstalledError,
    StorageError,
    StoragePermissionError,
    TorchferryError,
    UnsupportedOptionError,
    UnsupportedURLError,
    masked,
)
from torchferry.storage.base import Backend
from torchferry.storage.options import option_names, require_known, unknown_option
from torchferry.storage.translate import generic_error

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

__all__ = [
    "ENTRY_POINT_GROUP",
    "begins_with_a_protocol",
    "is_chain",
    "open_backend",
    "open_backend_async",
    "protocol_of",
]

ENTRY_POINT_GROUP = "torchferry.storage_backends"

_PATIENCE = 0.5  # seconds
_LOCAL = frozenset({"file", "local"})
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure", "abfss": "azure"}
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


def open_backend(
    url: str | os.PathLike[str],
    *,
    storage_options: Mapping[str, Any] | None = None,
    filesystem: AbstractFileSystem | None = None,
    directory: bool = False,
) -> tuple[Backend, str]:
    """Finds the backend for ``url`` and the path in it.

    The backend is the entry point of the group ``torchferry.storage_backends`` that is named for the
    filesystem's protocol; files of this machine and every other fsspec filesystem have built-in ones.
    May import the store's library and so take a second: see :func:`open_backend_async`.

    Args:
        url: Any fsspec URL, or a local path. A ``os.PathLike`` is a local path, also with ``::`` in it, and so is a
            string with ``::`` and no protocol around it.
        storage_options: Arguments for the fsspec filesystem.
        filesystem: An fsspec filesystem to use as it is, instead of ``storage_options``. In a child forked from the
            process that made it, another one with the same arguments is used.
        directory: Whether the URL may be that of a directory, a prefix or a bucket; its path has no "/" at the end.

    Raises:
        UnsupportedURLError: it is empty, fsspec knows no such protocol, it is a directory's, or neither one URL nor a
            chain of them (``zip://x.pt::s3://bucket/x.zip``).
        BackendNotInstalledError: the protocol's library is not installed.
        UnsupportedOptionError: the options contradict each other, or the filesystem does not know one.
        StorageError: what a chained URL starts from cannot be opened.
        TypeError: ``url`` is neither a string nor a path, or the options are no mapping.
    """
    require_path(url)
    require_mapping("storage_options", storage_options)
    text = os.fspath(url)
    if not text and filesystem is None:
        raise UnsupportedURLError('The URL is empty. "." is the current directory.')
    if text.endswith("/") and not directory:
        raise UnsupportedURLError(f"{text} names a directory: add the name of a file, such as {text}checkpoint.pt")
    if filesystem is None:
        is_path = isinstance(url, os.PathLike) and not _URL.match(text)
        filesystem, path = _filesystem_for(text, storage_options or {}, is_path=is_path)
    elif storage_options:
        raise UnsupportedOptionError(f"{text}: pass storage_options or a filesystem, not both.")
    else:
        path = _path_in(filesystem, text)
    while isinstance(filesystem, DirFileSystem):  # a directory of a store is reached as the store is
        filesystem, path = filesystem.fs, filesystem._join(path)
    if directory:
        path = path.rstrip("/")
        if not path and _is_object_store(filesystem):
            raise UnsupportedURLError(f"{text} names no bucket: a prefix begins with one, as in s3://bucket/runs.")
    return _backend_for(_of_this_process(filesystem)), path


async def open_backend_async(
    url: str | os.PathLike[str],
    *,
    storage_options: Mapping[str, Any] | None = None,
    filesystem: AbstractFileSystem | None = None,
    directory: bool = False,
) -> tuple[Backend, str]:
    """:func:`open_backend` in a worker thread.

    A cancel waits 0.5 s for a filesystem that is being made and connects: what comes of it later is dropped.
    """
    return await in_thread(
        partial(open_backend, url, storage_options=storage_options, filesystem=filesystem, directory=directory),
        interrupt=lambda: _PATIENCE,
    )


def protocol_of(url: str | os.PathLike[str]) -> str:
    """The protocol of a URL, or of the last one of a chain: "file" for a local path."""
    last = os.fspath(url).rpartition("::")[2]
    found = _URL.match(last)
    return found.group(1).lower() if found else "file"


def _backend_for(fs: AbstractFileSystem) -> Backend:
    if isinstance(fs, CachingFileSystem):
        from torchferry.storage.cached import CachedBackend

        return CachedBackend(_backend_for(fs.fs), fs)
    return _backend_class(fs).from_filesystem(fs)


def _of_this_process(fs: AbstractFileSystem) -> AbstractFileSystem:
    """``fs``; in a forked child, where asynchronous filesystems of the parent do not work, one like it."""
    if isinstance(fs, CachingFileSystem):
        cached = _of_this_process(fs.fs)
        if cached is fs.fs:
            return fs
        return type(fs)(**{**fs.storage_options, "fs": cached, "target_protocol": None, "target_options": None})
    if isinstance(fs, AsyncFileSystem) and fs._pid != os.getpid():
        return type(fs)(*fs.storage_args, **{**fs.storage_options, "loop": None})
    return fs


def _filesystem_for(
    url: str, storage_options: Mapping[str, Any], *, is_path: bool = False
) -> tuple[AbstractFileSystem, str]:
    protocol, colon, rest = url.partition(":")
    mistyped = colon and protocol in _protocols() - _LOCAL - {"data"} and not rest.startswith(("//", ":"))
    if mistyped:  # to fsspec, a local path
        raise UnsupportedURLError(f"{url} is no URL: use {protocol}://{rest.lstrip('/')}")
    try:
        return _make(url, storage_options, is_path=is_path)
    except TorchferryError:
        raise
    except Exception as error:  # noqa: BLE001 - a client may raise anything, as when it connects
        raise _translate(url, protocol, error) from masked(error)


def _translate(url: str, protocol: str, error: Exception) -> TorchferryError:
    if isinstance(error, ImportError):
        extra = _EXTRAS.get(protocol)
        hint = f"pip install 'torchferry[{extra}]'" if extra else f"install what fsspec needs for {protocol}://"
        return BackendNotInstalledError(f"{url}: {error}. To use {protocol}:// URLs, {hint}.")
    if isinstance(error, OSError):
        return generic_error(f"Cannot open {url}", error)
    if isinstance(error, TypeError | ValueError) and protocol not in _protocols():
        return UnsupportedURLError(
            f"{url}: no filesystem is known for the protocol {protocol!r}. "
            "fsspec.available_protocols() lists those that are."
        )
    if isinstance(error, TypeError | ValueError):  # an option that the filesystem needs, or does not know
        return UnsupportedOptionError(f"{url}: {unknown_option(error, _class_of(protocol)) or error}")
    about_credentials = type(error).__module__.startswith("google.auth.")
    fault = StoragePermissionError if about_credentials else StorageError
    return fault(f"Cannot open {url}: {type(error).__name__}: {error}")


def _make(url: str, storage_options: Mapping[str, Any], *, is_path: bool) -> tuple[AbstractFileSystem, str]:
    if is_path or ("::" in url and not any(map(_protocol_in, url.split("::")))):
        kind: type[AbstractFileSystem] = fsspec.get_filesystem_class("file")
        return kind(**storage_options), kind._strip_protocol(url)
    protocol = get_protocol(url)
    if protocol in _LOCAL and "::" not in url:
        return _make_one(url, protocol, storage_options)
    make = partial(_make_any, url, protocol, storage_options)
    try:
        made = _opener(protocol).executor.submit(make)
    except RuntimeError:  # the interpreter is about to end, and waits for the thread that this is in
        return make()
    return made.result()


def _make_any(url: str, protocol: str, storage_options: Mapping[str, Any]) -> tuple[AbstractFileSystem, str]:
    if not is_chain(url):
        return _make_one(url, protocol, storage_options)
    if _protocol_in(url.rpartition("::")[2]) in _entry_points():
        return _make_on_store(url, storage_options)
    made: tuple[AbstractFileSystem, str] = url_to_fs(_decoded_at_the_end(url), **storage_options)
    return made


def _make_on_store(chain: str, storage_options: Mapping[str, Any]) -> tuple[AbstractFileSystem, str]:
    """What ``url_to_fs`` makes of a chain, on the class that is used for the store's own URLs."""
    *layers, last = chain.split("::")
    options = dict(storage_options)
    protocol = get_protocol(last)
    fs, path = _make_one(last, protocol, options.pop(protocol, {}))
    for layer in reversed(layers):
        protocol = _protocol_in(layer) or ""
        kind: type[AbstractFileSystem] = fsspec.get_filesystem_class(protocol)
        given = {**kind._get_kwargs_from_urls(layer), **options.pop(protocol, {})}
        if layer is layers[0]:
            given |= options
        names = option_names(kind)
        given |= {"fs": fs} if "fs" in names else {"fo": fs.open(path)}
        if {"fs", "fo"} <= names:
            given["fo"] = path
        fs, path = kind(**given), kind._strip_protocol(layer.partition("://")[2]) or path
    return fs, path


def _make_one(url: str, protocol: str, storage_options: Mapping[str, Any]) -> tuple[AbstractFileSystem, str]:
    """The filesystem of one URL, and the path in it; ``::`` in it is nothing special."""
    kind = _class_of(protocol)
    options = {**kind._get_kwargs_from_urls(url), **storage_options}
    if protocol in _entry_points():
        require_known(url, kind, _backend_of(protocol), options)
    return kind(**options), _path_of(kind, url)


def _class_of(protocol: str) -> type[AbstractFileSystem]:
    """The class that is used for a protocol's URLs: a backend's own choice, or else what fsspec has registered."""
    chosen = _backend_of(protocol).filesystem_class() if protocol in _entry_points() else None
    kind: type[AbstractFileSystem] = chosen or fsspec.get_filesystem_class(protocol)
    return kind


def _path_of(fs: AbstractFileSystem | type[AbstractFileSystem], url: str) -> str:
    protocols = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
    path: str = fs._strip_protocol(_decoded(url) if "file" in protocols else url)
    return path


def _path_in(fs: AbstractFileSystem, url: str) -> str:
    path = _path_of(fs, url)
    # fsspec strips the protocol of the class. obstore's FsspecStore has one for each instance.
    if isinstance(fs.protocol, str) and fs.protocol != type(fs).protocol:
        path = path.removeprefix(f"{fs.protocol}://")
    if "://" in url and path != url and path.endswith(url):  # the local filesystem takes s3:// for a directory
        raise UnsupportedOptionError(f"{url} is not a URL of the filesystem that was given, {type(fs).__name__}.")
    if url.startswith(tuple(f"{protocol}://" for protocol in _LOCAL)) and _is_object_store(fs):
        raise UnsupportedOptionError(
            f"{url} is a file of this machine, and the filesystem that was given, {type(fs).__name__}, is a store's: "
            "leave filesystem= out, or give it the URL of an object."
        )
    return path


def _is_object_store(fs: AbstractFileSystem) -> bool:
    protocols = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
    return any(protocol in _EXTRAS for protocol in protocols)


# --- what "::" and "%20" mean


def begins_with_a_protocol(url: str) -> bool:
    """Whether a URL begins with the name of a protocol and a colon, with or without ``//``: else it is a local path."""
    return _URL.match(url) is not None or url.partition(":")[0] in _protocols()


def is_chain(url: str) -> bool:
    """Whether a URL with a protocol somewhere is a chain of URLs (``zip://x.pt::s3://bucket/x.zip``), or only one.

    A chain is one of filesystems that lie on others; only the last may be a store of its own, or a local path. The
    path of one URL may contain ``::``.

    Raises:
        UnsupportedURLError: it is neither.
    """
    if "::" not in url:
        return False
    *layers, last = url.split("::")
    protocols = [_protocol_in(layer) for layer in layers]
    if all(protocol is not None and _lies_on_another(protocol) for protocol in protocols):
        return True
    first = _URL.match(url)
    if first is not None and not _lies_on_another(first.group(1)) and not any([*protocols[1:], _protocol_in(last)]):
        return False
    raise UnsupportedURLError(
        f"{url} is neither one URL nor a chain of them: before each '::' of a chain stands a filesystem that lies on "
        "another, such as zip://x.pt or simplecache. A local path with '::' in it can be given as a pathlib.Path."
    )


def _protocol_in(segment: str) -> str | None:
    """The protocol that a segment of a URL begins with, or that it is."""
    if segment in _protocols():
        return segment
    found = _URL.match(segment)
    return found.group(1) if found else None


def _lies_on_another(protocol: str) -> bool:
    """Whether a filesystem takes another one to lie on, which fsspec hands it as these arguments."""
    kind: type[AbstractFileSystem] = fsspec.get_filesystem_class(protocol)
    return not {"fo", "fs", "target_protocol"}.isdisjoint(option_names(kind))


def _decoded(url: str) -> str:
    """The path of a ``file://`` URL, as ``pathlib.Path.as_uri`` makes them; anything else as it is."""
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in _LOCAL:
        return url
    return os.fsdecode(unquote_to_bytes(os.fsencode(rest)))


def _decoded_at_the_end(chain: str) -> str:
    layers, _, last = chain.rpartition("::")
    return f"{layers}::{_decoded(last)}"


# --- what there is


@cache
def _opener(protocol: str) -> ThreadPool:
    """The thread in which filesystems are made: up to fsspec 2026.3 each thread has its own, with its own connections.

    One for each protocol: making some connects them, which may take long.
    """
    return ThreadPool(1, f"torchferry-opener-{protocol}")


def _backend_class(fs: AbstractFileSystem) -> type[Backend]:
    protocols = (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)
    for protocol in protocols:
        if protocol in _entry_points():
            backend_class = _backend_of(protocol)
            kind = backend_class.filesystem_class()
            if kind is None or isinstance(fs, kind):
                return backend_class
    if "file" in protocols:
        from torchferry.storage.local import LocalBackend

        return LocalBackend
    from torchferry.storage.generic import GenericBackend

    return GenericBackend


def _backend_of(protocol: str) -> type[Backend]:
    backend_class: type[Backend] = _entry_points()[protocol].load()
    return backend_class


@cache
def _entry_points() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}


def _protocols() -> frozenset[str]:
    return frozenset({*fsspec.available_protocols(), *registry})  # what was registered as a class is only in there
