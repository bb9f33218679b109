"""Cancels at random moments of a save or a copy, over a link of so many bytes a second.

Right: once the call is over, and ever after, the old object is there, or none where there was none. Or the new one,
where the request that publishes it was sent before the cancel: it came in before, or at most 0.1 s after, because a
cancel reaches the loop that sends a moment later than the caller's, and a request the proxy a moment after it is sent.
"slowest" is from the cancel to the end of the call.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from reliability.outcome import Outcome
from reliability.stores import Store
from reliability.works import OLD, Work, state, tensors, work

_ON_ITS_WAY = 0.1  # seconds

KINDS = ("task.cancel", "asyncio.timeout", "Ctrl-C", "Ctrl-C twice")


@dataclass
class Moment:
    """When the cancel came."""

    at: float = 0.0
    error: BaseException | None = None
    ended: float = 0.0

    def note(self) -> None:
        self.at = time.monotonic()


def run(
    store: Store, *, count: int, mib: int, bandwidth: float, seed: int, say: Callable[[str], None]
) -> list[Outcome]:
    randomly = random.Random(seed)
    obj = tensors(mib)
    expected = mib * 2**20 / bandwidth
    outcomes = {kind: Outcome(f"cancel of a {kind}", store.cloud) for kind in ("save", "copy")}
    unpublished: list[tuple[str, str, str]] = []
    with store.proxy(bandwidth=bandwidth) as proxy:
        options = store.options(proxy)
        for index in range(count):
            kind, how = ("save", "copy")[index % 2], KINDS[index // 2 % len(KINDS)]
            key = f"cancel-{index:04}.pt"
            before = randomly.choice(["old", "nothing"])
            if before == "old":
                store.write(key, OLD)
            job = work(kind, store, options, key, obj)
            moment = _cancel(how, job, randomly.uniform(0, 1.1 * expected))
            outcome = outcomes[kind]
            found = state(store.read(key), obj)
            left = store.staged(key)
            outcome.notes[f"{how}: left something when it was over"] += bool(left)
            sent_before = [request for request in list(proxy.log) if request.at < moment.at + _ON_ITS_WAY]
            _judge(outcome, how, moment, before, found, store.was_published(sent_before, key))
            if found == before:
                unpublished.append((kind, key, before))
            say(f"{store.cloud} {index + 1}/{count} {kind} {how}: {found}, {len(left)} left")
    time.sleep(3)  # what a cancelled call may still do
    for kind, key, before in unpublished:
        if (found := state(store.read(key), obj)) != before:
            outcomes[kind].right -= 1
            outcomes[kind].add_wrong(f"appeared after the call was over: {found}")
    for kind, outcome in outcomes.items():
        keys = {f"cancel-{index:04}.pt" for index in range(count) if ("save", "copy")[index % 2] == kind}
        outcome.left = sum(any(key in name for key in keys) for name in store.staged())
        outcome.notes = +outcome.notes
    return list(outcomes.values())


def _judge(outcome: Outcome, how: str, moment: Moment, before: str, found: str, published_before: bool) -> None:
    if moment.error is None:
        if found == "new":
            outcome.right += 1
            outcome.notes["was over before the cancel"] += 1
        else:
            outcome.add_wrong(f"{how}: returned, and the store has {found}")
        return
    outcome.slowest = max(outcome.slowest, moment.ended - moment.at)
    if moment.ended - moment.at > 1:
        outcome.notes[f"{how}: took longer than 1 s"] += 1
    if not isinstance(moment.error, asyncio.CancelledError | TimeoutError | KeyboardInterrupt):
        outcome.add_error(moment.error)
    elif found == before:
        outcome.right += 1
    elif found == "new" and published_before:
        outcome.right += 1
        outcome.notes["the request that publishes was sent before the cancel"] += 1
    else:
        outcome.add_wrong(f"{how}: was {before}, is {found}")


def _cancel(how: str, job: Work, after: float) -> Moment:
    moment = Moment()
    try:
        if how == "task.cancel":
            asyncio.run(_cancel_task(job, after, moment))
        elif how == "asyncio.timeout":
            asyncio.run(_time_out(job, after, moment))
        else:
            _interrupt(job, after, moment, times=2 if how.endswith("twice") else 1)
    except BaseException as error:  # noqa: BLE001 - each is an outcome
        moment.error = error
    moment.ended = time.monotonic()
    if not moment.at:  # the work failed by itself before the cancel
        moment.at = moment.ended
    return moment


async def _cancel_task(job: Work, after: float, moment: Moment) -> None:
    async def call() -> None:
        await job.start()

    task = asyncio.create_task(call())
    asyncio.get_running_loop().call_later(after, lambda: (moment.note(), task.cancel()))
    await task


async def _time_out(job: Work, after: float, moment: Moment) -> None:
    async with asyncio.timeout(after):
        asyncio.get_running_loop().call_later(after, moment.note)
        await job.start()


def _interrupt(job: Work, after: float, moment: Moment, *, times: int) -> None:
    """Has the process get a SIGINT, as Ctrl-C in a terminal does."""
    over = threading.Event()

    def press() -> None:
        if over.wait(after):
            return
        moment.note()
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
            if over.wait(0.2):
                return

    presser = threading.Thread(target=press)
    presser.start()
    failure: BaseException | None = None
    try:
        job.run()
    except BaseException as error:  # noqa: BLE001 - each is an outcome
        failure = error
    ended = False
    while not ended:  # the second one may come here
        try:
            over.set()
            presser.join()
            ended = True
        except KeyboardInterrupt:
            pass
    if failure:
        raise failure
