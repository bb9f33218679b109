"""Fields of dataclasses and pydantic models in flytekit: each is saved and loaded by the transformer."""

from __future__ import annotations

from typing import Any

from flytekit.core.context_manager import FlyteContextManager
from flytekit.core.type_engine import TypeEngine
from flytekit.models.literals import Blob, BlobMetadata, Literal, Scalar

from torchferry.checkpoint.values import PyTorchCheckpoint
from torchferry.flyte import hooks

__all__ = ["checkpoint_literal", "in_flytekit", "load_uri", "save_uri"]


def checkpoint_literal(uri: str) -> Literal:
    """The literal of a checkpoint that is stored at ``uri``."""
    return Literal(scalar=Scalar(blob=Blob(metadata=BlobMetadata(type=hooks.blob_type()), uri=uri)))


def save_uri(t: Any, checkpoint: Any) -> str:
    """Saves a field of type ``t``, and returns its URI.

    Raises:
        TypeTransformerFailedError: it is no checkpoint, or cannot be saved.
        FlyteUploadDataException: the store is unavailable.
    """
    transformer = TypeEngine.get_transformer(PyTorchCheckpoint)
    literal = transformer.to_literal(FlyteContextManager.current_context(), checkpoint, t, None)
    return str(literal.scalar.blob.uri)


def load_uri(t: Any, uri: str) -> Any:
    """Loads a field of type ``t``.

    Raises:
        TypeTransformerFailedError: it cannot be loaded.
        FlyteDownloadDataException: the store is unavailable.
    """
    transformer = TypeEngine.get_transformer(PyTorchCheckpoint)
    return transformer.to_python_value(FlyteContextManager.current_context(), checkpoint_literal(uri), t)


def in_flytekit() -> bool:
    """Whether the caller runs in a task or a workflow of flytekit: both put a context on the one it starts with."""
    return bool(FlyteContextManager.size() > 1)
