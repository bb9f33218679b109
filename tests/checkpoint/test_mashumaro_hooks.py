"""What torchferry takes for granted of mashumaro's private parts: see torchferry/checkpoint/mashumaro_hooks.py.

When one of these fails with a new version of mashumaro, mashumaro_hooks.py is the place to mend.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import pytest

from torchferry.checkpoint.mashumaro_hooks import register_field

packing = pytest.importorskip("mashumaro.core.meta.types.pack", reason="only Flyte SDKs bring mashumaro")
unpacking = pytest.importorskip("mashumaro.core.meta.types.unpack")
codecs = pytest.importorskip("mashumaro.codecs.json")
jsonschema = pytest.importorskip("mashumaro.jsonschema")


@dataclass
class Stored:
    """A field that mashumaro would take apart."""

    secret: int


@dataclass
class Owner:
    field: Annotated[Stored, "how"]


REGISTRIES = (packing.PackerRegistry, unpacking.UnpackerRegistry, jsonschema.schema.Registry)


@pytest.fixture
def seen() -> Iterator[list[Any]]:
    before = [list(registry._registry) for registry in REGISTRIES]
    types: list[Any] = []

    def save(t: Any, value: Any) -> dict[str, str]:
        types.append(t)
        return {"path": str(value.secret)}

    def load(t: Any, value: Any) -> Any:
        types.append(t)
        return Stored(int(value["path"]))

    register_field(Stored, save, load, {"title": "Stored", "type": "object"})
    yield types
    for registry, entries in zip(REGISTRIES, before, strict=True):
        registry._registry[:] = entries


def test_mashumaro_asks_its_registries_in_order(seen: list[Any]) -> None:
    encoded = codecs.JSONEncoder(Owner).encode(Owner(Stored(7)))
    assert encoded == '{"field": {"path": "7"}}'
    assert codecs.JSONDecoder(Owner).decode(encoded) == Owner(Stored(7))
    assert seen == [Annotated[Stored, "how"]] * 2


@pytest.mark.usefixtures("seen")
def test_mashumaro_asks_its_schema_registry_in_order() -> None:
    assert jsonschema.build_json_schema(Owner).to_dict()["properties"]["field"]["title"] == "Stored"
