"""Google Cloud Storage for torchferry: ``gs://`` and ``gcs://``, configured by a gcsfs filesystem."""

from torchferry_gcs.backend import GcsBackend

__all__ = ["GcsBackend"]
