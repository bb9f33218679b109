"""What an SDK's adapter does for checkpoints that this package cannot do without knowing the SDK."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torchferry.errors import CheckpointValueError

__all__ = ["Adapter", "current_adapter", "message_of", "refusal", "register_adapter", "type_name"]


@dataclass(frozen=True, slots=True)
class Adapter:
    """One SDK.

    Attributes:
        checkpoint_type: What counts as a checkpoint: every instance of it can be given to ``save``.
        refusal: The error for what cannot be a checkpoint; also the error that users of the SDK would catch.
        save: Called with the type of a field, annotations included, and its checkpoint: saves it, returns its URI.
            Blocks.
        load: Called with the type of a field and a URI: loads the checkpoint. Blocks.
        is_current: Whether the caller runs in a task of this SDK. Asked only where two SDKs are imported.
    """

    checkpoint_type: type
    refusal: type[CheckpointValueError]
    save: Callable[[Any, Any], str]
    load: Callable[[Any, str], Any]
    is_current: Callable[[], bool]


_adapters: list[Adapter] = []


def register_adapter(adapter: Adapter) -> None:
    """Adds an SDK: each adapter does this once, when it is imported."""
    _adapters.append(adapter)


def current_adapter() -> Adapter | None:
    """The adapter of the SDK whose task the caller runs in; the first one outside of tasks; None without an SDK."""
    if len(_adapters) > 1:
        return next((adapter for adapter in _adapters if adapter.is_current()), _adapters[0])
    return _adapters[0] if _adapters else None


def refusal(message: str) -> CheckpointValueError:
    """The error for what cannot be a checkpoint: of the kind that users of the current SDK would catch."""
    adapter = current_adapter()
    return CheckpointValueError(message) if adapter is None else adapter.refusal(message)


def message_of(error: BaseException) -> str:
    """What an error says; never empty."""
    return repr(error) if isinstance(error, SystemExit) else str(error) or type(error).__name__


def type_name(t: Any) -> str:
    """What a type, or an annotation, is called in messages."""
    return getattr(t, "__qualname__", None) or str(t)
