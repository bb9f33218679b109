"""The command ``torchferry``: inspects, verifies, copies and cleans checkpoints, wherever they are."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fsspec.callbacks import Callback

import torchferry
from torchferry.errors import mask
from torchferry.printable import escaped

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
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; ``arguments`` are those of the process by default.

    Returns:
        The exit status: 0, or 1 where the checkpoint or the store failed; the reason is on standard error.
    """
    options = _parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for terminals that cannot show everything
    try:
        options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # who reads has seen enough, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (torchferry.TorchferryError, OSError) as error:
        message = str(error).replace("verify=False", "--no-verify")
        print(f"torchferry: {escaped(message)}", file=sys.stderr)
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

    clean = add("clean", _clean, "Remove what saves that were killed have left; checkpoints are not touched.")
    clean.add_argument("url", help="a bucket, a prefix or a directory, as an fsspec URL or a local path")
    clean.add_argument(
        "--older-than", type=_seconds, default=3600.0, metavar="TIME", help="90s, 30m, 1h or 2d; 1h by default"
    )
    clean.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    clean.add_argument(
        "--storage-options", type=_json_object, metavar="JSON", help="arguments for the fsspec filesystem"
    )
    return parser


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("not a JSON object")
    return value


def _seconds(text: str) -> float:
    number, unit = (text[:-1], text[-1]) if text[-1:] in _UNITS else (text, "s")
    try:
        seconds = float(number) * _UNITS[unit]
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"not a time such as 90s, 30m, 1h or 2d: {text!r}")
    return seconds


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
        record = None if tensor.record is None else escaped(tensor.record)
        table.add_row(escaped(tensor.key), dtype, shape, decimal(tensor.nbytes), record)
    # Keys are printed whole; where somebody's program reads them, a line each.
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
    reports: list[torchferry.TransferReport] = []
    with _progress("copying") as callback:
        stat = torchferry.copy(
            options.source,
            options.target,
            source_storage_options=options.source_options,
            target_storage_options=options.target_options,
            verify=not options.no_verify,
            callback=callback,
            report=reports.append,
        )
    checked = "not checked" if options.no_verify or reports[0].warnings else "every record matches its CRC32"
    print(f"{escaped(mask(stat.url))}: {decimal(stat.size)}, {checked}.")


def _clean(options: argparse.Namespace) -> None:
    report = torchferry.clean(
        options.url,
        older_than=options.older_than,
        dry_run=options.dry_run,
        storage_options=options.storage_options,
    )
    outcomes = {
        "would be removed" if options.dry_run else "removed": report.removed,
        "younger": report.younger,
        "kept": report.kept,
    }
    for outcome, leftovers in outcomes.items():
        for leftover in leftovers:
            since = f", last changed {leftover.modified:%Y-%m-%d %H:%M:%S %Z}" if leftover.modified else ""
            print(f"{outcome}: {leftover.kind} {escaped(leftover.url)}{since}")
    print(", ".join(f"{len(leftovers)} {outcome}" for outcome, leftovers in outcomes.items()))


def _summary(manifest: Manifest) -> str:
    storages = sum(record.name.startswith("data/") for record in manifest.records)
    return (
        f"{escaped(manifest.url)}: {decimal(manifest.size)}, {len(manifest.tensors):,} tensors in {storages:,} storages"
    )


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


if __name__ == "__main__":
    sys.exit(main())
