"""Arguments that mean nothing: refused in a sentence, before anything is stored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import torchferry
from torchferry.errors import UnsupportedOptionError

WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "callback": ({"callback": 5}, TypeError, "callback= takes a callback of fsspec's"),
    "function": ({"callback": print}, TypeError, "callback= takes a callback of fsspec's"),
    "text of bytes": ({"part_size": "5MiB"}, UnsupportedOptionError, "part_size= is a number of bytes"),
    "no bytes": ({"part_size": 0}, UnsupportedOptionError, "part_size= is a number of bytes"),
    "half a byte": ({"part_size": 1.5}, UnsupportedOptionError, "part_size= is a number of bytes"),
    "large files": ({"max_shard_size": "5GB"}, UnsupportedOptionError, "max_shard_size= is a number of bytes"),
    "seconds": ({"give_up_after": "60"}, UnsupportedOptionError, "give_up_after= is a number of seconds"),
    "before now": ({"give_up_after": -1}, UnsupportedOptionError, "give_up_after= is a number of seconds"),
    "never": ({"give_up_after": float("nan")}, UnsupportedOptionError, "give_up_after= is a number of seconds"),
    "format": ({"format": "pickle"}, UnsupportedOptionError, "format= is one of 'torch', 'safetensors'"),
    "metadata": ({"metadata": "step=1"}, TypeError, "metadata= is a mapping, such as a dict: not a str"),
    "options": ({"storage_options": "key=hush"}, TypeError, "storage_options= is a mapping, such as a dict: not a str"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_argument_of_save_that_means_nothing_is_refused_before_anything_is_stored(case: str, tmp_path: Path) -> None:
    arguments, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        torchferry.save({"a": torch.ones(3)}, tmp_path / "a.pt", **arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("keys", [3, [3], {"a": 3}.values()])
def test_keys_that_are_no_names_are_refused(keys: Any, tmp_path: Path) -> None:
    torchferry.save({"a": torch.ones(3)}, tmp_path / "a.pt")
    for arguments in ({"keys": keys}, {"exclude": keys}):
        with pytest.raises(TypeError, match="keys are strings"):
            torchferry.load(tmp_path / "a.pt", **arguments)


@pytest.mark.parametrize("verb", [torchferry.load, torchferry.inspect, torchferry.verify])
def test_a_url_of_bytes_is_refused_with_a_sentence(verb: Callable[[Any], object]) -> None:
    with pytest.raises(TypeError, match=r"A URL is a string or a path: not b'a\.pt'"):
        verb(b"a.pt")


def test_a_format_that_convert_does_not_know_is_refused(tmp_path: Path) -> None:
    torchferry.save({"a": torch.ones(3)}, tmp_path / "a.pt")
    with pytest.raises(UnsupportedOptionError, match="format= is one of 'torch', 'safetensors', 'sharded': not 'onnx'"):
        torchferry.convert(tmp_path / "a.pt", tmp_path / "b.pt", format="onnx")  # type: ignore[arg-type]
