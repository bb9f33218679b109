"""The command: what it prints, and how it fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import torchferry
from torchferry.cli import main


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    path = str(tmp_path / "model.pt")
    module = torch.nn.Linear(30, 20)
    torchferry.save({"module_state_dict": module.state_dict(), "epoch": 3}, path)
    return path


def test_inspect_lists_the_tensors(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", checkpoint]) == 0
    output = capsys.readouterr().out
    assert "module_state_dict.weight" in output
    assert "20 x 30" in output
    assert "2 tensors in 2 storages" in output


def test_inspect_prints_keys_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = ["w[/b]", "x[red]y", ":smile:"]
    torch.save({key: torch.ones(1) for key in keys}, tmp_path / "x.pt")
    assert main(["inspect", str(tmp_path / "x.pt")]) == 0
    output = capsys.readouterr().out
    assert [key for key in keys if key in output] == keys


def test_inspect_cuts_no_key_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = "module." * 40 + "weight"
    torch.save({key: torch.ones(1)}, tmp_path / "x.pt")
    assert main(["inspect", str(tmp_path / "x.pt")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines if key in line] == [[key, "float32", "1", "4", "bytes", "data/0"]]


def test_copy_does_not_call_checked_what_carries_no_crc32s(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.serialization.set_crc32_options(compute_crc32=False)
    try:
        torch.save(torch.ones(3), tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(compute_crc32=True)
    copy = ["copy", str(tmp_path / "x.pt"), str(tmp_path / "y.pt")]
    assert main(copy) == 1
    assert "was saved without them" in capsys.readouterr().err
    assert main([*copy, "--no-verify"]) == 0
    assert "not checked" in capsys.readouterr().out


def test_inspect_shortens_a_long_list_unless_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "many.pt")
    torchferry.save([torch.zeros(1) for _ in range(50)], path)
    main(["inspect", path])
    assert "... and 10 more" in capsys.readouterr().out
    main(["inspect", path, "--all"])
    assert "more" not in capsys.readouterr().out


def test_inspect_prints_json_for_programs(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", checkpoint, "--json"]) == 0
    manifest = json.loads(capsys.readouterr().out)
    assert manifest["tensors"][0] == {
        "key": "module_state_dict.weight",
        "dtype": "float32",
        "shape": [20, 30],
        "nbytes": 2400,
        "record": "data/0",
    }
    assert {record["name"] for record in manifest["records"]} >= {"data.pkl", "data/0", "data/1"}


def test_copy_and_verify_across_stores(
    checkpoint: str, s3_url: str, s3_storage_options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    options = json.dumps(s3_storage_options)
    assert main(["copy", checkpoint, f"{s3_url}/copy.pt", "--target-options", options]) == 0
    assert main(["verify", f"{s3_url}/copy.pt", "--storage-options", options]) == 0
    output = capsys.readouterr().out
    assert output.count("matches its CRC32") == 2
    assert torchferry.load(f"{s3_url}/copy.pt", storage_options=s3_storage_options)["epoch"] == 3


def test_a_failure_is_one_line_on_standard_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path / "missing.pt")]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "missing.pt" in captured.err


@pytest.mark.parametrize("text", ["{bad", "[1]"])
def test_options_that_are_no_json_object_are_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["inspect", "memory://x", "--storage-options", text])
    assert "not " in capsys.readouterr().err


def test_the_command_is_installed(checkpoint: str) -> None:
    command = Path(sys.executable).with_name("torchferry")
    result = subprocess.run([command, "inspect", checkpoint], capture_output=True, text=True, check=True)
    assert "module_state_dict.bias" in result.stdout
