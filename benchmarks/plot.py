"""The picture that the README shows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks import report, suites, targets
from benchmarks.contenders import CONTENDERS
from benchmarks.works import MIB

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

INK, FAINT, GRID = "#24292f", "#6e7781", "#e6e9ed"
FERRY, PEER, FLOOR = "#0b7285", "#b6c2cd", "#e9dcc3"
SECOND = "#e8590c"


def draw(cases: list[dict[str, Any]], path: Path) -> bool:
    """Draws what was measured of: save, load, growth. False where that is nothing."""
    bars = [case for suite in ("save", "load") for case in cases if case["suite"] == suite]
    growth = [case for case in cases if case["suite"] == "growth"]
    if not bars:
        return False
    mpl.rcParams.update(
        {"font.family": "DejaVu Sans", "font.size": 10, "svg.fonttype": "path", "svg.hashsalt": "bench"}
    )
    rows = max(len(_entries(case)) for case in bars)
    heights = [rows, *([8] if growth else [])]
    figure = Figure(figsize=(12, 0.33 * sum(heights) + 1.3 * len(heights)), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(h_pad=0.12, w_pad=0.12, rect=(0, 0.025, 1, 0.975))
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    for column, case in enumerate(bars[:2]):
        _bars(figure.add_subplot(grid[0, column]), case, rows)
    if growth:
        _growth(figure.add_subplot(grid[1, 0]), growth, "median", "seconds", 1)
        _growth(figure.add_subplot(grid[1, 1]), growth, "peak_bytes", "peak memory, MiB", MIB)
    environment = bars[0]["environment"]
    words = (
        f"Medians of {bars[0]['rounds']} rounds, lines from slowest to fastest; sand: bare sockets. "
        f"{environment['cpus']} x {environment['cpu']}, {bars[0]['endpoint']} on the same machine, "
        f"{bars[0]['scheme']}, torch {environment['versions']['torch']}, {bars[0]['date'][:10]}"
    )
    figure.text(0.012, 0.008, words, color=FAINT, fontsize=8.5)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    return True


def _entries(case: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """What has a bar: the slowest first, because the axis points up; of the bare sockets only the best."""
    best = targets.best_sockets(case)
    shown = [
        (name, entry)
        for name, entry in case["contenders"].items()
        if "median" in entry
        and (name == best or not name.startswith(targets.BEST_SOCKETS))
        and CONTENDERS[case["verb"], name].remote
    ]
    return sorted(shown, key=lambda item: item[1]["gb_per_second"])


def _bars(axes: Axes, case: dict[str, Any], rows: int) -> None:
    entries = _entries(case)
    for y, (name, entry) in enumerate(entries):
        colour = FERRY if name.startswith(suites.FERRY) else FLOOR if name.startswith(targets.BEST_SOCKETS) else PEER
        speed = entry["gb_per_second"]
        axes.barh(y, speed, height=0.72, color=colour)
        slowest, fastest = entry["payload"] / 1e9 / entry["max"], entry["payload"] / 1e9 / entry["min"]
        axes.plot([slowest, fastest], [y, y], color=INK, linewidth=1, alpha=0.55, solid_capstyle="butt")
        axes.text(max(speed, fastest), y, f"  {speed:.2f}", va="center", color=INK, fontsize=9)
    axes.set_yticks(range(len(entries)), [name for name, _ in entries])
    for label, (name, _) in zip(axes.get_yticklabels(), entries, strict=True):
        if name == suites.FERRY:
            label.set_fontweight("bold")
    axes.set_title(f"{case['verb'].capitalize()} {report.size_words(case['size'])}, GB/s", **_TITLE)
    _plain(axes, "x")
    axes.spines["bottom"].set_visible(False)
    axes.margins(x=0.1)
    axes.set_ylim(len(entries) - rows - 0.5, len(entries) - 0.5)  # bars as thick as beside, from the top


def _growth(axes: Axes, cases: list[dict[str, Any]], key: str, title: str, unit: int) -> None:
    for verb, colour in (("save", FERRY), ("load", SECOND)):
        entries = sorted((c["size"], c["contenders"][suites.FERRY]) for c in cases if c["verb"] == verb)
        points = [(size, max(entry[key] / unit, 1e-3)) for size, entry in entries if "median" in entry]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=5, color=colour, linewidth=1.8)
            axes.annotate(
                verb, points[-1], xytext=(8, 0), textcoords="offset points", va="center", color=colour, weight="bold"
            )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _position: f"{value:,g}")
    sizes = sorted({case["size"] for case in cases})
    axes.set_xticks(sizes, [report.size_words(size) for size in sizes])
    axes.set_xlim(sizes[0] / 1.3, sizes[-1] * 1.8)
    axes.minorticks_off()
    axes.set_title(f"torchferry: {title}", **_TITLE)
    _plain(axes, "both")


_TITLE: dict[str, Any] = {"loc": "left", "fontsize": 12, "fontweight": "bold", "color": INK, "pad": 10}


def _plain(axes: Axes, grid: Any) -> None:
    axes.grid(axis=grid, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=INK)
    for name, spine in axes.spines.items():
        spine.set_visible(name == "bottom")
        spine.set_color(GRID)
