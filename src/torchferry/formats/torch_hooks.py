"""What torchferry knows of torch's private functions, all of it; ``tests/test_torch_hooks.py`` tells of changes.

``torch.load(path, mmap=True)`` maps a file, and hands the mapping to ``torch.serialization._load`` as
``overall_storage``: every tensor becomes a view of it. A load buffer is no file, so that function is called directly.
Its parameters are the same from torch 2.7 to 2.14, but for ``weights_only``, which came with 2.14.
"""

from __future__ import annotations

import inspect
import os
import pickle
import re
import struct
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import _weights_only_unpickler, serialization

from torchferry.errors import (
    CheckpointCorruptError,
    CheckpointFormatError,
    NotEnoughMemoryError,
    TorchferryError,
    UnsafeCheckpointError,
    mask,
)
from torchferry.formats.printable import printable
from torchferry.formats.selection import is_meta, unsafe_message

if TYPE_CHECKING:
    import mmap
    from collections.abc import Iterator

__all__ = ["LOADS_IN_PLACE", "load_in_place", "torch_errors"]

_PARAMETERS = set(inspect.signature(serialization._load).parameters)  # noqa: SLF001
_TAKES_WEIGHTS_ONLY = "weights_only" in _PARAMETERS  # from torch 2.14: it then checks the indices of sparse tensors

LOADS_IN_PLACE = {"zip_file", "map_location", "pickle_module", "overall_storage"} <= _PARAMETERS
"""Whether this torch has what :func:`load_in_place` calls."""


# What torch's unpicklers raise for a pickle that torch did not write, or that is damaged.
_OF_DAMAGE = (
    AssertionError,
    AttributeError,
    LookupError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)
_OF_CLASSES = (AttributeError, TypeError)  # a class that is not there any more, or is made in another way
# Those of them that are about the machine, not about the checkpoint.
_OF_THE_MACHINE = (NotImplementedError, torch.OutOfMemoryError)
# Where such errors come from: a device that is not there, a library that is not there, checks that the caller wants.
_OTHERS = {"restore_location", "default_restore_location", "_validate_loaded_sparse_tensors"}
_ENDS_OF_OTHERS = ("_deserialize", "_from_numpy")
_ABOUT_INDICES = "inconsistent with indices"  # of sparse tensors: torch.sparse.check_sparse_tensor_invariants
_JIT = f"{Path(torch.jit.__file__).parent}{os.sep}"
_NOT_OF_TORCHSCRIPT = (
    "CUDA|device|Unknown builtin op"  # what torch.jit.load says of a machine or a torch that lacks some
)
_DIRECTORIES = (f"{Path(torch.__file__).parent}{os.sep}", f"{Path(__file__).parents[1]}{os.sep}")


class _Storages:
    """The storages in some memory, as ``torch.serialization._load`` takes them: by slices.

    torch keeps a storage for all tensors with its key, unless its address is 0, as that of an empty storage is. Empty
    tensors of several dtypes have one key. So an empty slice must be such a storage, not one within the memory.
    """

    def __init__(self, memory: mmap.mmap) -> None:
        self._all = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()

    def __getitem__(self, part: slice) -> torch.UntypedStorage:
        if part.start >= part.stop:
            return torch.UntypedStorage(0)  # type: ignore[no-untyped-call]
        storage: torch.UntypedStorage = self._all[part]
        return storage


class _NativeReader:
    """A reader of torch's that calls every archive one of this machine's byte order.

    Without, torch would swap the bytes of storages on the meta device, which have none, and crash.
    """

    def __init__(self, reader: Any) -> None:
        self._reader = reader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)

    def get_record(self, name: str) -> bytes:
        """A record's bytes."""
        record: bytes = self._reader.get_record(name)
        return sys.byteorder.encode() if name == "byteorder" and record in {b"little", b"big"} else record


def load_in_place(memory: mmap.mmap, *, map_location: Any, weights_only: bool) -> Any:
    """What ``torch.load`` makes of the archive in ``memory``; the tensors are views of it and keep it alive."""
    memory.seek(0)
    unpickler = _weights_only_unpickler if weights_only else pickle
    options = {"weights_only": weights_only} if _TAKES_WEIGHTS_ONLY else {}
    with serialization._open_zipfile_reader(memory) as reader:  # type: ignore[arg-type]  # noqa: SLF001
        return serialization._load(  # type: ignore[no-untyped-call]  # noqa: SLF001
            _NativeReader(reader) if is_meta(map_location) else reader,
            map_location,
            unpickler,
            overall_storage=_Storages(memory),
            encoding="utf-8",
            **options,
        )


@contextmanager
def torch_errors(url: str, *, map_location: Any, weights_only: bool, checked: bool) -> Iterator[None]:
    """Raises what torch raises for damaged and unsafe checkpoints as torchferry's own errors.

    Others are between torch, the checkpoint's own classes and the caller's ``map_location``: they are left as they
    are, with a note that names the checkpoint.

    Args:
        url: Of the checkpoint.
        map_location: As torch is told.
        weights_only: The same. If not, classes of the checkpoint run, which may raise anything.
        checked: Whether CRC32s have shown that the checkpoint is what was saved.
    """
    try:
        yield
    except TorchferryError:
        raise
    except pickle.UnpicklingError as error:
        raise _unpickling_error(error, url, weights_only=weights_only) from error
    except EOFError as error:
        raise CheckpointCorruptError(f"{url} is truncated: {error}") from error
    except MemoryError as error:
        raise NotEnoughMemoryError(f"{url}: this machine has no memory for its values: {error}") from error
    except Exception as error:
        if tag := re.search(r"don't know how to restore data location .*\(tagged with (.*)\)", str(error), re.DOTALL):
            if tag[1] != str(map_location):
                raise CheckpointFormatError(
                    f"{url} has tensors of a device that is not known here, {printable(tag[1])!r}: map_location= says "
                    "where to load them."
                ) from error
        elif _is_damage(error, weights_only=weights_only, checked=checked):
            detail = printable(str(error).strip().partition("\n")[0])
            raise CheckpointCorruptError(f"{url} is damaged: {type(error).__name__}: {detail}") from error
        error.add_note(mask(f"This happened while loading {url}."))
        raise


def _unpickling_error(error: pickle.UnpicklingError, url: str, *, weights_only: bool) -> TorchferryError:
    if not weights_only:
        return CheckpointCorruptError(f"{url} cannot be unpickled: {error}")
    if unsafe := re.findall(r"GLOBAL (\S+) was not an allowed global", str(error)):
        return UnsafeCheckpointError(unsafe_message(url, unsafe))
    detail = printable(str(error).rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0])
    return UnsafeCheckpointError(
        f"{url} cannot be loaded with weights_only=True: {detail}. If you trust whoever wrote it, "
        "weights_only=False may load it; that runs any code that the checkpoint contains."
    )


def _is_damage(error: Exception, *, weights_only: bool, checked: bool) -> bool:
    if isinstance(error, RuntimeError) and re.search("PytorchStreamReader|unexpected EOF", str(error)):
        return True
    if not isinstance(error, _OF_DAMAGE) or isinstance(error, _OF_THE_MACHINE) or _ABOUT_INDICES in str(error):
        return False
    if any(file.startswith(_JIT) for file, _ in _frames(error)):
        return not re.search(_NOT_OF_TORCHSCRIPT, str(error))
    if not weights_only and isinstance(error, _OF_CLASSES) and (checked or not isinstance(error, TypeError)):
        return False
    return not any(_is_of_others(*frame) for frame in _frames(error))


def _frames(error: Exception) -> Iterator[tuple[str, str]]:
    """File and function of each frame between here and where the error was raised."""
    traceback = error.__traceback__
    while traceback is not None:
        yield traceback.tb_frame.f_code.co_filename, traceback.tb_frame.f_code.co_name
        traceback = traceback.tb_next


def _is_of_others(file: str, function: str) -> bool:
    return function in _OTHERS or function.endswith(_ENDS_OF_OTHERS) or not file.startswith(_DIRECTORIES)
