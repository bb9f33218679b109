"""The benchmark works: a smoke run, against an endpoint that needs nothing but pip. Nothing here asserts a time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # benchmarks/ is part of the checkout, not of the wheel

from benchmarks import endpoint, report, run, suites, targets, works  # noqa: E402
from benchmarks.contenders import CONTENDERS  # noqa: E402
from benchmarks.meter import Measurement  # noqa: E402

from torchferry.testing.forkserver import python  # noqa: E402
from torchferry.testing.servers import ServerStartError  # noqa: E402

ALWAYS = {
    "save": {"torchferry", "obstore open_writer"},
    "load": {"torchferry", "obstore open_reader", "memcpy"},
}


@pytest.fixture(scope="module")
def smoke_cases(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What `python -m benchmarks --smoke` writes down of torchferry, the machine and one peer."""
    output = tmp_path_factory.mktemp("results")
    command = [*python(), "-m", "benchmarks", "--smoke", "--endpoint", "seaweedfs", "--output", str(output)]
    command += ["--contender", "torchferry,obstore open,memcpy,sockets"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    cases: list[dict[str, Any]] = json.loads((output / "latest.json").read_text())["cases"]
    return cases


@pytest.mark.timeout(900)
def test_every_byte_is_moved(smoke_cases: list[dict[str, Any]]) -> None:
    for case in smoke_cases:
        for name, entry in case["contenders"].items():
            if "missing" not in entry:
                assert entry.get("valid") == 1, (case["id"], name, entry)
                assert entry["measurements"][0]["invalid"] is None


@pytest.mark.timeout(900)
def test_what_the_tests_install_is_measured(smoke_cases: list[dict[str, Any]]) -> None:
    for verb, names in ALWAYS.items():
        (case,) = [case for case in smoke_cases if (case["suite"], case["verb"]) == ("smoke", verb)]
        measured = {name for name, entry in case["contenders"].items() if "median" in entry}
        assert names <= measured
        assert targets.best_sockets(case) in measured


@pytest.mark.timeout(900)
def test_the_report_has_a_line_for_every_contender(smoke_cases: list[dict[str, Any]]) -> None:
    for case in smoke_cases:
        table = report.case_table(case)
        for name in case["contenders"]:
            assert f"\n{name}" in table


def test_every_suite_names_contenders_that_exist() -> None:
    for make in suites.SUITES.values():
        for case in make():
            assert case.contenders
            for name in case.contenders:
                assert (case.verb, name) in CONTENDERS


def test_a_measurement_whose_bytes_did_not_move_is_thrown_away() -> None:
    moved = Measurement(seconds=2.0, endpoint_bytes=100, loopback_bytes=120)
    assert moved.problem(100) is None
    for sham in (Measurement(endpoint_bytes=1, loopback_bytes=120), Measurement(loopback_bytes=1)):
        assert sham.problem(100) is not None
    entry = run.summarize([_measured(2.0), _measured(0.1, invalid="nothing moved"), _measured(4.0)])
    assert (entry["valid"], entry["median"], entry["min"]) == (2, 3.0, 2.0)


def test_a_contender_with_invalid_measurements_only_has_no_figures() -> None:
    entry = run.summarize([_measured(0.1, invalid="nothing moved")])
    assert entry == {"invalid": "nothing moved"}


def test_targets_compare_medians_of_one_run() -> None:
    case = _case(torchferry=1.0, flytekit=6.0, sockets=0.9)
    rows = {row.what: row for row in targets.rows([case])}
    assert rows["save 1 GiB vs stock flytekit"].measured == "6.00x"
    assert rows["save 1 GiB vs stock flytekit"].met is True
    assert rows["save vs the best N bare sockets"].measured == "0.90x"
    assert rows["save vs boto3"].met is None, "boto3 was not measured"
    assert rows["load 1 GiB vs stock flytekit"].met is None, "loading was not measured"


def test_a_missed_target_is_said_to_be_missed() -> None:
    case = _case(torchferry=1.0, flytekit=2.0, sockets=0.5)
    lines = report.targets_table([case]).splitlines()
    assert [line.split()[-1] for line in lines if line.startswith(("save 1 GiB vs", "save vs the best"))] == [
        "MISSED",
        "MISSED",
    ]


@pytest.mark.parametrize("work", ["flat", "adam", "small"])
def test_a_loaded_checkpoint_is_compared_with_what_was_saved(work: str) -> None:
    checkpoint = works.make(work, works.MIB)
    works.touch(checkpoint)
    works.check(checkpoint, works.nbytes(checkpoint))
    next(tensor for _, tensor in works.named_tensors(checkpoint))[-1] += 1
    with pytest.raises(ValueError, match="other values"):
        works.check(checkpoint, works.nbytes(checkpoint))
    with pytest.raises(ValueError, match="bytes of tensors were loaded"):
        works.check({"weight": torch.zeros(3)}, works.MIB)


def test_without_nginx_the_benchmark_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint.shutil, "which", lambda *_args, **_options: None)
    with pytest.raises(ServerStartError, match=r"apt-get install .*nginx.*--endpoint seaweedfs"), endpoint.nginx():
        pass


def _measured(seconds: float, invalid: str | None = None) -> dict[str, Any]:
    return {
        "payload": works.GIB,
        "first_seconds": 0.1,
        "seconds": seconds,
        "cpu_seconds": seconds,
        "peak_bytes": works.MIB,
        "endpoint_bytes": works.GIB,
        "loopback_bytes": works.GIB,
        "invalid": invalid,
    }


def _case(**medians: float) -> dict[str, Any]:
    names = {"sockets": "bare sockets x4"}
    contenders = {
        names.get(name, name): {"measurements": [_measured(seconds)]} | run.summarize([_measured(seconds)])
        for name, seconds in medians.items()
    }
    return {"suite": "save", "verb": "save", "size": works.GIB, "shaped": False, "contenders": contenders}


@pytest.mark.timeout(300)
def test_waiting_for_background_saves_is_measured(tmp_path: Path) -> None:
    output = tmp_path / "background.json"
    command = [
        *python(),
        "-m",
        "benchmarks.background",
        "--smoke",
        "--size",
        "16",
        "--rounds",
        "1",
        "--only",
        "until-short",
    ]
    finished = subprocess.run(
        [*command, "--endpoint", "seaweedfs", "--output", str(output)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    found = json.loads(output.read_text())
    assert found["until=, upload shorter than the step: copied (MiB)"] <= 16, found  # less, where the machine is fast


@pytest.mark.timeout(300)
def test_the_benchmark_of_gpus_runs_without_one_and_says_so() -> None:
    command = [*python(), "benchmarks/gpu.py", "--size", "0.02", "--rounds", "1", "--device", "cpu"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert "no GPU" in json.loads(finished.stdout.splitlines()[-1])["device"]
