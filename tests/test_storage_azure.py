from __future__ import annotations

import base64
from typing import Any

import pytest

from torchferry.storage.base import Backend, Plane
from torchferry.storage.registry import open_backend
from torchferry.testing import CloudConformance, StoreUnderTest
from torchferry.testing.azure import AzureServer, connection_string_for

PLANES: tuple[Plane, ...] = ("fsspec", "obstore")
WRONG_KEY = base64.b64encode(b"wrong").decode()


class AzureStore(StoreUnderTest):
    keeps_metadata = True
    losers_fail = True

    def __init__(self, client: Any, url: str, storage_options: dict[str, Any], plane: Plane) -> None:
        self.options = {"storage_options": storage_options, "plane": plane}
        self.backend, self._prefix = open_backend(url, **self.options)
        self._client = client

    def path(self, name: str) -> str:
        return f"{self._prefix}/{name}"

    def raw_write(self, path: str, data: bytes) -> None:
        self._blob(path).upload_blob(data, overwrite=True)

    def raw_read(self, path: str) -> bytes:
        data: bytes = self._blob(path).download_blob().readall()
        return data

    def raw_exists(self, path: str) -> bool:
        found: bool = self._blob(path).exists()
        return found

    def leftovers(self) -> list[str]:
        """Blobs that are nothing but uncommitted blocks: those of a blob that exists stay, where nobody sees them."""
        return [name for name in self.staged() if not self.raw_exists(name)]

    def staged(self) -> list[str]:
        container, _, prefix = self._prefix.partition("/")
        blobs = self._client.get_container_client(container).list_blobs(prefix, include=["uncommittedblobs"])
        paths = [f"{container}/{blob.name}" for blob in blobs]
        return [path for path in paths if self._blob(path).get_block_list("uncommitted")[1]]

    def _blob(self, path: str) -> Any:
        container, _, key = path.partition("/")
        return self._client.get_blob_client(container, key)


class AzureConformance(CloudConformance):
    plane: Plane

    @pytest.fixture
    def store(self, azure_client: Any, azure_url: str, azure_storage_options: dict[str, Any]) -> AzureStore:
        return AzureStore(azure_client, azure_url, azure_storage_options, self.plane)

    @pytest.fixture
    def path_in_missing_container(self) -> str:
        return "ferry-nowhere/checkpoint.pt"

    @pytest.fixture
    def unauthorized(self, azure_url: str, azure_server: AzureServer) -> Backend:
        connection = connection_string_for(
            azure_server.endpoint, AccountName=azure_server.account_name, AccountKey=WRONG_KEY
        )
        return open_backend(azure_url, storage_options={"connection_string": connection}, plane=self.plane)[0]


class TestAzureThroughAdlfs(AzureConformance):
    plane = "fsspec"


class TestAzureThroughObstore(AzureConformance):
    plane = "obstore"
