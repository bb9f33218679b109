"""Two ranks save over a sharded checkpoint, and one or both are killed at a random moment.

Right: the old checkpoint or the new one is there, whole, and no rank waits beyond its group's timeout. What is left is
found by ``clean``.

The ranks are forked from a process that has imported everything and never used it: ``python -m reliability.resaves``.
"""

from __future__ import annotations

import base64
import json
import os
import pickle
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import fsspec

from reliability.outcome import Outcome
from reliability.stores import Store
from torchferry.testing.forkserver import python

ROOT = Path(__file__).parents[1]
TIMEOUT = 30.0  # seconds: of the process group
RANKS = 2


def run(store: Store, *, count: int, mib: int, seed: int, say: Callable[[str], None]) -> list[Outcome]:
    with store.proxy() as proxy:
        return [_told(store.cloud, store.url("resaved"), store.options(proxy), count, mib, seed, say)]


def run_locally(*, count: int, mib: int, seed: int, say: Callable[[str], None]) -> list[Outcome]:
    with tempfile.TemporaryDirectory() as directory:
        return [_told("local", f"{directory}/resaved", {}, count, mib, seed, say)]


def _told(
    cloud: str, url: str, options: dict[str, Any], count: int, mib: int, seed: int, say: Callable[[str], None]
) -> Outcome:
    order = {"url": url, "options": options, "count": count, "mib": mib, "seed": seed}
    request = base64.b64encode(pickle.dumps(order)).decode()  # a token is no JSON
    command = [*python(), "-m", "reliability.resaves", request]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    outcome = Outcome("sharded resave, killed", cloud)
    found = json.loads(done.stdout.splitlines()[-1])
    outcome.right, outcome.left, outcome.slowest = found["right"], found["left"], found["slowest"]
    for what in found["wrong"]:
        outcome.add_wrong(what)
    outcome.notes.update(found["notes"])
    say(" ".join(outcome.cells()))
    return outcome


# --- in the process that forks


def main() -> None:
    order = pickle.loads(base64.b64decode(sys.argv[1]))
    warnings.filterwarnings("ignore")
    import torch.distributed.checkpoint  # what the ranks need is there when they are forked
    import torch.distributed.tensor  # noqa: F401

    import torchferry.distributed  # noqa: F401

    if order["options"]:
        fsspec.get_filesystem_class(order["url"].split(":")[0])
    randomly = random.Random(order["seed"])
    found: dict[str, Any] = {"right": 0, "left": 0, "slowest": 0.0, "wrong": [], "notes": {}}
    with tempfile.TemporaryDirectory() as groups:
        there, duration = 1.0, 0.0
        for _ in range(3):  # how long a save takes
            duration = max(_save(order, f"{groups}/{random.random()}", there, lambda _: None, found)[0], 0.05)
        for number in range(order["count"]):
            new = there + 1.0
            victims = randomly.choice(([0], [1], [0, 1]))
            moment = randomly.uniform(0.0, 1.2 * duration)

            def kill(ranks: list[int], victims: list[int] = victims, moment: float = moment) -> None:
                time.sleep(moment)
                for victim in victims:
                    os.kill(ranks[victim], signal.SIGKILL)

            _save(order, f"{groups}/{number}", new, kill, found)
            value = _in_child(_value, order)
            if value not in {there, new}:
                found["wrong"].append(f"neither old nor new: {value}")
                continue
            found["right"] += 1
            which = "new" if value == new else "old"
            found["notes"][f"the {which} one is there"] = found["notes"].get(f"the {which} one is there", 0) + 1
            there = value
        found["left"] = _in_child(_clean, order)
        if _in_child(_value, order) != there:
            found["wrong"].append("clean has removed what was needed")
    print(json.dumps(found))


def _save(
    order: dict[str, Any], group: str, fill: float, act: Callable[[list[int]], None], found: dict[str, Any]
) -> tuple[float, list[int]]:
    """Saves with both ranks; ``act`` is called when they begin. Returns seconds and statuses."""
    ready, begin = os.pipe()
    ranks = []
    for rank in range(RANKS):
        pid = os.fork()
        if pid == 0:
            os.close(ready)
            _rank(order, group, rank, fill, begin)
        ranks.append(pid)
    os.close(begin)
    for _ in ranks:
        select.select([ready], [], [], TIMEOUT)
        os.read(ready, 1)
    began = time.monotonic()
    act(ranks)
    statuses = []
    for pid in ranks:
        while not (done := os.waitpid(pid, os.WNOHANG))[0]:
            if time.monotonic() - began > 2 * TIMEOUT:
                found["wrong"].append("a rank hangs")
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.005)
        statuses.append(done[1])
    os.close(ready)
    seconds = time.monotonic() - began
    found["slowest"] = max(found["slowest"], seconds)
    return seconds, statuses


def _rank(order: dict[str, Any], group: str, rank: int, fill: float, begin: int) -> None:
    import torch
    import torch.distributed as dist

    import torchferry.distributed as sharded

    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    status = 1
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{group}", rank=rank, world_size=RANKS, timeout=timedelta(seconds=TIMEOUT)
        )
        state = {f"{index}": torch.full((order["mib"] << 16,), fill) for index in range(4)}
        dist.barrier()
        os.write(begin, b"x")
        sharded.save(state, order["url"], storage_options=order["options"] or None)
        status = 0
    finally:
        os._exit(status)


def _value(order: dict[str, Any]) -> float:
    """The one value of the checkpoint that is there."""
    import torchferry

    loaded = torchferry.load(order["url"], storage_options=order["options"] or None)
    values = {float(value) for tensor in loaded.values() for value in tensor.unique()}
    return values.pop() if len(values) == 1 else -1.0


def _clean(order: dict[str, Any]) -> int:
    """What is left after all that is stale was removed."""
    import torchferry

    where = order["url"]
    torchferry.clean(where, older_than=0, storage_options=order["options"] or None)
    again = torchferry.clean(where, older_than=0, dry_run=True, storage_options=order["options"] or None)
    return len(again.removed) + len(again.kept)


def _in_child(func: Callable[[dict[str, Any]], float], order: dict[str, Any]) -> Any:
    """What ``func(order)`` returns in a forked process: this one never starts a thread."""
    answers, answer = os.pipe()
    if os.fork() == 0:
        result: Any = None
        try:
            result = func(order)
        except BaseException as error:  # noqa: BLE001 - it is what was found
            result = f"{type(error).__name__}: {error}"
        finally:
            os.write(answer, json.dumps(result).encode())
            os._exit(0)
    os.close(answer)
    with os.fdopen(answers, "rb") as source:
        data = source.read()
    os.wait()
    return json.loads(data)


if __name__ == "__main__":
    main()
