"""What ``load(into=...)`` fills: the tensors of modules and state dicts that exist, and how a checkpoint fits them."""

from __future__ import annotations

import ctypes
import itertools
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, MutableSequence, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from torchferry.errors import CheckpointMismatchError
from torchferry.printable import printable

__all__ = [
    "DENSE_TENSOR",
    "META_TENSOR",
    "QUANTIZED_TENSOR",
    "SPARSE_TENSOR",
    "Found",
    "IncompatibleKeys",
    "Target",
    "what_it_is",
]

_DIRECT_FROM = 1 << 20  # bytes; smaller tensors are read together, and copied
_SHOWN = 10  # names in a message
_PLAIN = (torch.Tensor, nn.Parameter, nn.Buffer)
_BUILT_IN = "torch.nn.modules."
_NEW_IN_BATCH_NORM = "num_batches_tracked"  # BatchNorm itself takes checkpoints of before its version 2 without it
_EXTRA_STATE = "_extra_state"  # as torch calls it: any value, which its module alone understands
_MISMATCH = "Error(s) in loading state_dict"  # how torch's message of what does not fit begins
DENSE_TENSOR = "a dense tensor"
SPARSE_TENSOR = "a sparse tensor"
META_TENSOR = "a meta tensor"
QUANTIZED_TENSOR = "a quantized tensor"
_TENSORS = frozenset({DENSE_TENSOR, SPARSE_TENSOR, META_TENSOR, QUANTIZED_TENSOR})


class IncompatibleKeys(NamedTuple):
    """Which names did not match, as ``load_state_dict`` reports them.

    Attributes:
        missing_keys: Names that the target has and the checkpoint has not.
        unexpected_keys: Names of tensors that the checkpoint has and the target has not.
    """

    missing_keys: list[str]
    unexpected_keys: list[str]


class Found(NamedTuple):
    """A tensor of a checkpoint.

    Attributes:
        dtype: Of its elements; None where only torch can tell.
        shape: Its sizes; None where only torch can tell.
        extent: First and last offset of its elements in the object, where they lie there as in a contiguous tensor.
        file: The name of the object, of a checkpoint that is several.
        kind: What it is, as :func:`what_it_is` says it; None where only torch can tell.
    """

    dtype: torch.dtype | None
    shape: tuple[int, ...] | None
    extent: tuple[int, int] | None
    file: str = ""
    kind: str | None = DENSE_TENSOR

    @property
    def identity(self) -> tuple[object, ...] | None:
        """The same for tensors that are one: the same bytes, seen in the same way. None where that cannot be told."""
        return None if self.extent is None else (self.file, self.extent, self.dtype, self.shape)


class Target:
    """Tensors that exist, by name.

    Args:
        into: A module, or a mapping or sequence of tensors, modules and others like it.

    Attributes:
        tensors: The tensors, by name. Without those of modules that have a say in what they take from a checkpoint:
            these are given all of it that is below their name, and check it.
        needs_all: Whether there are such modules.
        extra: Names of the extra states of modules, which are any values.

    Raises:
        TypeError: there is something else in it, or two tensors have one name.
    """

    def __init__(self, into: Any) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.extra: set[str] = set()
        self._places: dict[str, tuple[Any, Any]] = {}  # where a tensor can be replaced: its container and key
        self._owned: set[str] = set()  # names of tensors of modules
        self._modules: list[tuple[str, nn.Module]] = []
        self._say: list[str] = []  # names of the modules that have one
        self._add("", into, None)
        if not self.tensors and not self.extra and not self._say:
            raise TypeError("into= takes a module, or a mapping of tensors or modules, and there are none in it.")
        self.needs_all = bool(self._say)

    def _add(self, name: str, value: Any, place: tuple[Any, Any] | None) -> None:
        if isinstance(value, nn.Module):
            self._add_module(name, value)
        elif isinstance(value, torch.Tensor):
            self._add_tensor(name, value)
            if place is not None:
                self._places[name] = place
        elif isinstance(value, Mapping):
            for key, item in value.items():
                can_replace = isinstance(value, MutableMapping)
                self._add(_joined(name, str(key)), item, (value, key) if can_replace else None)
        elif isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray):
            for index, item in enumerate(value):
                can_replace = isinstance(value, MutableSequence)
                self._add(_joined(name, str(index)), item, (value, index) if can_replace else None)
        else:
            raise TypeError(
                f"into= fills modules and tensors, in dicts and lists: {name!r} is of type {type(value).__name__}. "
                "Leave it out; load it with keys=, and give what was loaded to the load_state_dict of what it is of."
            )

    def _add_module(self, name: str, module: nn.Module) -> None:
        self._modules.append((name, module))
        state = module.state_dict(keep_vars=True)
        self.extra.update(_joined(name, key) for key in state if key.rpartition(".")[2] == _EXTRA_STATE)
        if not _is_plain(module):
            self._say.append(name)
            return
        for key, item in state.items():
            if isinstance(item, torch.Tensor) and (full := _joined(name, key)) not in self.extra:
                self._add_tensor(full, item)
                self._owned.add(full)

    def _add_tensor(self, name: str, tensor: torch.Tensor) -> None:
        if self.tensors.setdefault(name, tensor) is not tensor:
            raise TypeError(f"into= has two tensors that are called {name!r}, as names are joined with dots.")

    def wants(self, name: str) -> bool:
        """Whether it has a value of this name, or a module that may."""
        return name in self.tensors or name in self.extra or any(_is_below(name, say) for say in self._say)

    def check(
        self,
        found: Mapping[str, Found],
        others: Mapping[str, str | None],
        url: str,
        *,
        strict: bool,
        metadata: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Checks that a checkpoint fits, before anything is read into the tensors.

        Args:
            found: Its tensors.
            others: Its other values: what each is, by name; None where only torch can tell.
            url: For messages.
            strict: Whether all names must match.
            metadata: The ``_metadata`` of state dicts in it, by name.

        Raises:
            CheckpointMismatchError: a shape differs, or a value cannot be copied into the tensor of its name; or, where
                that is asked for, a name is missing or unexpected.
        """
        shapes, kinds = [], []
        for name, tensor in self.tensors.items():
            here = found.get(name)
            if here is None and name not in others:
                continue
            if here is not None and here.shape is not None and here.shape != tuple(tensor.shape):
                shapes.append(f"{printable(name)} is {_shape(here.shape)} there and {_shape(tensor.shape)} here")
            elif cause := self._hindrance(name, here.kind if here else others[name]):
                kinds.append(f"{printable(name)} {cause}")
        missing, unexpected = self._compare(found, others)
        may_lack = self._may_lack(metadata) if missing else ()
        missing = [name for name in missing if name not in may_lack]
        reasons = []
        if strict and missing:
            reasons.append(f"it lacks {_some(missing)}")
        if strict and unexpected:
            reasons.append(f"it also has {_some(unexpected)}")
        if shapes:
            reasons.append(f"shapes differ: {_listed(shapes)}")
        if kinds:
            reasons.append(_listed(kinds))
        if reasons:
            hint = self._hint(missing, found) if strict else ""
            raise CheckpointMismatchError(f"{url} does not fit into=: {'; '.join(reasons)}.{hint}")

    def _hindrance(self, name: str, kind: str | None) -> str:
        """Why a value of this kind cannot become that of a tensor; "" where nothing is known to hinder it."""
        tensor = self.tensors[name]
        ours = what_it_is(tensor)
        takes = _TENSORS if tensor.is_meta else {ours}  # a meta tensor is replaced
        if ours == QUANTIZED_TENSOR:
            takes = {DENSE_TENSOR, QUANTIZED_TENSOR}
        if kind is not None and kind not in takes:
            return f"is {kind} there and {ours} here"
        if tensor.is_meta and name not in self._places and name not in self._owned:
            return "is a meta tensor here, in a container that does not let it be replaced"
        is_written = ours == DENSE_TENSOR and tensor.numel()
        if is_written and any(
            size > 1 and not stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        ):
            return "is expanded here: several of its elements are one in memory"
        return ""

    def _may_lack(self, metadata: Mapping[str, Any]) -> set[str]:
        """Names that modules do without themselves, where a checkpoint is of an older version of theirs."""
        names = set()
        for prefix, module in self._modules:
            kept = metadata.get(prefix)
            for path, inner in module.named_modules(remove_duplicate=False):
                if isinstance(inner, nn.modules.batchnorm._NormBase):  # noqa: SLF001 - all kinds of BatchNorm
                    local = kept.get(path) if isinstance(kept, Mapping) else None
                    version = local.get("version") if isinstance(local, Mapping) else None
                    if not isinstance(version, int) or version < 2:  # noqa: PLR2004 - as torch has it
                        names.add(_joined(prefix, _joined(path, _NEW_IN_BATCH_NORM)))
        return names

    def direct(self, found: Mapping[str, Found]) -> dict[str, tuple[int, memoryview]]:
        """The tensors of one object that can be read straight into their memory: first offset in it, and memory.

        Of those that are one tensor in the checkpoint, the first; :meth:`finish` copies it to the others.
        """
        chosen: dict[str, tuple[int, memoryview]] = {}
        taken: list[tuple[int, int, str]] = []
        extents: set[tuple[int, int]] = set()
        for name, tensor in self.tensors.items():
            here = found.get(name)
            if here is None or here.extent is None or here.dtype != tensor.dtype or not _is_direct(tensor):
                continue
            start, stop = here.extent
            if tensor.nbytes == stop - start and here.extent not in extents:
                extents.add(here.extent)
                taken.append((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, name))
                chosen[name] = (start, _memory(tensor))
        # Tensors that share memory, as tied weights do, are filled one after the other.
        end, last = 0, ""
        for start, stop, name in sorted(taken):
            if start < end:
                chosen.pop(name, None)
                chosen.pop(last, None)
            if stop > end:
                end, last = stop, name
        return chosen

    def separate(self, found: Mapping[str, Found]) -> dict[str, torch.Tensor]:
        """The tensors that can be filled where they are, in any order: plain ones that share no memory with others.

        What fills them does so part by part, and converts; whatever their device, dtype and strides.
        """
        spans: list[tuple[str, int, int, str]] = []
        for name, tensor in self.tensors.items():
            if name in found and _is_fillable(tensor):
                steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
                length = (1 + steps) * tensor.itemsize if tensor.numel() else 0
                spans.append((str(tensor.device), tensor.data_ptr(), tensor.data_ptr() + length, name))
        chosen = {name: self.tensors[name].detach() for *_, name in spans}
        before, end, last = "", 0, ""
        for device, start, stop, name in sorted(spans):
            if device == before and start < min(end, stop):
                chosen.pop(name, None)
                chosen.pop(last, None)
            if device != before or stop > end:
                before, end, last = device, stop, name
        return chosen

    def same_as(self, filled: Iterable[str], found: Mapping[str, Found]) -> dict[str, str]:
        """The names of tensors that are, in the checkpoint, one with a filled one; with the name of that."""
        firsts = {found[name].identity: name for name in filled}
        return {
            name: firsts[here.identity]
            for name in self.tensors
            if (here := found.get(name)) is not None and here.identity in firsts and name != firsts[here.identity]
        }

    def finish(
        self,
        loaded: Mapping[str, Any],
        filled: Iterable[str],
        found: Mapping[str, Found],
        metadata: Mapping[str, Any],
        url: str,
        *,
        strict: bool,
    ) -> IncompatibleKeys:
        """Puts the rest into the tensors.

        Args:
            loaded: What was loaded beside: tensors and other values, by name.
            filled: The names of the tensors that are filled already.
            found: The checkpoint's tensors.
            metadata: The ``_metadata`` of state dicts in it, by name.
            url: For messages.
            strict: Whether all names must match: for modules that have a say.

        Returns:
            What did not match.

        Raises:
            CheckpointMismatchError: what was loaded for a tensor does not fit into it.
        """
        # Tensors that were made in inference mode may be changed in it only.
        with torch.inference_mode(any(map(_is_inference, self._all_tensors()))):
            missing, unexpected = self._compare(found, loaded)
            done = set(filled)
            loaded = dict(loaded)
            for name, first in self.same_as(done, found).items():
                source = self.tensors[first].detach()
                loaded[name] = source.clone() if self.tensors[name].is_meta else source
            rest = {name: tensor for name, tensor in self.tensors.items() if name in loaded and name not in done}
            for name, tensor in rest.items():  # all are looked at before the first is copied
                self._check_loaded(name, tensor, loaded[name], url)
            with torch.no_grad():
                for name, tensor in self.tensors.items():
                    if name in done and not tensor.is_inference():
                        torch.autograd.graph.increment_version(tensor)
                    elif name in rest and not tensor.is_meta:
                        _copy(name, tensor, loaded[name], url)
                    elif name in rest and name in self._places:
                        container, key = self._places[name]
                        container[key] = loaded[name]
            for prefix, module in self._modules:
                has_say = prefix in self._say
                state = self._state_for(prefix, module, loaded, done)
                if (kept := metadata.get(prefix)) is not None:
                    state._metadata = kept  # type: ignore[attr-defined]  # noqa: SLF001 - as torch's state dicts have it
                result = _load(module, state, strict=strict and has_say, url=url)
                names = {*self._names_of(prefix, module)}
                missing = [name for name in missing if name not in names]
                missing += [_joined(prefix, key) for key in result.missing_keys]
                if has_say:
                    unexpected += [_joined(prefix, key) for key in result.unexpected_keys]
            return IncompatibleKeys(missing, unexpected)

    def _state_for(
        self, prefix: str, module: nn.Module, loaded: Mapping[str, Any], done: set[str]
    ) -> OrderedDict[str, Any]:
        start = f"{prefix}." if prefix else ""
        if prefix in self._say:
            return OrderedDict((name[len(start) :], item) for name, item in loaded.items() if name.startswith(start))
        state: OrderedDict[str, Any] = OrderedDict()
        for name in self._names_of(prefix, module):
            tensor = self.tensors.get(name)
            if name in done or (name in loaded and tensor is not None and not tensor.is_meta):
                state[name[len(start) :]] = tensor  # filled: to copy it to itself is nothing to torch
            elif name in loaded:
                state[name[len(start) :]] = loaded[name]
        return state

    def _all_tensors(self) -> Iterator[torch.Tensor]:
        yield from self.tensors.values()
        for prefix, module in self._modules:
            if prefix in self._say:
                yield from filter(_is_tensor, module.state_dict(keep_vars=True).values())

    def _names_of(self, prefix: str, module: nn.Module) -> list[str]:
        return [_joined(prefix, key) for key in module.state_dict(keep_vars=True)]

    def _check_loaded(self, name: str, tensor: torch.Tensor, value: Any, url: str) -> None:
        """What :meth:`check` could not tell before it was loaded."""
        cause = self._hindrance(name, what_it_is(value))
        if not cause and value.shape != tensor.shape:
            cause = f"is {_shape(value.shape)} there and {_shape(tensor.shape)} here"
        if cause:
            raise CheckpointMismatchError(f"{url} does not fit into=: {printable(name)} {cause}.")

    def _compare(self, found: Mapping[str, Found], others: Iterable[str]) -> tuple[list[str], list[str]]:
        there = {*found, *others}
        extra = sorted(name for name in self.extra if not any(_is_below(name, say) for say in self._say))
        missing = [name for name in (*self.tensors, *extra) if name not in there]
        return missing, [name for name in found if not self.wants(name)]

    def _hint(self, missing: Sequence[str], found: Mapping[str, Found]) -> str:
        for name in missing[:1]:
            for there in found:
                if there.endswith(f".{name}"):
                    prefix = there.removesuffix(f".{name}")
                    return f" It has them below {prefix!r}: into={{{prefix!r}: ...}} with keys={prefix!r} takes those."
        return " keys= and exclude= choose from a checkpoint; strict=False takes what matches."


def what_it_is(value: Any) -> str:
    """What a value is, as far as that decides what it can be copied into."""
    if not isinstance(value, torch.Tensor):
        return f"of type {printable(type(value).__name__)}"
    if value.is_meta or value.is_quantized:
        return META_TENSOR if value.is_meta else QUANTIZED_TENSOR
    return DENSE_TENSOR if value.layout == torch.strided else SPARSE_TENSOR


def _is_below(name: str, prefix: str) -> bool:
    return not prefix or name.startswith(f"{prefix}.")


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _copy(name: str, tensor: torch.Tensor, value: torch.Tensor, url: str) -> None:
    """Copies what was loaded into a tensor that exists.

    Raises:
        CheckpointMismatchError: it is of a kind that the other does not take.
    """
    try:
        tensor.copy_(value)
    except torch.OutOfMemoryError:
        raise
    except (NotImplementedError, RuntimeError, TypeError) as error:
        cause = printable(str(error).partition("\n")[0])
        raise CheckpointMismatchError(f"{url} does not fit into=: {printable(name)}: {cause}") from error


def _load(module: nn.Module, state: OrderedDict[str, Any], *, strict: bool, url: str) -> Any:
    """Lets a module load a state dict.

    Raises:
        CheckpointMismatchError: torch says that it does not fit. What does may be changed already.
    """
    are_meta = any(tensor.is_meta for tensor in module.state_dict(keep_vars=True).values() if _is_tensor(tensor))
    try:
        return module.load_state_dict(state, strict=strict, assign=are_meta)
    except RuntimeError as error:
        if not str(error).startswith(_MISMATCH):
            raise
        raise CheckpointMismatchError(
            f"{url} does not fit into=: {printable(str(error))} What fits may have been changed: this module decides "
            "itself what it takes."
        ) from error


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _is_inference(tensor: torch.Tensor) -> bool:
    return not is_lazy(tensor) and tensor.is_inference()


def _is_plain(module: nn.Module) -> bool:
    """Whether a module takes a state dict name by name, as torch's own modules do, and has no say in what it takes."""
    for inner in module.modules():
        kind = type(inner)
        own = kind._load_from_state_dict  # noqa: SLF001 - where torch's modules are customized
        is_custom = own is not nn.Module._load_from_state_dict and not own.__module__.startswith(_BUILT_IN)  # noqa: SLF001
        has_hooks = bool(inner._load_state_dict_pre_hooks or inner._load_state_dict_post_hooks)  # noqa: SLF001
        if is_custom or has_hooks or kind.load_state_dict is not nn.Module.load_state_dict:
            return False
    return not any(map(is_lazy, itertools.chain(module.parameters(), module.buffers())))


def _is_fillable(tensor: torch.Tensor) -> bool:
    return (
        type(tensor) in _PLAIN
        and not tensor.is_meta
        and tensor.layout == torch.strided
        and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg() or tensor.is_inference())
        and all(stride or size == 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    )


def _is_direct(tensor: torch.Tensor) -> bool:
    return (
        type(tensor) in _PLAIN
        and tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        and tensor.nbytes >= _DIRECT_FROM
        and tensor.is_contiguous()
        and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
    )


def _memory(tensor: torch.Tensor) -> memoryview:
    """A contiguous CPU tensor's memory, to be written to; keeps it alive."""
    memory = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    memory.tensor = tensor.detach()  # type: ignore[attr-defined]
    return memoryview(memory).cast("B")


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def _some(names: Sequence[str]) -> str:
    return _listed([repr(printable(name)) for name in names])


def _listed(texts: Sequence[str]) -> str:
    more = f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return ", ".join(texts[:_SHOWN]) + more
