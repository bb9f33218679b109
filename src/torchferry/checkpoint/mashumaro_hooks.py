"""Everything private of mashumaro that torchferry touches, in one place.

Read in mashumaro 3.15 to 3.23; ``tests/checkpoint/test_mashumaro_hooks.py`` checks that each of these is still what it
was.
"""

from __future__ import annotations

import uuid
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["register_field"]


def register_field(
    kind: type,
    save: Callable[[Any, Any], dict[str, str]],
    load: Callable[[Any, Any], Any],
    json_schema: Mapping[str, Any],
) -> None:
    """Teaches mashumaro fields of type ``kind``.

    mashumaro's public ways all belong to the dataclass around the field, which is the user's, or leave out what
    annotates the field.

    Args:
        kind: The type; its subclasses are meant, too.
        save: Called with the field's type, annotations included, and its value.
        load: The same, with what ``save`` returned.
        json_schema: Describes what ``save`` returns.
    """
    from mashumaro.core.meta.types.pack import PackerRegistry
    from mashumaro.core.meta.types.unpack import UnpackerRegistry
    from mashumaro.jsonschema.models import JSONSchema
    from mashumaro.jsonschema.schema import Registry as SchemaRegistry

    def concerns(spec: Any) -> bool:
        return isinstance(spec.origin_type, type) and issubclass(spec.origin_type, kind)

    def call(function: Callable[[Any, Any], Any], holder: str, spec: Any) -> str | None:
        if not concerns(spec):
            return None
        name = f"__torchferry_{function.__name__}_{uuid.uuid4().hex}"
        setattr(spec.attrs, name, partial(function, spec.annotated_type or spec.type))
        return f"{getattr(spec, holder)}.{name}({spec.expression})"

    def describe(instance: Any, _ctx: Any) -> Any:
        return JSONSchema.from_dict(dict(json_schema)) if concerns(instance) else None

    # In front: mashumaro would take them for dataclasses, which they are, too.
    PackerRegistry._registry.insert(0, partial(call, save, "self_attrs_name"))
    UnpackerRegistry._registry.insert(0, partial(call, load, "cls_attrs_name"))
    SchemaRegistry._registry.insert(0, describe)
