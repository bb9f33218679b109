from __future__ import annotations

from typing import Any

import pytest

from torchferry.storage.base import Backend, Plane
from torchferry.storage.registry import open_backend
from torchferry.testing import CloudConformance, StoreUnderTest

DATA = bytes(range(256)) * (12 * 4096)  # 12 MiB: three parts of 5 MiB
PLANES: tuple[Plane, ...] = ("fsspec", "obstore")


class S3Store(StoreUnderTest):
    keeps_metadata = True

    def __init__(self, client: Any, url: str, storage_options: dict[str, Any], plane: Plane) -> None:
        self.backend, self._prefix = open_backend(url, storage_options=storage_options, plane=plane)
        self._client = client

    def path(self, name: str) -> str:
        return f"{self._prefix}/{name}"

    def raw_write(self, path: str, data: bytes) -> None:
        self._client.put_object(**self._address(path), Body=data)

    def raw_read(self, path: str) -> bytes:
        data: bytes = self._client.get_object(**self._address(path))["Body"].read()
        return data

    def raw_exists(self, path: str) -> bool:
        bucket, _, key = path.partition("/")
        found = self._client.list_objects_v2(Bucket=bucket, Prefix=key)
        return any(entry["Key"] == key for entry in found.get("Contents", []))

    def leftovers(self) -> list[str]:
        bucket, _, prefix = self._prefix.partition("/")
        uploads = self._client.list_multipart_uploads(Bucket=bucket, Prefix=prefix)
        return [upload["Key"] for upload in uploads.get("Uploads", [])]

    def _address(self, path: str) -> dict[str, str]:
        bucket, _, key = path.partition("/")
        return {"Bucket": bucket, "Key": key}


class S3Conformance(CloudConformance):
    plane: Plane

    @pytest.fixture
    def store(self, s3_client: Any, s3_url: str, s3_storage_options: dict[str, Any]) -> S3Store:
        return S3Store(s3_client, s3_url, s3_storage_options, self.plane)

    @pytest.fixture
    def path_in_missing_container(self) -> str:
        return "ferry-nowhere/checkpoint.pt"

    @pytest.fixture
    def unauthorized(self, s3_url: str, s3_storage_options: dict[str, Any]) -> Backend:
        options = s3_storage_options | {"secret": "wrong"}
        return open_backend(s3_url, storage_options=options, plane=self.plane)[0]


class TestS3ThroughS3fs(S3Conformance):
    plane = "fsspec"


class TestS3ThroughObstore(S3Conformance):
    plane = "obstore"
