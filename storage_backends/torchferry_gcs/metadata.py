"""What user metadata Google Cloud Storage keeps and gives back: large objects get theirs as fields of HTTP."""

from __future__ import annotations

from collections.abc import Mapping

from torchferry.errors import UnsupportedOptionError

__all__ = ["storable"]

_MOST_BYTES = 8 << 10  # of names and values together: https://cloud.google.com/storage/quotas#objects
_MOST_ENTRIES = 64  # a read is answered with a field for each and some 20 more; Python's http.client takes 100


def storable(url: str, metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata as GCS keeps it: names in lower case, as those of fields of HTTP become.

    Args:
        url: Where the object goes, for messages.
        metadata: What the user gave, which :func:`torchferry.storage.metadata.require_storable` has let pass.

    Raises:
        UnsupportedOptionError: something would not come back as it is.
    """
    for name, value in metadata.items():
        if not value.isascii() or value != value.strip():
            raise UnsupportedOptionError(
                f"{url}: Google Cloud Storage does not give back the metadata {name!r}: {value!r} as it is: use ASCII, "
                "without spaces at the ends. json.dumps() makes ASCII of any text."
            )
    kept = {name.lower(): value for name, value in metadata.items()}
    if len(kept) != len(metadata):
        raise UnsupportedOptionError(f"{url}: names of metadata differ in upper and lower case only: {list(metadata)}.")
    if len(kept) > _MOST_ENTRIES:
        raise UnsupportedOptionError(f"{url}: {len(kept)} entries of metadata are more than {_MOST_ENTRIES}.")
    size = sum(len(name) + len(value) for name, value in kept.items())
    if size > _MOST_BYTES:
        raise UnsupportedOptionError(
            f"{url}: {size} bytes of metadata are more than the {_MOST_BYTES} that Google Cloud Storage keeps."
        )
    return kept
