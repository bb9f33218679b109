"""Files that were made to crash, hang, fill the memory or deceive, each with every entry point; in a store, with some.

The files and the values for the Deck are those of ``torchferry.testing.hostile``; right, wrong and "slowest" are as in
``reliability.fuzz``.
"""

from __future__ import annotations

from collections.abc import Callable

from reliability.fuzz import add, put, reported
from reliability.outcome import Outcome
from reliability.stores import Store
from torchferry.testing import hostile


def run(store: Store, *, say: Callable[[str], None]) -> list[Outcome]:
    outcome = Outcome("hostile files", store.cloud)
    with store.proxy() as proxy:
        report = hostile.run(
            lambda name, data: put(store, f"hostile/{name}", data),
            store.options(proxy),
            short=True,
            say=lambda _: proxy.log.clear(),
        )
    add(outcome, report)
    say(" ".join(outcome.cells()))
    return [outcome]


def run_locally(*, say: Callable[[str], None]) -> list[Outcome]:
    outcome = Outcome("hostile files", "local")
    add(outcome, reported("torchferry.testing.hostile"))
    say(" ".join(outcome.cells()))
    return [outcome]
