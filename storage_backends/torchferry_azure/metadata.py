"""What user metadata Azure keeps and gives back."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torchferry.errors import UnsupportedOptionError

__all__ = ["storable"]

# https://learn.microsoft.com/rest/api/storageservices/setting-and-retrieving-properties-and-metadata-for-blob-resources
_MOST_BYTES = 8 << 10  # of names and values together
_MOST_ENTRIES = 64  # a read is answered with a field for each and some 30 more; Python's http.client takes 100


def storable(url: str, metadata: Mapping[str, str]) -> dict[str, str]:
    """User metadata as Azure takes it: its names must be C# identifiers, in ASCII, whose case does not count.

    Azure looks at it with the last request of an upload, and takes spaces around a value for a wrong signature.

    Args:
        url: Where the blob goes, for messages.
        metadata: What the user gave, which :func:`torchferry.storage.metadata.require_storable` has let pass.

    Raises:
        UnsupportedOptionError: something would not come back: two names would become one, a value is not ASCII, there
            are more than 64 entries or more than 8 KiB.
    """
    kept: dict[str, str] = {}
    asked: dict[str, str] = {}
    for name, value in metadata.items():
        if not value.isascii():
            raise UnsupportedOptionError(
                f"{url}: Azure keeps metadata in ASCII only, unlike {name!r}: {value!r}. json.dumps() makes ASCII of "
                "any text."
            )
        identifier = re.sub(r"^(?=[0-9])", "_", re.sub(r"[^A-Za-z0-9_]", "_", name))
        if (other := asked.setdefault(identifier.lower(), name)) != name:
            raise UnsupportedOptionError(f"{url}: the metadata {other!r} and {name!r} have the same name on Azure.")
        kept[identifier] = value.strip()
    if len(kept) > _MOST_ENTRIES:
        raise UnsupportedOptionError(f"{url}: {len(kept)} entries of metadata are more than {_MOST_ENTRIES}.")
    size = sum(len(name) + len(value) for name, value in kept.items())
    if size > _MOST_BYTES:
        raise UnsupportedOptionError(
            f"{url}: {size} bytes of metadata are more than the {_MOST_BYTES} that Azure keeps."
        )
    return kept
