"""The reliability table: that it runs, and counts what is wrong as wrong."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from torchferry.testing.forkserver import python

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # reliability/ is part of the checkout, not of the wheel

from reliability import kills, resaves  # noqa: E402
from reliability.stores import S3  # noqa: E402


def test_table_has_a_row_for_each_scenario_and_counts_every_try() -> None:
    scenarios = ("--only", "cancels", "--only", "growth", "--count", "4", "--mib", "8")
    command = [*python(), "-m", "reliability", "--cloud", "s3", "--cloud", "local", *scenarios]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode in {0, 1}, done.stderr
    cells = re.findall(r"^\| .*? \| s3 +\| (\d+) +\| (\d+) +\| (\d+) +\| (\d+) +\| (\d+) ", done.stdout, re.MULTILINE)
    rows = [tuple(map(int, row)) for row in cells]
    assert [tried for tried, *_ in rows] == [2, 2, 4]
    assert all(tried == right + clear + wrong for tried, right, clear, wrong, _ in rows)
    assert done.returncode == any(wrong or left for *_, wrong, left in rows)


@pytest.mark.parametrize("cloud", ["s3", "local"])
def test_process_that_is_killed_while_it_saves_leaves_the_old_object_or_the_new_one(
    cloud: str, request: pytest.FixtureRequest
) -> None:
    """Six requests of a save to S3, before and after the store has done them; and six random moments of local ones."""
    if cloud == "s3":
        (outcome,) = kills.run(S3(request.getfixturevalue("s3_server")), count=6, mib=16, seed=0, say=print)
    else:
        (outcome,) = kills.run_locally(count=6, mib=16, seed=0, say=print)
    assert (outcome.right, outcome.clear, outcome.wrong, outcome.left) == (6, 0, 0, 0), outcome


def test_ranks_that_are_killed_while_they_save_over_a_checkpoint_leave_the_old_one_or_the_new_one() -> None:
    (outcome,) = resaves.run_locally(count=4, mib=4, seed=0, say=print)
    assert (outcome.right, outcome.clear, outcome.wrong, outcome.left) == (4, 0, 0, 0), outcome


def test_every_test_that_the_documentation_names_is_there() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text()
    named = re.findall(r"`(?:(tests/[\w/]+\.py)::)?(test_\w+)`", text)
    assert len(named) > 30
    file = ""
    for where, name in named:
        file = where or file
        assert f"def {name}(" in (ROOT / file).read_text(), f"{file}::{name}"
