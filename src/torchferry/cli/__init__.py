"""The command ``torchferry``: lists, inspects, compares, verifies, copies, converts and cleans checkpoints."""

from __future__ import annotations

import io
import os
import re
import sys
import warnings
from collections.abc import Sequence

__all__ = ["main"]

_INTERRUPTED = 130  # as a shell has it: 128 and SIGINT
_ARGUMENTS = re.compile(r"(?<![\w?&])(keys|exclude|strip_prefix|max_shard_size|format)=(?=[\s,.;:]|$)")


def main(arguments: Sequence[str] | None = None) -> int:  # noqa: C901, PLR0911 - one for each way to end
    """Runs the command; ``arguments`` are those of the process by default.

    Returns:
        The exit status: 0; 1 where the checkpoint or the store failed, with the reason on standard error, or, of
        ``diff``, where there are differences; 2 where the arguments are wrong, or ``diff`` failed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # rich-click's, of names that click is about to drop
            import click

            from torchferry.cli.app import cli
    except ImportError as error:
        print(f"torchferry: {error}. The command needs: pip install 'torchferry[cli]'", file=sys.stderr)
        return 1
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # torch's; nothing here needs it
    from torchferry.errors import TorchferryError

    given = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for terminals that cannot show everything
    debug = "--debug" in given
    trouble = 2 if given[:1] == ["diff"] else 1
    try:
        if "_TORCHFERRY_COMPLETE" in os.environ:
            cli.main(args=given, prog_name="torchferry")
        with cli.make_context("torchferry", given) as context:  # main() would end with status 1 on a closed pipe
            result = cli.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as exit_:
        return exit_.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        print("torchferry: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:  # whoever reads has enough, as `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (TorchferryError, OSError, ImportError, TypeError) as error:
        if debug or isinstance(error, TypeError):
            raise
        from torchferry.cli.printing import one_line

        print(f"torchferry: {one_line(_with_options(str(error)))}", file=sys.stderr)
        return trouble
    return result if isinstance(result, int) else 0


def _with_options(message: str) -> str:
    """Names the command's options where a message names the arguments of the Python functions."""
    message = message.replace("verify=False", "--no-verify")
    return _ARGUMENTS.sub(lambda found: f"--{found[1].replace('_', '-')}", message)
