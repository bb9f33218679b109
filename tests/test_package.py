"""The package as a whole: its public names, and what importing it costs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import torchferry

ROOT = Path(__file__).parent.parent


def loaded_after(statement: str) -> set[str]:
    """Which of the heavy libraries a fresh interpreter has loaded after ``statement``."""
    heavy = "{'torch', 'flytekit', 's3fs', 'gcsfs', 'adlfs', 'obstore', 'rich', 'isal'}"
    program = f"{statement}\nimport sys\nprint(*({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_importing_torchferry_imports_nothing_heavy() -> None:
    assert loaded_after("import torchferry") == set()


def test_the_engine_imports_neither_flytekit_nor_a_cloud_library() -> None:
    assert loaded_after("import torchferry; torchferry.save, torchferry.load, torchferry.copy") <= {"torch", "isal"}


@pytest.mark.parametrize("name", torchferry.__all__)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    value = getattr(torchferry, name)
    assert value.__doc__
    assert name in dir(torchferry)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        torchferry.nothing  # noqa: B018


@pytest.mark.parametrize("name", ["save", "load", "inspect", "verify", "copy", "clean"])
def test_each_function_has_a_synchronous_and_an_asynchronous_twin_of_one_signature(name: str) -> None:
    twin, original = getattr(torchferry, name), getattr(torchferry, f"{name}_async")
    assert twin.__wrapped__ is original
    assert twin.__name__ == name


@pytest.mark.parametrize("name", [name for name in torchferry.__all__ if name.endswith("Error")])
def test_every_error_is_a_torchferry_error_that_shows_its_message(name: str) -> None:
    error = getattr(torchferry, name)("what happened")
    assert isinstance(error, torchferry.TorchferryError)
    assert str(error) == "what happened"


def test_options_are_hashable_whatever_they_hold() -> None:
    load = torchferry.LoadOptions(keys=("a",), map_location={"cuda:0": "cpu"}, storage_options={"kwargs": {"x": [1]}})
    assert hash(load) == hash(
        torchferry.LoadOptions(keys=("a",), map_location={"cuda:0": "cpu"}, storage_options={"kwargs": {"x": [1]}})
    )
    assert hash(torchferry.SaveOptions(metadata={"a": "b"})) != hash(torchferry.SaveOptions())


def test_keys_of_options_may_be_a_list_or_one_string_and_are_hashable() -> None:
    assert torchferry.LoadOptions(keys=["a"]) == torchferry.LoadOptions(keys="a")
    assert hash(torchferry.LoadOptions(keys=["a"])) == hash(torchferry.LoadOptions(keys="a"))
    with pytest.raises(TypeError, match="strings"):
        torchferry.LoadOptions(keys=[1])  # type: ignore[list-item]


def test_the_fields_of_the_options_are_arguments_of_the_functions() -> None:
    for options, function in (
        (torchferry.LoadOptions, torchferry.load_async),
        (torchferry.SaveOptions, torchferry.save_async),
    ):
        parameters = typing.cast("typing.Any", function).__kwdefaults__
        for field in options.__dataclass_fields__.values():
            assert parameters[field.name] == field.default


def test_imports_run_one_way() -> None:
    """The contracts stand in pyproject.toml; the engine, for one, knows neither clouds nor checkpoints."""
    command = shutil.which("lint-imports", path=str(Path(sys.executable).parent))
    assert command is not None
    # In a process of its own: it configures logging, which switches off the loggers that are there.
    done = subprocess.run([command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_map_in_contributing_names_every_module() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    table = text[text.index("## Where things belong") : text.index("## How we write")]
    modules = {path.stem for path in (ROOT / "src/torchferry").rglob("*.py")} - {"__init__"}
    assert {module for module in modules if not re.search(rf"\b{module}\b", table)} == set()
