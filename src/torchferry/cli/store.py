"""The options that say how a store is reached, the same for every verb."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import rich_click as click

__all__ = ["pointing_below", "storage_options_for", "store_options"]

F = TypeVar("F", bound=Callable[..., Any])

_NAMES = ("endpoint_url", "profile", "anon", "region", "option", "storage_options")
_LOCAL = {"file", "local", "memory"}
_S3, _GCS, _AZURE = {"s3", "s3a"}, {"gs", "gcs"}, {"az", "abfs", "abfss"}
_TARGET = "target_"


def store_options(*, target: bool = False) -> Callable[[F], F]:
    """Adds the options to a verb; ``target``: also those of the other side, which begin with ``--target-``."""

    def add(func: F) -> F:
        for prefix, side in (("target-", " of the target"), ("", "")) if target else (("", ""),):
            func = _add(func, prefix, side)
        return func

    return add


def _add(func: F, prefix: str, side: str) -> F:
    name = prefix.replace("-", "_")
    hidden = bool(prefix)  # the help of a verb says what they are
    short = () if prefix else ("-o",)

    def option(argument: str, text: str, **kwargs: Any) -> Any:
        return click.option(
            f"--{prefix}{argument}",
            *(short if argument == "option" else ()),
            name + argument.replace("-", "_"),
            help=f"{text}{side}.",
            hidden=hidden,
            **kwargs,
        )

    pairs = "An argument for the fsspec filesystem; VALUE may be JSON, and KEY may have dots"
    options = (
        option("endpoint-url", "The URL of the store", metavar="URL"),
        option("profile", "A profile of the AWS configuration", metavar="NAME"),
        option("anon", "Without credentials", is_flag=True),
        option("region", "The region", metavar="NAME"),
        option("option", pairs, metavar="KEY=VALUE", multiple=True),
        option("storage-options", "All arguments for the fsspec filesystem", metavar="JSON"),
    )
    for decorate in reversed(options):
        func = decorate(func)
    return func


def storage_options_for(url: str, given: dict[str, Any], *, is_target: bool = False) -> dict[str, Any] | None:
    """The arguments for the filesystem of a URL.

    What is given without a prefix is for both sides of a copy that are in a store; what has one, for the target.

    Args:
        url: The URL.
        given: The options of the command; those of the store are taken out of it only when it is not the target.
        is_target: Whether it is the other side of a copy.

    Raises:
        click.UsageError: the store knows no such option, or a value cannot be read.
    """
    from torchferry.storage.registry import protocol_of

    own = {name: given.get(_TARGET + name) for name in _NAMES}
    has_own = is_target and any(own.values())
    chosen = own if has_own else {name: given.get(name) for name in _NAMES}
    protocol = protocol_of(url)
    if protocol in _LOCAL and not has_own and _TARGET + "option" in given:
        return None  # they are for the other side
    options = _json(chosen["storage_options"]) if chosen["storage_options"] else {}
    for text in chosen["option"] or ():
        key, equals, value = text.partition("=")
        if not equals:
            raise click.UsageError(f"-o wants KEY=VALUE, not {text!r}.")
        _set(options, key, _value(value))
    prefix = "--target-" if has_own else "--"
    for name in ("endpoint_url", "profile", "anon", "region"):
        if value := chosen[name]:
            if name == "endpoint_url" and protocol not in _AZURE and "://" not in value:
                raise click.UsageError(f"{prefix}endpoint-url wants a URL, such as http://{value}.")
            _translate(options, protocol, name, value, prefix + name.replace("_", "-"))
    return options or None


@contextmanager
def pointing_below(url: str, options: dict[str, Any] | None, advice: str) -> Generator[None]:
    """Where there is no object at a URL, but some below it, says so, and what to do about it.

    Args:
        url: What was named.
        options: The arguments for its filesystem.
        advice: What to do; ``{url}`` stands for the URL.
    """
    from torchferry.errors import CheckpointNotFoundError, StorageError, mask

    try:
        yield
    except StorageError as error:
        if isinstance(error, CheckpointNotFoundError) or error.errno == errno.EISDIR:
            from torchferry.listing import has_below

            is_prefix = False
            with suppress(StorageError):
                is_prefix = has_below(url, storage_options=options)
            if is_prefix:
                shown = mask(url)
                message = f"There is no checkpoint {shown}, but there are objects below it: {advice.format(url=shown)}"
                raise CheckpointNotFoundError(errno.ENOENT, message) from error
        raise


def _translate(options: dict[str, Any], protocol: str, name: str, value: Any, argument: str) -> None:
    if protocol in _S3 and name == "region":
        _set(options, "client_kwargs.region_name", value)
    elif protocol in _S3 or (protocol in _GCS and name == "endpoint_url") or (protocol in _AZURE and name == "anon"):
        options[name] = value
    elif protocol in _GCS and name == "anon":
        options["token"] = "anon"  # noqa: S105 - what gcsfs calls it
    elif protocol in _AZURE and name == "endpoint_url":
        options["account_host"] = value.partition("://")[2] or value
    else:
        raise click.UsageError(f"{protocol}:// takes no {argument}. -o KEY=VALUE gives an argument to its filesystem.")


def _set(options: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        options = options.setdefault(part, {})
        if not isinstance(options, dict):
            raise click.UsageError(f"{key} is given below {part}, which has a value of its own.")
    options[last] = value


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _json(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise click.UsageError(f"--storage-options is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise click.UsageError("--storage-options is not a JSON object.")
    return value
