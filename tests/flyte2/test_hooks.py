"""What torchferry takes for granted of flyte's private parts: see torchferry/flyte2/hooks.py.

When one of these fails with a new version of flyte, hooks.py is the place to mend.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import subprocess
import sys
import textwrap

from flyte._internal.runtime import convert, taskrunner
from flyte.models import CheckpointPaths, TaskContext
from flyte.types import TypeEngine, _load_custom_type_transformers
from flyte.types._tuple_dict import PydanticWrappingTransformer
from flyte.types._type_engine import UnionTransformer

from torchferry.flyte2 import PyTorchCheckpointTransformer, hooks, plugin


def run(code: str) -> list[str]:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.splitlines()


def test_flyte_calls_what_the_entry_point_names() -> None:
    [entry] = importlib.metadata.entry_points(group="flyte.plugins.types", name="torchferry")
    assert entry.load() is plugin.install
    assert "loaded()" in inspect.getsource(_load_custom_type_transformers)


def test_importing_flyte_and_declaring_a_task_imports_no_torch() -> None:
    assert run("""
        import sys
        import flyte
        print([name for name in sys.modules if name.startswith(("torch", "torchferry"))])
        env = flyte.TaskEnvironment(name="x")
        @env.task
        async def add(a: int, b: list[int]) -> int:
            return a
        from flyte._internal.runtime.types_serde import transform_native_to_typed_interface
        transform_native_to_typed_interface(add.interface)
        from flyte.types import TypeEngine
        print("torchferry.flyte2.plugin" in sys.modules, "torch" in sys.modules)
        import torch  # what is imported later is known all the same
        print(TypeEngine.get_transformer(torch.nn.Linear).name)
    """) == ["[]", "True False", "PyTorch Module"]


def test_a_checkpoint_is_guessed_before_torch_is_imported() -> None:
    assert run("""
        import sys
        from flyte.types import TypeEngine
        from flyteidl2.core.types_pb2 import BlobType, LiteralType
        import flyte.io
        TypeEngine.to_literal_type(int)
        print("torch" in sys.modules)
        print(TypeEngine.guess_python_type(LiteralType(blob=BlobType(format="PyTorchCheckpoint"))).__name__)
    """) == ["False", "PyTorchCheckpoint"]


def test_the_registry_is_a_dict_that_is_asked_in_its_order() -> None:
    assert isinstance(TypeEngine._REGISTRY, dict)
    assert "cls._REGISTRY.items()" in inspect.getsource(TypeEngine.guess_python_type)
    assert any(isinstance(other, PyTorchCheckpointTransformer) for other in TypeEngine._REGISTRY.values())


def test_every_look_up_loads_plugins_first() -> None:
    assert "cls.lazy_import_transformers()" in inspect.getsource(TypeEngine._get_transformer)


def test_a_task_runs_with_its_context_and_itself_by_name() -> None:
    assert list(inspect.signature(taskrunner.run_task).parameters) == ["tctx", "controller", "task", "inputs"]
    source = inspect.getsource(taskrunner.convert_and_run)
    assert "run_task(tctx=tctx, controller=controller, task=task, inputs=inputs_kwargs)" in source
    assert source.index("run_task(") < source.index("convert_from_native_to_outputs(")


def test_outputs_are_converted_under_their_name() -> None:
    assert convert.current_output_name() is None
    assert "_output_name_var.set(output_name)" in inspect.getsource(convert.convert_from_native_to_outputs)


def test_unions_hide_hashes_and_errors() -> None:
    source = inspect.getsource(inspect.unwrap(UnionTransformer.to_literal))
    assert "Literal(scalar=Scalar(union=Union(value=res, type=res_type)))" in source
    assert "except Exception as e:" in source


def test_the_context_of_a_task_has_paths() -> None:
    assert {"checkpoint_paths", "report", "mode", "action"} <= {*TaskContext.__dataclass_fields__}
    assert {*CheckpointPaths.__dataclass_fields__} == {"prev_checkpoint_path", "checkpoint_path"}
    assert hooks.checkpoint_paths() is None
    assert not hooks.in_task()
    assert hooks.new_place("x") is None


def test_tuples_make_dicts_of_dataclasses() -> None:
    source = inspect.getsource(inspect.unwrap(PydanticWrappingTransformer._convert_value_for_pydantic))
    assert "dataclasses.asdict(value)" in source
