"""The reliability table: that it runs, and counts what is wrong as wrong."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_table_has_a_row_for_each_scenario_and_counts_every_try() -> None:
    scenarios = ("--only", "cancels", "--only", "growth", "--count", "4", "--mib", "8")
    command = [sys.executable, "-m", "reliability", "--cloud", "s3", *scenarios]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode in {0, 1}, done.stderr
    cells = re.findall(r"^\| .*? \| s3 +\| (\d+) +\| (\d+) +\| (\d+) +\| (\d+) +\| (\d+) ", done.stdout, re.MULTILINE)
    rows = [tuple(map(int, row)) for row in cells]
    assert [tried for tried, *_ in rows] == [2, 2, 4]
    assert all(tried == right + clear + wrong for tried, right, clear, wrong, _ in rows)
    assert done.returncode == any(wrong or left for *_, wrong, left in rows)


def test_process_that_is_killed_while_it_saves_leaves_the_old_object_or_the_new_one() -> None:
    """Six requests of a save to S3, before and after the store has done them; and six random moments of local ones."""
    command = [sys.executable, "-m", "reliability", "--only", "kills", "--cloud", "s3", "--cloud", "local"]
    done = subprocess.run(
        [*command, "--count", "6", "--mib", "16"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=250
    )
    assert done.returncode == 0, done.stdout + done.stderr
    cells = re.findall(r"^\| kill .*? \| (\w+) +\| (\d+) +\| (\d+) +\| 0 +\| 0 +\| 0 ", done.stdout, re.MULTILINE)
    assert sorted(cells) == [("local", "6", "6"), ("s3", "6", "6")]


def test_ranks_that_are_killed_while_they_save_over_a_checkpoint_leave_the_old_one_or_the_new_one() -> None:
    command = [
        sys.executable,
        "-m",
        "reliability",
        "--only",
        "resaves",
        "--cloud",
        "local",
        "--count",
        "4",
        "--mib",
        "4",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    cells = re.findall(
        r"^\| sharded resave.*? \| local +\| (\d+) +\| (\d+) +\| 0 +\| 0 +\| 0 ", done.stdout, re.MULTILINE
    )
    assert cells == [("4", "4")]


def test_every_test_that_the_documentation_names_is_there() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text()
    named = re.findall(r"`(?:(tests/[\w/]+\.py)::)?(test_\w+)`", text)
    assert len(named) > 30
    file = ""
    for where, name in named:
        file = where or file
        assert f"def {name}(" in (ROOT / file).read_text(), f"{file}::{name}"
