"""Tasks whose failures reach the caller as the plain error."""

from __future__ import annotations

from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, TypeVar

import anyio

from torchferry.errors import TorchferryError, mask

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator

    from anyio.abc import TaskGroup

__all__ = ["CarriedExit", "Tasks", "task_group", "unwrapping_exits", "wrapping_exits"]

T = TypeVar("T")


class CarriedExit(Exception):  # noqa: N818 - never seen by a caller
    """Carries a KeyboardInterrupt or SystemExit out of a task.

    By itself it would come out of the event loop, and end it: before other tasks have cleaned up, and for ever,
    where the loop runs in a thread.

    Args:
        exit_: What it carries.
    """

    def __init__(self, exit_: BaseException) -> None:
        super().__init__()
        self.exit = exit_


async def wrapping_exits(func: Callable[..., Awaitable[T]], /, *args: object) -> T:
    """Awaits ``func(*args)``, as the outermost of a task; raises :class:`CarriedExit` for what would end the loop."""
    try:
        return await func(*args)
    except (KeyboardInterrupt, SystemExit) as error:
        raise CarriedExit(error) from None


@contextmanager
def unwrapping_exits() -> Iterator[None]:
    """Raises what a :class:`CarriedExit` carries in its place."""
    try:
        yield
    except CarriedExit as carried:
        raise carried.exit from None


class Tasks:
    """The tasks of a :func:`task_group`.

    Attributes:
        cancel_scope: Cancels them, and the body of the group.
    """

    def __init__(self, group: TaskGroup) -> None:
        self.cancel_scope = group.cancel_scope
        self._group = group

    def start_soon(self, func: Callable[..., Awaitable[object]], *args: object) -> None:
        """Starts a task that runs ``func(*args)``."""
        self._group.start_soon(wrapping_exits, func, *args)


@asynccontextmanager
async def task_group() -> AsyncGenerator[Tasks]:
    """An anyio task group that raises one error instead of an exception group.

    When tasks fail, the first :class:`~torchferry.errors.TorchferryError` among their errors is raised, or else
    the first error; the others are named in its notes. A KeyboardInterrupt or SystemExit goes before all others.
    Cancellation is anyio's own, untouched.
    """
    error: BaseException | None = None
    try:
        async with anyio.create_task_group() as group:
            yield Tasks(group)
    except BaseExceptionGroup as errors:
        error = _choose_error(list(_flatten(errors)))
    if error is not None:  # raised out here, so that the group that contains the error does not become its context
        raise error


def _flatten(errors: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in errors.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _flatten(error)
        else:
            yield error.exit if isinstance(error, CarriedExit) else error


def _choose_error(errors: list[BaseException]) -> BaseException:
    def rank(error: BaseException) -> int:
        return 0 if not isinstance(error, Exception) else 1 if isinstance(error, TorchferryError) else 2

    chosen = min(errors, key=rank)  # min() takes the first of equals
    for other in errors:
        if other is not chosen:
            chosen.add_note(mask(f"Another task failed too: {type(other).__name__}: {other}"))
    return chosen
