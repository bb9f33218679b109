"""Everything private of flyte that torchferry touches, in one place.

Read in flyte 2.12.1; ``tests/flyte2/test_hooks.py`` checks that each of these is still what it was. This module
imports no torch.
"""

from __future__ import annotations

import sys
from contextvars import ContextVar
from functools import wraps
from typing import TYPE_CHECKING, Any

from flyte._context import internal_ctx
from flyte._internal.runtime import convert, taskrunner
from flyte._internal.runtime.io import _is_nonzero_rank_clustered_worker
from flyte.types import TypeEngine, TypeTransformer
from flyte.types._tuple_dict import PydanticWrappingTransformer
from flyte.types._type_engine import PydanticTransformer, UnionTransformer
from flyteidl2.core import literals_pb2, types_pb2

if TYPE_CHECKING:
    from collections.abc import Callable

    from flyte.report import Report

__all__ = [
    "CHECKPOINT_FORMAT",
    "MODULE_FORMAT",
    "TENSOR_FORMAT",
    "blob_literal",
    "blob_type",
    "checkpoint_paths",
    "in_task",
    "is_blob_of",
    "is_thrown_away",
    "leave_alone",
    "new_place",
    "open_models",
    "open_unions",
    "output_name",
    "place",
    "register",
    "register_guesser",
    "remember_reports",
    "report_of_task",
    "tell_union",
    "when_torch_is_imported",
]

CHECKPOINT_FORMAT = "PyTorchCheckpoint"
"""The blob format of a checkpoint: that of flytekit, so that either Flyte reads what the other wrote."""

MODULE_FORMAT = "PyTorchModule"
TENSOR_FORMAT = "PyTorchTensor"

_FORMATS = frozenset({CHECKPOINT_FORMAT, MODULE_FORMAT, TENSOR_FORMAT})
_SINGLE = types_pb2.BlobType.BlobDimensionality.SINGLE
_HAS_REPORT = "_torchferry_has_report"

_union_errors: ContextVar[list[Exception] | None] = ContextVar("torchferry_union_errors", default=None)


# --- types and literals


def blob_type(blob_format: str, tag: str) -> types_pb2.LiteralType:
    """The type of a single blob, tagged with its transformer's name: by that flyte finds it again."""
    return types_pb2.LiteralType(
        blob=types_pb2.BlobType(format=blob_format, dimensionality=_SINGLE),
        structure=types_pb2.TypeStructure(tag=tag),
    )


def is_blob_of(literal_type: types_pb2.LiteralType, blob_format: str) -> bool:
    """Whether a type is that of a single blob of this format; flytekit's have no tag."""
    blob = literal_type.blob
    return bool(literal_type.HasField("blob") and blob.format == blob_format and blob.dimensionality == _SINGLE)


def blob_literal(blob_format: str, uri: str, content_hash: str | None) -> literals_pb2.Literal:
    """The literal of a blob; ``content_hash`` stands for it where flyte looks for what it has in its cache."""
    blob = literals_pb2.Blob(
        uri=uri,
        metadata=literals_pb2.BlobMetadata(type=types_pb2.BlobType(format=blob_format, dimensionality=_SINGLE)),
    )
    return literals_pb2.Literal(scalar=literals_pb2.Scalar(blob=blob), hash=content_hash or "")


# --- the context of a task


def in_task() -> bool:
    """Whether the caller runs in a task of flyte."""
    return bool(internal_ctx().is_task_context())


def new_place(name: str) -> str | None:
    """A new URI under the run's raw data path, which ends in ``name``; None where there is no such path."""
    context = internal_ctx()
    return str(context.raw_data.get_random_remote_path(name)) if context.has_raw_data else None


def place() -> str | None:
    """The run's raw data path; None where there is none."""
    context = internal_ctx()
    return str(context.raw_data.path) if context.has_raw_data else None


def checkpoint_paths() -> tuple[str, str | None] | None:
    """Where this attempt of the task keeps its checkpoint, and where the one before did; None without such a place.

    In a local run all tasks share one path, which is made the task's own here, and which its attempts share.
    """
    task = internal_ctx().data.task_context
    paths = None if task is None else task.checkpoint_paths
    # Not TaskContext.checkpoint, which makes a temporary directory.
    destination = _path(paths.checkpoint_path) if paths is not None else None
    if task is None or paths is None or destination is None:
        return None
    if task.mode == "local":
        return f"{destination}-{task.action.name}", None
    return destination, _path(paths.prev_checkpoint_path)


def _path(text: str | None) -> str | None:
    return (text or "").strip().strip('"') or None  # what a template leaves where there was no attempt before


def output_name() -> str | None:
    """The name of the task's output that is being converted; None while anything else is."""
    context = internal_ctx()
    task = context.data.task_context
    if task is None or task.in_driver_literal_conversion or context.is_in_trace():
        return None
    return convert.current_output_name()


def is_thrown_away() -> bool:
    """Whether flyte throws the task's output away that is being converted: of the ranks of a clustered task one counts.

    Every rank of it runs the task and converts what it returns; only the first stores the outputs.
    """
    return output_name() is not None and _is_nonzero_rank_clustered_worker()


def remember_reports() -> None:
    """Makes the report of a task remember whether the task has one: ``@env.task(report=True)``."""
    run = taskrunner.run_task

    @wraps(run)
    async def run_task(tctx: Any, controller: Any, task: Any, inputs: Any) -> Any:
        vars(tctx.report)[_HAS_REPORT] = bool(task.report)
        return await run(tctx=tctx, controller=controller, task=task, inputs=inputs)

    taskrunner.run_task = run_task


def report_of_task() -> Report | None:
    """The report of the task, if it has one."""
    report = internal_ctx().get_report()
    return report if report is not None and vars(report).get(_HAS_REPORT) else None


# --- the registry


def register(transformer: TypeTransformer[Any], *types: type) -> None:
    """Makes ``transformer`` the one for ``types``, ahead of all others.

    Ahead, because flyte guesses a python type by asking its transformers in the order of its registry, and the one for
    ``File`` claims every single blob that has no tag.
    """
    others = {t: other for t, other in TypeEngine._REGISTRY.items() if t not in types and t is not _Unimported}
    # A new dict, put in place in one step: another thread may be walking over the old one.
    TypeEngine._REGISTRY = {**dict.fromkeys(types, transformer), **others}


def register_guesser() -> None:
    """Makes flyte guess ``PyTorchCheckpoint`` for a checkpoint's literal type before torch is imported."""
    # torchferry's own transformers, or the guesser that holds their place
    if not any(type(other).__module__.startswith("torchferry.") for other in TypeEngine._REGISTRY.values()):
        TypeEngine._REGISTRY = {_Unimported: _Guesser(), **TypeEngine._REGISTRY}


def when_torch_is_imported(then: Callable[[], None]) -> None:
    """Calls ``then`` once: now, or before the first look-up of a type after torch has been imported."""
    if _torch_is_imported():
        then()
        return
    load: Any = TypeEngine.lazy_import_transformers
    waiting = [then]

    @wraps(load)
    def load_and_look() -> None:
        load()
        if waiting and _torch_is_imported():
            waiting.clear()  # two threads may come here: doing it twice changes nothing
            then()

    setattr(TypeEngine, "lazy_import_transformers", staticmethod(load_and_look))  # noqa: B010 - it is a method


def _torch_is_imported() -> bool:
    # `_initializing` is what importlib itself asks before it waits for another import; no public question exists.
    return "torch" in sys.modules and not getattr(sys.modules["torch"].__spec__, "_initializing", False)


# --- unions


def open_unions(kind: type, only_variant: Callable[[Any, type], tuple[int, Any] | None]) -> None:
    """Makes unions, ``Optional`` among them, pass on what they hide of a value of ours: its hash, and its error.

    And makes them take a value of type ``kind`` for nothing else: what a task received is a dict, too, which a model
    or a pickle would take as well.
    """
    to_literal, to_python_value = UnionTransformer.to_literal, UnionTransformer.to_python_value

    async def convert_variant(self: Any, python_val: Any, python_type: Any, expected: types_pb2.LiteralType) -> Any:
        found = only_variant(python_type, kind) if isinstance(python_val, kind) else None
        if found is None:
            return await to_literal(self, python_val, python_type, expected)
        index, variant = found
        variant_type = expected.union_type.variants[index]
        literal = await TypeEngine.get_transformer(variant).to_literal(python_val, variant, variant_type)
        union = literals_pb2.Union(value=literal, type=variant_type)
        return literals_pb2.Literal(scalar=literals_pb2.Scalar(union=union))

    @wraps(to_literal)
    async def union_to_literal(self: Any, *args: Any, **kwargs: Any) -> Any:
        literal = await _telling(convert_variant, self, *args, **kwargs)
        inner = literal.scalar.union
        if inner.value.hash and inner.value.scalar.blob.metadata.type.format in _FORMATS:
            literal.hash = inner.value.hash
        return literal

    @wraps(to_python_value)
    async def union_to_python_value(self: Any, *args: Any, **kwargs: Any) -> Any:
        return await _telling(to_python_value, self, *args, **kwargs)

    setattr(UnionTransformer, "to_literal", union_to_literal)  # noqa: B010 - it is a method
    setattr(UnionTransformer, "to_python_value", union_to_python_value)  # noqa: B010 - the same


def open_models() -> None:
    """Makes pydantic models pass on the error of a checkpoint in them: pydantic makes one of its own of it."""
    to_literal = PydanticTransformer.to_literal

    @wraps(to_literal)
    async def model_to_literal(self: Any, *args: Any, **kwargs: Any) -> Any:
        return await _telling(to_literal, self, *args, **kwargs)

    setattr(PydanticTransformer, "to_literal", model_to_literal)  # noqa: B010 - it is a method


def tell_union(error: Exception) -> None:
    """Tells the union or model around a checkpoint, if there is one, why it failed: else they say something else."""
    errors = _union_errors.get()
    if errors is not None:
        errors.append(error)


async def _telling(convert_value: Any, *args: Any, **kwargs: Any) -> Any:
    errors: list[Exception] = []
    token = _union_errors.set(errors)
    try:
        return await convert_value(*args, **kwargs)
    except Exception:
        if errors:
            raise errors[0] from errors[0].__cause__
        raise
    finally:
        _union_errors.reset(token)


# --- tuples


def leave_alone(kind: type) -> None:
    """Makes named and typed tuples take fields of type ``kind`` as they are.

    flyte makes a dict of every dataclass in them, which a checkpoint is, too; a model is made of the dicts.
    """
    convert_value = PydanticWrappingTransformer._convert_value_for_pydantic

    @wraps(convert_value)
    def convert_others(self: Any, value: Any, field_type: Any = None) -> Any:
        return value if isinstance(value, kind) else convert_value(self, value, field_type)

    setattr(PydanticWrappingTransformer, "_convert_value_for_pydantic", convert_others)  # noqa: B010 - it is a method


# --- before torch is imported


class _Unimported:
    """Holds the place of ``PyTorchCheckpoint`` in flyte's registry."""


class _Guesser(TypeTransformer[Any]):
    """Answers one question, and imports torch only when the answer is yes."""

    def __init__(self) -> None:
        super().__init__("PyTorch Checkpoint (not imported yet)", _Unimported)

    def guess_python_type(self, literal_type: types_pb2.LiteralType) -> type[Any]:
        if not is_blob_of(literal_type, CHECKPOINT_FORMAT):
            raise ValueError(f"{literal_type} is no checkpoint's type.")
        try:
            from torchferry.flyte2.transformers import PyTorchCheckpoint
        except Exception as error:  # whatever it is: ValueError is how a transformer passes
            raise ValueError(f"Checkpoints cannot be read here: {error}") from error
        return PyTorchCheckpoint

    def get_literal_type(self, t: type[Any]) -> types_pb2.LiteralType:
        raise ValueError(f"{t} has no values.")

    async def to_literal(self, *_args: Any) -> Any:
        raise ValueError(f"{self.python_type} has no values.")

    async def to_python_value(self, *_args: Any) -> Any:
        raise ValueError(f"{self.python_type} has no values.")
