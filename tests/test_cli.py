"""The command: what it prints, and how it fails."""

from __future__ import annotations

import json
import os
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


ACTING = "a\x1b[2J\x1b]0;title\x07\n  forged  float32  9 x 9\u202egpj.\x9b1m"


def test_inspect_prints_nothing_of_a_key_that_acts_on_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.pt"
    torch.save({ACTING: torch.ones(3), "\ud800": torch.ones(1)}, path)
    for arguments in (["inspect", str(path)], ["inspect", str(path), "--json"], ["verify", str(path)]):
        assert main(arguments) == 0
        output = capsys.readouterr().out
        assert "".join(output.splitlines()).isprintable()
        assert "\n  forged" not in output


def test_an_error_prints_nothing_that_acts_on_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / ACTING)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.rstrip("\n").isprintable()


@pytest.mark.parametrize("module", ["torchferry", "torchferry.cli"])
def test_python_m_runs_the_command(checkpoint: str, module: str) -> None:
    command = [sys.executable, "-m", module, "inspect", checkpoint]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "module_state_dict.bias" in done.stdout


def test_who_reads_the_beginning_alone_gets_no_error(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save([torch.zeros(1) for _ in range(20_000)], path)
    command = [sys.executable, "-m", "torchferry", "inspect", "--all", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_a_terminal_that_cannot_show_a_key_gets_an_escape(tmp_path: Path) -> None:
    torch.save({"gewicht.ü": torch.ones(1)}, tmp_path / "x.pt")
    command = [sys.executable, "-m", "torchferry", "inspect", str(tmp_path / "x.pt")]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert r"gewicht.\xfc" in done.stdout


def test_copy_names_its_own_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    assert main(["copy", str(tmp_path / "x.safetensors"), str(tmp_path / "y")]) == 1
    error = capsys.readouterr().err
    assert "--no-verify" in error
    assert "verify=" not in error


def test_copy_of_a_legacy_checkpoint_goes_on_and_says_what_it_did_not_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "x.pt", tmp_path / "y.pt"
    torch.save({"a": torch.ones(3)}, source, _use_new_zipfile_serialization=False)
    assert main(["copy", str(source), str(target)]) == 0
    assert "not checked" in capsys.readouterr().out
    assert target.read_bytes() == source.read_bytes()
