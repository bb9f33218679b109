"""pytest fixtures for the clouds' stand-ins, each started once a session when a test first asks for it.

A plugin: ``pytest_plugins = ["torchferry.testing.fixtures"]`` in the topmost ``conftest.py``.
"""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest
import requests

from torchferry.testing.azure import AzureServer, azurite
from torchferry.testing.gcs import GcsServer, TokenProxy, fake_gcs_server, gcp_storage_emulator, gcs_xml_api

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["GcsClient"]

_TIMEOUT = 60


class GcsClient:
    """A plain client of the JSON API: the way around everything under test."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._session = requests.Session()
        self._session.trust_env = False

    def close(self) -> None:
        self._session.close()

    def make_bucket(self, name: str) -> None:
        self._call("POST", "/storage/v1/b", json={"name": name}, params={"project": "ferry-test-project"})

    def write(self, path: str, data: bytes) -> None:
        bucket, _, key = path.partition("/")
        target = f"/upload/storage/v1/b/{bucket}/o"
        headers = {"Content-Type": "application/octet-stream"}
        self._call("POST", target, params={"uploadType": "media", "name": key}, data=data, headers=headers)

    def read(self, path: str) -> bytes:
        return self._call("GET", f"/download{_target(path)}", params={"alt": "media"}).content

    def exists(self, path: str) -> bool:
        return self._session.get(self._endpoint + _target(path), timeout=_TIMEOUT).ok

    def names(self, path: str) -> list[str]:
        """The names of all objects below a path, as paths."""
        bucket, _, prefix = path.partition("/")
        found: list[str] = []
        params = {"prefix": prefix}
        while True:
            page: dict[str, Any] = self._call("GET", f"/storage/v1/b/{bucket}/o", params=params).json()
            found += [f"{bucket}/{item['name']}" for item in page.get("items", [])]
            if "nextPageToken" not in page:
                return found
            params["pageToken"] = page["nextPageToken"]

    def _call(self, method: str, target: str, **arguments: Any) -> requests.Response:
        response = self._session.request(method, self._endpoint + target, timeout=_TIMEOUT, **arguments)
        response.raise_for_status()
        return response


def _target(path: str) -> str:
    bucket, _, key = path.partition("/")
    return f"/storage/v1/b/{bucket}/o/{quote(key, safe='')}"


@pytest.fixture(scope="session")
def gcs_server() -> Iterator[GcsServer]:
    """fake-gcs-server on loopback, which speaks the JSON API."""
    with fake_gcs_server() as server:
        yield server


@pytest.fixture(scope="session")
def gcs_emulator() -> Iterator[GcsServer]:
    """gcp-storage-emulator on loopback, which speaks the JSON API and checks CRC32C."""
    with gcp_storage_emulator() as server:
        yield server


@pytest.fixture(scope="session")
def gcs_client(gcs_server: GcsServer) -> Iterator[GcsClient]:
    """A plain client of fake-gcs-server."""
    client = GcsClient(gcs_server.endpoint)
    yield client
    client.close()


@pytest.fixture(scope="session")
def gcs_bucket(gcs_client: GcsClient) -> str:
    """The name of a bucket on fake-gcs-server, fresh for the session."""
    name = f"ferry-{uuid.uuid4().hex[:12]}"
    gcs_client.make_bucket(name)
    return name


@pytest.fixture
def gcs_url(gcs_bucket: str) -> str:
    """A prefix on fake-gcs-server that no other test uses: "gs://bucket/prefix"."""
    return f"gs://{gcs_bucket}/{uuid.uuid4().hex}"


@pytest.fixture
def gcs_storage_options(gcs_server: GcsServer) -> dict[str, Any]:
    """What fsspec's gs:// filesystem takes to reach fake-gcs-server."""
    return gcs_server.storage_options


@pytest.fixture(scope="session")
def gcs_xml() -> Iterator[tuple[TokenProxy, GcsServer]]:
    """What answers as Google does: the proxy that asks for a token, and the server behind it, which does not."""
    with gcs_xml_api() as (proxy, server):
        yield proxy, server


@pytest.fixture(scope="session")
def azurite_program(pytestconfig: pytest.Config) -> Path:
    """Azurite as ``npm ci --prefix tests/azurite`` installs it."""
    return pytestconfig.rootpath / "tests/azurite/node_modules/.bin/azurite-blob"


@pytest.fixture(scope="session")
def azure_server(azurite_program: Path) -> Iterator[AzureServer]:
    """Azurite on loopback: .connection_string, .endpoint, .account_name, .account_key, .storage_options."""
    with azurite(program=azurite_program) as server:
        yield server


@pytest.fixture
def azure_storage_options(azure_server: AzureServer) -> dict[str, Any]:
    """What fsspec's abfs:// filesystem takes to reach Azurite."""
    return azure_server.storage_options


@pytest.fixture(scope="session")
def azure_client(azure_server: AzureServer) -> Iterator[Any]:
    """A plain, synchronous BlobServiceClient: the way around everything under test."""
    from azure.storage.blob import BlobServiceClient  # takes a while to import

    with BlobServiceClient.from_connection_string(azure_server.connection_string) as client:
        yield client


@pytest.fixture(scope="module")
def azure_container(azure_client: Any) -> Iterator[str]:
    """The name of a container on Azurite, fresh for the file of tests."""
    name = f"ferry-{uuid.uuid4().hex[:12]}"
    azure_client.create_container(name)
    yield name
    azure_client.delete_container(name)


@pytest.fixture
def azure_url(azure_container: str) -> str:
    """A prefix on Azurite that no other test uses: "abfs://container/prefix"."""
    return f"abfs://{azure_container}/{uuid.uuid4().hex}"
