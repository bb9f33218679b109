"""The verb inspect."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import rich_click as click

from torchferry.cli.printing import Table, escaped, is_terminal, print_json, say, size
from torchferry.cli.store import pointing_below, storage_options_for, store_options

if TYPE_CHECKING:
    from torchferry.formats.places import TensorInfo
    from torchferry.manifest import Manifest

__all__ = ["inspect"]

_SHOWN = 40  # lines of a tree on a terminal, where no depth is given
_VALUES = 20
_ALWAYS = 1 << 30
_DEEPEST = 100  # levels of a tree that are shown


@dataclass(slots=True)
class _Node:
    """A part of the names."""

    name: str
    tensors: list[TensorInfo] = field(default_factory=list)
    children: dict[str, _Node] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


@click.command()
@click.argument("url")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option(
    "-d", "--depth", type=click.IntRange(1), help="How many levels of the tree; by default what fits a screen."
)
@click.option("-a", "--all", "is_all", is_flag=True, help="Every tensor.")
@click.option("--sort", type=click.Choice(["file", "name", "size"]), default="file", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@store_options()
def inspect(
    url: str, names: tuple[str, ...], depth: int | None, is_all: bool, sort: str, as_json: bool, **given: Any
) -> None:
    """Show the tensors and values of a checkpoint, without reading the tensors.

    NAME is a name, a prefix or a glob: "model.encoder", "*.bias". Into a pipe goes a table of all tensors.
    """
    import torchferry

    options = storage_options_for(url, given)
    with pointing_below(url, options, "torchferry ls {url} lists them."):
        manifest = torchferry.inspect(url, storage_options=options)
    chosen, values = _chosen(manifest, names)
    if sort == "name":
        chosen.sort(key=lambda tensor: tensor.key)
    elif sort == "size":
        chosen.sort(key=lambda tensor: -tensor.nbytes)
    if as_json:
        print_json(_as_json(manifest, chosen, values))
        return
    if chosen and sort == "file" and not is_all and (is_terminal() or depth is not None):
        _print_tree(chosen, depth)
    elif chosen or not values:
        _print_table(chosen)
    _print_values(values, {} if names else manifest.metadata)
    _print_totals(manifest, chosen)


def _chosen(manifest: Manifest, names: Sequence[str]) -> tuple[list[TensorInfo], dict[str, Any]]:
    """The tensors and the values that are asked for.

    Raises:
        CheckpointKeyError: a name takes nothing.
    """
    if not names:
        return list(manifest.tensors), dict(manifest.values)
    from torchferry.formats.keys import Keys

    keys = Keys(tuple(names))
    tensors = [tensor for tensor in manifest.tensors if keys.takes(tensor.key, is_leaf=True)]
    values = {name: value for name, value in manifest.values.items() if keys.takes(name, is_leaf=True)}
    if unmatched := keys.unmatched:
        from torchferry.formats.picking import missing_keys

        every = [*(tensor.key for tensor in manifest.tensors), *manifest.values]
        deepest = max(name.count(".") for name in unmatched)
        parts = dict.fromkeys(".".join(key.split(".")[: deepest + 1]) for key in every)
        raise missing_keys(manifest.url, unmatched, parts)
    return tensors, values


def _described(tensor: TensorInfo) -> tuple[str, str]:
    return str(tensor.dtype).removeprefix("torch."), " x ".join(map(str, tensor.shape)) or "scalar"


def _print_table(tensors: Iterable[TensorInfo]) -> None:
    listing = Table("tensor", "dtype", "shape", "bytes", "record", right=("bytes",))
    for tensor in tensors:
        listing.add_row(escaped(tensor.key), *_described(tensor), size(tensor.nbytes), escaped(tensor.record or "meta"))
    listing.show()


def _print_tree(tensors: Sequence[TensorInfo], depth: int | None) -> None:
    root = _Node("")
    for tensor in tensors:
        node = root
        node.tensors.append(tensor)
        for part in tensor.key.split("."):
            node = node.children.setdefault(part, _Node(part))
            node.tensors.append(tensor)
    if depth is None:
        depth = 1
        while depth < _ALWAYS and (lines := _count(root, depth + 1)) <= _SHOWN:
            if lines == _count(root, depth):
                break
            depth += 1
    listing = Table("name", "dtype", "shape", "bytes", right=("bytes",))
    _add_lines(listing, root, min(depth, _DEEPEST), "")
    listing.show()


def _count(node: _Node, depth: int) -> int:
    """Lines that a tree of so many levels has."""
    if not depth:
        return 0
    return sum(1 + _count(_joined(child)[1], depth - 1) for child in node.children.values())


def _joined(node: _Node) -> tuple[str, _Node]:
    """A node and its only child, and so on, as one: the names together, and the last one."""
    name = node.name
    while len(node.children) == 1 and len((only := next(iter(node.children.values()))).tensors) == len(node.tensors):
        node = only
        name += f".{node.name}"
    return name, node


def _add_lines(listing: Any, node: _Node, depth: int, indent: str) -> None:
    for child in node.children.values():
        name, shown = _joined(child)
        if shown.children:
            count = f"{len(shown.tensors):,} tensors"
            listing.add_row(f"{indent}{escaped(name)}", count, "", size(shown.nbytes))
            if depth > 1:
                _add_lines(listing, shown, depth - 1, f"{indent}  ")
        else:
            listing.add_row(f"{indent}{escaped(name)}", *_described(shown.tensors[0]), size(shown.nbytes))


def _print_values(values: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    nearest = sorted(values.items(), key=lambda pair: pair[0].count("."))
    facts = {**dict(nearest), **{f"metadata {name}": text for name, text in metadata.items()}}
    if not facts:
        return
    say()
    for number, (name, value) in enumerate(facts.items()):
        if number == _VALUES and is_terminal():
            say(f"... and {len(facts) - _VALUES:,} more values (--json has them)")
            break
        say(f"{escaped(name)} = {escaped(repr(value) if isinstance(value, str) else str(value))}")


def _print_totals(manifest: Manifest, tensors: Sequence[TensorInfo]) -> None:
    by_dtype: dict[str, list[int]] = {}
    by_part: dict[str, list[int]] = {}
    for tensor in tensors:
        by_dtype.setdefault(_described(tensor)[0], []).append(tensor.nbytes)
        by_part.setdefault(tensor.key.partition(".")[0], []).append(tensor.nbytes)
    say()
    if len(by_dtype) > 1:
        say(
            "by dtype: " + ", ".join(f"{name} {size(sum(sizes))} in {len(sizes):,}" for name, sizes in by_dtype.items())
        )
    if 1 < len(by_part) <= _VALUES:
        parts = (f"{escaped(name)} {size(sum(sizes))} in {len(sizes):,}" for name, sizes in by_part.items())
        say("by part: " + ", ".join(parts))
    storages = sum(record.name.startswith("data/") for record in manifest.records)
    where = f" in {storages:,} storages" if manifest.format == "torch" else ""
    noun = "tensor" if len(manifest.tensors) == 1 else "tensors"
    shown = f"{len(tensors):,}"
    if len(tensors) < len(manifest.tensors):
        shown += f" of {len(manifest.tensors):,}"
    say(f"{escaped(manifest.url)}: {manifest.format}, {size(manifest.size)}, {shown} {noun}{where}")


def _as_json(manifest: Manifest, tensors: Sequence[TensorInfo], values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "url": manifest.url,
        "format": manifest.format,
        "size": manifest.size,
        "etag": manifest.etag,
        "metadata": dict(manifest.metadata),
        "values": dict(values),
        "records": [
            {"name": record.name, "offset": record.offset, "size": record.size, "crc32": record.crc32}
            for record in manifest.records
        ],
        "tensors": [
            {
                "key": tensor.key,
                "dtype": _described(tensor)[0],
                "shape": list(tensor.shape),
                "nbytes": tensor.nbytes,
                "record": tensor.record,
            }
            for tensor in tensors
        ],
    }
