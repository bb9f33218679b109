from __future__ import annotations

import anyio
import pytest
from anyio.lowlevel import checkpoint

from torchferry.engine.tasks import task_group
from torchferry.errors import StorageError


async def fail(error: BaseException) -> None:
    await checkpoint()
    raise error


async def fail_when_cancelled(error: BaseException) -> None:
    try:
        await anyio.sleep_forever()
    finally:
        raise error


async def test_the_error_of_a_task_arrives_as_it_is() -> None:
    error = StorageError("broken")
    with pytest.raises(StorageError) as raised:
        async with task_group() as group:
            group.start_soon(fail, error)
            await anyio.sleep_forever()
    assert raised.value is error
    assert not isinstance(error.__context__, BaseExceptionGroup)


async def test_the_error_of_the_body_arrives_as_it_is() -> None:
    with pytest.raises(ZeroDivisionError):
        async with task_group() as group:
            group.start_soon(anyio.sleep_forever)
            raise ZeroDivisionError


async def test_of_several_errors_ours_goes_first_and_names_the_others() -> None:
    with pytest.raises(StorageError, match="ours") as raised:
        async with task_group() as group:
            group.start_soon(fail, ValueError("theirs"))
            group.start_soon(fail_when_cancelled, StorageError("ours"))
    assert raised.value.__notes__ == ["Another task failed too: ValueError: theirs"]


@pytest.mark.parametrize("exit_", [SystemExit(3), KeyboardInterrupt()], ids=repr)
async def test_an_exit_in_a_task_goes_on_when_the_others_have_cleaned_up(exit_: BaseException) -> None:
    log: list[str] = []

    async def leave() -> None:
        raise exit_

    async def work() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.lowlevel.checkpoint()
                log.append("cleaned up")

    with pytest.raises(type(exit_)) as caught:
        async with task_group() as tasks:
            tasks.start_soon(work)
            tasks.start_soon(leave)
    assert caught.value is exit_
    assert log == ["cleaned up"]


async def test_cancellation_is_left_alone() -> None:
    with anyio.CancelScope() as scope:
        async with task_group() as group:
            group.start_soon(anyio.sleep_forever)
            scope.cancel()
    assert scope.cancelled_caught
