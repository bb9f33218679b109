"""``python -m reliability``: runs the scenarios and prints one table."""

from __future__ import annotations

import argparse
import faulthandler
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from reliability import cancels, flips, fuzz, growth, hostile, kills, managed, outages, resaves, series
from reliability.outcome import Outcome, table
from reliability.stores import CLOUDS, Store
from torchferry.testing.forkserver import python
from torchferry.testing.servers import ServerStartError

USUAL = ("cancels", "outages", "growth", "flips", "kills", "hostile", "fuzz")
LONG = ("managed", "resaves", "series")
LOCAL = "local"


def main() -> None:
    arguments = _parser().parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored
    clouds = arguments.cloud or [LOCAL, *CLOUDS]
    outcomes: list[Outcome] = []
    if len(clouds) > 1:
        outcomes = _run_side_by_side(clouds, arguments)
    else:
        for found in _run_cloud(clouds[0], arguments):
            outcomes += found
            if arguments.rows:
                Path(arguments.rows).write_bytes(pickle.dumps(outcomes))
    if not arguments.rows:
        print(table(outcomes))
    sys.stdout.flush()
    sys.exit(any(outcome.wrong or outcome.left for outcome in outcomes))


def _run_side_by_side(clouds: list[str], arguments: argparse.Namespace) -> list[Outcome]:
    """Runs each cloud in a process of its own: most of the time they wait for slow links and outages."""
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="reliability-") as name:
        rows = {cloud: Path(name, cloud) for cloud in clouds}
        chosen = [f"--only={scenario}" for scenario in _chosen(arguments)]
        options = {name: getattr(arguments, name) for name in ("count", "seconds", "mib", "bandwidth", "seed")}
        chosen += [f"--{name}={value}" for name, value in options.items() if value is not None]
        command = [*python(), "-m", "reliability", *chosen]
        started = {
            cloud: subprocess.Popen([*command, f"--cloud={cloud}", f"--rows={path}"]) for cloud, path in rows.items()
        }
        for cloud, process in started.items():
            code = process.wait()
            found = pickle.loads(rows[cloud].read_bytes()) if rows[cloud].exists() else []
            outcomes += found
            if code != any(outcome.wrong or outcome.left for outcome in found):
                failed = Outcome("what is not in this table", cloud)
                failed.add_wrong(f"the process ended with {code}")
                outcomes.append(failed)
    return sorted(outcomes, key=lambda outcome: outcome.scenario)


def _chosen(arguments: argparse.Namespace) -> tuple[str, ...]:
    return tuple(arguments.only) if arguments.only else USUAL + LONG * arguments.all


def _run_cloud(cloud: str, arguments: argparse.Namespace) -> Iterator[list[Outcome]]:
    """The rows of each scenario, when it is over."""
    chosen = _chosen(arguments)
    if cloud == LOCAL:
        for scenario in chosen:
            yield _run_locally(scenario, arguments)
        return
    try:
        with CLOUDS[cloud]() as store:
            for scenario in chosen:
                yield _run(scenario, store, arguments)
                store.renew()  # all scenarios together write tens of GiB
    except ServerStartError as error:
        sys.exit(str(error))


def _run(scenario: str, store: Store, arguments: argparse.Namespace) -> list[Outcome]:
    count, bandwidth, seed = arguments.count, arguments.bandwidth * 1e6, arguments.seed
    mib = arguments.mib or (64 if scenario == "outages" else 32)
    match scenario:
        case "cancels":
            outcomes = cancels.run(store, count=count or 200, mib=mib, bandwidth=bandwidth, seed=seed, say=_say)
        case "outages":
            outcomes = outages.run(store, seconds=arguments.seconds, mib=mib, bandwidth=bandwidth, say=_say)
        case "growth":
            outcomes = growth.run(store, count=count or 300, say=_say)
        case "kills":
            outcomes = kills.run(store, count=count, mib=mib, seed=seed, say=_say)
        case "managed":
            with store.proxy() as proxy:
                place, options = managed.StorePlace(store, "managed"), store.options(proxy)
                outcomes = managed.run(place, store.cloud, options, count=count or 100, seed=seed, say=_say)
        case "series":
            with store.proxy() as proxy:
                place, options = managed.StorePlace(store, "series"), store.options(proxy)
                outcomes = series.run(place, store.cloud, options, count=count or 1000, say=_say)
        case "resaves":
            outcomes = resaves.run(store, count=count or 50, mib=mib, seed=seed, say=_say)
        case "hostile":
            outcomes = hostile.run(store, say=_say)
        case "fuzz":
            outcomes = fuzz.run(store, count=count or 500, seed=seed, say=_say)
        case _:
            outcomes = flips.run(store, count=count or 5, mib=mib, seed=seed, say=_say)
    return outcomes


def _run_locally(scenario: str, arguments: argparse.Namespace) -> list[Outcome]:
    """The same without a store; of some scenarios there is nothing to do."""
    count, mib, seed = arguments.count, arguments.mib or 32, arguments.seed
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix=f"{scenario}-") as name:
        place = managed.LocalPlace(Path(name) / "run")
        match scenario:
            case "kills":
                outcomes = kills.run_locally(count=count or 100, mib=mib, seed=seed, say=_say)
            case "managed":
                outcomes = managed.run(place, LOCAL, {}, count=count or 100, seed=seed, say=_say)
            case "series":
                outcomes = series.run(place, LOCAL, {}, count=count or 1000, say=_say)
            case "resaves":
                outcomes = resaves.run_locally(count=count or 50, mib=mib, seed=seed, say=_say)
            case "hostile":
                outcomes = hostile.run_locally(say=_say)
            case "fuzz":
                outcomes = fuzz.run_locally(count=count or 20_000, seed=seed, say=_say)
    return outcomes


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
    faulthandler.dump_traceback_later(1800, exit=True)  # nothing said for so long: something hangs


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m reliability", description=__doc__)
    every = ", ".join(LONG)
    parser.add_argument("--all", action="store_true", help=f"also what is about series of checkpoints: {every}")
    parser.add_argument("--only", action="append", choices=USUAL + LONG, help="only this; may be given again")
    parser.add_argument("--cloud", action="append", choices=[LOCAL, *CLOUDS], help="only this; may be given again")
    parser.add_argument(
        "--count",
        type=int,
        help="tries: cancels (200), saves and loads (300), flips (5), resaves (50), kills (each request), mutants "
        "(500, and 20,000 of local files), others (100)",
    )
    parser.add_argument("--seconds", type=float, default=30.0, help="length of an outage (30)")
    parser.add_argument("--mib", type=int, help="size of the checkpoint (32; 64 for outages)")
    parser.add_argument("--bandwidth", type=float, default=20.0, help="of the link, in MB/s, each way (20)")
    parser.add_argument("--rows", help=argparse.SUPPRESS)  # where to put the outcomes, for who prints the table
    parser.add_argument("--seed", type=int, default=0, help="of the random moments and bytes (0)")
    return parser


if __name__ == "__main__":
    main()
