"""What the benchmark is asked to show: ratios of medians within one case, and limits of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks import suites
from benchmarks.works import GIB, MIB

Cases = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Row:
    """One target.

    Attributes:
        what: In words.
        target: In words.
        measured: In words; None where this run did not measure it.
        met: Whether the target is met; None where this run did not measure it.
    """

    what: str
    target: str
    measured: str | None
    met: bool | None


def rows(cases: Cases) -> Iterator[Row]:
    """All targets, with what the cases say of each."""
    save, load = _of(cases, "save", "save"), _of(cases, "load", "load")
    yield _at_least("save 1 GiB vs stock flytekit", 6, _faster(save, suites.FLYTEKIT))
    yield _at_least("save vs s3torchconnector", 1.8, _faster(save, "s3torchconnector"))
    yield _at_least("save vs obstore open_writer", 1.3, _faster(save, suites.OBSTORE["save"]))
    yield _at_least("save vs boto3", 6, _faster(save, suites.BOTO3["save"]))
    yield _at_least("save vs the best N bare sockets", 0.8, _faster(save, BEST_SOCKETS))
    yield _at_least("load 1 GiB vs stock flytekit", 4, _faster(load, suites.FLYTEKIT))
    yield _at_least("load vs s3torchconnector", 3, _faster(load, "s3torchconnector"))
    yield _at_least("load vs runai-model-streamer", 2.5, _faster(load, "runai-model-streamer"))
    yield _at_least("load vs tensorizer", 1.4, _faster(load, "tensorizer"))
    yield _at_least("load vs the best N bare sockets", 0.75, _faster(load, BEST_SOCKETS))
    tensors = _of(cases, "safetensors", "load")
    for name, target in ((suites.RUNAI, 2.5), (suites.SAFETENSORS, 4)):
        ratio = _faster(tensors, name, than_by=suites.FERRY_SAFETENSORS)
        yield _at_least(f"load safetensors of 1 GiB vs {name}", target, ratio)
    adam = _of(cases, "adam", "load")
    yield _at_least(
        "module only of an Adam checkpoint vs all of it", 2.5, _faster(adam, suites.FERRY, than_by=suites.FERRY_MODULE)
    )
    for verb in suites.VERBS:
        small = _of(cases, "small", verb)
        slower = _faster(small, suites.FERRY, than_by=suites.TO_FILE[verb])
        yield _at_most(f"{verb} 100,000 small tensors vs torch.{verb} on a local file", 1.5, slower)
    for verb in suites.VERBS:
        shaped = _of(cases, "shaped", verb)
        yield _at_least(f"{verb} over a shaped link vs one connection", 8, _faster(shaped, *suites.sockets(1)))
    for verb in suites.VERBS:
        https = _of(cases, "https", verb)
        yield _at_least(f"{verb} over https vs stock flytekit", 2, _faster(https, suites.FLYTEKIT))
    for verb, suite in (("save", "disk"), ("save", "disk-replace"), ("load", "disk")):
        of, ferry, torch = _of(cases, suite, verb), suites.FERRY_FILE[verb], suites.TORCH_FILE[verb]
        how = "in place of another" if suite == "disk-replace" else {"save": "new", "load": "verified"}[verb]
        yield _at_least(f"{verb} of a file of 1 GiB, {how}, vs {torch}", 1, _faster(of, torch, than_by=ferry))
    for verb in suites.VERBS:
        lightning = _of(cases, "integrations", verb)
        faster = _faster(lightning, suites.LIGHTNING, than_by=suites.LIGHTNING_FERRY)
        yield _at_least(f"{verb} 512 MiB in Lightning vs its own CheckpointIO", 3, faster)
    yield _at_least(
        "save over https vs the best N bare sockets", 0.85, _faster(_of(cases, "https", "save"), BEST_SOCKETS)
    )
    yield _at_least(
        "save 16 MiB vs obstore open_writer", 1, _faster(_of(cases, "tiny", "save"), suites.OBSTORE["save"])
    )
    shaped = _of(cases, "shaped", "save")
    yield _at_least("save over a shaped link vs s3torchconnector", 1.1, _faster(shaped, "s3torchconnector"))
    yield _cpu("CPU of saving 1 GiB over http", 0.32, save)
    yield _cpu("CPU of saving 1 GiB over https", 0.6, _of(cases, "https", "save"))
    yield _memory("save", save, lambda _size: 64 * MIB, "64 MiB")
    yield _memory("load", load, lambda size: size + 200 * MIB, "size + 200 MiB")
    for verb in suites.VERBS:
        growth = [case for case in cases if case["suite"] == "growth" and case["verb"] == verb]
        yield from _linear(verb, {case["size"]: case["contenders"][suites.FERRY] for case in growth})


BEST_SOCKETS = "bare sockets"
"""Stands for the number of sockets that was the fastest."""


def best_sockets(case: dict[str, Any]) -> str | None:
    """The name of the fastest bare sockets of a case."""
    names = [name for name, entry in case["contenders"].items() if name.startswith(BEST_SOCKETS) and "median" in entry]
    return min(names, key=lambda name: case["contenders"][name]["median"], default=None)


def _of(cases: Cases, suite: str, verb: str) -> dict[str, Any] | None:
    found = [case for case in cases if case["suite"] == suite and case["verb"] == verb]
    return found[-1] if found else None


def _median(case: dict[str, Any], name: str) -> float | None:
    if name == BEST_SOCKETS:
        name = best_sockets(case) or name
    median: float | None = case["contenders"].get(name, {}).get("median")
    return median


def _faster(case: dict[str, Any] | None, than: str, *, than_by: str = suites.FERRY) -> float | None:
    """How many times faster ``than_by`` is than ``than``."""
    if case is None:
        return None
    slow, fast = _median(case, than), _median(case, than_by)
    return slow / fast if slow and fast else None


def _at_least(what: str, target: float, ratio: float | None) -> Row:
    if ratio is None:
        return Row(what, f"at least {target:g}x", None, None)
    return Row(what, f"at least {target:g}x", f"{ratio:.2f}x", ratio >= target)


def _at_most(what: str, target: float, ratio: float | None) -> Row:
    if ratio is None:
        return Row(what, f"at most {target:g}x the time", None, None)
    return Row(what, f"at most {target:g}x the time", f"{ratio:.2f}x", ratio <= target)


def _cpu(what: str, limit: float, case: dict[str, Any] | None) -> Row:
    seconds = case and case["contenders"].get(suites.FERRY, {}).get("cpu_seconds")
    if case is None or seconds is None:
        return Row(what, f"at most {limit:g} s", None, None)
    return Row(what, f"at most {limit:g} s", f"{seconds:.2f} s", seconds <= limit)


def _memory(verb: str, case: dict[str, Any] | None, limit: Callable[[int], int], words: str) -> Row:
    what = f"peak memory over the baseline, {verb}"
    peak = case and case["contenders"].get(suites.FERRY, {}).get("peak_bytes")
    if case is None or peak is None:
        return Row(what, f"at most {words}", None, None)
    return Row(what, f"at most {words}", f"{peak / MIB:.0f} MiB", peak <= limit(case["size"]))


def _linear(verb: str, by_size: dict[int, dict[str, Any]]) -> Iterator[Row]:
    """Time: the largest is as fast as 1 GiB. Memory: what is held beyond a loaded object does not grow."""
    what = f"{verb}, 64 MiB to 8 GiB"
    by_size = {size: entry for size, entry in by_size.items() if "median" in entry}
    complete = {64 * MIB, GIB, 8 * GIB} <= set(by_size)
    ratio = by_size[8 * GIB]["gb_per_second"] / by_size[GIB]["gb_per_second"] if complete else None
    yield Row(
        f"{what}: time is linear",
        "8 GiB at 0.8x the GB/s of 1 GiB",
        None if ratio is None else f"{ratio:.2f}x",
        None if ratio is None else ratio >= 0.8,
    )
    own = {size: 0 if verb == "save" else size for size in by_size}
    limit = 64 * MIB if verb == "save" else 200 * MIB
    beyond = (
        max((entry["peak_bytes"] - own[size] for size, entry in by_size.items()), default=None) if complete else None
    )
    yield Row(
        f"{what}: memory is linear",
        f"at most {'' if verb == 'save' else 'size + '}{limit // MIB} MiB at each size",
        None if beyond is None else f"{'' if verb == 'save' else 'size + '}{beyond / MIB:.0f} MiB",
        None if beyond is None else beyond <= limit,
    )
