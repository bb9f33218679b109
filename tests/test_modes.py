"""Modes of torch that hold for the calling thread hold for what torchferry does in other threads."""

from __future__ import annotations

import asyncio
import io
import subprocess
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.serialization import skip_data

import torchferry
from torchferry.testing.forkserver import python

MIB = 1 << 20


def saved(obj: Any) -> bytes:
    file = io.BytesIO()
    torch.save(obj, file)
    return file.getvalue()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.pt"


@pytest.fixture
def obj() -> dict[str, torch.Tensor]:
    return {"small": torch.arange(6.0), "large": torch.ones(80 * MIB, dtype=torch.uint8), "empty": torch.empty(0)}


@pytest.mark.parametrize("is_async", [False, True])
def test_under_skip_data_a_save_is_as_torchs_and_loads(path: Path, obj: Any, is_async: bool) -> None:
    async def save() -> None:
        with skip_data():
            await torchferry.save_async(obj, path)

    if is_async:
        asyncio.run(save())
    else:
        with skip_data():
            torchferry.save(obj, path)
    with skip_data():
        assert path.read_bytes() == saved(obj)
    assert not any(tensor.any() for tensor in torchferry.load(path).values())
    torchferry.verify(path)


def test_damage_to_a_record_that_was_skipped_is_noticed(path: Path) -> None:
    with skip_data():
        torchferry.save(torch.ones(100), path)
    data = bytearray(path.read_bytes())
    data[torchferry.inspect(path).records[-3].offset] ^= 1
    assert torchferry.inspect(path).records[-3].name == "data/0"
    path.write_bytes(data)
    with pytest.raises(torchferry.CheckpointCorruptError):
        torchferry.load(path)


def test_fake_tensors_are_saved_as_torch_saves_them(path: Path) -> None:
    with FakeTensorMode(), skip_data(materialize_fake_tensors=True):
        fake = [torch.zeros(3), torch.zeros(2 * MIB)]
        torchferry.save(fake, path)
        assert path.read_bytes() == saved(fake)
    assert [tuple(tensor.shape) for tensor in torchferry.load(path)] == [(3,), (2 * MIB,)]


@pytest.mark.parametrize("options", [{}, {"keys": ["small"]}, {"weights_only": False, "verify": False}])
def test_what_is_loaded_under_a_fake_mode_is_fake_and_not_read(path: Path, obj: Any, options: Any) -> None:
    torchferry.save(obj, path)
    reports: list[torchferry.TransferReport] = []
    with FakeTensorMode() as mode:
        loaded = torchferry.load(path, report=reports.append, **options)
    assert all(isinstance(tensor, FakeTensor) and tensor.fake_mode is mode for tensor in loaded.values())
    assert loaded["small"].device.type == "cpu"
    assert reports[0].nbytes < 4 * MIB


def test_what_is_loaded_under_skip_data_is_not_read(path: Path, obj: Any) -> None:
    torchferry.save(obj, path)
    reports: list[torchferry.TransferReport] = []
    with skip_data():
        loaded = torchferry.load(path, report=reports.append)
    assert [tuple(tensor.shape) for tensor in loaded.values()] == [(6,), (80 * MIB,), (0,)]
    assert reports[0].nbytes < 4 * MIB


def test_legacy_checkpoints_are_loaded_in_the_callers_modes(path: Path) -> None:
    torch.save([torch.ones(3)], path, _use_new_zipfile_serialization=False)
    with FakeTensorMode():
        assert isinstance(torchferry.load(path)[0], FakeTensor)
    with torch.inference_mode():
        assert torchferry.load(path)[0].is_inference()


def test_tensors_loaded_in_inference_mode_are_inference_tensors(path: Path, obj: Any) -> None:
    with torch.inference_mode():
        torchferry.save(obj, path)
        assert all(tensor.is_inference() for tensor in torchferry.load(path).values())
    assert not any(tensor.is_inference() for tensor in torchferry.load(path).values())


def test_a_mode_ends_with_the_call(path: Path, obj: Any) -> None:
    with FakeTensorMode() as mode:
        torchferry.save([1], path)
        torchferry.load(path)
        assert len(mode.enter_stack) == 1
    torchferry.save(obj, path)
    assert all(torch.equal(tensor, obj[key]) for key, tensor in torchferry.load(path).items())


def test_torch_save_and_load_can_be_replaced_by_torchferrys(tmp_path: Path) -> None:
    program = f"""
        import torch, torchferry
        torch.load = lambda *args, **kwargs: torchferry.load(*args, **kwargs)
        torch.save = torchferry.save
        for format in ({{}}, {{"_use_new_zipfile_serialization": False}}):
            torch.serialization.save([torch.ones(3)], {str(tmp_path / "x.pt")!r}, **format)
            assert torch.load({str(tmp_path / "x.pt")!r})[0].sum() == 3
            torch.save([torch.ones(3)], {str(tmp_path / "x.pt")!r})
            assert torch.load({str(tmp_path / "x.pt")!r})[0].sum() == 3
    """
    subprocess.run([*python(), "-c", textwrap.dedent(program)], check=True, timeout=60)
