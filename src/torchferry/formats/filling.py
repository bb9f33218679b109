"""What ``load(into=...)`` fills: the tensors of modules and state dicts that exist, and how a checkpoint fits them."""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Iterable, Mapping, MutableMapping, MutableSequence, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from torchferry.errors import CheckpointMismatchError
from torchferry.printable import printable

__all__ = ["Found", "IncompatibleKeys", "Target"]

_DIRECT_FROM = 1 << 20  # bytes; smaller tensors are read together, and copied
_SHOWN = 10  # names in a message
_PLAIN = (torch.Tensor, nn.Parameter, nn.Buffer)
_BUILT_IN = "torch.nn.modules."
_NEW_IN_BATCH_NORM = "num_batches_tracked"  # BatchNorm itself takes checkpoints without it


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
    """

    dtype: torch.dtype | None
    shape: tuple[int, ...] | None
    extent: tuple[int, int] | None
    file: str = ""

    @property
    def identity(self) -> tuple[object, ...] | None:
        """The same for tensors that are one: the same bytes, seen in the same way. None where that cannot be told."""
        return None if self.extent is None else (self.file, self.extent, self.dtype, self.shape)


class Target:
    """Tensors that exist, by name.

    Args:
        into: A module, or a mapping or sequence of tensors, modules and others like it.

    Attributes:
        tensors: The tensors, by name.
        needs_all: Whether a module has a say in what it takes from a checkpoint: then it is given all of it.
    """

    def __init__(self, into: Any) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._places: dict[str, tuple[Any, Any]] = {}  # where a tensor can be replaced: its container and key
        self._modules: list[tuple[str, nn.Module]] = []
        self._others: set[str] = set()  # what modules want that is no tensor
        self._add("", into, None)
        if not self.tensors and not self._others:
            raise TypeError("into= takes a module, or a mapping of tensors or modules, and there are none in it.")
        self.needs_all = not all(map(_is_plain, self._modules))

    def _add(self, name: str, value: Any, place: tuple[Any, Any] | None) -> None:
        if isinstance(value, nn.Module):
            self._modules.append((name, value))
            for key, item in value.state_dict(keep_vars=True).items():
                if isinstance(item, torch.Tensor):
                    self.tensors[_joined(name, key)] = item
                else:
                    self._others.add(_joined(name, key))
        elif isinstance(value, torch.Tensor):
            self.tensors[name] = value
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

    def wants(self, name: str) -> bool:
        """Whether it has a value of this name."""
        return name in self.tensors or name in self._others

    def check(self, found: Mapping[str, Found], others: Iterable[str], url: str, *, strict: bool) -> None:
        """Checks that a checkpoint fits, before anything is read into the tensors.

        Args:
            found: Its tensors.
            others: Names of its other values.
            url: For messages.
            strict: Whether all names must match.

        Raises:
            CheckpointMismatchError: a shape differs; or, where that is asked for, a name is missing or unexpected.
        """
        differs = [
            f"{printable(name)} is {_shape(shape)} there and {_shape(tensor.shape)} here"
            for name, tensor in self.tensors.items()
            if not self.needs_all
            and (shape := found[name].shape if name in found else None) is not None
            and shape != tuple(tensor.shape)
        ]
        missing, unexpected = self._compare(found, others)
        missing = [name for name in missing if not name.endswith(_NEW_IN_BATCH_NORM)]
        reasons = []
        if strict and missing and not self.needs_all:
            reasons.append(f"it lacks {_some(missing)}")
        if strict and unexpected and not self.needs_all:
            reasons.append(f"it also has {_some(unexpected)}")
        if differs:
            reasons.append(f"shapes differ: {_listed(differs)}")
        if reasons:
            hint = self._hint(missing, found) if strict else ""
            raise CheckpointMismatchError(f"{url} does not fit into=: {'; '.join(reasons)}.{hint}")

    def direct(self, found: Mapping[str, Found]) -> dict[str, tuple[int, memoryview]]:
        """The tensors of one object that can be read straight into their memory: first offset in it, and memory.

        Of those that are one tensor in the checkpoint, the first; :meth:`finish` copies it to the others.
        """
        if self.needs_all:
            return {}
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
        if self.needs_all:
            return {}
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
        with torch.inference_mode(any(tensor.is_inference() for tensor in self.tensors.values())):
            missing, unexpected = self._compare(found, loaded)
            done = set(filled)
            loaded = dict(loaded)
            for name, first in self.same_as(done, found).items():
                source = self.tensors[first].detach()
                loaded[name] = source.clone() if self.tensors[name].is_meta else source
            owned = {name for prefix, module in self._modules for name in self._names_of(prefix, module)}
            with torch.no_grad():
                for name, tensor in self.tensors.items():
                    if name in done and not tensor.is_inference():
                        torch.autograd.graph.increment_version(tensor)
                    elif name in loaded and name not in done and not tensor.is_meta and not self.needs_all:
                        _copy(name, tensor, loaded[name], url)
                    elif name in loaded and name not in owned:
                        self._put(name, tensor, loaded[name], url)
            for prefix, module in self._modules:
                result = self._finish_module(prefix, module, loaded, done, metadata, strict=strict)
                names = {*self._names_of(prefix, module)}
                missing = [name for name in missing if name not in names] + [_joined(prefix, k) for k in result[0]]
                if self.needs_all:
                    inner = {name for name in unexpected if not prefix or name.startswith(f"{prefix}.")}
                    unexpected = [name for name in unexpected if name not in inner]
                    unexpected += [_joined(prefix, key) for key in result[1]]
            return IncompatibleKeys(missing, unexpected)

    def _finish_module(
        self,
        prefix: str,
        module: nn.Module,
        loaded: Mapping[str, Any],
        done: set[str],
        metadata: Mapping[str, Any],
        *,
        strict: bool,
    ) -> tuple[list[str], list[str]]:
        state: OrderedDict[str, Any] = OrderedDict()
        if self.needs_all:
            start = f"{prefix}." if prefix else ""
            state.update((name[len(start) :], item) for name, item in loaded.items() if name.startswith(start))
        else:
            for name in self._names_of(prefix, module):
                tensor = self.tensors.get(name)
                key = name[len(prefix) + 1 :] if prefix else name
                if name in done or (name in loaded and tensor is not None and not tensor.is_meta):
                    state[key] = tensor  # filled: to copy it to itself is nothing to torch
                elif name in loaded:
                    state[key] = loaded[name]
        if (kept := metadata.get(prefix)) is not None:
            state._metadata = kept  # type: ignore[attr-defined]  # noqa: SLF001 - as torch's state dicts have it
        are_meta = any(tensor.is_meta for tensor in module.state_dict(keep_vars=True).values() if _is_tensor(tensor))
        result = module.load_state_dict(state, strict=strict and self.needs_all, assign=are_meta)
        return list(result.missing_keys), list(result.unexpected_keys)

    def _names_of(self, prefix: str, module: nn.Module) -> list[str]:
        return [_joined(prefix, key) for key in module.state_dict(keep_vars=True)]

    def _put(self, name: str, tensor: torch.Tensor, value: Any, url: str) -> None:
        if not tensor.is_meta:
            _copy(name, tensor, value, url)
        elif not isinstance(value, torch.Tensor):
            raise _no_tensor(name, value, url)
        elif name in self._places:
            container, key = self._places[name]
            container[key] = value
        else:
            raise CheckpointMismatchError(
                f"{url} does not fit into=: {printable(name)} is a meta tensor in a container that does not let it be "
                "replaced."
            )

    def _compare(self, found: Mapping[str, Found], others: Iterable[str]) -> tuple[list[str], list[str]]:
        there = {*found, *others}
        missing = [name for name in (*self.tensors, *sorted(self._others)) if name not in there]
        return missing, [name for name in found if not self.wants(name)]

    def _hint(self, missing: Sequence[str], found: Mapping[str, Found]) -> str:
        for name in missing[:1]:
            for there in found:
                if there.endswith(f".{name}"):
                    prefix = there.removesuffix(f".{name}")
                    return f" It has them below {prefix!r}: into={{{prefix!r}: ...}} with keys={prefix!r} takes those."
        return " keys= and exclude= choose from a checkpoint; strict=False takes what matches."


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _copy(name: str, tensor: torch.Tensor, value: Any, url: str) -> None:
    """Copies what was loaded into a tensor that exists.

    Raises:
        CheckpointMismatchError: it is no tensor, or of a kind, such as a sparse one, that the other does not take.
    """
    if not isinstance(value, torch.Tensor):
        raise _no_tensor(name, value, url)
    try:
        tensor.copy_(value)
    except torch.OutOfMemoryError:
        raise
    except (NotImplementedError, RuntimeError, TypeError) as error:
        cause = printable(str(error).partition("\n")[0])
        raise CheckpointMismatchError(f"{url} does not fit into=: {printable(name)}: {cause}") from error


def _no_tensor(name: str, value: Any, url: str) -> CheckpointMismatchError:
    kind = printable(type(value).__name__)
    return CheckpointMismatchError(
        f"{url} does not fit into=: {printable(name)} is of type {kind} there, a tensor here."
    )


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _is_plain(named: tuple[str, nn.Module]) -> bool:
    """Whether a module takes a state dict name by name, as torch's own modules do."""
    for module in named[1].modules():
        kind = type(module)
        own = kind._load_from_state_dict  # noqa: SLF001 - where torch's modules are customized
        is_custom = own is not nn.Module._load_from_state_dict and not own.__module__.startswith(_BUILT_IN)  # noqa: SLF001
        has_hooks = bool(module._load_state_dict_pre_hooks)  # noqa: SLF001
        if is_custom or has_hooks or kind.load_state_dict is not nn.Module.load_state_dict:
            return False
    return True


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
