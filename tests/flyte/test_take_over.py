"""Installing torchferry is enough, whatever is imported first; each order in a process of its own.

The processes are forked from one that has imported what flytekit and torch are made of, but for them neither torch is
imported nor numpy, pyarrow and pandas: see ``imported_later.py``. One order and what counts modules have interpreters.
"""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest

import torchferry.flyte
from torchferry.testing.forkserver import ForkServer

CHECK = """
    from flytekit.core.type_engine import TypeEngine
    from flytekit.models.core.types import BlobType
    from flytekit.models.types import LiteralType
    import flytekit.extras.pytorch, flytekit.extras.pytorch.checkpoint, torchferry.flyte
    for name in ("PyTorchCheckpoint", "PyTorchCheckpointTransformer"):
        ours = getattr(torchferry.flyte, name)
        assert getattr(flytekit.extras.pytorch, name) is ours
        assert getattr(flytekit.extras.pytorch.checkpoint, name) is ours
    from torchferry.flyte.values import FlytekitCheckpoint
    assert FlytekitCheckpoint.__module__ == "flytekit.extras.pytorch.checkpoint"
    for t in (torchferry.flyte.PyTorchCheckpoint, torchferry.flyte.LoadedCheckpoint, FlytekitCheckpoint):
        assert type(TypeEngine.get_transformer(t)) is torchferry.flyte.PyTorchCheckpointTransformer, t
    blob = BlobType(format="PyTorchCheckpoint", dimensionality=BlobType.BlobDimensionality.SINGLE)
    assert TypeEngine.guess_python_type(LiteralType(blob=blob)) is torchferry.flyte.PyTorchCheckpoint
    print("taken over")
"""

ORDERS = {
    "flytekit first": "import flytekit",
    "torchferry first": "import torchferry",
    "torchferry's engine first": "from torchferry import save, load",
    "torchferry's names first": "from torchferry.flyte import PyTorchCheckpoint",
    "torchferry's neutral part first": "from torchferry.checkpoint import PyTorchCheckpoint; import flytekit",
    "torch first": "import torch, flytekit",
    "torch last": "import flytekit, torch",
    "flytekit's package first": "from flytekit.extras.pytorch import PyTorchCheckpoint",
    "flytekit's submodule first": "from flytekit.extras.pytorch.checkpoint import PyTorchCheckpoint",
    "flytekit's type engine first": "from flytekit.core.type_engine import TypeEngine",
    "lazily": """
        import flytekit, torch
        from flytekit.core.type_engine import TypeEngine
        TypeEngine.lazy_import_transformers()
    """,
    "flytekit's class before the plugin": """
        import os
        os.environ["TORCHFERRY_TAKE_OVER"] = "0"
        from flytekit.extras.pytorch import PyTorchCheckpoint
        assert PyTorchCheckpoint.__module__ == "flytekit.extras.pytorch.checkpoint"
        del os.environ["TORCHFERRY_TAKE_OVER"]
        import torchferry.flyte.plugin
        torchferry.flyte.plugin.install()
    """,
    "plugin twice": """
        import flytekit
        from torchferry.flyte.plugin import install
        import sys
        before = len(sys.meta_path)
        install()
        assert len(sys.meta_path) == before
    """,
}


@cache
def forking() -> list[str]:
    """The head of a command that runs Python with much of what flytekit imports behind it."""
    if sys.platform != "linux":
        return [sys.executable]
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    server = ForkServer("imported_later", environment={**os.environ, "PYTHONPATH": path})
    atexit.register(server.close)
    return server.command


def run(code: str, *, alone: bool = False, **environment: str) -> str:
    """What a script prints, in a forked process or in an interpreter that has nothing imported."""
    with tempfile.TemporaryDirectory() as directory:  # flytekit wants to read the source of tasks
        script = Path(directory, "script.py")
        script.write_text(textwrap.dedent(code))
        result = subprocess.run(
            [*([sys.executable] if alone else forking()), "-W", "ignore", script],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


SUBMODULES = sorted(path.stem for path in Path(torchferry.flyte.__path__[0]).glob("[a-z]*.py"))
ORDERS |= {f"torchferry.flyte.{name} first": f"import torchferry.flyte.{name}" for name in SUBMODULES}


@pytest.fixture(scope="module")
def outcomes() -> Iterator[dict[str, Future[str]]]:
    """What each order prints. They run side by side; the first in an interpreter, which takes seconds to start."""
    forking()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        check = textwrap.dedent(CHECK)
        yield {
            order: pool.submit(run, textwrap.dedent(code) + check, alone=order == "flytekit first")
            for order, code in ORDERS.items()
        }


@pytest.mark.parametrize("order", ORDERS)
def test_flytekits_checkpoint_uses_torchferry(outcomes: dict[str, Future[str]], order: str) -> None:
    assert outcomes[order].result() == "taken over\n"


def test_a_subclass_of_flytekits_class_uses_torchferry() -> None:
    run("""
        from flytekit.extras.pytorch import PyTorchCheckpoint
        from flytekit.core.type_engine import TypeEngine
        class Mine(PyTorchCheckpoint):
            pass
        assert type(TypeEngine.get_transformer(Mine)).__module__ == "torchferry.flyte.checkpoint"
    """)


def test_a_task_declared_before_torchferry_is_imported_uses_it() -> None:
    out = run("""
        import torch
        from flytekit import task
        from flytekit.extras.pytorch import PyTorchCheckpoint
        @task
        def make() -> PyTorchCheckpoint:
            return PyTorchCheckpoint(module=torch.nn.Linear(2, 2))
        import torchferry.flyte
        print(type(make()).__name__)
    """)
    assert out == "LoadedCheckpoint\n"


def test_guessing_the_type_of_a_checkpoint_imports_torch_only_then() -> None:
    out = run("""
        import sys, flytekit
        from flytekit.core.type_engine import TypeEngine
        from flytekit.models.core.types import BlobType
        from flytekit.models.types import LiteralType
        single = BlobType.BlobDimensionality.SINGLE
        print(TypeEngine.guess_python_type(LiteralType(blob=BlobType(format="csv", dimensionality=single))).__name__)
        print("torch" in sys.modules)
        lt = LiteralType(blob=BlobType(format="PyTorchCheckpoint", dimensionality=single))
        print(TypeEngine.guess_python_type(lt).__name__)
        print(TypeEngine.guess_python_type(LiteralType(collection_type=lt)))
    """)
    assert out.splitlines() == [
        "_SpecificFormatClass",
        "False",
        "PyTorchCheckpoint",
        "typing.List[torchferry.checkpoint.values.PyTorchCheckpoint]",
    ]


@cache
def modules_of_flytekit(take_over: str) -> frozenset[str]:
    """What ``import flytekit`` imports."""
    code = "import flytekit, sys; print(*sys.modules, sep=chr(10))"
    return frozenset(run(code, alone=True, TORCHFERRY_TAKE_OVER=take_over).split())


def test_importing_flytekit_imports_no_torch_and_none_of_the_engine() -> None:
    tops = ("torch", "torchferry", "obstore")
    imported = {name for name in modules_of_flytekit("1") if name.split(".")[0] in tops}
    assert imported == {"torchferry", "torchferry.flyte", "torchferry.flyte.hooks", "torchferry.flyte.plugin"}


def test_importing_torchferry_imports_neither_torch_nor_flytekit_nor_a_cloud_library() -> None:
    heavy = ("torch", "flytekit", "s3fs", "gcsfs", "adlfs", "botocore")
    code = f"import torchferry, sys; print([name for name in {heavy!r} if name in sys.modules])"
    assert run(code, alone=True).strip() == "[]"


def test_importing_flytekit_imports_four_small_modules_more_than_without_torchferry() -> None:
    with_it, without = map(modules_of_flytekit, ("1", "0"))
    assert with_it - without == {"torchferry.flyte.hooks"}
    assert {name for name in without if name.startswith("torchferry")} == {
        "torchferry",
        "torchferry.flyte",
        "torchferry.flyte.plugin",
    }


def test_flytekit_can_be_left_alone() -> None:
    out = run(
        """
        from flytekit.extras.pytorch import PyTorchCheckpoint
        from flytekit.core.type_engine import TypeEngine
        import torchferry.flyte
        print(type(TypeEngine.get_transformer(PyTorchCheckpoint)).__module__)
        print(type(TypeEngine.get_transformer(torchferry.flyte.PyTorchCheckpoint)).__module__)
        """,
        TORCHFERRY_TAKE_OVER="0",
    )
    assert out.splitlines() == ["flytekit.extras.pytorch.checkpoint", "torchferry.flyte.checkpoint"]


def test_a_broken_installation_leaves_flytekits_own_transformer_in_place() -> None:
    out = run("""
        import sys
        sys.modules["obstore"] = None  # an import of it fails
        sys.modules["torchferry.saving"] = None
        from flytekit.extras.pytorch import PyTorchCheckpoint
        from flytekit.core.type_engine import TypeEngine
        print(type(TypeEngine.get_transformer(PyTorchCheckpoint)).__module__)
    """)
    assert out == "flytekit.extras.pytorch.checkpoint\n"


def test_the_source_of_flytekits_module_can_still_be_read() -> None:
    run("""
        import inspect, flytekit.extras.pytorch.checkpoint as module
        assert "PYTORCH_CHECKPOINT_FORMAT" in inspect.getsource(module)
    """)
