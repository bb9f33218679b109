"""The verbs verify, copy and convert."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import rich_click as click

from torchferry.cli.printing import escaped, progress, say, size
from torchferry.cli.store import pointing_below, storage_options_for, store_options
from torchferry.errors import mask

if TYPE_CHECKING:
    from torchferry.engine.transfer import TransferReport
    from torchferry.engine.types import ObjectStat

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
def copy(source: str, target: str, recursive: bool, missing: bool, no_verify: bool, **given: Any) -> None:
    """Copy a checkpoint from one store to another, checked on the way; or all below a prefix.

    The options of the store are for both sides; for the target alone: --target-endpoint-url, --target-profile,
    --target-anon, --target-region, --target-option and --target-storage-options.
    """
    stores = _Stores(
        storage_options_for(source, given), storage_options_for(target, given, is_target=True), not no_verify
    )
    if recursive:
        _copy_all(source, target, stores, missing=missing)
    elif missing and (there := _size(target, stores.target)) is not None and there == _size(source, stores.source):
        say(f"{escaped(target)}: there already, {size(there)}.")
    else:
        with pointing_below(source, stores.source, "-r copies all of them."):
            done = stores.copy(source, target, "copying")
        say(f"{escaped(mask(done.url))}: {size(done.size)}, {stores.outcome(done.url)}.")


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


def _size(url: str, options: dict[str, Any] | None) -> int | None:
    from torchferry.errors import CheckpointNotFoundError
    from torchferry.listing import stat

    try:
        return stat(url, storage_options=options).size
    except CheckpointNotFoundError:
        return None


def _copy_all(source: str, target: str, stores: _Stores, *, missing: bool) -> None:
    from torchferry.errors import CheckpointFormatError, CheckpointNotFoundError
    from torchferry.listing import list_objects

    present: dict[str, int] = {}
    if missing:
        with suppress(CheckpointNotFoundError):
            present = {name: found.size for name, found in list_objects(target, storage_options=stores.target)}
    listed = list_objects(source, storage_options=stores.source)
    todo = [(name, found) for name, found in listed if present.get(name) != found.size]
    unchecked = 0
    for name, found in sorted(todo, key=lambda pair: (_is_last(pair[0]), pair[0])):
        to, verb = f"{target.rstrip('/')}/{name}", f"copying {escaped(name)}"
        if name.endswith(".json"):  # its files are in the list, too
            stores.copy(found.url, to, verb, verify=False)
            continue
        try:
            stores.copy(found.url, to, verb)
        except CheckpointFormatError as error:
            if "carries no checksums" not in str(error):
                raise
            stores.copy(found.url, to, verb, verify=False)
            unchecked += 1
    notes = [f"{len(todo):,} copied, {size(sum(found.size for _, found in todo))}"]
    notes += [f"{len(listed) - len(todo):,} there already"] if len(todo) < len(listed) else []
    notes += [f"{unchecked:,} carried no checksums"] if unchecked else []
    say(f"{escaped(target)}: {'; '.join(notes)}.")


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
