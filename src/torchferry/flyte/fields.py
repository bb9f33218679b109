"""Checkpoints as fields of dataclasses and pydantic models, which flytekit itself cannot do.

Such a value travels as MessagePack, in which a checkpoint is ``{"path": <uri>}``, as a FlyteFile is. flytekit leaves
the fields of a dataclass to mashumaro and those of a model to pydantic; both ask here. Both are synchronous, so
a field is saved or loaded while flytekit waits.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from flytekit.core.context_manager import FlyteContextManager
from flytekit.core.type_engine import TypeEngine, TypeTransformerFailedError
from flytekit.models.literals import Blob, BlobMetadata, Literal, Scalar

from torchferry.flyte import hooks
from torchferry.flyte.values import FlytekitCheckpoint, PyTorchCheckpoint
from torchferry.options import LoadOptions, SaveOptions

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["JSON_SCHEMA", "checkpoint_literal", "load_field", "register_fields", "save_field"]

JSON_SCHEMA: dict[str, Any] = {
    "title": "PyTorchCheckpoint",
    "type": "object",
    "properties": {"path": {"type": "string", "title": "Path"}},
    "required": ["path"],
    "additionalProperties": False,
}
"""A checkpoint in the schema of the dataclass or model around it."""

_OPTIONS = "torchferry_options"


def checkpoint_literal(uri: str) -> Literal:
    """The literal of a checkpoint that is stored at ``uri``."""
    return Literal(scalar=Scalar(blob=Blob(metadata=BlobMetadata(type=hooks.blob_type()), uri=uri)))


def save_field(t: Any, checkpoint: Any) -> dict[str, str]:
    """Saves a field of type ``t``.

    Raises:
        TypeTransformerFailedError: it is no checkpoint, or cannot be saved.
        FlyteUploadDataException: the store is unavailable.
    """
    transformer = TypeEngine.get_transformer(PyTorchCheckpoint)
    literal = transformer.to_literal(FlyteContextManager.current_context(), checkpoint, t, None)
    return {"path": literal.scalar.blob.uri}


def load_field(t: Any, value: Any) -> Any:
    """Loads a field of type ``t``.

    Raises:
        TypeTransformerFailedError: ``value`` names no checkpoint, or one that cannot be loaded.
    """
    if not isinstance(value, Mapping) or not isinstance(value.get("path"), str):
        raise TypeTransformerFailedError(f"A checkpoint's field is saved as its path; this is not: {value!r}.")
    transformer = TypeEngine.get_transformer(PyTorchCheckpoint)
    return transformer.to_python_value(FlyteContextManager.current_context(), checkpoint_literal(value["path"]), t)


def register_fields(kind: type) -> None:
    """Tells mashumaro and pydantic how to save, load and describe a checkpoint: mashumaro for ``kind`` and below."""
    hooks.register_field(kind, save_field, load_field, JSON_SCHEMA)
    # pydantic finds the schema of a type in the type, and asks what annotates it for another one.
    for options in (LoadOptions, SaveOptions):
        options.__get_pydantic_core_schema__ = _annotated_schema  # type: ignore[union-attr]
    PyTorchCheckpoint.__get_pydantic_core_schema__ = classmethod(_schema)
    PyTorchCheckpoint.__get_pydantic_json_schema__ = staticmethod(_json_schema)


def _schema(_cls: type, source: Any, _handler: Any, options: tuple[Any, ...] = ()) -> dict[str, Any]:
    from pydantic_core import core_schema

    t = Annotated[source, *options] if options else source
    schema: Any = core_schema.no_info_plain_validator_function(
        partial(_validate, t),
        serialization=core_schema.plain_serializer_function_ser_schema(
            partial(save_field, t), when_used="json-unless-none"
        ),
        metadata={_OPTIONS: options, "pydantic_js_functions": [_json_schema]},
    )
    return dict(schema)


def _annotated_schema(self: LoadOptions | SaveOptions, source: Any, handler: Callable[[Any], Any]) -> Any:
    inner = handler(source)
    options = inner.get("metadata", {}).get(_OPTIONS)
    return inner if options is None else _schema(PyTorchCheckpoint, source, handler, (*options, self))


def _json_schema(_schema: Any, _handler: Any) -> dict[str, Any]:
    return dict(JSON_SCHEMA)


def _validate(t: Any, value: Any) -> Any:
    # pydantic turns a ValueError into its own error; ours is one.
    return value if isinstance(value, FlytekitCheckpoint) else load_field(t, value)
