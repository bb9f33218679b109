"""The verbs verify, copy and convert."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import rich_click as click

from torchferry.cli.printing import escaped, one_line, progress, say, size
from torchferry.cli.store import pointing_below, storage_options_for, store_options
from torchferry.errors import mask

if TYPE_CHECKING:
    from torchferry.engine.transfer import TransferReport
    from torchferry.engine.types import ObjectStat
    from torchferry.storage.base import ListedObject

__all__ = ["convert", "copy", "verify"]

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


class _Size(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions of click only
    name = "SIZE"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        """Reads "5GB" as a number of bytes."""
        matched = re.fullmatch(r"(\d{1,15}(?:\.\d*)?)\s*([kmg]i?)?b?", str(value).lower(), re.ASCII)
        if matched is None:
            self.fail(f"{value!r} is no size such as 5GB or 500MiB", param, ctx)
        return int(float(matched[1]) * _UNITS[matched[2] or ""])


@click.command()
@click.argument("url")
@store_options()
def verify(url: str, **given: Any) -> None:
    """Read a whole checkpoint and check every CRC32; of safetensors, check the structure."""
    import torchferry

    options = storage_options_for(url, given)
    with pointing_below(url, options, "torchferry ls {url} lists them."), progress("verifying") as callback:
        manifest = torchferry.verify(url, storage_options=options, callback=callback)
    has_crc32s = manifest.format != "safetensors"
    what = "Every record matches its CRC32" if has_crc32s else "Its structure is whole; it has no CRC32s"
    say(f"{escaped(manifest.url)}: {size(manifest.size)}, {len(manifest.tensors):,} tensors. {what}.")


@click.command()
@click.argument("source")
@click.argument("target")
@click.option("-r", "--recursive", is_flag=True, help="Copy all objects below a prefix.")
@click.option("--missing", is_flag=True, help="Only those that the target lacks, or has in another size.")
@click.option("--no-verify", is_flag=True, help="Copy whatever it is, without checking.")
@store_options(target=True)
def copy(source: str, target: str, recursive: bool, missing: bool, no_verify: bool, **given: Any) -> int:
    """Copy a checkpoint from one store to another, checked on the way; or all below a prefix.

    With -r, what cannot be copied is named at the end, and the exit status is 1. What is no checkpoint is copied
    unchecked. An index of safetensors and its files are one checkpoint.

    The options of the store are for both sides; for the target alone: --target-endpoint-url, --target-profile,
    --target-anon, --target-region, --target-option and --target-storage-options.
    """
    stores = _Stores(
        storage_options_for(source, given), storage_options_for(target, given, is_target=True), not no_verify
    )
    if recursive:
        return _copy_all(source, target, stores, missing=missing)
    there = _objects(target, stores.target) if missing else []
    if there and _sizes(there) == _sizes(_objects(source, stores.source)):
        say(f"{escaped(target)}: there already, {size(sum(part.size for part in there))}.")
    else:
        with pointing_below(source, stores.source, "-r copies all of them."):
            done = stores.copy(source, target, "copying")
        say(f"{escaped(mask(done.url))}: {size(done.size)}, {stores.outcome(done.url)}.")
    return 0


@dataclass(slots=True)
class _Stores:
    """The two sides of a copy."""

    source: dict[str, Any] | None
    target: dict[str, Any] | None
    verify: bool
    reports: list[TransferReport] = field(default_factory=list)

    def copy(self, source: str, target: str, verb: str, *, verify: bool | None = None) -> ObjectStat:
        """Copies one checkpoint."""
        from torchferry.copying import copy as copy_one

        with progress(verb) as callback:
            return copy_one(
                source,
                target,
                verify=self.verify if verify is None else verify,
                callback=callback,
                source_storage_options=self.source,
                target_storage_options=self.target,
                report=self.reports.append,
            )

    def outcome(self, url: str) -> str:
        """What was checked of the last one."""
        if not self.verify or self.reports[-1].warnings:
            return "not checked"
        is_safetensors = url.endswith((".safetensors", ".safetensors.index.json"))
        return "its structure is whole" if is_safetensors else "every record matches its CRC32"


def _objects(url: str, options: dict[str, Any] | None) -> list[ListedObject]:
    """Those that a checkpoint is made of, first what names the others; none where there is none that is whole."""
    from torchferry.errors import StorageUnavailableError, TorchferryError
    from torchferry.listing import objects_of

    try:
        return objects_of(url, storage_options=options)
    except StorageUnavailableError:
        raise
    except TorchferryError:
        return []


def _sizes(objects: Sequence[ListedObject]) -> list[int]:
    """What tells whether a copy is there. What names others is not the same size in a copy: they have other names."""
    return sorted(item.size for item in (objects[1:] or objects))


@dataclass(slots=True)
class _Item:
    """Something below a prefix that is copied as one: an object, or an index with its files.

    Attributes:
        name: Below the prefix.
        url: Of the object, or of the index.
        objects: All that are copied.
    """

    name: str
    url: str
    objects: list[ListedObject]

    @property
    def size(self) -> int:
        return sum(item.size for item in self.objects)

    @property
    def is_index(self) -> bool:
        return len(self.objects) > 1


def _items(source: str, options: dict[str, Any] | None) -> list[_Item]:
    """What there is to copy, and last what makes other objects a checkpoint."""
    from torchferry.listing import list_objects

    found = list_objects(source, storage_options=options)
    listed = [_Item(name, item.url, [item]) for name, item in found if item.size or not _is_folder(name)]
    for item in listed:
        if item.name.endswith(".json"):
            objects = _objects(item.url, options)
            if all(file.path.endswith(".safetensors") for file in objects[1:]):
                item.objects = objects or item.objects
    files = {file.path for item in listed for file in item.objects[1:]}
    items = [item for item in listed if item.objects[0].path not in files]
    return sorted(items, key=lambda item: (_is_last(item.name), item.name))


def _is_folder(name: str) -> bool:
    """Whether an empty object of this name only shows a folder, as consoles of stores make them."""
    return not name or name.endswith("/")


def _copy_all(source: str, target: str, stores: _Stores, *, missing: bool) -> int:
    from torchferry.errors import CheckpointNotFoundError, StorageUnavailableError, TorchferryError
    from torchferry.listing import list_objects

    present: dict[str, int] = {}
    if missing:
        with suppress(CheckpointNotFoundError):
            present = {name: found.size for name, found in list_objects(target, storage_options=stores.target)}
    copied: list[_Item] = []
    failures: list[str] = []
    there = unchecked = 0
    for item in _items(source, stores.source):
        to = f"{target.rstrip('/')}/{item.name}"
        try:
            if item.name in present and _is_there(item, present, to, stores):
                there += len(item.objects)
                continue
            unchecked += not _copy_one(item, to, stores)
            copied.append(item)
        except TorchferryError as error:
            failures.append(f"{escaped(item.name)}: {one_line(str(error))}")
            if isinstance(error, StorageUnavailableError):  # nor would it answer for the others
                failures.append("what comes after it was not tried")
                break
    number = sum(len(item.objects) for item in copied)
    notes = [f"{number:,} copied, {size(sum(item.size for item in copied))}"]
    notes += [f"{there:,} there already"] if there else []
    notes += [f"{unchecked:,} carried no checksums"] if unchecked else []
    say(f"{escaped(target)}: {'; '.join(notes)}.")
    for failure in failures:
        print(f"torchferry: not copied: {failure}", file=sys.stderr)
    return int(bool(failures))


def _is_there(item: _Item, present: dict[str, int], to: str, stores: _Stores) -> bool:
    if item.is_index:
        return _sizes(_objects(to, stores.target)) == _sizes(item.objects)
    return present[item.name] == item.size


def _copy_one(item: _Item, to: str, stores: _Stores) -> bool:
    """Copies something, unchecked where it is no checkpoint; returns False where it could have been one."""
    from torchferry.errors import CheckpointCorruptError, CheckpointFormatError

    verb = f"copying {escaped(item.name)}"
    if item.name.endswith(".json") and not item.is_index:
        stores.copy(item.url, to, verb, verify=False)
        return True
    try:
        stores.copy(item.url, to, verb)
    except CheckpointCorruptError:
        raise
    except CheckpointFormatError:
        stores.copy(item.url, to, verb, verify=False)
        return False
    return True


def _is_last(name: str) -> bool:
    """Whether an object makes others a checkpoint: it is copied when they are there."""
    return name.endswith((".index.json", ".metadata"))


@click.command()
@click.argument("source")
@click.argument("target")
@click.option(
    "--format",
    "format_",
    type=click.Choice(["torch", "safetensors", "sharded"]),
    help="Of the target; by default the other one. Of a sharded source: by the target's name.",
)
@click.option("-k", "--keys", multiple=True, metavar="NAME", help="Only these tensors: names, prefixes, globs.")
@click.option("-x", "--exclude", multiple=True, metavar="NAME", help="Not these.")
@click.option("--strip-prefix", default="", metavar="TEXT", help='Taken from the front of names, such as "model.".')
@click.option("--max-shard-size", type=_Size(), help="Of a file of safetensors: 5GB. Larger ones become shards.")
@store_options(target=True)
def convert(
    source: str,
    target: str,
    format_: Any,
    keys: tuple[str, ...],
    exclude: tuple[str, ...],
    strip_prefix: str,
    max_shard_size: int | None,
    **given: Any,
) -> None:
    """Convert between torch.save, safetensors and sharded checkpoints, in bounded memory.

    A TARGET that ends in "/" becomes the directory of a sharded checkpoint, of a file of torch.save.

    The options of the store are for both sides; those that begin with --target- for the target alone, as in copy.
    """
    import torchferry

    with progress("converting") as callback:
        done = torchferry.convert(
            source,
            target,
            format=format_,
            keys=keys or None,
            exclude=exclude or None,
            strip_prefix=strip_prefix,
            max_shard_size=max_shard_size,
            source_storage_options=storage_options_for(source, given),
            target_storage_options=storage_options_for(target, given, is_target=True),
            callback=callback,
        )
    say(f"{escaped(mask(done.url))}: {size(done.size)}.")
