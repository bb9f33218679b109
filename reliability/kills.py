"""A process that saves is killed (SIGKILL): at each request of its save, before and after the store has done it.

Of local files: at random moments. Right: the object is the old one (or none, where there was none) or the new one,
whole; ``torchferry.clean`` removes everything that is left, and the next save goes well. "left behind" is what
``clean`` did not find.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch

import torchferry
from reliability.outcome import Outcome
from reliability.stores import Store
from reliability.works import MIB, OLD, state
from torchferry.testing import victims
from torchferry.testing.faultproxy import Fault

_CLEANS = 50  # something of the dead process may still be on its way to the store


def tensors(seed: int, mib: int) -> list[torch.Tensor]:
    """The same for each seed, in every process."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(-(1 << 62), 1 << 62, (MIB >> 1,), generator=generator) for _ in range(mib // 4)]


def save(url: str, options: dict[str, Any], seed: int, mib: int, started: Path | None = None) -> None:
    obj = tensors(seed, mib)
    if started:
        started.touch()
    torchferry.save(obj, url, storage_options=options, part_size=5 * MIB)


def run(store: Store, *, count: int | None, mib: int, seed: int, say: Callable[[str], None]) -> list[Outcome]:
    outcome = Outcome("kill of a save at every request", store.cloud)
    with store.proxy() as proxy:
        victims.start(save, store.url("kill-none.pt"), store.options(proxy), seed, mib).join()
        requests = len(proxy.log)
    moments = list(product(range(requests), ("hang", "lose_reply"), ("old", "nothing")))
    if count and count < len(moments):
        moments = random.Random(seed).sample(moments, count)
    for index, (request, action, before) in enumerate(moments):
        key = f"kill-{index:04}.pt"
        if before == "old":
            store.write(key, OLD)
        fault = Fault(skip=request, **{action: True})
        with store.proxy(fault) as proxy:
            victim = victims.start(save, store.url(key), store.options(proxy), seed + index, mib)
            fault.call = victim.kill
            victim.join()
        obj = tensors(seed + index, mib)
        found = state(store.read(key), obj)
        _judge(outcome, victim.exitcode, before, found)
        with store.proxy() as proxy:
            outcome.left += _clean(lambda key=key: len(store.staged(key)), store.url(key), store.options(proxy))
            torchferry.save(obj, store.url(key), storage_options=store.options(proxy), part_size=5 * MIB)
        if state(store.read(key), obj) != "new" or store.staged(key):
            outcome.add_wrong("the next save")
        say(f"{store.cloud} {index + 1}/{len(moments)} kill at request {request + 1} ({action}): {before} -> {found}")
    return [outcome]


def run_locally(*, count: int, mib: int, seed: int, say: Callable[[str], None]) -> list[Outcome]:
    outcome = Outcome("kill of a save at a random moment", "local")
    randomly = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="kills-") as name:
        directory = Path(name)
        seconds = _seconds_of_a_save(directory, seed, mib)
        for index in range(count):
            path, started, before = directory / f"kill-{index:04}.pt", directory / f"started-{index}", "nothing"
            if randomly.random() < 0.5:
                path.write_bytes(OLD)
                before = "old"
            victim = victims.start(save, str(path), {}, seed + index, mib, started)
            while not started.exists():
                time.sleep(0.001)
            time.sleep(randomly.uniform(0, seconds))
            victim.kill()
            victim.join()
            obj = tensors(seed + index, mib)
            found = state(path.read_bytes() if path.exists() else None, obj)
            _judge(outcome, victim.exitcode, before, found)

            def staged() -> int:
                return len(list(directory.glob(".torchferry-*")))

            left = staged()
            if index % 2:
                outcome.left += _clean(staged, name, {})
            torchferry.save(obj, path)  # takes away what its own predecessor has left
            outcome.left += staged()
            if state(path.read_bytes(), obj) != "new":
                outcome.add_wrong("the next save")
            path.unlink()
            say(f"local {index + 1}/{count}: {before} -> {found}, {left} left")
    return [outcome]


def _seconds_of_a_save(directory: Path, seed: int, mib: int) -> float:
    started = directory / "started"
    victim = victims.start(save, str(directory / "none.pt"), {}, seed, mib, started)
    while not started.exists():
        time.sleep(0.001)
    begun = time.monotonic()
    victim.join()
    return time.monotonic() - begun


def _judge(outcome: Outcome, exitcode: int | None, before: str, found: str) -> None:
    if found == "new" or (exitcode and found == before):
        outcome.right += 1
        outcome.notes[f"{'killed' if exitcode else 'over before the kill'}: was {before}, is {found}"] += 1
    else:
        outcome.add_wrong(f"ended with {exitcode}: was {before}, is {found}")


def _clean(staged: Callable[[], int], url: str, options: dict[str, Any]) -> int:
    """Cleans; returns how much is left."""
    for _ in range(_CLEANS):
        torchferry.clean(url, older_than=0, storage_options=options)
        if not staged():
            break
        time.sleep(0.1)
    return staged()
