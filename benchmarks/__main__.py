"""``python -m benchmarks``: measures, prints tables, and writes JSON and a plot."""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import report, suites
from benchmarks.contenders import CONTENDERS
from benchmarks.contenders.ferry import OTHER_CHECKOUT
from benchmarks.run import run_case
from benchmarks.works import GIB, MIB
from torchferry.testing.forkserver import python
from torchferry.testing.servers import ServerStartError

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    arguments = _parser().parse_args()
    if arguments.list:
        _list()
        return
    path = arguments.output / f"{arguments.name}.json"
    if not arguments.report:
        try:
            _measure(arguments, path)
        except ServerStartError as error:
            sys.exit(str(error))
    cases = _read(path)
    if arguments.report:
        for case in cases:
            _show(case)
    if not arguments.smoke:
        print(report.targets_table(cases))
        _plot(cases, path.with_suffix(".svg"))
    print(path)


def _measure(arguments: argparse.Namespace, path: Path) -> None:
    """Runs the cases; each is written down when it is done, in place of what an earlier run found for it."""
    cases = list(_cases(arguments))
    rounds = arguments.rounds or (1 if arguments.smoke else 5)
    if arguments.endpoint == "seaweedfs" and any(case.scheme == "https" or case.shaped for case in cases):
        sys.exit(
            "SeaweedFS is measured over plain http only: leave out --scheme https and the suites https and shaped."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    # Another checkout is found by an interpreter that begins.
    interpreter = python() if arguments.smoke and not OTHER_CHECKOUT else [sys.executable]
    for case in cases:
        result = run_case(case, endpoint=arguments.endpoint, rounds=rounds, interpreter=interpreter, say=_say)
        kept = [other for other in _read(path) if other["id"] != case.id]
        path.write_text(json.dumps({"cases": [*kept, result]}, indent=1) + "\n")
        _show(result)


def _show(case: dict[str, Any]) -> None:
    print(f"\n{report.case_title(case)}\n\n{report.case_table(case)}\n", flush=True)


def _cases(arguments: argparse.Namespace) -> Any:
    names = list(suites.SUITES) if arguments.suite == ["all"] else arguments.suite
    cases = suites.smoke_cases() if arguments.smoke else (case for name in names for case in suites.SUITES[name]())
    for case in cases:
        chosen = case
        if arguments.size:
            chosen = replace(chosen, size=arguments.size)
        if arguments.scheme and case.scheme != suites.FILE:
            chosen = replace(chosen, scheme=arguments.scheme)
        if arguments.contender:
            chosen = replace(
                chosen, contenders=tuple(n for n in case.contenders if any(part in n for part in arguments.contender))
            )
        yield chosen


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    cases: list[dict[str, Any]] = json.loads(path.read_text())["cases"]
    order = [*suites.SUITES, "disk-replace"]
    return sorted(cases, key=lambda case: order.index(case["suite"]) if case["suite"] in order else -1)


def _plot(cases: list[dict[str, Any]], path: Path) -> None:
    try:
        from benchmarks import plot
    except ModuleNotFoundError as error:
        print(f"No plot: {error}")
        return
    if plot.draw(cases, path):
        print(path)


def _say(line: str) -> None:
    print(line, flush=True)


def _list() -> None:
    for name, make in suites.SUITES.items():
        print(f"{name}: {make.__doc__ or '1 GiB: everyone.'}")
    for verb in suites.VERBS:
        print(f"\n{verb}: " + ", ".join(name for of, name in CONTENDERS if of == verb))


def _names(text: str) -> list[str]:
    return text.split(",")


def _suites(text: str) -> list[str]:
    if unknown := set(_names(text)) - {"all", *suites.SUITES}:
        raise argparse.ArgumentTypeError(f"no such suite: {', '.join(sorted(unknown))}")
    return _names(text)


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d+)\s*(MiB|GiB)", text, re.IGNORECASE)
    if not found:
        raise argparse.ArgumentTypeError("a size is like 64MiB or 1GiB")
    return int(found[1]) * {"mib": MIB, "gib": GIB}[found[2].lower()]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--suite", type=_suites, default=["all"], help=f"of {', '.join(suites.SUITES)} (default: all)")
    parser.add_argument("--contender", type=_names, help="only those whose names contain one of these, comma-separated")
    parser.add_argument("--size", type=_size, help="of the module's tensors, instead of what the suite says: 256MiB")
    parser.add_argument("--scheme", choices=("http", "https"), help="instead of what the suite says")
    parser.add_argument("--rounds", type=int, help="measurements of each contender (default: 5)")
    parser.add_argument("--endpoint", choices=("nginx", "seaweedfs"), default="nginx")
    parser.add_argument(
        "--smoke", action="store_true", help="small sizes, one round, forked processes: no figures worth reading"
    )
    parser.add_argument("--name", default="latest", help="of the files with the results; other cases in them stay")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the directory of those files")
    parser.add_argument("--report", action="store_true", help="measure nothing: print what the files say, and plot it")
    parser.add_argument("--list", action="store_true", help="print what there is")
    return parser


if __name__ == "__main__":
    main()
