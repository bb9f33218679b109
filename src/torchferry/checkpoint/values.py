"""What a task returns, :class:`PyTorchCheckpoint`, and what the next one receives, :class:`LoadedCheckpoint`.

Both are the same classes in every SDK, and know none of them. What an SDK needs of them beyond that, its adapter adds
to them (:mod:`torchferry.flyte.values`, :mod:`torchferry.checkpoint.fields`).
"""

from __future__ import annotations

import reprlib
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Optional, Protocol, TypeVar, Union

import torch

from torchferry.checkpoint import sharded
from torchferry.checkpoint.adapters import refusal
from torchferry.checkpoint.devices import give_memory
from torchferry.checkpoint.hyperparameters import as_dict, is_dataclass_instance, is_named_tuple, rebuild
from torchferry.checkpoint.wrappers import matched_to
from torchferry.errors import CheckpointKeyError

__all__ = [
    "MODULE_KEY",
    "OPTIMIZER_KEY",
    "IsDataclass",
    "LoadedCheckpoint",
    "PyTorchCheckpoint",
    "RestoredHyperparameters",
    "StateOf",
    "check_names",
    "name_is_taken",
    "remember_place",
    "remembered_place",
]

T = TypeVar("T")

MODULE_KEY = "module_state_dict"
OPTIMIZER_KEY = "optimizer_state_dict"

_PLACE = "_torchferry_place"

# torch.save pickles with this protocol; copies and messages between processes use newer ones.
_TORCH_SAVE_PROTOCOL = 2


class IsDataclass(Protocol):
    """An instance of a class made by :func:`dataclasses.dataclass`."""

    __dataclass_fields__: dict[str, Any]
    __dataclass_params__: dict[str, Any]
    __post_init__: Callable[..., None] | None


@dataclass(frozen=True, slots=True)
class StateOf:
    """The state of a module or an optimizer: what a checkpoint that comes from another process has in its place.

    Attributes:
        kind: The name of the class that it is the state of.
        state: Its ``state_dict()``.
    """

    kind: str
    state: Any

    def state_dict(self) -> Any:
        """The state."""
        return self.state


@dataclass(repr=False)
class PyTorchCheckpoint:
    """A checkpoint for a Flyte task to return.

    Saved as flytekit saves it: one flat dict with ``module_state_dict``, ``optimizer_state_dict`` and each
    hyperparameter under its own name. The task that receives it gets a :class:`LoadedCheckpoint`.

    Pickled, it becomes the states of the two: rank 0 of a distributed training can return one of a
    ``DistributedDataParallel``.

    Attributes:
        module: The module whose ``state_dict()`` to save.
        hyperparameters: A dict, or an instance of a NamedTuple or dataclass.
        optimizer: The optimizer whose ``state_dict()`` to save.

    Raises:
        CheckpointValueError: ``hyperparameters`` is something else, or there is nothing to save. In flytekit it is also
            a ``TypeTransformerFailedError``.
    """

    # Union and Optional: dataclasses_json and flytekit both read these annotations, and know the old spelling.
    module: Optional[torch.nn.Module] = None  # noqa: UP045
    hyperparameters: Optional[Union[dict[str, Any], NamedTuple, IsDataclass]] = None  # noqa: UP045
    optimizer: Optional[torch.optim.Optimizer] = None  # noqa: UP045

    def __post_init__(self) -> None:
        value = self.hyperparameters
        if not (value is None or isinstance(value, dict) or is_dataclass_instance(value) or is_named_tuple(value)):
            raise refusal(
                "The hyperparameters of a PyTorchCheckpoint are a dict, or an instance of a NamedTuple or a dataclass; "
                f"given: {_describe(value)}."
            )
        # `is None` and not truth: a module may be empty (`len(module) == 0`), or refuse to be asked.
        if self.module is None and self.optimizer is None and (value is None or value == {}):
            raise refusal(
                "A PyTorchCheckpoint needs at least one of module, hyperparameters and optimizer; "
                f"given: module=None, hyperparameters={value!r}, optimizer=None."
            )

    def __getstate__(self) -> dict[str, Any]:
        # A live module may need the process group of its ranks, or be of a class that the other process cannot import:
        # what goes there are the states, which is what is saved anyway.
        owners = {name: _state_only(name, getattr(self, name)) for name in ("module", "optimizer")}
        return {**vars(self), **owners}

    def __copy__(self) -> PyTorchCheckpoint:
        made = type(self).__new__(type(self))
        vars(made).update(vars(self))
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> PyTorchCheckpoint:
        made = memo[id(self)] = type(self).__new__(type(self))
        vars(made).update(deepcopy(vars(self), memo))
        return made

    def __repr__(self) -> str:
        # flytekit takes the repr of inputs and outputs whether it shows them or not: no tensors, no user code.
        parts = (f"{field.name}={_describe(getattr(self, field.name))}" for field in fields(PyTorchCheckpoint))
        return f"{type(self).__name__}({', '.join(parts)})"


class RestoredHyperparameters(dict[str, Any]):
    """The hyperparameters of a restored checkpoint, and which keys of the module's state did not match.

    Attributes:
        missing_keys: Keys that the module has and the checkpoint has not.
        unexpected_keys: Keys that the checkpoint has and the module has not.
    """

    def __init__(self, hyperparameters: Mapping[str, Any], missing: Iterable[str], unexpected: Iterable[str]) -> None:
        super().__init__(hyperparameters)
        self.missing_keys = list(missing)
        self.unexpected_keys = list(unexpected)


class LoadedCheckpoint(dict[str, Any], PyTorchCheckpoint):
    """A checkpoint as a task receives it: the dict that was saved, and a ``PyTorchCheckpoint`` that can be returned.

    Everything that worked on flytekit's plain dict works on it. ``torch.save`` of one writes a plain
    (ordered) dict, which loads anywhere, ``weights_only=True`` included.

    Attributes:
        uri: Where it was loaded from; None for one that was made here.
    """

    # A dict's equality and a dataclass's fields: __eq__ comes from dict, which is first.
    __hash__ = None  # type: ignore[assignment]

    uri: str | None

    def __init__(self, content: Mapping[str, Any] | None = None, *, uri: str | None = None) -> None:
        dict.__init__(self, content or {})
        self.uri = uri

    def __setattr__(self, name: str, value: Any) -> None:
        if name in {"module", "optimizer"}:
            raise AttributeError(
                f"A LoadedCheckpoint holds the state of the {name}, which this would not change: set "
                f"checkpoint[{name + '_state_dict'!r}], or return a new PyTorchCheckpoint."
            )
        super().__setattr__(name, value)

    @property
    def module_state_dict(self) -> dict[str, Any]:
        """The module's state.

        Raises:
            CheckpointKeyError: there is none, or ``LoadOptions(keys=...)`` left it behind.
        """
        return self._part(MODULE_KEY)

    @property
    def optimizer_state_dict(self) -> dict[str, Any]:
        """The optimizer's state.

        Raises:
            CheckpointKeyError: there is none, or ``LoadOptions(keys=...)`` left it behind.
        """
        return self._part(OPTIMIZER_KEY)

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Everything but the two states, in a new dict. Setting it replaces them.

        Raises:
            CheckpointValueError: set with the name of one of the states.
        """
        return {key: value for key, value in self.items() if key not in {MODULE_KEY, OPTIMIZER_KEY}}

    @hyperparameters.setter
    def hyperparameters(self, value: dict[str, Any] | NamedTuple | IsDataclass | None) -> None:
        hyperparameters = as_dict(value)
        check_names(hyperparameters)
        for key in self.hyperparameters.keys() - hyperparameters.keys():
            del self[key]
        self.update(hyperparameters)

    def hyperparameters_as(self, cls: type[T]) -> T:
        """The hyperparameters as a dataclass or NamedTuple, nested dataclasses rebuilt too.

        Raises:
            TypeError: ``cls`` is neither, or its fields and the hyperparameters do not match; the message names them.
        """
        return rebuild(cls, self.hyperparameters)

    def restore(
        self,
        module: torch.nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        strict: bool = True,
    ) -> RestoredHyperparameters:
        """Fills existing objects with what was saved.

        The module is filled before the optimizer. Build the optimizer on the module's parameters first, as torch wants.

        Keys may differ in what ``DistributedDataParallel`` and ``torch.compile`` put into them (``module.``,
        ``_orig_mod.``): the state of a wrapped module fills a bare one, and the other way round. A module that is
        sharded over ranks (FSDP2), and its optimizer, get this rank's part of each tensor: call it on every rank. What
        is on the meta device gets memory, on the device of what was saved; an optimizer that has it already keeps it.

        Args:
            module: Gets ``module_state_dict``.
            optimizer: Gets ``optimizer_state_dict``.
            strict: Whether keys of the module that do not match are an error. The optimizer's always are.

        Returns:
            The hyperparameters; its ``missing_keys`` and ``unexpected_keys`` are what ``load_state_dict`` reported.

        Raises:
            CheckpointKeyError: the checkpoint lacks a state that was asked for; or none of its keys is one of the
                module's (without ``strict``).
            RuntimeError: ``strict``, and keys or shapes do not match; raised by torch, which lists them.
        """
        # Both before the first is filled: nothing is half restored because a key is missing.
        module_state = None if module is None else self._part(MODULE_KEY)
        optimizer_state = None if optimizer is None else self._part(OPTIMIZER_KEY)
        missing: list[str] = []
        unexpected: list[str] = []
        if module is not None and module_state is not None:
            missing, unexpected = _load(module, module_state, strict=strict)
        if optimizer is not None and optimizer_state is not None:
            if module is not None and sharded.is_sharded(module):
                sharded.load_optimizer(module, optimizer, optimizer_state)
            else:
                # A copy: torch takes the tensors themselves, and training changes them.
                optimizer.load_state_dict(deepcopy(optimizer_state))
        return RestoredHyperparameters(self.hyperparameters, missing, unexpected)

    def _part(self, key: str) -> dict[str, Any]:
        try:
            part: dict[str, Any] = self[key]
        except KeyError:
            raise CheckpointKeyError(
                f"{self!r} has no {key}: it was saved without, or LoadOptions(keys=...) did not ask for it."
            ) from None
        return part

    def copy(self) -> LoadedCheckpoint:
        """A shallow copy."""
        return LoadedCheckpoint(self, uri=self.uri)

    def __copy__(self) -> LoadedCheckpoint:
        return self.copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> LoadedCheckpoint:
        made = memo[id(self)] = LoadedCheckpoint(uri=self.uri)
        made.update(deepcopy(dict(self), memo))
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        if protocol <= _TORCH_SAVE_PROTOCOL:
            # Of the two, weights_only=True knows how to build the ordered one.
            return OrderedDict, (), None, None, iter(self.items())
        return LoadedCheckpoint, (dict(self),), {"uri": self.uri}

    def __repr__(self) -> str:
        states = [key for key in (MODULE_KEY, OPTIMIZER_KEY) if key in self]
        return f"LoadedCheckpoint({', '.join([repr(self.uri), *states, _describe(self.hyperparameters)])})"


def _load(module: torch.nn.Module, saved: dict[str, Any], *, strict: bool) -> tuple[list[str], list[str]]:
    state, saved_keys = matched_to(module, saved)
    if sharded.is_sharded(module):
        missing, unexpected = sharded.load_module(module, state, strict=strict)
    else:
        give_memory(module, state)
        missing, unexpected = module.load_state_dict(state, strict=strict)
    if missing and saved and len(unexpected) == len(saved):
        raise CheckpointKeyError(
            f"Nothing was restored: not one of the {len(saved)} keys in {MODULE_KEY} ({_some(saved)}) is a key of the "
            f"{type(module).__qualname__} ({_some(missing)}). Rename them, or restore another module."
        )
    return missing, [saved_keys.get(key, key) for key in unexpected]


def _some(keys: Iterable[str]) -> str:
    return reprlib.repr(list(keys))[1:-1]


def _state_only(name: str, owner: Any) -> Any:
    state_dict = getattr(owner, "state_dict", None)
    if isinstance(owner, StateOf) or not callable(state_dict):
        return owner
    state = state_dict()
    found = _sharded(state)
    if found is not None:
        raise refusal(
            f"The state of the {name} ({type(owner).__qualname__}) is sharded over ranks ({found} is a DTensor), and "
            "this rank has a part of it only. On every rank, gather it with torch.distributed.checkpoint.state_dict."
            "get_state_dict(module, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True)); "
            f"return LoadedCheckpoint({{{MODULE_KEY!r}: ..., {OPTIMIZER_KEY!r}: ...}}) of what rank 0 gets."
        )
    return StateOf(type(owner).__qualname__, state)


def _sharded(state: Any, path: str = "") -> str | None:
    """The path of the first tensor that is distributed over ranks."""
    distributed = sys.modules.get("torch.distributed.tensor")  # what is a DTensor has imported it
    if distributed is None:
        return None
    if isinstance(state, distributed.DTensor):
        return repr(path)
    items = state.items() if isinstance(state, Mapping) else enumerate(state) if isinstance(state, list | tuple) else ()
    for key, value in items:
        if found := _sharded(value, f"{path}.{key}" if path else str(key)):
            return found
    return None


def remember_place(checkpoint: PyTorchCheckpoint, uri: str) -> None:
    """Notes where a checkpoint was saved: as long as it is the same, it need not be saved again."""
    vars(checkpoint)[_PLACE] = uri


def remembered_place(checkpoint: PyTorchCheckpoint) -> str | None:
    """Where a checkpoint was saved last, or loaded from; it may have changed since."""
    place: str | None = vars(checkpoint).get(_PLACE) or getattr(checkpoint, "uri", None)
    return place


def check_names(hyperparameters: Mapping[str, Any]) -> None:
    """Refuses hyperparameters with the name of one of the states.

    Raises:
        CheckpointValueError: names it.
    """
    for reserved in (MODULE_KEY, OPTIMIZER_KEY):
        if reserved in hyperparameters:
            raise refusal(name_is_taken(reserved))


def name_is_taken(name: str) -> str:
    """What to say where a hyperparameter has the name of one of the states."""
    return (
        f"A hyperparameter cannot be named {name!r}: the checkpoint keeps the state itself there. Rename it; of a "
        "checkpoint that was loaded, pass on its .hyperparameters."
    )


def _describe(value: object) -> str:
    if value is None:
        return "None"
    if isinstance(value, StateOf):
        return f"state of {value.kind}"
    if isinstance(value, Mapping):
        names = ", ".join(map(str, value))
    elif is_named_tuple(value) or is_dataclass_instance(value):
        names = ", ".join(getattr(value, "_fields", None) or (field.name for field in fields(value)))  # type: ignore[arg-type]
    else:
        return repr(value) if isinstance(value, str | int | float) else type(value).__qualname__
    return f"{type(value).__name__}({names})"
