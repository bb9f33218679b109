"""What torchferry takes for granted of flytekit's private parts: see torchferry/flyte/hooks.py.

When one of these fails with a new version of theirs, hooks.py is the place to mend.
"""

from __future__ import annotations

import importlib.metadata
import inspect

from flytekit import FlyteContextManager
from flytekit.core import promise
from flytekit.core.array_node_map_task import ArrayNodeMapTask
from flytekit.core.data_persistence import FileAccessProvider
from flytekit.core.python_function_task import PythonFunctionTask
from flytekit.core.type_engine import DataclassTransformer, TypeEngine, UnionTransformer

from torchferry.flyte import PyTorchCheckpointTransformer, hooks, plugin
from torchferry.flyte.fields import in_flytekit


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


def test_flytekit_prepares_dataclasses_before_it_encodes_them() -> None:
    assert "_make_dataclass_serializable" in inspect.getsource(DataclassTransformer.to_literal)
    prepare = DataclassTransformer._make_dataclass_serializable
    assert list(inspect.signature(prepare).parameters) == ["self", "python_val", "python_type"]


def test_flytekit_makes_the_dicts_of_a_struct_anew() -> None:
    assert "_fix_val_int" in inspect.getsource(DataclassTransformer)
    assert list(inspect.signature(DataclassTransformer._fix_val_int).parameters) == ["self", "t", "val"]


def test_flytekit_executes_the_elements_of_a_local_map_one_by_one() -> None:
    source = inspect.getsource(inspect.unwrap(ArrayNodeMapTask._raw_execute))
    assert "self._run_task.execute(**single_instance_inputs)" in source
    assert inspect.unwrap(PythonFunctionTask.execute) is not PythonFunctionTask.execute


def test_flytekit_tries_every_variant_of_a_union() -> None:
    to_literal = inspect.unwrap(UnionTransformer.async_to_literal)
    assert list(inspect.signature(to_literal).parameters) == ["self", "ctx", "python_val", "python_type", "expected"]
    assert "Ambiguous choice of variant" in inspect.getsource(to_literal)


def test_flytekit_binds_what_a_dynamic_passes_on_by_a_function_that_calls_itself() -> None:
    parameters = list(inspect.signature(promise.binding_data_from_python_std).parameters)
    assert parameters == ["ctx", "expected_literal_type", "t_value", "t_value_type", "nodes"]
    original = inspect.getsource(inspect.unwrap(promise.binding_data_from_python_std))
    assert original.count("await binding_data_from_python_std(") == 3
    assert "binding_data_from_python_std," in inspect.getsource(promise.binding_from_python_std)


def test_a_context_is_put_on_the_first_one_in_a_task() -> None:
    assert FlyteContextManager.size() == 1
    with FlyteContextManager.with_context(FlyteContextManager.current_context().new_builder()):
        assert in_flytekit()
