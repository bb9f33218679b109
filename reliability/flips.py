"""One bit flips on the way, once or each time.

Right: it is noticed and mended. Clear error: it is noticed, and nothing is stored.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable

from reliability.outcome import Outcome
from reliability.stores import Store
from reliability.works import MIB, same, state, tensors, work
from torchferry.testing.faultproxy import Fault, Request

GIVE_UP_AFTER = 5.0  # seconds, where a bit flips each time: nothing else ends such a try
SCENARIOS = (("save", "up"), ("copy", "up"), ("load", "down"), ("copy", "down"))


def run(store: Store, *, count: int, mib: int, seed: int, say: Callable[[str], None]) -> list[Outcome]:
    randomly = random.Random(seed)
    outcomes = []
    for kind, way in SCENARIOS:
        for times in (1, None):
            outcome = Outcome(f"bit flips {way}, {'once' if times else 'each time'}, in a {kind}", store.cloud)
            for index in range(count):
                key = f"flip-{kind}-{way}-{times}-{index}.pt"
                _try(store, outcome, kind, way, times, key, mib, randomly)
                say(" ".join(outcome.cells()))
            outcomes.append(outcome)
    return outcomes


def _try(
    store: Store, outcome: Outcome, kind: str, way: str, times: int | None, key: str, mib: int, randomly: random.Random
) -> None:
    """Flips a bit of the body of a request that is long enough; of a later one where the chosen one is too short."""
    first = randomly.randrange(3)
    for skip in (*range(first, first + 4), *range(first)):
        if _flipped(
            store, outcome, kind, way, times, f"{skip}-{key}", mib, skip, randomly.randrange(MIB >> 4, 4 * MIB)
        ):
            return
    outcome.notes["no body was long enough: not counted"] += 1


def _flipped(
    store: Store, outcome: Outcome, kind: str, way: str, times: int | None, key: str, mib: int, skip: int, byte: int
) -> bool:
    """Does the work once; returns whether a bit flipped, and counts what became of it then."""
    obj = tensors(mib)
    if way == "up":
        methods, target = store.carries_data
        faults = [
            Fault(method=method, target=target, skip=skip, times=times, corrupt_upload_byte=byte)
            for method in methods.split("|")
        ]
    else:
        faults = [Fault(method="GET", skip=skip, times=times, corrupt_download_byte=byte)]
    with store.proxy(*faults) as proxy:
        job = work(kind, store, store.options(proxy), key, obj, None if times else GIVE_UP_AFTER)
        try:
            result = job.run()
        except BaseException as error:  # noqa: BLE001 - each is an outcome
            result = error
        if not any(request.fault and _length(request, way) > byte for request in proxy.log):
            return False
    found = state(store.read(key), obj)
    if isinstance(result, BaseException):
        if kind != "load" and found != "nothing":
            outcome.add_wrong(f"{type(result).__name__}, and the store has {found}")
        else:
            outcome.add_error(result)
    elif found == "new" and (kind != "load" or same(result, obj)):
        outcome.right += 1
    else:
        outcome.add_wrong(f"not noticed: the store has {found}")
    outcome.left += len(store.staged(key))
    return True


def _length(request: Request, way: str) -> int:
    if way == "up":
        return int(request.headers.get("content-length", 0))
    asked = request.headers.get("x-ms-range") or request.headers.get("range", "")
    span = re.fullmatch(r"bytes=(\d+)-(\d+)", asked)
    return int(span[2]) - int(span[1]) + 1 if span else 0
