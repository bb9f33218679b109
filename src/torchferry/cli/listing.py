"""The verbs ls, rm and clean."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import rich_click as click

from torchferry.cli.printing import Table, age, escaped, print_json, say, size
from torchferry.cli.store import pointing_below, storage_options_for, store_options
from torchferry.formats.safetensors import parse_shard_name

if TYPE_CHECKING:
    import torchferry
    from torchferry.storage.base import ListedObject

__all__ = ["clean", "ls", "rm"]

_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".index.json", ".torch", ".tar")
_INDEX = ".safetensors.index.json"
_METADATA = ".metadata"
_SHARDED = "sharded"
_STEP = re.compile(r"(?:step|epoch|iter|checkpoint|ckpt|global_step)s?[-_=]?(\d+)", re.IGNORECASE)
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


@dataclass(slots=True)
class _Row:
    name: str
    url: str
    size: int
    modified: datetime | None
    objects: int = 1
    format: str = ""
    tensors: int | None = None

    @property
    def step(self) -> int | None:
        found = _STEP.findall(self.name)
        return int(found[-1]) if found else None


@click.command()
@click.argument("url")
@click.option("-l", "--long", "is_long", is_flag=True, help="Look into each: format and number of tensors.")
@click.option("-a", "--all", "is_all", is_flag=True, help="All objects, not only what looks like a checkpoint.")
@click.option("--sort", type=click.Choice(["name", "step", "size", "age"]), default="name", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@store_options()
def ls(url: str, is_long: bool, is_all: bool, sort: str, as_json: bool, **given: Any) -> None:
    """List the checkpoints below a prefix, a bucket or a directory; a sharded one is one row."""
    from torchferry.listing import list_objects

    options = storage_options_for(url, given)
    found = list(list_objects(url, storage_options=options))
    rows = [_Row(name, item.url, item.size, item.modified) for name, item in found] if is_all else _checkpoints(found)
    if is_long:
        _look_into(rows, options)
    orders: dict[str, Any] = {
        "name": lambda row: row.name,
        "step": lambda row: (row.step is None, row.step or 0, row.name),
        "size": lambda row: (-row.size, row.name),
        "age": lambda row: (-(row.modified.timestamp() if row.modified else 0), row.name),
    }
    rows.sort(key=orders[sort])
    if as_json:
        print_json([_as_json(row) for row in rows])
        return
    more = ("format", "tensors") if is_long else ()
    listing = Table("step", "size", "age", *more, "name", right=("step", "size", "age", "tensors"))
    for row in rows:
        extra = (row.format, "" if row.tensors is None else f"{row.tensors:,}") if is_long else ()
        step = "" if row.step is None else str(row.step)
        listing.add_row(step, size(row.size), age(row.modified), *extra, escaped(row.name))
    if rows:
        listing.show()
    hidden = len(found) - sum(row.objects for row in rows)
    others = "1 other object: --all lists it" if hidden == 1 else f"{hidden:,} other objects: --all lists them"
    note = f" ({others})" if hidden and not is_all else ""
    noun = ("object" if is_all else "checkpoint") + ("" if len(rows) == 1 else "s")
    say(f"{len(rows):,} {noun}, {size(sum(row.size for row in rows))}{note}")


def _checkpoints(found: list[tuple[str, ListedObject]]) -> list[_Row]:
    """What looks like a checkpoint by its name: files, shards with their index, folders with a .metadata of DCP.

    A sharded checkpoint is all that is in its folder.
    """
    names = {name for name, _ in found}
    stems = {name.removesuffix(_INDEX): name for name in names if name.endswith(_INDEX)}
    folders = {name[: -len(_METADATA)] for name in names if name == _METADATA or name.endswith(f"/{_METADATA}")}
    rows: dict[str, _Row] = {}
    for name, item in found:
        folder = next((above for above in _folders_above(name) if above in folders), None)
        stem, _ = parse_shard_name(name) or (None, None)
        if folder is not None:
            key, shown, url = folder + _METADATA, folder or "./", item.url[: len(item.url) - len(name) + len(folder)]
        elif stem in stems:
            key = shown = stems[stem]
            url = item.url[: len(item.url) - len(name)] + key
        elif name.endswith(_SUFFIXES):
            key, shown, url = name, name, item.url
        else:
            continue
        if key in rows:
            row = rows[key]
            row.size += item.size
            row.objects += 1
            row.modified = max(filter(None, (row.modified, item.modified)), default=None)
        else:
            rows[key] = _Row(shown, url, item.size, item.modified, format=_SHARDED if folder is not None else "")
    return list(rows.values())


def _folders_above(name: str) -> Iterator[str]:
    """The folders that an object is in, from the innermost, with a slash at their end; at last ""."""
    at = name.rfind("/")
    while at >= 0:
        yield name[: at + 1]
        at = name.rfind("/", 0, at)
    yield ""


def _look_into(rows: list[_Row], options: dict[str, Any] | None) -> None:
    import torchferry

    for row in rows:
        try:
            manifest = torchferry.inspect(row.url.rstrip("/"), storage_options=options)
        except torchferry.UnsafeCheckpointError:
            continue  # of a sharded one: nothing of it is run
        except torchferry.StorageUnavailableError:
            raise
        except torchferry.TorchferryError as error:  # of this one: the others are listed
            row.format = _described(error)
            continue
        row.format, row.tensors = manifest.format, len(manifest.tensors)


def _described(error: torchferry.TorchferryError) -> str:
    """What a row says in place of a format."""
    import torchferry

    if isinstance(error, torchferry.CheckpointCorruptError | torchferry.CheckpointNotFoundError):
        return "damaged"  # a file that its index names may be missing
    return "other" if isinstance(error, torchferry.CheckpointFormatError) else "unreadable"


def _as_json(row: _Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "url": row.url,
        "step": row.step,
        "size": row.size,
        "modified": row.modified.isoformat() if row.modified else None,
        "objects": row.objects,
        "format": row.format or None,
        "tensors": row.tensors,
    }


@click.command()
@click.argument("urls", nargs=-1, required=True, metavar="URL...")
@click.option("-r", "--recursive", is_flag=True, help="All objects below a prefix.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@store_options()
def rm(urls: tuple[str, ...], recursive: bool, yes: bool, dry_run: bool, **given: Any) -> None:
    """Remove checkpoints; of an index of safetensors its files, too, and of a sharded one its shards.

    What makes the others a checkpoint, an index or .metadata, is removed first.
    """
    from torchferry.listing import delete, objects_of

    for url in urls:
        options = storage_options_for(url, given)
        with pointing_below(url, options, "-r removes all of them."):
            found = objects_of(url, recursive=recursive, storage_options=options)
        for item in found if dry_run else ():
            say(f"would remove {escaped(item.url)}  {size(item.size)}")
        total = size(sum(item.size for item in found))
        if dry_run or not found:
            say(f"{_objects(len(found))}, {total}")
            continue
        if len(found) > 1 and not yes:
            click.confirm(f"Remove {_objects(len(found))}, {total}, at {escaped(url)}?", abort=True)
        delete(url, found, storage_options=options)
        say(f"removed {_objects(len(found))}, {total}: {escaped(url)}")


def _objects(count: int) -> str:
    return f"{count:,} {'object' if count == 1 else 'objects'}"


class _Time(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions of click only
    name = "TIME"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        """Reads "30m" as a number of seconds."""
        text = str(value)
        number, unit = (text[:-1], text[-1]) if text[-1:] in _UNITS else (text, "s")
        try:
            seconds = float(number) * _UNITS[unit]
        except ValueError:
            seconds = -1.0
        if not 0 <= seconds < float("inf"):
            self.fail(f"not a time such as 90s, 30m, 1h or 2d: {text!r}", param, ctx)
        return seconds


@click.command()
@click.argument("url")
@click.option("--older-than", type=_Time(), default="1h", show_default=True, help="90s, 30m, 1h or 2d.")
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@store_options()
def clean(url: str, older_than: float, dry_run: bool, **given: Any) -> None:
    """Remove what saves that were killed have left; checkpoints are not touched."""
    import torchferry

    report = torchferry.clean(
        url, older_than=older_than, dry_run=dry_run, storage_options=storage_options_for(url, given)
    )
    outcomes = {
        "would be removed" if dry_run else "removed": report.removed,
        "younger": report.younger,
        "kept": report.kept,
    }
    for outcome, leftovers in outcomes.items():
        for leftover in leftovers:
            since = f", last changed {leftover.modified:%Y-%m-%d %H:%M:%S %Z}" if leftover.modified else ""
            say(f"{outcome}: {leftover.kind} {escaped(leftover.url)}{since}")
    say(", ".join(f"{len(leftovers)} {outcome}" for outcome, leftovers in outcomes.items()))
