"""Uploads whose creation got no answer: nobody has their id, so they are looked for, and aborted."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from time import monotonic

import anyio

from torchferry.errors import StorageError, mask

__all__ = ["LostCreations", "OpenUpload"]

_LOOKS = (0.0, 0.5, 2.0)  # seconds before each look: an upload can appear after its request was given up
_ABORTS = 3
_SPARE = 1.0  # seconds: both of a store's times may be whole ones

logger = logging.getLogger("torchferry.engine")


@dataclass(frozen=True, slots=True)
class OpenUpload:
    """An upload that a store lists.

    Attributes:
        id: The store's name for it.
        begun: When it was opened.
        now: The store's clock when it answered.
    """

    id: str
    begun: datetime
    now: datetime


class LostCreations:
    """The creations of one upload that got no answer: the store may have opened an upload for each.

    A store tells the key and the time of an upload, and not who opened it. Only as many as creations were lost, opened
    since the first was asked for, without parts, are ours. Where there are more, somebody else is writing to this key:
    all stay.

    Args:
        url: Of the object, for messages.
        list_uploads: Lists the open uploads of this key.
        has_parts: Whether an upload has parts.
        abort: Aborts an upload.
    """

    def __init__(
        self,
        url: str,
        list_uploads: Callable[[], AsyncIterator[OpenUpload]],
        has_parts: Callable[[str], Awaitable[bool]],
        abort: Callable[[str], Awaitable[None]],
    ) -> None:
        self._url = url
        self._list_uploads = list_uploads
        self._has_parts = has_parts
        self._abort = abort
        self._first: float | None = None  # when a creation was first asked for
        self._count = 0

    def ask(self) -> None:
        """Notes that a creation is asked for now."""
        self._first = self._first or monotonic()

    def add(self) -> None:
        """Counts a creation that got no answer."""
        self._count += 1

    async def abort_beside(self, upload_id: str) -> None:
        """Aborts them, once another creation was answered. Where that fails, the log says so, and the save goes on."""
        try:
            await self._abort_lost(but=upload_id)
        except StorageError as error:
            message = f"{self._url}: an upload whose creation was not answered may stay. {error}"
            logger.warning("%s", mask(message))

    async def abort_all(self, upload_id: str | None, *, parts_were_cut_off: bool) -> None:
        """Aborts the upload, and those whose creation got no answer.

        Args:
            upload_id: The upload; None where no creation was answered.
            parts_were_cut_off: Whether parts of it got no answer. They can arrive after the abort: then it is aborted
                again, three times at most.

        Raises:
            StorageError: the store refused, parts are there after the third abort, or more uploads could be ours than
                were lost.
        """
        if upload_id is not None:
            for _ in range(_ABORTS):
                await self._abort(upload_id)
                if not parts_were_cut_off or not await self._has_parts(upload_id):
                    break
            else:
                raise StorageError(f"Cannot clean up {self._url}: parts are there after {_ABORTS} aborts.")
        await self._abort_lost(but=upload_id)

    async def _abort_lost(self, *, but: str | None) -> None:
        """Aborts those whose creation got no answer; looks again, twice, where fewer are found than were lost."""
        for seconds in _LOOKS:
            if not self._count:
                return
            await anyio.sleep(seconds)
            found = await self._find(but)
            if len(found) > self._count:
                raise StorageError(
                    f"Cannot clean up {self._url}: {len(found)} uploads could be the {self._count} whose creation was "
                    "not answered."
                )
            for upload_id in found:
                await self._abort(upload_id)
            self._count -= len(found)
        self._count = 0  # those that were not found never came about

    async def _find(self, but: str | None) -> list[str]:
        age = timedelta(seconds=monotonic() - (self._first or monotonic()) + _SPARE)
        found = [
            upload.id async for upload in self._list_uploads() if upload.id != but and upload.begun >= upload.now - age
        ]
        return [upload_id for upload_id in found if not await self._has_parts(upload_id)]
