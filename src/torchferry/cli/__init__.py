"""The command ``torchferry``: lists, inspects, compares, verifies, copies, converts and cleans checkpoints."""

from __future__ import annotations

import io
import os
import re
import sys
import warnings
from collections.abc import Sequence
from contextvars import copy_context

__all__ = ["main", "run"]

_INTERRUPTED = 130  # as a shell has it: 128 and SIGINT
_ARGUMENTS = re.compile(r"(?<![\w?&])(keys|exclude|strip_prefix|max_shard_size|format)=(?=[\s,.;:]|$)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; ``arguments`` are those of the process by default.

    Returns:
        The exit status: 0; 1 where the checkpoint or the store failed, with the reason on standard error, or, of
        ``diff``, where there are differences; 2 where the arguments are wrong, or ``diff`` failed.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # closed: the next file or socket would get its number
            setattr(sys, name, open(os.devnull, "w" if number else "r"))  # noqa: PTH123, SIM115 - open to the end
    try:
        return copy_context().run(run, given)  # which --give-up-after changes
    except Exception as error:
        if "--debug" in given:
            raise
        kind = type(error).__name__
        print(f"torchferry: unexpected {kind}, a fault of torchferry's: --debug shows where.", file=sys.stderr)
        return _trouble(given)


def run(given: Sequence[str]) -> int:  # noqa: C901, PLR0911 - one for each way to end
    """:func:`main`, but for errors that are torchferry's own faults: they are raised."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # rich-click's, of names that click is about to drop
            import click

            from torchferry.cli.app import cli
    except ImportError as error:
        print(f"torchferry: {error}. The command needs: pip install 'torchferry[cli]'", file=sys.stderr)
        return 1
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # torch's; nothing here needs it
    from torchferry.cli.printing import nobody_reads, one_line
    from torchferry.errors import TorchferryError

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for terminals that cannot show everything
    try:
        if "_TORCHFERRY_COMPLETE" in os.environ:
            cli.main(args=list(given), prog_name="torchferry")
        with cli.make_context("torchferry", list(given)) as context:  # main() would end with status 1 on a closed pipe
            result = cli.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as exit_:
        return exit_.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.ClickException as error:
        of = getattr(error, "ctx", None)
        help_ = f" See {of.command_path} --help." if of is not None else ""
        print(f"torchferry: {one_line(error.format_message()).removesuffix('.')}.{help_}", file=sys.stderr)
        return error.exit_code
    except (click.Abort, KeyboardInterrupt) as error:
        if isinstance(error, click.Abort) and not sys.stdin.isatty():
            print("torchferry: not confirmed: --yes removes without asking.", file=sys.stderr)
            return 1
        print("torchferry: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        nobody_reads()
        return 0
    except (TorchferryError, OSError, ImportError) as error:
        if "--debug" in given:
            raise
        print(f"torchferry: {one_line(_with_options(str(error)))}", file=sys.stderr)
        return _trouble(given)
    return result if isinstance(result, int) else 0


def _trouble(given: Sequence[str]) -> int:
    """The exit status of what has failed: 1 is that of two checkpoints that differ."""
    return 2 if given[:1] == ["diff"] else 1


def _with_options(message: str) -> str:
    """Names the command's options where a message names the arguments of the Python functions."""
    message = message.replace("verify=False", "--no-verify")
    return _ARGUMENTS.sub(lambda found: f"--{found[1].replace('_', '-')}", message)
