"""The first half of ``torch.save``: the object's pickle and its storages, before anything is written.

``torch.save`` pickles the whole object, and then writes the storages that it has met on the way. The two halves can be
apart: :func:`pickle_object` does the first, and a ``torch.save`` with :func:`replaying_pickle` does the second, later,
and from other storages with the same bytes.
"""

from __future__ import annotations

import pickle
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from torchferry.formats.partial import require_whole
from torchferry.formats.torch_hooks import torch_save

if TYPE_CHECKING:
    from torchferry.formats.snapshot import LentStorages

__all__ = ["Pickled", "pickle_object", "recording_pickle", "replaying_pickle"]


_PLAIN = frozenset(
    {
        *(str, int, float, bool, tuple, list, dict, OrderedDict, type(None), type, types.FunctionType),
        type(torch.FloatStorage),
    }
)
"""Types of what is no tensor and no storage: 17 of 19 values that a pickler asks about. Half of the time goes there."""

_TENSORS = frozenset({torch.Tensor, torch.nn.Parameter})


@dataclass(frozen=True, slots=True)
class Pickled:
    """What ``torch.save`` writes of an object.

    Attributes:
        data: The pickle.
        storages: The storages, in the order of their names in the archive: "0", "1", ...
        tensors: The tensors that were met.
        lent: Those of the storages that may still change; None where none may.
        copied: Bytes of memory that the storages take which are nobody else's.
    """

    data: bytes
    storages: Sequence[torch.UntypedStorage]
    tensors: Sequence[torch.Tensor] = ()
    lent: LentStorages | None = None
    copied: int = 0


class _PickledError(Exception):
    """Ends a ``torch.save`` when it has pickled its object."""


class _Nowhere:
    """The file of a ``torch.save`` that ends before it writes."""

    def write(self, data: memoryview) -> int:
        return len(data)

    def flush(self) -> None:
        pass


def pickle_object(obj: Any) -> Pickled:
    """Pickles ``obj`` as ``torch.save`` does, in this thread.

    Raises:
        Exception: what ``torch.save`` raises for an object that cannot be pickled.
    """
    storages: dict[str, torch.UntypedStorage] = {}
    pickled: list[bytes] = []

    def on_pickled(data: Any) -> None:
        pickled.append(data.getvalue())
        raise _PickledError

    tensors: list[torch.Tensor] = []
    recorder = recording_pickle(lambda: None, storages.setdefault, tensors.append, on_pickled)
    with suppress(_PickledError):
        torch_save(obj, _Nowhere(), pickle_module=recorder)  # type: ignore[arg-type]  # write and flush will do
    return Pickled(pickled[0], list(storages.values()), tensors)


def recording_pickle(
    on_opened: Callable[[], None],
    on_storage: Callable[[str, torch.UntypedStorage], object],
    on_tensor: Callable[[torch.Tensor], object],
    on_pickled: Callable[[Any], None],
) -> Any:
    """A ``pickle_module`` for ``torch.save`` that tells when it begins and ends, and of each storage and tensor.

    ``torch.save`` subclasses the module's ``Pickler`` and overrides ``persistent_id``, which returns
    ``("storage", type, key, location, numel)`` for each storage; the bytes it writes are the pickle module's own.

    Args:
        on_opened: Called before anything is pickled.
        on_storage: Called with each storage and its name in the archive; with some several times.
        on_tensor: Called with each tensor.
        on_pickled: Called with the ``io.BytesIO`` that the pickle is in.
    """

    class RecordingPickler(pickle.Pickler):
        def __init_subclass__(cls) -> None:
            torchs = cls.persistent_id

            def persistent_id(self: Any, obj: Any) -> Any:
                if type(obj) in _PLAIN:
                    return None
                require_whole(obj)
                if type(obj) in _TENSORS:  # torch has an id for storages only
                    on_tensor(obj)
                    return None
                pid = torchs(self, obj)
                if pid is not None:
                    typed = isinstance(obj, torch.TypedStorage)
                    on_storage(pid[2], obj._untyped_storage if typed else obj)  # noqa: SLF001  # .untyped() warns
                elif isinstance(obj, torch.Tensor):
                    on_tensor(obj)
                return pid

            cls.persistent_id = persistent_id  # type: ignore[method-assign]

        def __init__(self, file: Any, *args: Any, **kwargs: Any) -> None:
            on_opened()
            super().__init__(file, *args, **kwargs)
            self._file = file

        def dump(self, obj: Any) -> None:
            with _letting_go(self):
                super().dump(obj)
                on_pickled(self._file)

    return types.SimpleNamespace(__name__=pickle.__name__, Pickler=RecordingPickler)


def replaying_pickle(
    pickled: Pickled,
    on_opened: Callable[[], None],
    on_storage: Callable[[str, torch.UntypedStorage], object],
    on_pickled: Callable[[Any], None],
) -> Any:
    """A ``pickle_module`` with which ``torch.save`` of anything writes what is pickled already.

    ``torch.save`` notes the storages that its ``persistent_id`` is asked about, and numbers them as they come.
    """
    storages = deque(pickled.storages)
    data = [pickled.data]

    class ReplayingPickler:
        def __init__(self, file: Any, *_: Any, **__: Any) -> None:
            on_opened()
            self._file = file

        def dump(self, _: Any) -> None:
            with _letting_go(self):
                for number in range(len(storages)):
                    storage = storages.popleft()
                    _, _, key, _, _ = self.persistent_id(storage)  # type: ignore[attr-defined]  # torch adds it
                    if key != str(number):
                        raise RuntimeError(f"This torch.save names the storage {number} {key!r}: please report it.")
                    on_storage(key, storage)
                self._file.write(data.pop())
                on_pickled(self._file)

    return types.SimpleNamespace(__name__=pickle.__name__, Pickler=ReplayingPickler)


@contextmanager
def _letting_go(pickler: Any) -> Generator[None]:
    """Where pickling fails, lets go of the storages.

    A class refers to itself, so what its methods hold waits for the garbage collector. torch.save's own pickler holds
    all storages; torch takes them from it when pickling has succeeded.
    """
    try:
        yield
    except BaseException:
        del type(pickler).persistent_id
        raise
