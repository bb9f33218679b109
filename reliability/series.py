"""A long series with a CheckpointManager: what is left of it, and whether memory and descriptors grow (Linux).

In a process of its own. "slowest" is the longest that a call of ``save`` took.
"""

from __future__ import annotations

import base64
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reliability.managed import Place
from reliability.outcome import Outcome

KEPT = 3
MOST_GROWTH_MIB = 16
MOST_DESCRIPTORS = 8


def run(place: Place, where: str, options: dict[str, Any], *, count: int, say: Callable[[str], None]) -> list[Outcome]:
    outcome = Outcome(f"steps of one series, {KEPT} kept", where)
    request = base64.b64encode(pickle.dumps((count, place.url, options))).decode()
    command = [sys.executable, "-m", "reliability.series", request]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        outcome.add_wrong(f"failed: {done.stderr.strip().splitlines()[-1]}")
        return [outcome]
    *measured, slowest = done.stdout.splitlines()
    (rss, descriptors), (last_rss, last_descriptors) = (map(int, line.split()) for line in measured)
    outcome.slowest = float(slowest)
    left = [name for name in place.names() if name.endswith(".pt")]
    grown = last_rss - rss > MOST_GROWTH_MIB or last_descriptors - descriptors > MOST_DESCRIPTORS
    outcome.wrong, outcome.right = (count, 0) if grown or len(left) != KEPT else (0, count)
    outcome.left = place.staged()
    outcome.notes[
        f"after {_first(count)}: {rss} MiB, {descriptors} descriptors; after {count}: {last_rss} MiB, "
        f"{last_descriptors}; {len(left)} checkpoints left"
    ] += 1
    say(" ".join(outcome.cells()))
    return [outcome]


def _first(count: int) -> int:
    return max(1, count // 5)


def _measure(count: int, url: str, options: dict[str, Any]) -> None:
    import torch

    import torchferry

    state = {"weight": torch.zeros(1 << 16), "step": 0}
    slowest = 0.0
    with torchferry.CheckpointManager(url, max_to_keep=KEPT, storage_options=options) as manager:
        for step in range(1, count + 1):
            state["step"] = step
            begun = time.perf_counter()
            manager.save(step, state, {"loss": 1 / step})
            if step > _first(count):  # by then everything is imported and warm
                slowest = max(slowest, time.perf_counter() - begun)
            if step in {_first(count), count}:
                fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
                print(int(fields["VmRSS"].split()[0]) >> 10, len(list(Path("/proc/self/fd").iterdir())))
    print(slowest)


if __name__ == "__main__":
    _measure(*pickle.loads(base64.b64decode(sys.argv[1])))
