"""The verbs, and what they have in common."""

from __future__ import annotations

from importlib.metadata import version

import rich_click as click
from click.shell_completion import get_completion_class

from torchferry.cli.comparing import diff
from torchferry.cli.inspecting import inspect
from torchferry.cli.listing import clean, ls, rm
from torchferry.cli.moving import convert, copy, verify
from torchferry.engine.transfer import GIVE_UP_AFTER

__all__ = ["cli"]

_STATUS = (
    "The exit status is 0; 1 if it failed; 2 if the arguments are wrong. Of diff: 0 the same, 1 different, 2 failed."
)


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=_STATUS,
    no_args_is_help=True,
)
@click.version_option(version("torchferry"), "--version", prog_name="torchferry")
def cli() -> None:
    """Checkpoints in object stores and local files: look at them, check, copy, convert and clean them.

    URL is an fsspec URL (s3://, gs://, az://, ...) or a local path. fsspec's configuration files and variables hold
    here, too.
    """


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of a shell.

    In ~/.bashrc: eval "$(torchferry completion bash)"
    """
    kind = get_completion_class(shell)
    if kind is None:  # pragma: no cover - click has all three
        raise click.UsageError(f"No completion for {shell}.")
    click.echo(kind(cli, {}, "torchferry", "_TORCHFERRY_COMPLETE").source())


def _give_up_after(context: click.Context, option: click.Parameter, seconds: float | None) -> None:
    del context, option
    if seconds is not None:
        GIVE_UP_AFTER.set(seconds)


for _command in (ls, inspect, diff, verify, copy, convert, clean, rm):
    _command.params.append(
        click.Option(
            ["--give-up-after"],
            type=click.FloatRange(min=0),
            metavar="SECONDS",
            expose_value=False,
            callback=_give_up_after,
            help="How long failed requests are tried again while nothing moves; 120 by default.",
        )
    )
    cli.add_command(_command)
for _verb in cli.commands.values():
    _verb.params.append(
        click.Option(["--debug"], is_flag=True, expose_value=False, help="Show where an error comes from.")
    )
