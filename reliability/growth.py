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
        measured = {}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                calls, *found = map(int, line.split())
                measured[calls] = found
                say(f"{store.cloud} {calls}/{count} calls: {found[0]} MiB, {found[1]} descriptors")
    if process.returncode:
        outcome.add_wrong(f"the process ended with {process.returncode}")
        return [outcome]
    first = min(measured)
    (rss, descriptors), (last_rss, last_descriptors) = measured[first], measured[max(measured)]
    grown = last_rss - rss > MOST_GROWTH_MIB or last_descriptors - descriptors > MOST_DESCRIPTORS
    outcome.wrong, outcome.right = (count, 0) if grown else (0, count)
    outcome.notes[
        f"after {first}: {rss} MiB, {descriptors} descriptors; after {count}: {last_rss} MiB, {last_descriptors}"
    ] += 1
    say(" ".join(outcome.cells()))
    return [outcome]


def _measure(count: int, url: str, options: dict[str, Any]) -> None:
    import torch

    import torchferry

    obj = [torch.arange(1 << 17)]
    step = max(2, count // 6)  # by the first, everything is imported and warm
    for calls in range(2, count + 1, 2):
        torchferry.save(obj, url, storage_options=options | {"skip_instance_cache": True})
        (found,) = torchferry.load(url, storage_options=options | {"skip_instance_cache": True})
        assert torch.equal(found, obj[0])
        if calls % step in {0, 1} or calls == count:
            fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            descriptors = len(list(Path("/proc/self/fd").iterdir()))
            print(calls, int(fields["VmRSS"].split()[0]) >> 10, descriptors, flush=True)


if __name__ == "__main__":
    _measure(*pickle.loads(base64.b64decode(sys.argv[1])))
