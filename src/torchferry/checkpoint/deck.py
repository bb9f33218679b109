"""The Deck's view of a checkpoint: one block of HTML, without scripts and without the network.

flytekit puts it into a page together with others, as it is. So everything from the checkpoint is escaped, the
styles apply to this block only, and the size is bounded whatever the checkpoint holds.
"""

from __future__ import annotations

import logging
from collections import Counter
from html import escape
from typing import TYPE_CHECKING, Any

from torchferry.checkpoint.summary import summary_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torchferry.checkpoint.summary import Summary, TensorRow

__all__ = ["deck_of", "failure", "render"]

MAX_TENSORS = 250
MAX_ROWS = 60
_MAX_BARS = 12
_MAX_TEXT = 120

_logger = logging.getLogger("torchferry")

_MODULE, _OPTIMIZER, _OTHER = "#3b6fd4", "#e08a2b", "#7a869a"

_STYLE = """<style>
.torchferry-deck{font:14px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,"Open Sans",sans-serif;color:#1f2328}
.torchferry-deck{max-width:960px}
.torchferry-deck h3{font-size:15px;margin:24px 0 8px}
.torchferry-deck .uri{color:#59636e;overflow-wrap:anywhere;margin:0 0 12px}
.torchferry-deck .totals{display:flex;flex-wrap:wrap;gap:8px 32px;margin:0 0 4px}
.torchferry-deck .totals b{display:block;font-size:20px;font-weight:600}
.torchferry-deck .totals span{color:#59636e}
.torchferry-deck svg{display:block;width:100%;height:auto;margin:4px 0}
.torchferry-deck svg text{font-size:12px;fill:#1f2328}
.torchferry-deck .scroll{max-height:480px;overflow:auto;border:1px solid #d1d9e0;border-radius:6px}
.torchferry-deck table{border-collapse:collapse;width:100%}
.torchferry-deck th{position:sticky;top:0;background:#f6f8fa;text-align:left;font-weight:600}
.torchferry-deck th,.torchferry-deck td{padding:4px 12px;border-bottom:1px solid #eaeef2;vertical-align:top}
.torchferry-deck td{overflow-wrap:anywhere}
.torchferry-deck .n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.torchferry-deck .note{color:#59636e;margin:6px 0 0}
</style>"""


def deck_of(checkpoint: Any) -> str:
    """A checkpoint's block of HTML. Never raises: it is made when the task has done its work, and must not fail it."""
    try:
        return render(summary_of(checkpoint))
    except (Exception, SystemExit) as error:  # the value is the user's, and may raise anything
        _logger.warning("A checkpoint has no summary in the Deck.", exc_info=True)
        return failure(error)


def render(summary: Summary) -> str:
    """A checkpoint's summary as HTML, below 200 kB."""
    parts = (("Module", summary.module), ("Optimizer", summary.optimizer), ("Other tensors", summary.other))
    sizes = {name: sum(row.size for row in rows) for name, rows in parts if rows}
    total = sum(sizes.values())
    blocks = [
        _STYLE,
        f'<p class="uri">{_text(summary.uri, 600)}</p>' if summary.uri else "",
        _totals(summary, sizes, total),
        _chart(summary, sizes, total),
        _tensors(summary.module, total),
        _groups(summary.groups),
        _hyperparameters(summary.hyperparameters),
    ]
    return f'<div class="torchferry-deck">{"".join(blocks)}</div>'


def failure(error: BaseException) -> str:
    """What is shown for a checkpoint that could not be summarized: a Deck must not fail a task."""
    return f'<div class="torchferry-deck"><p>This checkpoint has no summary: {_text(type(error).__name__)}.</p></div>'


def _totals(summary: Summary, sizes: dict[str, int], total: int) -> str:
    rows = [*summary.module, *summary.optimizer, *summary.other]
    figures = [
        (_bytes(total), "in tensors"),
        (f"{len(rows):,}", "tensors"),
        (f"{_numel(summary.module):,}", "values in the module"),
    ]
    figures += [(_bytes(size), name.lower()) for name, size in sizes.items() if len(sizes) > 1]
    cells = "".join(f"<div><b>{value}</b><span>{label}</span></div>" for value, label in figures)
    return f'<div class="totals">{cells}</div>'


def _chart(summary: Summary, sizes: dict[str, int], total: int) -> str:
    if not total:
        return ""
    bars = [(name, size, _MODULE) for name, size in _grouped(summary.module)]
    bars += [(f"optimizer: {name}", size, _OPTIMIZER) for name, size in _by_kind(summary.optimizer)]
    if sizes.get("Other tensors"):
        bars.append(("other tensors", sizes["Other tensors"], _OTHER))
    bars = [bar for bar in bars if bar[1]]
    widest = max(size for _, size, _ in bars)
    lines = []
    for index, (name, size, colour) in enumerate(bars):
        y = 24 * index
        width = max(2.0, 420 * size / widest)
        lines.append(
            f'<text x="290" y="{y + 15}" text-anchor="end">{_text(name, 44)}</text>'
            f'<rect x="300" y="{y + 3}" width="{width:.1f}" height="16" rx="2" fill="{colour}"/>'
            f'<text x="{308 + width:.1f}" y="{y + 15}">{_bytes(size)}, {_share(size, total)}</text>'
        )
    return (
        f'<h3>Where the bytes are</h3><svg viewBox="0 0 900 {24 * len(bars)}" role="img" '
        f'aria-label="Bytes by part of the checkpoint">{"".join(lines)}</svg>'
    )


def _tensors(rows: Sequence[TensorRow], total: int) -> str:
    if not rows:
        return ""
    shown: Sequence[TensorRow] = rows
    note = ""
    if len(rows) > MAX_TENSORS:
        shown = sorted(rows, key=lambda row: row.size, reverse=True)[:MAX_TENSORS]
        rest = sum(row.size for row in rows) - sum(row.size for row in shown)
        note = f"The {MAX_TENSORS} largest of {len(rows):,}; the others have {_bytes(rest)} together."
    cells = (
        (
            _text(row.name),
            _text(" \N{MULTIPLICATION SIGN} ".join(map(str, row.shape)) or "scalar"),
            _text(row.dtype),
            _bytes(row.size),
            _share(row.size, total),
        )
        for row in shown
    )
    return _table("Parameters", ("Name", "Shape", "Type", "Bytes", "Share"), cells, numbers=(3, 4), note=note)


def _groups(groups: Sequence[dict[str, str]]) -> str:
    if not groups:
        return ""
    columns = list(dict.fromkeys(column for group in groups[:MAX_ROWS] for column in group))[:MAX_ROWS]
    # One group a column: optimizers have many options and few groups.
    shown = groups[:4]
    cells = ((_text(column), *(_text(group.get(column, "")) for group in shown)) for column in columns)
    header = ("Option", *(f"Group {index}" for index in range(len(shown))))
    note = f"{len(groups) - len(shown):,} more groups." if len(groups) > len(shown) else ""
    return _table("Optimizer groups", header, cells, note=note)


def _hyperparameters(rows: Sequence[tuple[str, str, str]]) -> str:
    if not rows:
        return ""
    note = f"{len(rows) - MAX_ROWS:,} more." if len(rows) > MAX_ROWS else ""
    cells = ((_text(name), _text(kind), _text(value, 200)) for name, kind, value in rows[:MAX_ROWS])
    return _table("Hyperparameters", ("Name", "Type", "Value"), cells, note=note)


def _table(
    title: str, header: Iterable[str], rows: Iterable[tuple[str, ...]], numbers: tuple[int, ...] = (), note: str = ""
) -> str:
    kinds = dict.fromkeys(numbers, ' class="n"')
    lines = ["".join(f"<th{kinds.get(index, '')}>{name}</th>" for index, name in enumerate(header))]
    lines += ["".join(f"<td{kinds.get(index, '')}>{cell}</td>" for index, cell in enumerate(row)) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    below = f'<p class="note">{note}</p>' if note else ""
    return f'<h3>{title}</h3><div class="scroll"><table>{body}</table></div>{below}'


def _grouped(rows: Sequence[TensorRow]) -> list[tuple[str, int]]:
    """Bytes by parts of the module: the finest level of names that still fits the chart."""
    chosen: Counter[str] = Counter()
    for depth in range(1, 8):
        groups: Counter[str] = Counter()
        for row in rows:
            groups[".".join(row.name.split(".")[:depth])] += row.size
        if chosen and len(groups) > _MAX_BARS:
            break
        if len(groups) > len(chosen):  # not where it only makes names longer: wrappers add levels with one name each
            chosen = groups
    if len(chosen) <= _MAX_BARS:
        return list(chosen.items())
    largest = chosen.most_common(_MAX_BARS - 1)
    return [
        *largest,
        (f"{len(chosen) - len(largest):,} others", sum(chosen.values()) - sum(size for _, size in largest)),
    ]


def _by_kind(rows: Sequence[TensorRow]) -> list[tuple[str, int]]:
    """Bytes of an optimizer's state by what they are (``exp_avg``, ...): the last part of their names."""
    kinds: Counter[str] = Counter()
    for row in rows:
        kinds[row.name.rsplit(".", 1)[-1]] += row.size
    return [(name, size) for name, size in kinds.most_common(4) if size]


def _numel(rows: Iterable[TensorRow]) -> int:
    total = 0
    for row in rows:
        count = 1
        for length in row.shape:
            count *= length
        total += count
    return total


def _text(value: object, limit: int = _MAX_TEXT) -> str:
    text = str(value)
    if len(text) > limit:
        text = f"{text[: limit - 1]}\N{HORIZONTAL ELLIPSIS}"
    # A lone surrogate in a name would fail the whole page when flytekit writes it.
    return escape(text.encode("utf-8", "replace").decode())


def _share(size: int, total: int) -> str:
    if not total:
        return ""
    return "&lt;0.1%" if 0 < size < total / 1000 else f"{size / total:.1%}"


def _bytes(size: int) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} B"
