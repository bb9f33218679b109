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
