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
from contextlib import ExitStack, closing, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import _weights_only_unpickler, overrides, serialization
from torch.utils import _python_dispatch

from torchferry.errors import (
    CheckpointCorruptError,
    CheckpointFormatError,
    NotEnoughMemoryError,
    TorchferryError,
    UnsafeCheckpointError,
    mask,
)
from torchferry.formats.lending import LENT_FROM, lend
from torchferry.formats.selection import is_meta, unsafe_message
from torchferry.printable import printable

if TYPE_CHECKING:
    import mmap
    from collections.abc import Iterator

    import torch.distributed as dist

__all__ = [
    "LOADS_IN_PLACE",
    "NO_MODES",
    "TorchModes",
    "crc32_option_is_of_the_context",
    "kept_gloo_group",
    "load_in_place",
    "new_gloo_group",
    "torch_errors",
    "torch_load",
    "torch_save",
]

# Bound here: a user may put torchferry's own functions in their place.
torch_save = serialization.save
torch_load = serialization.load

_FAKE = torch._C._TorchDispatchModeKey.FAKE  # noqa: SLF001

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
_OF_AN_ODD_LAYOUT = "rebuilding sparse tensor for layout"
_NO_MEMORY = "DefaultCPUAllocator: can't allocate memory"
_ABOUT_INDICES = "inconsistent with indices"  # of sparse tensors: torch.sparse.check_sparse_tensor_invariants
_JIT = f"{Path(torch.jit.__file__).parent}{os.sep}"
_NOT_OF_TORCHSCRIPT = (
    "CUDA|device|Unknown builtin op"  # what torch.jit.load says of a machine or a torch that lacks some
)
_NO_TYPE = "'torch.storage.UntypedStorage' has no attribute 'dtype'"  # of dtypes younger than the legacy format
_UNKNOWN_DEVICE = re.compile(
    r"don't know how to restore data location .*\(tagged with (.*)\)"
    r"|device type at start of device string: ([^\n]+)",  # of TorchScript
    re.DOTALL,
)
_STDLIB = f"{Path(os.__file__).parent}{os.sep}"  # what torch calls of it, such as Counter
_PACKAGES = re.compile(r"[/\\](?:site|dist)-packages[/\\]")
_DIRECTORIES = (f"{Path(torch.__file__).parent}{os.sep}", f"{Path(__file__).parents[1]}{os.sep}")


def crc32_option_is_of_the_context() -> bool:
    """Whether ``set_crc32_options`` is seen by this thread alone: older versions of torch have one option for all."""
    from torch.utils.serialization import config

    entry = getattr(config, "_config", {}).get("save.compute_crc32")
    return isinstance(getattr(entry, "user_override", None), ContextVar)


class _Storages:
    """The storages in some memory, as ``torch.serialization._load`` takes them: by slices.

    A large one gives its own memory back when its tensors are gone.

    torch keeps a storage for all tensors with its key, unless its address is 0, as that of an empty storage is. Empty
    tensors of several dtypes have one key. So an empty slice must be such a storage, not one within the memory.
    And one that cannot grow, as a slice of another cannot: torch would make it as large as a tensor that was saved
    without its data says, and leave that memory as it finds it.
    """

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory: mmap.mmap | None = memory
        self._lent: list[torch.UntypedStorage] = []  # torch may ask for one twice
        self._all = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()

    def __getitem__(self, part: slice) -> torch.UntypedStorage:
        if part.start >= part.stop:
            empty: torch.UntypedStorage = torch.UntypedStorage(0)[0:0]  # type: ignore[no-untyped-call]
            return empty
        if part.stop - part.start >= LENT_FROM:
            assert self._memory is not None  # noqa: S101 - not closed
            lent = lend(self._memory, part.start, part.stop - part.start)
            with _without_modes():
                self._lent.append(torch.frombuffer(lent, dtype=torch.uint8).untyped_storage())
            return self._lent[-1]
        storage: torch.UntypedStorage = self._all[part]
        return storage

    def close(self) -> None:
        """Lets go of the memory: what torch keeps of a load until the collector runs must not keep it alive."""
        self._memory = None
        self._lent.clear()
        self._all = torch.UntypedStorage(0)  # type: ignore[no-untyped-call]


@contextmanager
def _without_modes() -> Iterator[None]:
    """Has modes of the caller's not see what is done."""
    with _python_dispatch._disable_current_modes(), torch._C.DisableTorchFunction():  # noqa: SLF001
        yield


@dataclass(frozen=True, slots=True)
class TorchModes:
    """Modes of torch that hold for one thread: what a load makes, and a save writes, depends on them.

    Attributes:
        dispatch: The modes that see every operator, such as ``FakeTensorMode``, outermost first.
        function: The modes that see every function of torch, such as a default device, outermost first.
        inference: ``torch.inference_mode``.
        grad: ``torch.enable_grad`` and ``torch.no_grad``.
        skips_data: ``torch.serialization.skip_data``.
        materializes_fakes: Its ``materialize_fake_tensors``.
    """

    dispatch: tuple[Any, ...] = ()
    function: tuple[Any, ...] = ()
    inference: bool = False
    grad: bool = True
    skips_data: bool = False
    materializes_fakes: bool = False

    @classmethod
    def of_caller(cls) -> TorchModes:
        """Those of the thread that called torchferry: :meth:`carried` ones, or else this thread's."""
        return _carried.get() or cls._of_thread()

    @classmethod
    @contextmanager
    def carried(cls) -> Iterator[None]:
        """Has :meth:`of_caller` return this thread's modes, also in other threads that run in this context."""
        token = _carried.set(cls._of_thread())
        try:
            yield
        finally:
            _carried.reset(token)

    @classmethod
    def _of_thread(cls) -> TorchModes:
        local = serialization._serialization_tls  # noqa: SLF001
        return cls(
            tuple(_python_dispatch._get_current_dispatch_mode_stack()),  # noqa: SLF001
            tuple(overrides._get_current_function_mode_stack()),  # type: ignore[no-untyped-call]  # noqa: SLF001
            torch.is_inference_mode_enabled(),
            torch.is_grad_enabled(),
            local.skip_data,
            getattr(local, "materialize_fake_tensors", False),
        )

    @property
    def leave_values_out(self) -> bool:
        """Whether a load makes tensors without values: fake ones, or under ``skip_data``."""
        return self.skips_data or self.make_fakes

    @property
    def make_fakes(self) -> bool:
        """Whether a load makes fake tensors, whose storages are on the meta device."""
        return any(getattr(mode, "_mode_key", None) is _FAKE for mode in self.dispatch)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Has this thread in these modes."""
        with ExitStack() as stack:
            for modes, hooks in ((self.function, overrides), (self.dispatch, _python_dispatch)):
                for mode in modes:
                    hooks._push_mode(mode)  # noqa: SLF001 - its __enter__ would be run twice
                    stack.callback(hooks._pop_mode)  # noqa: SLF001
            stack.enter_context(torch.inference_mode(self.inference))
            stack.enter_context(torch.set_grad_enabled(self.grad))
            if self.skips_data:
                stack.enter_context(serialization.skip_data(self.materializes_fakes))
            yield


NO_MODES = TorchModes()
"""Those of a thread that nobody has changed."""

_carried: ContextVar[TorchModes | None] = ContextVar("torchferry_torch_modes", default=None)


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


def load_in_place(memory: mmap.mmap, *, map_location: Any, weights_only: bool, modes: TorchModes = NO_MODES) -> Any:
    """What ``torch.load`` makes of the archive in ``memory``; the tensors are views of it and keep it alive."""
    memory.seek(0)
    unpickler = _weights_only_unpickler if weights_only else pickle
    options = {"weights_only": weights_only} if _TAKES_WEIGHTS_ONLY else {}
    has_meta_storages = is_meta(map_location) or modes.make_fakes
    with (
        closing(_Storages(memory)) as storages,
        serialization._open_zipfile_reader(memory) as reader,  # type: ignore[arg-type]  # noqa: SLF001
        modes.applied(),
    ):
        return serialization._load(  # type: ignore[no-untyped-call]  # noqa: SLF001
            _NativeReader(reader) if has_meta_storages else reader,
            map_location,
            unpickler,
            overall_storage=storages,
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
        if (told := _memory_or_dtype_error(error, url)) is not None:
            raise told from error
        if tag := _UNKNOWN_DEVICE.search(str(error)):
            if (device := tag[1] or tag[2]) != str(map_location) and not (tag[2] and callable(map_location)):
                raise CheckpointFormatError(
                    f"{url} has tensors of a device that is not known here, {printable(device)!r}: map_location= says "
                    "where to load them."
                ) from error
        elif _is_damage(error, weights_only=weights_only, checked=checked):
            detail = printable(str(error).strip().partition("\n")[0])
            raise CheckpointCorruptError(f"{url} is damaged: {type(error).__name__}: {detail}") from error
        error.add_note(mask(f"This happened while loading {url}."))
        raise


def _memory_or_dtype_error(error: Exception, url: str) -> TorchferryError | None:
    if isinstance(error, RuntimeError) and _NO_MEMORY in str(error):
        return NotEnoughMemoryError(f"{url}: this machine has no memory for its values: {error}")
    if isinstance(error, AttributeError) and _NO_TYPE in str(error):
        return CheckpointFormatError(
            f"{url} has tensors of a dtype that torch's legacy format stores and does not load (float8, uint16 and the "
            "like). Whoever wrote it can save it without _use_new_zipfile_serialization=False."
        )
    return None


def _unpickling_error(error: pickle.UnpicklingError, url: str, *, weights_only: bool) -> TorchferryError:
    if not weights_only:
        return CheckpointCorruptError(f"{url} cannot be unpickled: {error}")
    unsafe = re.findall(r"GLOBAL (\S+) (?:was not an allowed global|whose module \S+ is blocked)", str(error))
    if unsafe:
        return UnsafeCheckpointError(unsafe_message(url, unsafe))
    detail = printable(str(error).rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0])
    return UnsafeCheckpointError(
        f"{url} cannot be loaded with weights_only=True: {detail}. If you trust whoever wrote it, "
        "weights_only=False may load it; that runs any code that the checkpoint contains."
    )


def _is_damage(error: Exception, *, weights_only: bool, checked: bool) -> bool:
    if isinstance(error, RuntimeError) and re.search("PytorchStreamReader|unexpected EOF", str(error)):
        return True
    is_of_the_machine = isinstance(error, _OF_THE_MACHINE) and not str(error).startswith(_OF_AN_ODD_LAYOUT)
    if not isinstance(error, _OF_DAMAGE) or is_of_the_machine or _ABOUT_INDICES in str(error):
        return False
    frames = list(_frames(error))
    if isinstance(error, TypeError) and [frame[1] for frame in frames[-2:]] == ["_deserialize", "match"]:
        return True  # torch has looked for the name of a device in what is no text
    if any(file.startswith(_JIT) for file, _ in frames):
        return not re.search(_NOT_OF_TORCHSCRIPT, str(error))
    if not weights_only and isinstance(error, _OF_CLASSES) and (checked or not isinstance(error, TypeError)):
        return False
    return not any(_is_of_others(*frame) for frame in frames)


def _frames(error: Exception) -> Iterator[tuple[str, str]]:
    """File and function of each frame between here and where the error was raised."""
    traceback = error.__traceback__
    while traceback is not None:
        yield traceback.tb_frame.f_code.co_filename, traceback.tb_frame.f_code.co_name
        traceback = traceback.tb_next


def _is_of_others(file: str, function: str) -> bool:
    is_pythons = file.startswith((_STDLIB, "<frozen ")) and _PACKAGES.search(file) is None
    is_known = is_pythons or file.startswith(_DIRECTORIES)
    return function in _OTHERS or function.endswith(_ENDS_OF_OTHERS) or not is_known


_kept_groups: WeakKeyDictionary[dist.ProcessGroup, dict[str, dist.ProcessGroup]] = WeakKeyDictionary()


def kept_gloo_group(purpose: str, group: dist.ProcessGroup | None = None) -> dist.ProcessGroup:
    """The gloo group of the same ranks that serves one purpose alone: nothing gets between its collectives.

    Collective the first time, when it is made; it stays as long as ``group`` does, of which ``None`` is that of all.
    """
    import torch.distributed as dist

    of = group or dist.group.WORLD
    assert of is not None  # noqa: S101 - there is a process group
    kept = _kept_groups.setdefault(of, {})
    if purpose not in kept:
        kept[purpose] = new_gloo_group(group)
    return kept[purpose]


def new_gloo_group(group: dist.ProcessGroup | None = None) -> dist.ProcessGroup:
    """A new gloo group of the same ranks, which waits for them as long as ``group`` does: ``None`` is that of all.

    Collective. A new group of torch's own accord waits for 30 minutes.
    """
    import torch.distributed as dist

    of = group or dist.group.WORLD
    assert of is not None  # noqa: S101 - there is a process group
    timeout = None
    with suppress(AttributeError, IndexError, RuntimeError):  # of a backend of its own kind
        timeout = of._get_backend(of._device_types[0]).options._timeout  # noqa: SLF001
    ranks = None if dist.get_world_size(of) == dist.get_world_size() else dist.get_process_group_ranks(of)
    # Where only some ranks come, they must do without the others. Such a group must not be destroyed alone: torch would
    # give its name to the next one, which would meet the addresses of the first in the store, and wait for them.
    new: Any = dist.new_group(ranks, timeout=timeout, backend="gloo", use_local_synchronization=ranks is not None)
    return new  # type: ignore[no-any-return]  # torch's annotation is missing
