"""Checkpoints as fields of dataclasses and pydantic models, which no SDK can do by itself.

Such a value travels as MessagePack or JSON, in which a checkpoint is ``{"path": <uri>}``, as Flyte's files are. SDKs
leave the fields of a dataclass to mashumaro and those of a model to pydantic; both ask here. Both are synchronous, so a
field is saved or loaded while the SDK waits.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from torchferry.checkpoint import mashumaro_hooks
from torchferry.checkpoint.adapters import Adapter, current_adapter, refusal
from torchferry.checkpoint.values import PyTorchCheckpoint
from torchferry.options import LoadOptions, SaveOptions

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["describes_checkpoint", "load_field", "path_in", "register_fields", "save_field"]

_JSON_SCHEMA: dict[str, Any] = {
    "title": "PyTorchCheckpoint",
    "type": "object",
    "properties": {"path": {"type": "string", "title": "Path"}},
    "required": ["path"],
    "additionalProperties": False,
}
"""A checkpoint in the schema of the dataclass or model around it."""

_OPTIONS = "torchferry_options"


def save_field(t: Any, checkpoint: Any) -> dict[str, str]:
    """Saves a field of type ``t``.

    Raises:
        CheckpointValueError: it is no checkpoint, or cannot be saved. Other errors are the SDK's.
    """
    return {"path": _adapter().save(t, checkpoint)}


def load_field(t: Any, value: Any) -> Any:
    """Loads a field of type ``t``.

    Raises:
        CheckpointValueError: ``value`` is not what :func:`save_field` returns. Other errors are the SDK's.
    """
    path = path_in(value)
    if path is None:
        raise refusal(f"A checkpoint's field is saved as its path; this is not: {value!r}.")
    return _adapter().load(t, path)


def path_in(value: Any) -> str | None:
    """The URI in what :func:`save_field` returned; None for what it did not return."""
    path = value.get("path") if isinstance(value, Mapping) else None
    return path if isinstance(path, str) else None


def describes_checkpoint(schema: Any) -> bool:
    """Whether a part of the JSON schema of a dataclass or model is that of a checkpoint: Flyte guesses types by it."""
    return isinstance(schema, dict) and all(schema.get(key) == _JSON_SCHEMA[key] for key in ("title", "required"))


def register_fields(checkpoint_type: type) -> None:
    """Tells mashumaro and pydantic how to save, load and describe a checkpoint.

    Args:
        checkpoint_type: What mashumaro takes for a checkpoint, subclasses included. pydantic asks the class of
            the field, which is always ours.
    """
    mashumaro_hooks.register_field(checkpoint_type, save_field, load_field, _JSON_SCHEMA)
    # pydantic finds the schema of a type in the type, and asks what annotates it for another one.
    for options in (LoadOptions, SaveOptions):
        options.__get_pydantic_core_schema__ = _annotated_schema  # type: ignore[union-attr]
    PyTorchCheckpoint.__get_pydantic_core_schema__ = classmethod(_schema)  # type: ignore[attr-defined]
    PyTorchCheckpoint.__get_pydantic_json_schema__ = staticmethod(_json_schema)  # type: ignore[attr-defined]


def _adapter() -> Adapter:
    adapter = current_adapter()
    if adapter is None:
        raise refusal("A checkpoint that is a field is saved and loaded by Flyte, and no Flyte SDK is imported.")
    return adapter


def _schema(_cls: type, source: Any, _handler: Any, options: tuple[Any, ...] = ()) -> dict[str, Any]:
    from pydantic_core import core_schema

    t = Annotated[source, *options] if options else source
    # What is no JSON keeps the checkpoint itself: pydantic makes a dict of a dataclass, unless it could be a text.
    itself = core_schema.any_schema(serialization=core_schema.to_string_ser_schema(when_used="json-unless-none"))
    schema: Any = core_schema.no_info_before_validator_function(
        partial(_validate, t),
        itself,
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
    return dict(_JSON_SCHEMA)


def _validate(t: Any, value: Any) -> Any:
    # pydantic turns a ValueError into its own error; ours is one.
    return value if isinstance(value, _adapter().checkpoint_type) else load_field(t, value)
