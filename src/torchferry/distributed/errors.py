"""Errors that travel between ranks."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from torchferry.errors import RankFailedError, TorchferryError, mask

__all__ = ["is_uncommitted", "portable", "ranks_as_errors", "with_portable_errors"]

P = ParamSpec("P")
T = TypeVar("T")


def portable(error: BaseException) -> BaseException:
    """``error``, or one that says the same where it cannot be pickled: other ranks would wait for it for ever."""
    try:
        pickle.loads(pickle.dumps(error))  # what was pickled just now
    except Exception:  # noqa: BLE001 - whatever keeps it from being sent
        stand_in = RankFailedError(f"{type(error).__name__}: {error}")
        for note in getattr(error, "__notes__", ()):
            stand_in.add_note(note)
        return stand_in.with_traceback(error.__traceback__)
    return error


def with_portable_errors(func: Callable[P, T]) -> Callable[P, T]:
    """What a method that DCP calls raises can be sent to the other ranks.

    Where the method's object ``may_be_committed``, the errors do not say that nothing is: an interrupt can come while
    the answer of the store is on its way.
    """

    @wraps(func)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return func(*args, **kwargs)
        except BaseException as error:
            sent = portable(error)
            if not getattr(args[0], "may_be_committed", False):
                sent.uncommitted = True  # type: ignore[attr-defined]  # an attribute of our own
            if sent is error:
                raise
            raise sent from error

    return call


def is_uncommitted(error: CheckpointException) -> bool:
    """Whether a save is known to have committed nothing: each rank that failed says so."""
    return all(getattr(failure, "uncommitted", False) for failure, _ in error.failures.values())


@contextmanager
def ranks_as_errors(what: str, world_size: int) -> Generator[None]:
    """Raises DCP's ``CheckpointException``, which is no Exception, and what collectives raise, as torchferry errors.

    Of the class of the first rank's error, where that is torchferry's own: a missing checkpoint is a
    ``CheckpointNotFoundError`` on every rank. Its ``failures`` are all ranks' errors. Where a rank died, or does not
    come, it is a ``RankFailedError`` without any: nobody knows why.

    Args:
        what: "save s3://bucket/x", for messages.
        world_size: The number of ranks.
    """
    try:
        yield
    except CheckpointException as error:
        failures = {rank: failure for rank, (failure, _) in error.failures.items()}
        raise _summary(what, failures, world_size) from next(iter(failures.values()), error)
    except RuntimeError as error:
        if isinstance(error, TorchferryError) or not _is_of_a_collective(error):
            raise
        lost: Any = RankFailedError(f"Cannot {what}: one of {world_size} ranks died, or did not come: {error}")
        lost.failures = {}
        raise lost from error


def _is_of_a_collective(error: RuntimeError) -> bool:
    """Whether a function of ``torch.distributed`` has raised it: what gloo raises has no class of its own."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and frames[-1].f_globals.get("__name__") == dist.distributed_c10d.__name__


def _summary(what: str, failures: Mapping[int, BaseException], world_size: int) -> BaseException:
    first, failure = next(iter(failures.items()))
    for exit_ in failures.values():
        if isinstance(exit_, KeyboardInterrupt | SystemExit) and len(failures) == world_size:
            return exit_
    named = {rank: f"{type(error).__name__}: {error}" for rank, error in failures.items()}
    others = f", and {len(failures) - 1} more" if len(failures) > 1 else ""
    text = f"Cannot {what}: rank {first} of {world_size} failed{others}: {named[first]}"
    summary: Any = None
    if isinstance(failure, TorchferryError) and not isinstance(failure, RankFailedError):
        with suppress(TypeError):
            summary = type(failure)(text)
    if summary is None:
        summary = RankFailedError(text)
    summary.failures = dict(failures)
    for rank, said in list(named.items())[1:9]:
        if said != named[first]:
            summary.add_note(f"Rank {rank}: {mask(said)}")
    return summary  # type: ignore[no-any-return]
