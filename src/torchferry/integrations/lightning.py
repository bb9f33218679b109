"""Lightning: a ``CheckpointIO`` that saves and loads through torchferry.

``Trainer(plugins=[TorchferryCheckpointIO()])`` is all. What is stored is what Lightning itself would have stored.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fsspec.implementations.local import LocalFileSystem

from torchferry.background import BackgroundSave, save_in_background
from torchferry.engine.loops import run
from torchferry.errors import TorchferryError, mask
from torchferry.integrations.folders import delete_async
from torchferry.loading import load
from torchferry.saving import save
from torchferry.storage.registry import protocol_of

if TYPE_CHECKING:
    from torchferry.engine.transfer import TransferReport

__all__ = ["TorchferryCheckpointIO"]

logger = logging.getLogger("torchferry")

_turn = threading.Lock()  # held for moments; an object of its own could not be pickled, as some launchers do
_CLASSES = {  # the same class lies in two packages, and each has its own Trainer
    "lightning": "lightning.fabric.plugins.io.checkpoint_io",
    "pytorch_lightning": "lightning_fabric.plugins.io.checkpoint_io",
}


def _base() -> Any:
    """Lightning's ``CheckpointIO``, of the package that is in use, or else of one that is installed."""
    for package, module in _CLASSES.items():
        if package in sys.modules:
            return import_module(module).CheckpointIO
    for package, module in _CLASSES.items():
        if find_spec(package) is not None:
            return import_module(module).CheckpointIO
    raise ModuleNotFoundError("Lightning is not installed: pip install 'torchferry[lightning]'", name="lightning")


class TorchferryCheckpointIO(_base()):  # type: ignore[misc]  # one of two classes
    """Saves and loads the checkpoints of a Lightning ``Trainer``, wherever their paths lead.

    A checkpoint that is removed goes when those that were saved before its removal are whole: not before what
    replaces it is there. One whose replacement could not be saved stays.

    Args:
        background: Whether a save returns when the checkpoint has been copied (:func:`torchferry.save_in_background`),
            or when it is stored. An error in the background is raised by the next save, load, or ``teardown``, which is
            the end of ``fit``; ``teardown`` waits for all saves.
        storage_options: Arguments for the fsspec filesystem. Lightning itself looks into the directory with fsspec's
            defaults, so credentials belong into the environment or into fsspec's configuration; these are for the rest.
        part_size: As for :func:`torchferry.save`.
        give_up_after: The same.
        report: The same. Called in another thread where the save goes on in the background.
    """

    def __init__(
        self,
        *,
        background: bool = True,
        storage_options: Mapping[str, Any] | None = None,
        part_size: int | None = None,
        give_up_after: float | None = None,
        report: Callable[[TransferReport], object] | None = None,
    ) -> None:
        super().__init__()
        for package, module in _CLASSES.items():
            if package in sys.modules:
                import_module(module).CheckpointIO.register(type(self))
        self._background = background
        self._store: dict[str, Any] = {"storage_options": storage_options, "give_up_after": give_up_after}
        self._saving: dict[str, Any] = {"part_size": part_size, "report": report}
        self._under_way: Future[None] | None = None  # the last save, with the removals that wait for it
        self._to_remove: list[str] = []

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Saves a checkpoint, or begins to.

        Args:
            checkpoint: What Lightning made.
            path: Where to: an fsspec URL or a local path.
            storage_options: Arguments for the fsspec filesystem, beside those that this object was made with.

        Raises:
            Exception: what :func:`torchferry.save` raises; and the error of the save before. This one has then not
                begun.
        """
        self._wait()
        if os.fspath(path) in self._to_remove:
            self._to_remove.remove(os.fspath(path))
        _make_way(path)
        options = {**self._store, **self._saving}
        if storage_options:
            options["storage_options"] = {**(options["storage_options"] or {}), **storage_options}
        if self._background:
            self._follow(save_in_background(checkpoint, path, **options))
        else:
            save(checkpoint, path, **options)
            self._remove_waiting()

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Loads a checkpoint, and checks its CRC32s. Waits for a save that is under way.

        Args:
            path: Where from.
            map_location: As for :func:`torchferry.load`.
            weights_only: The same; None for True, as in torch.

        Raises:
            Exception: what :func:`torchferry.load` raises; and the error of the save before.
        """
        self._wait()
        loaded: dict[str, Any] = load(
            path, map_location=map_location, weights_only=weights_only is not False, **self._store
        )
        return loaded

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Removes a checkpoint, when the save that is under way has succeeded. One that is not there is no error."""
        with _turn:
            self._to_remove.append(os.fspath(path))
            if self._under_way is not None and not self._under_way.done():
                return
        if self._under_way is None or self._under_way.exception() is None:
            self._remove_waiting()

    def teardown(self) -> None:
        """Waits for the save that is under way.

        Raises:
            Exception: its error.
        """
        self._wait()

    def _wait(self) -> None:
        if self._under_way is not None:
            try:
                self._under_way.result()
            finally:
                if self._under_way.done():  # not so after Ctrl-C
                    self._under_way = None

    def _follow(self, saving: BackgroundSave) -> None:
        """Has what waits for a save done when it is over, in the thread that waits for it."""
        self._under_way = over = Future[None]()

        def finish(saved: BackgroundSave) -> None:
            try:
                saved.result()
                self._remove_waiting(over)
            except BaseException as error:  # noqa: BLE001 - goes on from the future
                logger.error("%s was not saved: %s", saved.url, error)  # noqa: TRY400
                over.set_exception(error)

        saving.add_done_callback(finish)

    def _remove_waiting(self, over: Future[None] | None = None) -> None:
        """Removes what waits for that, and then says that it is over."""
        failed: list[str] = []
        while True:
            with _turn:
                if not self._to_remove:
                    self._to_remove += failed
                    if over is not None:
                        over.set_result(None)
                    return
                path = self._to_remove.pop(0)
            try:
                run(delete_async, path, **self._store)
            except (TorchferryError, OSError) as error:
                logger.warning("%s stays until the next checkpoint is saved: %s", mask(path), error)
                failed.append(path)


def _make_way(path: str | os.PathLike[str]) -> None:
    """Makes the directory of a local checkpoint, and takes away a link in its place, as Lightning itself does.

    With ``save_last="link"`` Lightning makes its link beside a checkpoint as soon as that is "saved"; a later run with
    ``save_last=True`` would write through the link, into the checkpoint that it names.
    """
    if protocol_of(os.fspath(path)) in {"file", "local"}:
        local = Path(LocalFileSystem._strip_protocol(os.fspath(path)))  # noqa: SLF001 - fsspec's way to say so
        local.parent.mkdir(parents=True, exist_ok=True)
        if local.is_symlink():
            local.unlink()
