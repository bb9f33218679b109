"""The verb diff."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import rich_click as click

from torchferry.cli.printing import escaped, nobody_reads, print_json, progress, say
from torchferry.cli.store import storage_options_for, store_options

if TYPE_CHECKING:
    from torchferry.comparing import Diff
    from torchferry.formats.places import TensorInfo

__all__ = ["diff"]


@click.command()
@click.argument("first")
@click.argument("second")
@click.option("-q", "--quiet", is_flag=True, help="Only the exit status.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@store_options(target=True)
def diff(first: str, second: str, quiet: bool, as_json: bool, **given: Any) -> int:
    """Compare two checkpoints by their tensors and values; exit status 0: the same, 1: different, 2: failed.

    CRC32s are compared where files carry them; then no tensor is read. The options of the store are for both sides;
    those that begin with --target- for the second alone, as in copy.
    """
    import torchferry

    with progress("comparing") as callback:
        found = torchferry.diff(
            first,
            second,
            first_storage_options=storage_options_for(first, given),
            second_storage_options=storage_options_for(second, given, is_target=True),
            callback=callback,
        )
    try:
        if as_json:
            print_json(_as_json(found))
        elif not quiet:
            _print(found)
        sys.stdout.flush()
    except BrokenPipeError:  # the exit status still says what was found
        nobody_reads()
    return int(bool(found))


def _print(found: Diff) -> None:
    for name in found.removed:
        say(f"- {escaped(name)}")
    for name in found.added:
        say(f"+ {escaped(name)}")
    for name, (before, after) in found.reshaped.items():
        say(f"! {escaped(name)}: {_described(before)} -> {_described(after)}")
    for name in found.changed:
        say(f"~ {escaped(name)}: other content")
    for name, (old, new) in found.values.items():
        say(f"~ {escaped(name)}: {escaped(repr(old))} -> {escaped(repr(new))}")
    notes = [
        f"{len(names):,} {what}"
        for what, names in (
            ("removed", found.removed),
            ("added", found.added),
            ("of another shape or dtype", found.reshaped),
            ("of other content", found.changed),
            ("other value" if len(found.values) == 1 else "other values", found.values),
        )
        if names
    ]
    say("; ".join([*notes, f"{found.equal:,} {'tensor' if found.equal == 1 else 'tensors'} the same"]))


def _described(tensor: TensorInfo) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {' x '.join(map(str, tensor.shape)) or 'scalar'}"


def _as_json(found: Diff) -> dict[str, Any]:
    return {
        "added": list(found.added),
        "removed": list(found.removed),
        "reshaped": {name: [_described(before), _described(after)] for name, (before, after) in found.reshaped.items()},
        "changed": list(found.changed),
        "values": {name: list(pair) for name, pair in found.values.items()},
        "equal": found.equal,
    }
