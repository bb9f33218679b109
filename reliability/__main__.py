"""``python -m reliability``: runs the scenarios and prints one table."""

from __future__ import annotations

import argparse
import faulthandler
import sys

from reliability import cancels, flips, growth, outages
from reliability.outcome import Outcome, table
from reliability.stores import CLOUDS, Store
from torchferry.testing.servers import ServerStartError

SCENARIOS = ("cancels", "outages", "growth", "flips")


def main() -> None:
    arguments = _parser().parse_args()
    outcomes: list[Outcome] = []
    for cloud in arguments.cloud or CLOUDS:
        try:
            with CLOUDS[cloud]() as store:
                for scenario in arguments.only or SCENARIOS:
                    outcomes += _run(scenario, store, arguments)
        except ServerStartError as error:
            sys.exit(str(error))
    print(table(outcomes))
    sys.stdout.flush()
    sys.exit(any(outcome.wrong or outcome.left for outcome in outcomes))


def _run(scenario: str, store: Store, arguments: argparse.Namespace) -> list[Outcome]:
    count, bandwidth, seed = arguments.count, arguments.bandwidth * 1e6, arguments.seed
    mib = arguments.mib or (64 if scenario == "outages" else 32)
    match scenario:
        case "cancels":
            return cancels.run(store, count=count or 200, mib=mib, bandwidth=bandwidth, seed=seed, say=_say)
        case "outages":
            return outages.run(store, seconds=arguments.seconds, mib=mib, bandwidth=bandwidth, say=_say)
        case "growth":
            return growth.run(store, count=count or 300, say=_say)
        case _:
            return flips.run(store, count=count or 5, mib=mib, seed=seed, say=_say)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
    faulthandler.dump_traceback_later(600, exit=True)  # nothing said for so long: something hangs


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m reliability", description=__doc__)
    parser.add_argument("--only", action="append", choices=SCENARIOS, help="only this; may be given again")
    parser.add_argument("--cloud", action="append", choices=list(CLOUDS), help="only this; may be given again")
    parser.add_argument("--count", type=int, help="tries: cancels (200), saves and loads (300), flips of a kind (5)")
    parser.add_argument("--seconds", type=float, default=30.0, help="length of an outage (30)")
    parser.add_argument("--mib", type=int, help="size of the checkpoint (32; 64 for outages)")
    parser.add_argument("--bandwidth", type=float, default=20.0, help="of the link, in MB/s, each way (20)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments and bytes (0)")
    return parser


if __name__ == "__main__":
    main()
