"""Callbacks that show the progress of a transfer: ``load(url, callback=RichCallback())``."""

from __future__ import annotations

import sys
from typing import Any, Self

from fsspec.callbacks import Callback

__all__ = ["RichCallback", "TqdmCallback"]


class _Bar(Callback):  # type: ignore[misc]
    """A callback with a bar that appears with the first size and is closed at the end of the transfer.

    May be used for several transfers, one after the other, or as a context manager around one that may fail.
    """

    size: int | None
    value: int

    def __init__(self, description: str = "") -> None:
        super().__init__()
        self.description = description

    def call(self, hook_name: str | None = None, **kwargs: Any) -> None:  # noqa: ARG002 - fsspec's signature
        """Called by fsspec after each change."""
        if not self.size:
            self.value = 0
            return
        self._show(self.size, min(self.value, self.size))
        if self.value >= self.size:
            self.close()

    def _show(self, size: int, value: int) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Takes the bar away, and is ready for another transfer."""
        self.value = 0
        self.size = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class RichCallback(_Bar):
    """A progress bar of rich: bytes with units, speed, time left; in a notebook, too. Needs ``pip install rich``.

    Args:
        description: What stands before the bar; such as "saving".
        console: A ``rich.console.Console``; by default one on standard error, where nothing is shown in a pipe.
    """

    def __init__(self, description: str = "", *, console: Any = None) -> None:
        super().__init__(description)
        self._console = console
        self._progress: Any = None
        self._task: Any = None

    def _show(self, size: int, value: int) -> None:
        if self._progress is None:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )

            console = self._console or Console(stderr=True)
            columns = (
                TextColumn("{task.description}", markup=False),  # names may have brackets
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
            )
            shown = console.is_terminal or console.is_jupyter
            self._progress = Progress(*columns, console=console, transient=True, disable=not shown)
            self._progress.start()
            self._task = self._progress.add_task(self.description, total=size)
        self._progress.update(self._task, total=size, completed=value)

    def close(self) -> None:
        """Takes the bar away, and is ready for another transfer."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        super().close()


class TqdmCallback(_Bar):
    """A progress bar of tqdm: bytes with units; in a notebook, too. Needs ``pip install tqdm``.

    Args:
        description: What stands before the bar; such as "saving".
        options: Others of ``tqdm.auto.tqdm``.
    """

    def __init__(self, description: str = "", **options: Any) -> None:
        super().__init__(description)
        self._options = {"unit": "B", "unit_scale": True, "leave": False, "file": sys.stderr, **options}
        self._bar: Any = None

    def _show(self, size: int, value: int) -> None:
        if self._bar is None:
            from tqdm.auto import tqdm  # type: ignore[import-untyped]

            self._bar = tqdm(desc=self.description or None, total=size, **self._options)
        self._bar.total = size
        self._bar.update(value - self._bar.n)

    def close(self) -> None:
        """Takes the bar away, and is ready for another transfer."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        super().close()
