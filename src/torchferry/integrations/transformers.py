"""Transformers: a callback for its ``Trainer`` that sends checkpoint folders to a URL, and what fetches one from there.

``Trainer(callbacks=[TorchferryCallback(url)])``, and to go on, ``trainer.train(fetch_latest(url, output_dir))``.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchferry.engine.loops import run
from torchferry.errors import CheckpointNotFoundError, TorchferryError, mask
from torchferry.integrations.folders import Folders

if TYPE_CHECKING:
    from torchferry.storage.base import ListedObject

if find_spec("transformers") is None:
    raise ModuleNotFoundError(
        "Transformers is not installed: pip install 'torchferry[transformers]'", name="transformers"
    )

from transformers import TrainerCallback

__all__ = ["TorchferryCallback", "fetch_latest"]

logger = logging.getLogger("torchferry")

_PREFIX = "checkpoint-"
_NAME = re.compile(r"checkpoint-(\d+)")
_STAGING = ".torchferry"


class TorchferryCallback(TrainerCallback):  # type: ignore[misc]  # mypy does not look into Transformers
    """Sends each checkpoint folder of a ``Trainer`` to a URL, while training goes on.

    A folder counts when all of its files are there; see :func:`fetch_latest`. Older ones are deleted afterwards, as the
    ``Trainer`` deletes its own (``save_total_limit``; the latest and the best stay). An error is raised at the next
    checkpoint, or at the end of the training, which waits for the last one.

    The process of rank 0 sends the files that it finds: with several machines, ``output_dir`` is to be a directory
    that they share.

    Args:
        url: The directory: an fsspec URL or a local path.
        background: Whether training goes on meanwhile.
        save_total_limit: How many stay at the URL, if not as many as ``TrainingArguments`` says. 0 for all.
        storage_options: Arguments for the fsspec filesystem of ``url``.
        give_up_after: As for :func:`torchferry.save`.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        background: bool = True,
        save_total_limit: int | None = None,
        storage_options: Mapping[str, Any] | None = None,
        give_up_after: float | None = None,
    ) -> None:
        self.url = url
        self._background = background
        self._limit = save_total_limit
        self._store: dict[str, Any] = {"storage_options": storage_options, "give_up_after": give_up_after}
        self._under_way: Future[None] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Removes what a training that was killed has left in ``output_dir``."""
        del control
        if state.is_world_process_zero:
            shutil.rmtree(Path(args.output_dir, _STAGING), ignore_errors=True)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begins to send the folder that was just written; waits for the one before.

        Raises:
            Exception: the error of the one before.
        """
        del control
        _wait_for_all_ranks()  # each writes a file of its own
        if not state.is_world_process_zero:
            return
        self.wait()
        name = f"{_PREFIX}{state.global_step}"
        folder = Path(args.output_dir, name)
        if not folder.is_dir():
            raise CheckpointNotFoundError(f"There is no {folder}. A search of hyperparameters is not supported.")
        limit = args.save_total_limit if self._limit is None else self._limit
        best = Path(state.best_model_checkpoint).name if state.best_model_checkpoint else None
        linked = Path(args.output_dir, _STAGING, name)
        _link_all(folder, linked)  # the Trainer may delete its folder meanwhile

        def send() -> None:
            try:
                run(_send, Folders(self.url, **self._store), linked, name, limit, best)
            finally:
                shutil.rmtree(linked.parent, ignore_errors=True)

        if self._background:
            self._under_way = Future()
            threading.Thread(target=_work, args=(send, self._under_way, name), name="torchferry-background").start()
        else:
            send()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Waits for the last checkpoint.

        Raises:
            Exception: its error.
        """
        del args, state, control
        self.wait()

    def wait(self) -> None:
        """Waits for the checkpoint that is being sent.

        Raises:
            Exception: its error.
        """
        if self._under_way is not None:
            try:
                self._under_way.result()
            finally:
                if self._under_way.done():  # not so after Ctrl-C
                    self._under_way = None


def fetch_latest(
    url: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    storage_options: Mapping[str, Any] | None = None,
    give_up_after: float | None = None,
) -> str | None:
    """Copies the latest whole checkpoint of a URL into ``output_dir``, if it is not there already.

    Every machine of a training calls it, once: it is a copy of files, and no collective call.

    Args:
        url: What :class:`TorchferryCallback` was given.
        output_dir: The directory of the ``Trainer``; the folder in it that has the same name and is not whole is
            replaced.
        storage_options: Arguments for the fsspec filesystem of ``url``.
        give_up_after: As for :func:`torchferry.save`.

    Returns:
        The local folder, for ``trainer.train(resume_from_checkpoint=...)``; None where there is no checkpoint, with
        which that starts from the beginning.

    Raises:
        StorageError: the store failed.
    """
    return run(_fetch_latest, Folders(url, storage_options=storage_options, give_up_after=give_up_after), output_dir)


async def _fetch_latest(folders: Folders, output_dir: str | os.PathLike[str]) -> str | None:
    listed = await folders.list(_PREFIX)
    for _, name in _in_order(listed)[::-1]:
        if await folders.is_whole(name, listed[name]):
            target = Path(output_dir, name)
            if not await folders.is_here(name, target):
                await folders.fetch(name, target)
            return str(target)
        logger.warning("%s of %s is not whole: left out.", name, mask(os.fspath(folders.url)))
    return None


async def _send(folders: Folders, folder: Path, name: str, limit: int | None, best: str | None) -> None:
    await folders.send(folder, name)
    if limit is None or limit <= 0:
        return
    try:
        listed = await folders.list(_PREFIX)
        for superfluous in await _superfluous(folders, listed, name, limit, best):
            await folders.delete(superfluous, listed[superfluous])
    except (TorchferryError, OSError) as error:
        logger.warning("Old checkpoints of %s stay until the next one: %s", mask(os.fspath(folders.url)), error)


async def _superfluous(
    folders: Folders, listed: Mapping[str, Mapping[str, ListedObject]], latest: str, limit: int, best: str | None
) -> list[str]:
    """What goes, the oldest first, as ``rotate_checkpoints`` of Transformers chooses; and what is not whole.

    A later one than the latest is of a training that had come further before, and stays.
    """
    number = int(latest.removeprefix(_PREFIX))
    older = [name for step, name in _in_order(listed) if step < number]
    whole = [name for name in older if await folders.is_whole(name, listed[name])]
    kept = max(limit, 1) - 1  # beside the latest
    if best in whole:
        whole.remove(best)
        kept = max(kept - 1, 0)
    broken = [name for name in older if name != best and name not in whole]
    return [*broken, *whole[: max(len(whole) - kept, 0)]]


def _in_order(listed: Mapping[str, Any]) -> list[tuple[int, str]]:
    found = [(int(match[1]), name) for name in listed if (match := _NAME.fullmatch(name))]
    return sorted(found)


def _work(send: Any, over: Future[None], name: str) -> None:
    """In a thread of its own, which the interpreter waits for when it ends."""
    try:
        send()
    except BaseException as error:  # noqa: BLE001 - goes on from the future
        logger.error("%s was not sent: %s", name, error)  # noqa: TRY400
        over.set_exception(error)
    else:
        over.set_result(None)


def _link_all(folder: Path, target: Path) -> None:
    """The same files once more, those that symbolic links lead to among them; copies where there are no links."""
    shutil.rmtree(target, ignore_errors=True)
    try:
        shutil.copytree(folder, target, copy_function=lambda file, link: os.link(os.path.realpath(file), link))
    except (OSError, shutil.Error):
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(folder, target)


def _wait_for_all_ranks() -> None:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()
