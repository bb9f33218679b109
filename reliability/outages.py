"""Outages in the middle of a save, a load or a copy. Right: it is survived, and what is stored or loaded is whole.

"slowest" is the longest that a call took, the outage included.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from reliability.outcome import Outcome
from reliability.stores import Store
from reliability.works import same, state, tensors, work
from torchferry.testing.faultproxy import Outage

OUTAGES: dict[Outage, str] = {"refuse": "refused connections", "silence": "silence", 503: "503"}
KINDS = ("save", "load", "copy")
SECONDS_UNTIL_CALLED_HUNG = 240.0


def run(store: Store, *, seconds: float, mib: int, bandwidth: float, say: Callable[[str], None]) -> list[Outcome]:
    outcomes = []
    for outage, name in OUTAGES.items():  # the three kinds side by side: each waits most of the time
        tries = [Outcome(f"{seconds:g} s of {name} in a {kind}", store.cloud) for kind in KINDS]
        threads = [
            threading.Thread(target=_try, args=(store, outcome, outage, kind, seconds, mib, bandwidth))
            for kind, outcome in zip(KINDS, tries, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread, outcome in zip(threads, tries, strict=True):
            thread.join()
            say(" ".join(outcome.cells()))
        outcomes += tries
    return outcomes


def _try(store: Store, outcome: Outcome, outage: Outage, kind: str, seconds: float, mib: int, bandwidth: float) -> None:
    obj, key = tensors(mib), f"outage-{outage}-{kind}.pt"
    results: list[object] = []
    with store.proxy(bandwidth=bandwidth) as proxy:
        job = work(kind, store, store.options(proxy), key, obj)

        def call() -> None:
            try:
                results.append(job.run())
            except BaseException as error:  # noqa: BLE001 - each is an outcome
                results.append(error)

        thread = threading.Thread(target=call, daemon=True)  # one that hangs is left behind
        began = time.monotonic()
        thread.start()
        proxy.wait_for(target=key)
        time.sleep(0.2 * mib * 2**20 / bandwidth)
        with proxy.outage(outage):
            thread.join(seconds)
        thread.join(SECONDS_UNTIL_CALLED_HUNG)
        outcome.slowest = time.monotonic() - began
    found = state(store.read(key), obj)
    if not results:
        outcome.add_wrong(f"had not ended {SECONDS_UNTIL_CALLED_HUNG:g} s after the outage")
    elif isinstance(results[0], BaseException):
        if found == "damaged":
            outcome.add_wrong(f"{results[0]!r}, and the store has a damaged object")
        else:
            outcome.add_error(results[0])
    elif found == "new" and (kind != "load" or same(results[0], obj)):
        outcome.right += 1
    else:
        outcome.add_wrong(f"ended well, and the store has {found}")
    outcome.left = len(store.staged(key))
