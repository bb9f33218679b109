"""Everything private of flytekit that torchferry touches, in one place.

Read in flytekit 1.15 to 1.16.31; ``tests/flyte/test_hooks.py`` checks that each of
these is still what it was. This module imports no torch.
"""

from __future__ import annotations

import sys
from contextvars import ContextVar
from functools import wraps
from itertools import count
from typing import TYPE_CHECKING, Any

from flytekit.core.type_engine import DataclassTransformer, TypeEngine, TypeTransformer, UnionTransformer
from flytekit.models.core.types import BlobType
from flytekit.models.literals import BindingData, Literal, Scalar, Union

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from flytekit.core.context_manager import FlyteContext
    from flytekit.models.types import LiteralType

__all__ = [
    "CHECKPOINT_FORMAT",
    "bind_whole",
    "blob_type",
    "checkpoint_folders",
    "execution_metadata",
    "is_checkpoint_type",
    "leave_alone",
    "number_elements",
    "open_unions",
    "register",
    "register_guesser",
    "rename",
]

CHECKPOINT_FORMAT = "PyTorchCheckpoint"
"""The blob format of a checkpoint: flytekit's name for it."""

_numbers: ContextVar[count[int] | None] = ContextVar("torchferry_numbers", default=None)
_element: ContextVar[int | None] = ContextVar("torchferry_element", default=None)


def blob_type() -> BlobType:
    """The blob type of a checkpoint; a new one each time, because flytekit writes its tags into those it is given."""
    return BlobType(format=CHECKPOINT_FORMAT, dimensionality=BlobType.BlobDimensionality.SINGLE)


def is_checkpoint_type(literal_type: LiteralType) -> bool:
    """Whether a Flyte type is that of a checkpoint: a single blob of our format."""
    blob = literal_type.blob
    return bool(
        blob is not None
        and blob.format == CHECKPOINT_FORMAT
        and blob.dimensionality == BlobType.BlobDimensionality.SINGLE
    )


def register(transformer: TypeTransformer[Any], *types: type) -> None:
    """Makes ``transformer`` the one for ``types``, ahead of all others.

    Ahead, because flytekit guesses a python type by asking its transformers in the order of its registry, and
    the one for FlyteFile claims every single blob.
    """
    others = {t: other for t, other in TypeEngine._REGISTRY.items() if t not in types and t is not _Unimported}
    # A new dict, put in place in one step: another thread may be walking over the old one.
    TypeEngine._REGISTRY = {**dict.fromkeys(types, transformer), **others}


def register_guesser() -> None:
    """Makes flytekit guess ``PyTorchCheckpoint`` for a checkpoint's literal type before torch is imported."""
    # torchferry's own transformer, or the guesser that holds its place
    if not any(type(other).__module__.startswith("torchferry.") for other in TypeEngine._REGISTRY.values()):
        TypeEngine._REGISTRY = {_Unimported: _Guesser(), **TypeEngine._REGISTRY}


def rename(module: str, **values: object) -> None:
    """Sets names in a module that has been imported; one that has not is left alone."""
    if module in sys.modules:
        vars(sys.modules[module]).update(values)


def execution_metadata(ctx: FlyteContext) -> Mapping[str, str]:
    """What flytekit attaches to every object of this execution (``attach_execution_metadata``): its names and ids."""
    return getattr(ctx.file_access, "_execution_metadata", None) or {}


def checkpoint_folders(ctx: FlyteContext) -> tuple[str, str | None] | None:
    """Where this attempt of the task keeps checkpoints, and where the one before did; None where there is no place."""
    parameters: Any = ctx.user_space_params
    checkpoint: Any = None if parameters is None else parameters._checkpoint
    destination = getattr(checkpoint, "_checkpoint_dest", None)
    if destination is None:
        return None
    source = (checkpoint._checkpoint_src or "").strip('"')  # what a template leaves where there was no attempt before
    element = _element.get()  # all elements of a map that runs locally have the place of the map
    place = str(destination) if element is None else f"{destination}/{element}"
    return place, source or None


def number_elements() -> None:
    """Makes the elements of a ``map_task`` that runs locally know their numbers: in a pod each is a task of its own."""
    # Here: this module is imported while flytekit is.
    from flytekit.core.array_node_map_task import ArrayNodeMapTask
    from flytekit.core.python_function_task import PythonFunctionTask

    execute_all, execute = ArrayNodeMapTask._raw_execute, PythonFunctionTask.execute

    @wraps(execute_all)
    def execute_numbered(self: Any, **kwargs: Any) -> Any:
        token = _numbers.set(count())
        try:
            return execute_all(self, **kwargs)
        finally:
            _numbers.reset(token)

    @wraps(execute)
    def execute_one(self: Any, **kwargs: Any) -> Any:
        numbers = _numbers.get()
        if numbers is None:
            return execute(self, **kwargs)
        all_numbers, element = _numbers.set(None), _element.set(next(numbers))  # not for what an element calls
        try:
            return execute(self, **kwargs)
        finally:
            _numbers.reset(all_numbers)
            _element.reset(element)

    ArrayNodeMapTask._raw_execute = execute_numbered
    PythonFunctionTask.execute = execute_one


def leave_alone(kind: type) -> None:
    """Makes the transformer that flytekit has for dataclasses pass on fields of type ``kind`` as they are."""
    # flytekit prepares the values of a dataclass in place, down into the fields of dataclasses inside. A checkpoint is
    # one, but has nothing to prepare: and its hyperparameters would be called types that Flyte does not support.
    prepare = DataclassTransformer._make_dataclass_serializable

    @wraps(prepare)
    def prepare_others(self: Any, python_val: Any, python_type: Any) -> Any:
        return python_val if isinstance(python_val, kind) else prepare(self, python_val, python_type)

    DataclassTransformer._make_dataclass_serializable = prepare_others

    # Of what comes as a protobuf Struct it makes every dict anew, to put the ints in it right; a checkpoint is a dict.
    fix_ints = DataclassTransformer._fix_val_int

    @wraps(fix_ints)
    def fix_others(self: Any, t: Any, val: Any) -> Any:
        return val if isinstance(val, kind) else fix_ints(self, t, val)

    DataclassTransformer._fix_val_int = fix_others


def bind_whole(kind: type) -> None:
    """Makes a value of type ``kind`` that a ``@dynamic`` passes on one literal, where a checkpoint is expected.

    What a dynamic received is a dict, too. flytekit binds dicts item by item, and so refuses them where something else
    is expected; in the pod only, because locally it does not compile the dynamic.
    """
    from flytekit.core import promise

    bind = promise.binding_data_from_python_std

    @wraps(bind)
    async def bind_others(
        ctx: FlyteContext, expected_literal_type: LiteralType, t_value: Any, t_value_type: Any, nodes: list[Any]
    ) -> Any:
        if not isinstance(t_value, kind) or not _takes_checkpoint(expected_literal_type):
            return await bind(ctx, expected_literal_type, t_value, t_value_type, nodes)
        literal = await TypeEngine.async_to_literal(ctx, t_value, t_value_type or type(t_value), expected_literal_type)
        return BindingData(scalar=literal.scalar)

    promise.binding_data_from_python_std = bind_others


def open_unions(kind: type, only_variant: Callable[[Any, type], tuple[int, Any] | None]) -> None:
    """Makes unions take a value of type ``kind`` for nothing else.

    flytekit tries every variant, and finds a checkpoint ambiguous beside what it pickles: ``bytes``, ``Any``.
    """
    to_literal = UnionTransformer.async_to_literal

    @wraps(to_literal)
    async def union_to_literal(
        self: Any, ctx: FlyteContext, python_val: Any, python_type: Any, expected: LiteralType
    ) -> Any:
        found = only_variant(python_type, kind) if isinstance(python_val, kind) else None
        if found is None:
            return await to_literal(self, ctx, python_val, python_type, expected)
        index, variant = found
        variant_type = expected.union_type.variants[index]
        literal = await TypeEngine.get_transformer(variant).async_to_literal(ctx, python_val, variant, variant_type)
        return Literal(scalar=Scalar(union=Union(value=literal, stored_type=variant_type)))

    UnionTransformer.async_to_literal = union_to_literal


def _takes_checkpoint(literal_type: LiteralType) -> bool:
    variants = literal_type.union_type.variants if literal_type.union_type else [literal_type]
    return any(map(is_checkpoint_type, variants))


class _Unimported:
    """Holds the place of ``PyTorchCheckpoint`` in flytekit's registry."""


class _Guesser(TypeTransformer[Any]):  # type: ignore[misc]  # flytekit has no types
    """Answers one question, and imports torch only when the answer is yes."""

    def __init__(self) -> None:
        super().__init__("PyTorch Checkpoint (not imported yet)", _Unimported)

    def guess_python_type(self, literal_type: LiteralType) -> type[Any]:
        if not is_checkpoint_type(literal_type):
            raise ValueError(f"{literal_type} is no checkpoint's type.")
        try:
            from torchferry.flyte.checkpoint import PyTorchCheckpoint
        except Exception as error:  # whatever it is: ValueError is how a transformer passes
            raise ValueError(f"Checkpoints cannot be read here: {error}") from error
        return PyTorchCheckpoint

    def get_literal_type(self, t: type[Any]) -> LiteralType:
        raise ValueError(f"{t} has no values.")

    def to_literal(self, *_args: Any) -> Any:
        raise ValueError(f"{self.python_type} has no values.")

    def to_python_value(self, *_args: Any) -> Any:
        raise ValueError(f"{self.python_type} has no values.")
