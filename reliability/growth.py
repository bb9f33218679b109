"""Saves and loads with a new filesystem each: whether memory and descriptors grow. In a process of its own (Linux)."""

from __future__ import annotations

import base64
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reliability.outcome import Outcome
from reliability.stores import Store
from torchferry.testing.forkserver import python

MOST_GROWTH_MIB = 16
MOST_DESCRIPTORS = 8


def run(store: Store, *, count: int, say: Callable[[str], None]) -> list[Outcome]:
    outcome = Outcome("saves and loads with a new filesystem each", store.cloud)
    with store.proxy() as proxy:
        request = base64.b64encode(pickle.dumps((count, store.url("growth.pt"), store.options(proxy)))).decode()
        command = [*python(), "-m", "reliability.growth", request]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        outcome.add_wrong(f"failed: {done.stderr.strip().splitlines()[-1]}")
        return [outcome]
    (rss, descriptors), (last_rss, last_descriptors) = (map(int, line.split()) for line in done.stdout.splitlines())
    first = _first(count)
    grown = last_rss - rss > MOST_GROWTH_MIB or last_descriptors - descriptors > MOST_DESCRIPTORS
    outcome.wrong, outcome.right = (count, 0) if grown else (0, count)
    outcome.notes[
        f"after {first}: {rss} MiB, {descriptors} descriptors; after {count}: {last_rss} MiB, {last_descriptors}"
    ] += 1
    say(" ".join(outcome.cells()))
    return [outcome]


def _first(count: int) -> int:
    """After how many it is measured first: 50 of 300. By then everything is imported and warm."""
    return max(1, count // 6)


def _measure(count: int, url: str, options: dict[str, Any]) -> None:
    import torch

    import torchferry

    obj = [torch.arange(1 << 17)]
    for index in range(1, count + 1):
        torchferry.save(obj, url, storage_options=options | {"skip_instance_cache": True})
        (found,) = torchferry.load(url, storage_options=options | {"skip_instance_cache": True})
        assert torch.equal(found, obj[0])
        if index in {_first(count), count}:
            fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            print(int(fields["VmRSS"].split()[0]) >> 10, len(list(Path("/proc/self/fd").iterdir())))


if __name__ == "__main__":
    _measure(*pickle.loads(base64.b64decode(sys.argv[1])))
