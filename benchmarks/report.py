"""Results as text."""

from __future__ import annotations

from typing import Any

from benchmarks import suites, targets
from benchmarks.works import GIB, MIB

Entry = dict[str, Any]

_WORKS = {
    "flat": "{size} in 64 tensors",
    "adam": "module of {size} and its Adam state (3x)",
    "small": "{size} in tensors of 4 KiB",
}


def case_title(case: dict[str, Any]) -> str:
    """What a case is, in words."""
    what = _WORKS[case["work"]].format(size=size_words(case["size"]))
    link = "; 30 ms and 90 MB/s a connection" if case["shaped"] else ""
    again = " in place of the same" if case.get("replaces") else ""
    return f"{case['verb']} {what}{again}, {case['scheme']}, {case['endpoint']}{link}; rounds: {case['rounds']}"


def case_table(case: dict[str, Any]) -> str:
    """One line a contender, the fastest first; of the bare sockets only the fastest, and one alone on a shaped link."""
    sockets = {targets.best_sockets(case)} | ({*suites.sockets(1)} if case["shaped"] else set())
    entries = {
        name: entry
        for name, entry in case["contenders"].items()
        if not name.startswith(targets.BEST_SOCKETS) or name in sockets or sockets == {None}
    }
    ferry = (entries.get(suites.FERRY) or entries.get(suites.FERRY_FILE[case["verb"]], {})).get("median")
    header = ("", "median s", "min", "max", "GB/s", "CPU s", "peak MiB", "moved", "time vs torchferry")
    measured = sorted((name for name in entries if "median" in entries[name]), key=lambda name: entries[name]["median"])
    lines = [header, *(_measured(name, entries[name], ferry) for name in measured)]
    text = _aligned(lines)
    for name, entry in entries.items():
        if name not in measured:
            text += f"\n{name}: {_failure(entry)}"
        elif entry["valid"] < len(entry["measurements"]):
            text += f"\n{name}: {len(entry['measurements']) - entry['valid']} measurements thrown away as invalid"
    return text


def targets_table(cases: list[dict[str, Any]]) -> str:
    """One line a target."""
    words = {True: "met", False: "MISSED", None: "not measured"}
    lines = [("target", "wanted", "measured", "")]
    lines += [(row.what, row.target, row.measured or "-", words[row.met]) for row in targets.rows(cases)]
    return _aligned(lines, left=2)


def _measured(name: str, entry: Entry, ferry: float | None) -> tuple[str, ...]:
    return (
        name,
        f"{entry['median']:.3f}",
        f"{entry['min']:.3f}",
        f"{entry['max']:.3f}",
        f"{entry['gb_per_second']:.2f}",
        f"{entry['cpu_seconds']:.2f}",
        f"{entry['peak_bytes'] / MIB:.0f}",
        f"{entry['moved']:.2f}x" if suites.is_remote(name) else "-",
        f"{entry['median'] / ferry:.2f}x" if ferry else "",
    )


def _failure(entry: Entry) -> str:
    if "missing" in entry:
        return f"not installed ({entry['missing']})"
    if "error" in entry:
        words = " ".join(entry["error"].split())
        return "failed: " + (words if len(words) <= 400 else f"{words[:150]} ... {words[-240:]}")
    return f"invalid: {entry.get('invalid', 'no measurement')}"


def _aligned(lines: list[tuple[str, ...]], left: int = 1) -> str:
    """Columns, the first ``left`` of them flush left."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]

    def cell(i: int, text: str) -> str:
        return text.ljust(widths[i]) if i < left else text.rjust(widths[i])

    rows = ["  ".join(cell(i, text) for i, text in enumerate(line)).rstrip() for line in lines]
    return "\n".join([rows[0], "-" * max(map(len, rows)), *rows[1:]])


def size_words(size: int) -> str:
    """A size as one writes it."""
    return f"{size / GIB:g} GiB" if size % GIB == 0 else f"{size / MIB:.0f} MiB"
