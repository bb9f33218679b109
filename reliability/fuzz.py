"""Mutants of real checkpoints of every format, at every entry point (``torchferry.testing.fuzz``).

Right: what was saved. Clear error: one of torchferry's. Wrong: anything else, 2 s of CPU time, 64 MiB beyond the file,
or text that acts on a terminal. "slowest" is CPU time.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from reliability.outcome import Outcome
from reliability.stores import Store
from torchferry.testing import fuzz

AT_ONCE = 2500  # mutants in a process: what ends it ends no more; each begins with 5 s of imports


def run(store: Store, *, count: int, seed: int, say: Callable[[str], None]) -> list[Outcome]:
    outcome = Outcome("mutants of checkpoints", store.cloud)
    with store.proxy() as proxy:
        for start in range(0, count, AT_ONCE):
            report = fuzz.run(
                min(AT_ONCE, count - start),
                seed,
                start,
                put=lambda name, data: put(store, f"fuzz/{name}", data),
                options=store.options(proxy),
            )
            add(outcome, report)
            proxy.log.clear()
            say(" ".join(outcome.cells()))
    return [outcome]


def run_locally(*, count: int, seed: int, say: Callable[[str], None]) -> list[Outcome]:
    outcome = Outcome("mutants of checkpoints", "local")
    for start in range(0, count, AT_ONCE):
        arguments = [str(min(AT_ONCE, count - start)), "--seed", str(seed), "--start", str(start)]
        add(outcome, reported("torchferry.testing.fuzz", *arguments))
        say(" ".join(outcome.cells()))
    return [outcome]


def put(store: Store, key: str, data: bytes) -> str:
    store.write(key, data)
    return store.url(key)


def reported(module: str, *arguments: str) -> dict[str, Any] | str:
    """What a module prints as JSON; or, where its process died, what it said last."""
    command = [sys.executable, "-W", "ignore", "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or "nothing").splitlines()[-1]
        return f"the process ended with {done.returncode} after {last}"
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def add(outcome: Outcome, report: dict[str, Any] | str) -> None:
    """Adds what :func:`torchferry.testing.fuzz.run` or :func:`torchferry.testing.hostile.run` returned."""
    if isinstance(report, str):
        outcome.add_wrong(report)
        return
    outcome.right += report["right"]
    outcome.clear += report["clear error"] + report.get("own error", 0)
    outcome.slowest = max(outcome.slowest, report["slowest"])
    for kind in fuzz.UNWANTED:
        for found in report.get(kind, ()):
            outcome.add_wrong(f"{kind}: {found}")
