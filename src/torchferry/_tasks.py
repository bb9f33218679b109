"""anyio task groups whose failures reach the caller as the plain error."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio

from torchferry.errors import TorchferryError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator

    from anyio.abc import TaskGroup

__all__ = ["task_group"]


@asynccontextmanager
async def task_group() -> AsyncGenerator[TaskGroup]:
    """An anyio task group that raises one error instead of an exception group.

    When tasks fail, the first :class:`~torchferry.errors.TorchferryError` among their errors is raised, or else
    the first error; the others are named in its notes. A KeyboardInterrupt or SystemExit goes before all others.
    Cancellation is anyio's own, untouched.
    """
    error: BaseException | None = None
    try:
        async with anyio.create_task_group() as group:
            yield group
    except BaseExceptionGroup as errors:
        error = _most_telling(list(_flatten(errors)))
    if error is not None:  # raised out here, so that the group that contains the error does not become its context
        raise error


def _flatten(errors: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in errors.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _flatten(error)
        else:
            yield error


def _most_telling(errors: list[BaseException]) -> BaseException:
    def rank(error: BaseException) -> int:
        return 0 if not isinstance(error, Exception) else 1 if isinstance(error, TorchferryError) else 2

    chosen = min(errors, key=rank)  # min() takes the first of equals
    for other in errors:
        if other is not chosen:
            chosen.add_note(f"Another task failed too: {type(other).__name__}: {other}")
    return chosen
