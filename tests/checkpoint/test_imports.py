"""The neutral part knows no Flyte SDK: each check in an interpreter of its own."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import torchferry.checkpoint

SUBMODULES = sorted(path.stem for path in Path(torchferry.checkpoint.__path__[0]).glob("[a-z]*.py"))


def run(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore:Failed to initialize NumPy", "-c", textwrap.dedent(code)],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_importing_it_imports_no_flyte_sdk() -> None:
    names = [f"torchferry.checkpoint.{name}" for name in SUBMODULES]
    out = run(f"""
        import sys
        from importlib import import_module
        for name in {names!r}:
            import_module(name)
        sdks = ("flytekit", "flyte", "flyteidl", "flyteidl2", "dataclasses_json", "mashumaro", "pydantic")
        print(sorted(name for name in sys.modules if name.split(".")[0] in sdks or name.startswith("torchferry.flyte")))
    """)
    assert out == "[]\n"
    assert len(names) > 8


def test_without_a_flyte_sdk_a_checkpoint_is_made_looked_at_and_restored() -> None:
    out = run("""
        import sys
        for sdk in ("flytekit", "flyte", "dataclasses_json"):
            sys.modules[sdk] = None  # an import of it fails
        import torch
        from torchferry.checkpoint import LoadedCheckpoint, PyTorchCheckpoint
        from torchferry.checkpoint.content import content_of, loadable
        from torchferry.checkpoint.deck import deck_of
        from torchferry.errors import CheckpointValueError
        linear = torch.nn.Linear(2, 2)
        checkpoint = PyTorchCheckpoint(linear, {"epochs": 3})
        content = content_of(checkpoint)
        assert loadable(content).content is content
        print("epochs" in deck_of(checkpoint))
        other = torch.nn.Linear(2, 2)
        print(LoadedCheckpoint(content).restore(module=other), torch.equal(other.weight, linear.weight))
        try:
            PyTorchCheckpoint()
        except CheckpointValueError as error:
            print(type(error).__name__)
    """)
    assert out.splitlines() == ["True", "{'epochs': 3} True", "CheckpointValueError"]
