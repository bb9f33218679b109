"""Tells when the private functions of torch that torchferry calls have changed."""

from __future__ import annotations

import inspect
import io
import mmap

import pytest
import torch
from torch import _weights_only_unpickler, serialization

from torchferry.formats import torch_hooks

AFTER_2_13 = {"weights_only"}


def test_this_torch_loads_in_place() -> None:
    """Where this fails, a load works but takes a copy more: look at what torch.load does with mmap=True now."""
    assert torch_hooks.LOADS_IN_PLACE


def test_the_option_for_crc32s_is_of_the_context() -> None:
    """Where this fails, torch computes the CRC32s of a save: look at where its option is kept now."""
    assert torch_hooks.crc32_option_is_of_the_context()


def test_the_private_functions_of_torch_have_the_parameters_that_are_known() -> None:
    load = inspect.signature(serialization._load).parameters
    known = {"zip_file", "map_location", "pickle_module", "pickle_file", "overall_storage", "pickle_load_args"}
    assert set(load) - AFTER_2_13 == known
    assert load["pickle_load_args"].kind is inspect.Parameter.VAR_KEYWORD
    reader = inspect.signature(serialization._open_zipfile_reader.__init__).parameters
    assert list(reader) == ["self", "name_or_buffer"]
    unpickler = inspect.signature(_weights_only_unpickler.Unpickler.__init__).parameters
    assert list(unpickler) == ["self", "file", "encoding"]


@pytest.mark.parametrize("weights_only", [True, False])
def test_tensors_are_loaded_in_place(weights_only: bool) -> None:
    file = io.BytesIO()
    torch.save({"a": torch.arange(3)}, file)
    memory = mmap.mmap(-1, len(file.getvalue()))
    memory[:] = file.getvalue()
    loaded = torch_hooks.load_in_place(memory, map_location=None, weights_only=weights_only)
    at = memory[:].index(b"\1\0\0\0\0\0\0\0\2") - 8
    memory[at : at + 8] = (42).to_bytes(8, "little")
    assert loaded["a"].tolist() == [42, 1, 2]
