"""Progress bars of rich and tqdm, and what notebooks show."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.callbacks import Callback
from rich.console import Console

import torchferry
from torchferry import RichCallback, TqdmCallback


def bars() -> tuple[list[Callback], list[io.StringIO]]:
    outputs = [io.StringIO(), io.StringIO()]
    console = Console(file=outputs[0], force_terminal=True, width=100)
    return [RichCallback("saving", console=console), TqdmCallback("saving", file=outputs[1], mininterval=0)], outputs


@pytest.mark.parametrize("number", [0, 1])
def test_a_bar_shows_bytes_with_units_and_is_gone_at_the_end(tmp_path: Path, number: int) -> None:
    callbacks, outputs = bars()
    tensors = [torch.ones(1 << 20) for _ in range(16)]
    for url in (tmp_path / "a.pt", tmp_path / "b.pt"):  # for one transfer after the other
        torchferry.save(tensors, url, callback=callbacks[number])
        torchferry.load(url, callback=callbacks[number])
    shown = outputs[number].getvalue()
    assert "saving" in shown
    assert "MB" in shown or "M/" in shown
    assert "67.1" in shown
    last = shown.replace("\x1b[2K", "\r").rsplit("\r", 1)[-1]
    assert not last.replace("\x1b[1A", "").replace("\x1b[?25h", "").strip()


@pytest.mark.parametrize("number", [0, 1])
def test_a_bar_is_closed_when_the_transfer_fails(tmp_path: Path, number: int) -> None:
    callbacks, _ = bars()
    callback: Any = callbacks[number]
    torch.save({"a": torch.ones(1 << 22)}, tmp_path / "x.pt")
    data = bytearray((tmp_path / "x.pt").read_bytes())
    data[5 << 20] ^= 1
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(torchferry.CheckpointCorruptError):
        torchferry.load(tmp_path / "x.pt", callback=callback)
    assert (callback._progress if number == 0 else callback._bar) is None


def test_a_bar_says_what_it_is_told_whatever_brackets_that_has(tmp_path: Path) -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=100)
    torchferry.save([torch.ones(10)], tmp_path / "a.pt", callback=RichCallback("copying run[/last]", console=console))
    assert "copying run[/last]" in output.getvalue()


@pytest.mark.parametrize("number", [0, 1])
def test_a_transfer_of_no_tensors_leaves_a_bar_ready_for_the_next(tmp_path: Path, number: int) -> None:
    callback = bars()[0][number]
    torchferry.save({}, tmp_path / "a.safetensors", callback=callback)
    assert callback.value == 0


def test_a_callback_never_hears_of_more_bytes_than_there_are(tmp_path: Path) -> None:
    told = Callback()
    torchferry.save({"a": torch.ones(10)}, tmp_path / "a.safetensors", callback=told)
    assert told.size == told.value


def test_manifest_and_report_have_a_short_repr_and_tables_for_notebooks(tmp_path: Path) -> None:
    reports: list[torchferry.TransferReport] = []
    names = {f"<b>{i}": torch.ones(2, 3) for i in range(50)}
    torchferry.save({"model": names, "epoch": 3}, tmp_path / "x.pt", report=reports.append)
    manifest = torchferry.inspect(tmp_path / "x.pt")
    assert repr(manifest).startswith("<Manifest of ")
    assert len(repr(manifest)) < 300
    html = manifest._repr_html_()
    assert "model.&lt;b&gt;0" in html
    assert "2 x 3" in html
    assert "... and 10 more" in html
    assert "epoch = 3" in html
    assert repr(reports[0]).startswith("<TransferReport of save ")
    assert "requests" in reports[0]._repr_html_()
