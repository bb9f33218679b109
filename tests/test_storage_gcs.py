from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import botocore.session
import pytest
from botocore import UNSIGNED
from botocore.config import Config
from google.oauth2.credentials import Credentials

from torchferry.storage.base import Backend, Plane
from torchferry.storage.registry import open_backend
from torchferry.testing import CloudConformance, StoreUnderTest
from torchferry.testing.fixtures import GcsClient
from torchferry.testing.gcs import GcsServer, TokenProxy

PLANES: tuple[Plane, ...] = ("fsspec", "obstore")


def with_token(token: str, endpoint: str) -> dict[str, Any]:
    return {"endpoint_url": endpoint, "project": "ferry-test-project", "token": Credentials(token)}


class GcsStore(StoreUnderTest):
    """The JSON API."""

    keeps_metadata = True

    def __init__(self, client: GcsClient, url: str, storage_options: dict[str, Any]) -> None:
        self.options = {"storage_options": storage_options, "plane": "fsspec"}
        self.backend, self._prefix = open_backend(url, **self.options)
        self._client = client

    def path(self, name: str) -> str:
        return f"{self._prefix}/{name}"

    def raw_write(self, path: str, data: bytes) -> None:
        self._client.write(path, data)

    def raw_read(self, path: str) -> bytes:
        return self._client.read(path)

    def raw_exists(self, path: str) -> bool:
        return self._client.exists(path)

    def leftovers(self) -> list[str]:
        return [name for name in self._client.names(self._prefix) if "/.torchferry-" in name]


class TestGcsThroughGcsfs(CloudConformance):
    @pytest.fixture
    def store(self, gcs_client: GcsClient, gcs_url: str, gcs_storage_options: dict[str, Any]) -> GcsStore:
        return GcsStore(gcs_client, gcs_url, gcs_storage_options)

    @pytest.fixture
    def path_in_missing_container(self) -> str:
        return "ferry-nowhere/checkpoint.pt"

    @pytest.fixture
    def unauthorized(self, gcs_server: GcsServer, gcs_url: str) -> Iterator[Backend]:
        with TokenProxy(gcs_server.port) as proxy:
            options = with_token("ferry-powerless-token", proxy.endpoint)
            yield open_backend(gcs_url, storage_options=options, plane="fsspec")[0]


class GcsXmlStore(StoreUnderTest):
    """The XML API, which is S3's but for the names of headers: an S3 client goes around what is under test."""

    keeps_metadata = True

    def __init__(self, client: Any, url: str, storage_options: dict[str, Any]) -> None:
        self.options = {"storage_options": storage_options, "plane": "obstore"}
        self.backend, self._prefix = open_backend(url, **self.options)
        self._client = client

    def path(self, name: str) -> str:
        return f"{self._prefix}/{name}"

    def raw_write(self, path: str, data: bytes) -> None:
        self._client.put_object(**_address(path), Body=data)

    def raw_read(self, path: str) -> bytes:
        data: bytes = self._client.get_object(**_address(path))["Body"].read()
        return data

    def raw_exists(self, path: str) -> bool:
        address = _address(path)
        found = self._client.list_objects_v2(Bucket=address["Bucket"], Prefix=address["Key"])
        return any(entry["Key"] == address["Key"] for entry in found.get("Contents", []))

    def leftovers(self) -> list[str]:
        address = _address(self._prefix)
        uploads = self._client.list_multipart_uploads(Bucket=address["Bucket"], Prefix=address["Key"])
        return [upload["Key"] for upload in uploads.get("Uploads", [])]


def _address(path: str) -> dict[str, str]:
    bucket, _, key = path.partition("/")
    return {"Bucket": bucket, "Key": key}


@pytest.fixture(scope="session")
def xml_client(gcs_xml: tuple[TokenProxy, GcsServer]) -> Iterator[Any]:
    client = botocore.session.get_session().create_client(
        "s3",
        endpoint_url=gcs_xml[1].endpoint,
        region_name="us-east-1",
        config=Config(signature_version=UNSIGNED),
    )
    yield client
    client.close()


@pytest.fixture(scope="session")
def xml_bucket(xml_client: Any) -> str:
    name = f"ferry-{uuid.uuid4().hex[:12]}"
    xml_client.create_bucket(Bucket=name)
    return name


@pytest.fixture
def xml_url(xml_bucket: str) -> str:
    return f"gs://{xml_bucket}/{uuid.uuid4().hex}"


class TestGcsThroughObstore(CloudConformance):
    @pytest.fixture
    def store(self, xml_client: Any, xml_url: str, gcs_xml: tuple[TokenProxy, GcsServer]) -> GcsXmlStore:
        return GcsXmlStore(xml_client, xml_url, with_token("ferry-test-token", gcs_xml[0].endpoint))

    @pytest.fixture
    def path_in_missing_container(self) -> str:
        return "ferry-nowhere/checkpoint.pt"

    @pytest.fixture
    def unauthorized(self, xml_url: str, gcs_xml: tuple[TokenProxy, GcsServer]) -> Backend:
        options = with_token("ferry-powerless-token", gcs_xml[0].endpoint)
        return open_backend(xml_url, storage_options=options, plane="obstore")[0]
