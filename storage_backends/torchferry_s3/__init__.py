"""S3 and what speaks its protocol, for torchferry: ``s3://`` and ``s3a://``, configured by an s3fs filesystem."""

from torchferry_s3.backend import S3Backend

__all__ = ["S3Backend"]
