"""What torchferry takes for granted of flytekit's and mashumaro's private parts: see torchferry/flyte/hooks.py.

When one of these fails with a new version of theirs, hooks.py is the place to mend.
"""

from __future__ import annotations

import importlib.metadata
import inspect

import mashumaro.core.meta.types.pack as packing
import mashumaro.core.meta.types.unpack as unpacking
import pytest
from flytekit import FlyteContextManager
from flytekit.core.data_persistence import FileAccessProvider
from flytekit.core.type_engine import DataclassTransformer, TypeEngine
from mashumaro.jsonschema import schema

from torchferry.flyte import PyTorchCheckpointTransformer, hooks, plugin


def test_flytekit_loads_what_the_entry_point_names_and_does_not_call_it() -> None:
    [entry] = importlib.metadata.entry_points(group="flytekit.plugins", name="torchferry")
    assert entry.load() is plugin.install
    import flytekit

    assert "p.load()" in inspect.getsource(flytekit.load_implicit_plugins)


def test_the_registry_is_a_dict_that_is_asked_in_its_order() -> None:
    assert isinstance(TypeEngine._REGISTRY, dict)
    assert isinstance(next(iter(TypeEngine._REGISTRY.values())), PyTorchCheckpointTransformer)
    assert "cls._REGISTRY.items()" in inspect.getsource(TypeEngine.guess_python_type)


def test_the_guesser_gives_way_to_the_transformer() -> None:
    names = [transformer.name for transformer in TypeEngine._REGISTRY.values()]
    assert not any("not imported yet" in name for name in names)
    hooks.register_guesser()  # does nothing where the transformer is
    assert names == [transformer.name for transformer in TypeEngine._REGISTRY.values()]


def test_the_provider_keeps_the_execution_metadata(tmp_path: object) -> None:
    provider = FileAccessProvider(str(tmp_path), str(tmp_path), execution_metadata={"flyte-execution-name": "f"})
    context = FlyteContextManager.current_context().with_file_access(provider).build()
    assert hooks.execution_metadata(context) == {"flyte-execution-name": "f"}
    assert hooks.execution_metadata(FlyteContextManager.current_context()) == {}


@pytest.mark.parametrize("module", [packing, unpacking], ids=["pack", "unpack"])
def test_mashumaro_asks_its_registries_in_order(module: object) -> None:
    registry = getattr(module, "PackerRegistry" if module is packing else "UnpackerRegistry")
    assert registry._registry[0].func.__qualname__ == "register_field.<locals>.call"


def test_mashumaro_asks_its_schema_registry_in_order() -> None:
    assert schema.Registry._registry[0].__qualname__ == "register_field.<locals>.describe"


def test_flytekit_prepares_dataclasses_before_it_encodes_them() -> None:
    assert "_make_dataclass_serializable" in inspect.getsource(DataclassTransformer.to_literal)
    prepare = DataclassTransformer._make_dataclass_serializable
    assert list(inspect.signature(prepare).parameters) == ["self", "python_val", "python_type"]
