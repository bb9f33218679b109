"""The Deck's view of a checkpoint: one block of HTML, without scripts and without the network.

flytekit puts it into a page together with others, as it is. So everything from the checkpoint is escaped, the
styles apply to this block only, and the size is bounded whatever the checkpoint holds.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from torchferry.checkpoint.summary import summary_of
from torchferry.printable import escaped

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torchferry.checkpoint.summary import Summary, TensorRow

__all__ = ["deck_of", "failure", "render"]

MAX_TENSORS = 250
MAX_ROWS = 60
_MAX_BARS = 12
_UNIFORM_FROM = 4  # tensors that differ in the numbers of their layers only
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
.torchferry-deck .bars{display:grid;grid-template-columns:minmax(0,2fr) minmax(0,3fr) max-content;gap:4px 12px}
.torchferry-deck .bars span{overflow-wrap:anywhere}
.torchferry-deck .bars i{display:block;height:16px;border-radius:2px;margin-top:2px;min-width:2px}
.torchferry-deck .scroll{max-height:480px;overflow:auto;border:1px solid #d1d9e0;border-radius:6px}
.torchferry-deck table{border-collapse:collapse;width:100%;font:inherit}
.torchferry-deck th{position:sticky;top:0;background:#f6f8fa;text-align:left;font-weight:600}
.torchferry-deck th,.torchferry-deck td{padding:4px 10px;border-bottom:1px solid #eaeef2;vertical-align:top}
.torchferry-deck td{overflow-wrap:anywhere}
.torchferry-deck .n,.torchferry-deck .w{white-space:nowrap;overflow-wrap:normal}
.torchferry-deck .n{text-align:right;font-variant-numeric:tabular-nums}
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
        _hyperparameters(summary.hyperparameters),
        _chart(summary, sizes, total),
        _tensors(summary.module, total),
        _groups(summary.groups),
    ]
    return f'<div class="torchferry-deck">{"".join(blocks)}</div>'


def failure(error: BaseException) -> str:
    """What is shown for a checkpoint that could not be summarized: a Deck must not fail a task."""
    return f'<div class="torchferry-deck"><p>This checkpoint has no summary: {_text(type(error).__name__)}.</p></div>'


def _totals(summary: Summary, sizes: dict[str, int], total: int) -> str:
    rows = [*summary.module, *summary.optimizer, *summary.other]
    figures = [(_bytes(total), "in tensors"), (f"{len(rows):,}", "tensors")]
    if summary.module:
        figures.append((f"{_numel(summary.module):,}", "parameters"))
    figures += [(_bytes(size), name.lower()) for name, size in sizes.items() if len(sizes) > 1]
    if summary.saved is not None:
        figures.append((f"{summary.saved.seconds:.2f} s", f"to save, {_bytes(int(summary.saved.bytes_per_second))}/s"))
    cells = "".join(f"<div><b>{value}</b><span>{label}</span></div>" for value, label in figures)
    return f'<div class="totals">{cells}</div>'


def _chart(summary: Summary, sizes: dict[str, int], total: int) -> str:
    if not total or len(_alike(summary.module)) <= _MAX_BARS:  # the table says it all
        return ""
    bars = [(name, size, _MODULE) for name, size in _grouped(summary.module)]
    bars += [(f"optimizer: {name}", size, _OPTIMIZER) for name, size in _by_kind(summary.optimizer)]
    if sizes.get("Other tensors"):
        bars.append(("other tensors", sizes["Other tensors"], _OTHER))
    bars = [bar for bar in bars if bar[1]]
    widest = max(size for _, size, _ in bars)
    lines = (
        f'<span>{_text(name, 60)}</span><div><i style="width:{100 * size / widest:.1f}%;background:{colour}"></i></div>'
        f'<span class="n">{_bytes(size)}, {_share(size, total)}</span>'
        for name, size, colour in bars
    )
    return f'<h3>Where the bytes are</h3><div class="bars">{"".join(lines)}</div>'


def _tensors(rows: Sequence[TensorRow], total: int) -> str:
    if not rows:
        return ""
    shown = _alike(rows)
    note = ""
    if len(shown) > MAX_TENSORS:
        everything = shown
        shown = sorted(shown, key=lambda alike: alike.size, reverse=True)[:MAX_TENSORS]
        rest = sum(alike.size for alike in everything) - sum(alike.size for alike in shown)
        note = f"The {MAX_TENSORS} largest of {len(everything):,}; the others have {_bytes(rest)} together."
    cells = (
        (
            _text(alike.name),
            f"{alike.count:,}",
            _text(" \N{MULTIPLICATION SIGN} ".join(map(str, alike.shape)) or "scalar"),
            _text(alike.dtype),
            _bytes(alike.size),
            _share(alike.size, total),
        )
        for alike in shown
    )
    header = ("Name", "Tensors", "Shape", "Type", "Bytes", "Share")
    return _table("Parameters", header, cells, numbers=(1, 4, 5), words=(2, 3), note=note)


@dataclass(frozen=True, slots=True)
class _Alike:
    """Tensors of one name, shape and type in layers that are alike: ``layers.0-31.weight``; or a single one."""

    name: str
    count: int
    shape: tuple[int, ...]
    dtype: str
    size: int


def _alike(rows: Sequence[TensorRow]) -> list[_Alike]:
    """The rows, with those of uniform layers in one."""
    groups: dict[Any, list[TensorRow]] = {}
    for row in rows:
        groups.setdefault((_pattern(row.name), row.shape, row.dtype), []).append(row)
    merged: list[_Alike] = []
    for (_, shape, dtype), members in groups.items():
        names = [member.name for member in members]
        if len(members) >= _UNIFORM_FROM:
            merged.append(_Alike(_common(names), len(members), shape, dtype, sum(member.size for member in members)))
        else:
            merged += [_Alike(member.name, 1, shape, dtype, member.size) for member in members]
    return merged


def _pattern(name: str) -> tuple[str, ...]:
    return tuple("" if part.isdecimal() else part for part in name.split("."))


def _common(names: Sequence[str]) -> str:
    """One name for several that differ in numbers only, which become the range that they are in."""
    parts = []
    for column in zip(*(name.split(".") for name in names), strict=True):
        numbers = sorted({int(part) for part in column if part.isdecimal()})
        parts.append(f"{numbers[0]}\N{EN DASH}{numbers[-1]}" if len(numbers) > 1 else column[0])
    return ".".join(parts)


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
    title: str,
    header: Iterable[str],
    rows: Iterable[tuple[str, ...]],
    *,
    numbers: tuple[int, ...] = (),
    words: tuple[int, ...] = (),
    note: str = "",
) -> str:
    """A table; the columns ``numbers`` are aligned to the right, and neither those nor ``words`` break their lines."""
    kinds = {**dict.fromkeys(numbers, ' class="n"'), **dict.fromkeys(words, ' class="w"')}
    lines = ["".join(f"<th{kinds.get(index, '')}>{name}</th>" for index, name in enumerate(header))]
    lines += ["".join(f"<td{kinds.get(index, '')}>{cell}</td>" for index, cell in enumerate(row)) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    below = f'<p class="note">{note}</p>' if note else ""
    return f'<h3>{title}</h3><div class="scroll"><table>{body}</table></div>{below}'


def _grouped(rows: Sequence[TensorRow]) -> list[tuple[str, int]]:
    """Bytes by parts of the module: the finest level of names that still fits the chart, uniform layers in one."""
    chosen: dict[tuple[str, ...], list[TensorRow]] = {}
    for depth in range(1, 8):
        groups: dict[tuple[str, ...], list[TensorRow]] = {}
        for row in rows:
            groups.setdefault(_pattern(row.name)[:depth], []).append(row)
        if chosen and len(groups) > _MAX_BARS:
            break
        if len(groups) > len(chosen):  # not where it only makes names longer: wrappers add levels with one name each
            chosen = groups
    sizes = Counter[str]()
    for pattern, members in chosen.items():
        names = [".".join(member.name.split(".")[: len(pattern)]) for member in members]
        sizes[_common(names)] += sum(member.size for member in members)
    if len(sizes) <= _MAX_BARS:
        return list(sizes.items())
    largest = sizes.most_common(_MAX_BARS - 1)
    rest = sum(sizes.values()) - sum(size for _, size in largest)
    return [*largest, (f"{len(sizes) - len(largest):,} others", rest)]


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
    return escape(escaped(text))  # half of a surrogate pair would fail the whole page when flytekit writes it


def _share(size: int, total: int) -> str:
    if not total:
        return ""
    return "&lt;0.1%" if 0 < size < total / 1000 else f"{size / total:.1%}"


def _bytes(size: int) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} B"
