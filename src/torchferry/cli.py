"""The command ``torchferry``: inspect, verify and copy checkpoints, wherever they are."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fsspec.callbacks import Callback

import torchferry

try:
    from rich.console import Console
    from rich.filesize import decimal
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn
    from rich.table import Table
except ImportError as error:  # pragma: no cover - the message is the whole point
    raise SystemExit(f"{error}. The command needs: pip install 'torchferry[cli]'") from error

if TYPE_CHECKING:
    from torchferry.loading import Manifest

__all__ = ["main"]

_SHOWN = 40
_UNLIMITED = 1 << 20  # columns


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; ``arguments`` are those of the process by default.

    Returns:
        The exit status: 0, or 1 where the checkpoint or the store failed; the reason is on standard error.
    """
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (torchferry.TorchferryError, OSError) as error:
        print(f"torchferry: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="torchferry", description="Inspect, verify and copy PyTorch checkpoints in object stores and local files."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Any, summary: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=summary, description=summary)
        command.set_defaults(run=run)
        return command

    inspect = add("inspect", _inspect, "List the tensors of a checkpoint without reading them.")
    verify = add("verify", _verify, "Read a whole checkpoint and check every CRC32.")
    for command in (inspect, verify):
        command.add_argument("url", help="an fsspec URL or a local path")
        command.add_argument(
            "--storage-options", type=_json_object, metavar="JSON", help="arguments for the fsspec filesystem"
        )
    inspect.add_argument("--json", action="store_true", help="print everything as JSON")
    inspect.add_argument("--all", action="store_true", help=f"list every tensor, not only the first {_SHOWN}")

    copy = add("copy", _copy, "Copy a checkpoint from one store to another, checked on the way.")
    copy.add_argument("source", help="an fsspec URL or a local path")
    copy.add_argument("target", help="an fsspec URL or a local path")
    copy.add_argument("--source-options", type=_json_object, metavar="JSON", help="for the filesystem of the source")
    copy.add_argument("--target-options", type=_json_object, metavar="JSON", help="for the filesystem of the target")
    copy.add_argument("--no-verify", action="store_true", help="copy whatever it is, without checking")
    return parser


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("not a JSON object")
    return value


def _inspect(options: argparse.Namespace) -> None:
    manifest = torchferry.inspect(options.url, storage_options=options.storage_options)
    if options.json:
        print(json.dumps(_as_json(manifest), indent=2))
        return
    shown = manifest.tensors if options.all else manifest.tensors[:_SHOWN]
    table = Table("tensor", "dtype", "shape", "bytes", "record", box=None, pad_edge=False, header_style="bold")
    table.columns[0].overflow = "fold"
    table.columns[3].justify = "right"
    for tensor in shown:
        dtype, shape = str(tensor.dtype).removeprefix("torch."), " x ".join(map(str, tensor.shape)) or "scalar"
        table.add_row(tensor.key, dtype, shape, decimal(tensor.nbytes), tensor.record)
    # Keys are printed as they are; where somebody's program reads them, a line each.
    width = None if sys.stdout.isatty() else _UNLIMITED
    console = Console(highlight=False, markup=False, emoji=False, width=width)
    console.print(table)
    if left_out := len(manifest.tensors) - len(shown):
        console.print(f"... and {left_out:,} more (--all lists them)")
    console.print(f"\n{_summary(manifest)}")


def _verify(options: argparse.Namespace) -> None:
    with _progress("verifying") as callback:
        manifest = torchferry.verify(options.url, storage_options=options.storage_options, callback=callback)
    print(f"{_summary(manifest)}. Every record matches its CRC32.")


def _copy(options: argparse.Namespace) -> None:
    with _progress("copying") as callback:
        stat = torchferry.copy(
            options.source,
            options.target,
            source_storage_options=options.source_options,
            target_storage_options=options.target_options,
            verify=not options.no_verify,
            callback=callback,
        )
    checked = "not checked" if options.no_verify else "every record matches its CRC32"
    print(f"{stat.url}: {decimal(stat.size)}, {checked}.")


def _summary(manifest: Manifest) -> str:
    storages = sum(record.name.startswith("data/") for record in manifest.records)
    return f"{manifest.url}: {decimal(manifest.size)}, {len(manifest.tensors):,} tensors in {storages:,} storages"


def _as_json(manifest: Manifest) -> dict[str, Any]:
    return {
        "url": manifest.url,
        "size": manifest.size,
        "etag": manifest.etag,
        "records": [
            {"name": record.name, "offset": record.offset, "size": record.size, "crc32": record.crc32}
            for record in manifest.records
        ],
        "tensors": [
            {
                "key": tensor.key,
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "shape": list(tensor.shape),
                "nbytes": tensor.nbytes,
                "record": tensor.record,
            }
            for tensor in manifest.tensors
        ],
    }


@contextmanager
def _progress(verb: str) -> Iterator[Callback]:
    """An fsspec callback that moves a progress bar on standard error."""
    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(verb, total=None)

        class Bar(Callback):  # type: ignore[misc]
            def call(self, hook_name: str | None = None, **kwargs: Any) -> None:  # noqa: ARG002
                progress.update(bar, total=self.size, completed=self.value)

        yield Bar()
