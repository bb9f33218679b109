"""The object that is being written, and what is said of it in every way to write it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torchferry.engine.retry import Headers
from torchferry.engine.types import ObjectStat
from torchferry.errors import StorageError
from torchferry_gcs.checksum import encoded
from torchferry_gcs.errors import is_missing

if TYPE_CHECKING:
    from torchferry_gcs.backend import GcsBackend

__all__ = ["CONTENT_TYPE", "Target", "Written"]

CONTENT_TYPE = "application/octet-stream"

_CRC32C = re.compile(r"crc32c=([^,\s]+)")


@dataclass(frozen=True, slots=True)
class Written:
    """What the store says of the object that it has published.

    Attributes:
        generation: Its version, if the store tells.
        crc32c: In base64, if it tells.
    """

    generation: str | None = None
    crc32c: str | None = None

    @classmethod
    def from_resource(cls, found: Mapping[str, Any]) -> Written:
        """From the JSON API's description."""
        return cls(found.get("generation"), found.get("crc32c"))

    @classmethod
    def from_headers(cls, headers: Headers) -> Written:
        """From the headers of an answer of the XML API."""
        fields = [(name.lower(), value) for name, value in headers.items()]
        found = _CRC32C.search(",".join(value for name, value in fields if name == "x-goog-hash"))
        return cls(dict(fields).get("x-goog-generation"), found.group(1) if found else None)


@dataclass(frozen=True, slots=True)
class Target:
    """The object that is being written.

    Attributes:
        backend: Whose it is.
        path: As the backend's verbs take it.
        bucket: Its bucket.
        key: Its name in the bucket.
        metadata: The user's.
    """

    backend: GcsBackend
    path: str
    bucket: str
    key: str
    metadata: Mapping[str, str]

    @property
    def description(self) -> dict[str, Any]:
        """What the JSON API is told."""
        metadata = {"metadata": dict(self.metadata)} if self.metadata else {}
        return {"name": self.key, "contentType": CONTENT_TYPE, **metadata}

    @property
    def fields(self) -> dict[str, str]:
        """The same as headers, for the XML API."""
        fields = {"Content-Type": CONTENT_TYPE}
        fields |= {f"x-goog-meta-{name}": value for name, value in self.metadata.items()}
        if self.backend.kms_key_name:
            fields["x-goog-encryption-kms-key-name"] = self.backend.kms_key_name
        return fields

    async def published(self, size: int, crc32c: int, written: Written) -> ObjectStat:
        """What ``write`` returns; asks the store for what it has not said yet.

        Raises:
            StorageError: the object has another CRC32C.
        """
        self.backend.forget(self.path)
        if written.generation is None or written.crc32c is None:
            written = await self.backend.call("look up", self.path, lambda: self._look_again(written))
        if written.crc32c not in {None, encoded(crc32c)}:
            raise StorageError(
                f"Cannot write {self.backend.url(self.path)}: bytes were damaged on the way, and the store took them "
                f"(CRC32C {written.crc32c} instead of {encoded(crc32c)}). The object is damaged: save again."
            )
        return ObjectStat(self.backend.url(self.path), size, written.generation, dict(self.metadata))

    async def if_there(self, size: int, crc32c: int) -> Written | None:
        """What is there, if it is what was written: for when the answer to what publishes was lost. One attempt."""
        try:
            found = await self.backend.resource(self.bucket, self.key)
        except Exception as error:
            if is_missing(error):
                return None
            raise
        same = int(found["size"]) == size and found.get("crc32c") == encoded(crc32c)
        return Written.from_resource(found) if same and found.get("metadata", {}) == self.metadata else None

    async def _look_again(self, written: Written) -> Written:
        try:
            return Written.from_resource(await self.backend.resource(self.bucket, self.key, written.generation))
        except Exception as error:
            if written.generation is not None and is_missing(error):  # replaced meanwhile
                return written
            raise
