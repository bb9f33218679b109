"""The clouds' stand-ins, and the ways around torchferry into them."""

from __future__ import annotations

import re
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import botocore.session
import requests
from azure.core.exceptions import ResourceNotFoundError
from azure.storage.blob import BlobServiceClient
from botocore.exceptions import ClientError
from google.oauth2.credentials import Credentials

from torchferry.testing.azure import ACCOUNT, ACCOUNT_KEY, azurite, connection_string_for
from torchferry.testing.faultproxy import Fault, FaultProxy, Request
from torchferry.testing.gcs import PROJECT, TokenProxy, gcs_xml_api
from torchferry.testing.servers import HOST, S3Server, seaweedfs, storage_options_for

AZURITE = Path(__file__).parents[1] / "tests/azurite/node_modules/.bin/azurite-blob"


class Store(ABC):
    """One cloud, with a bucket of its own.

    Attributes:
        cloud: Its name in the table.
        carries_data: What a request that carries an object's data up has: its method and what its target matches.
        publishes: The same of the request that ends an upload of parts.
    """

    cloud: str
    carries_data: tuple[str, str]
    publishes: tuple[str, str]

    def __init__(self) -> None:
        self.bucket = _name()

    @abstractmethod
    def url(self, key: str) -> str:
        """The URL of an object."""

    @abstractmethod
    def proxy(self, *faults: Fault, bandwidth: float | None = None) -> FaultProxy:
        """A proxy that clients talk to in place of the store."""

    @abstractmethod
    def options(self, proxy: FaultProxy) -> dict[str, Any]:
        """The ``storage_options`` that lead through a proxy."""

    @abstractmethod
    def read(self, key: str) -> bytes | None:
        """The bytes of an object, or None where there is none."""

    @abstractmethod
    def write(self, key: str, data: bytes) -> None:
        """Puts an object."""

    @abstractmethod
    def names(self, prefix: str) -> list[str]:
        """The keys of the objects that begin so."""

    @abstractmethod
    def staged(self, prefix: str = "") -> list[str]:
        """What is staged and not published: the keys that it is for."""

    @abstractmethod
    def renew(self) -> None:
        """Another bucket; the one before is deleted, with all that is in it."""

    def was_published(self, requests: list[Request], key: str) -> bool:
        """Whether one of these requests ends an upload of parts for the key."""
        method, target = self.publishes
        return any(key in r.target and r.method == method and re.search(target, r.target) for r in requests)


class S3(Store):
    cloud = "s3"
    carries_data = ("PUT", "")
    publishes = ("POST", "uploadId=")

    def __init__(self, server: S3Server) -> None:
        super().__init__()
        self._server = server
        self._client = botocore.session.get_session().create_client(
            "s3",
            endpoint_url=server.endpoint,
            region_name=server.region,
            aws_access_key_id=server.key,
            aws_secret_access_key=server.secret,
        )
        self._client.create_bucket(Bucket=self.bucket)

    def url(self, key: str) -> str:
        return f"s3://{self.bucket}/{key}"

    def proxy(self, *faults: Fault, bandwidth: float | None = None) -> FaultProxy:
        return FaultProxy(self._server.port, *faults, bandwidth=bandwidth)

    def options(self, proxy: FaultProxy) -> dict[str, Any]:
        return storage_options_for(proxy.endpoint, self._server.key, self._server.secret, self._server.region)

    def read(self, key: str) -> bytes | None:
        try:
            data: bytes = self._client.get_object(Bucket=self.bucket, Key=key)["Body"].read()
        except ClientError:
            return None
        return data

    def write(self, key: str, data: bytes) -> None:
        self._client.put_object(Bucket=self.bucket, Key=key, Body=data)

    def names(self, prefix: str) -> list[str]:
        found = self._client.list_objects_v2(Bucket=self.bucket, Prefix=prefix)
        return [each["Key"] for each in found.get("Contents", [])]

    def renew(self) -> None:
        self._client.delete_bucket(Bucket=self.bucket)  # SeaweedFS deletes it with what is in it
        self.bucket = _name()
        self._client.create_bucket(Bucket=self.bucket)

    def staged(self, prefix: str = "") -> list[str]:
        found = self._client.list_multipart_uploads(Bucket=self.bucket, Prefix=prefix)
        return [upload["Key"] for upload in found.get("Uploads", [])]


class Gcs(Store):
    cloud = "gcs"
    carries_data = ("PUT|POST", "partNumber=|upload/storage|/[^?]*$")
    publishes = ("POST", "uploadId=")

    def __init__(self, port: int) -> None:
        super().__init__()
        self._port = port
        self._session = requests.Session()
        self._session.trust_env = False
        self._call("PUT", "")

    def url(self, key: str) -> str:
        return f"gs://{self.bucket}/{key}"

    def proxy(self, *faults: Fault, bandwidth: float | None = None) -> FaultProxy:
        return TokenProxy(self._port, *faults, bandwidth=bandwidth)

    def options(self, proxy: FaultProxy) -> dict[str, Any]:
        return {"endpoint_url": proxy.endpoint, "project": PROJECT, "token": Credentials("ferry-test-token")}

    def read(self, key: str) -> bytes | None:
        answer = self._call("GET", quote(key))
        return answer.content if answer.ok else None

    def write(self, key: str, data: bytes) -> None:
        self._call("PUT", quote(key), data).raise_for_status()

    def names(self, prefix: str) -> list[str]:
        return re.findall("<Key>(.*?)</Key>", self._call("GET", f"?list-type=2&prefix={quote(prefix)}").text)

    def renew(self) -> None:
        while names := self.names(""):
            for name in names:
                self._call("DELETE", quote(name))
        self.bucket = _name()
        self._call("PUT", "")

    def staged(self, prefix: str = "") -> list[str]:
        listed = self._call("GET", f"?uploads&prefix={quote(prefix)}").text
        objects = self._call("GET", f"?list-type=2&prefix={quote(prefix)}").text
        components = [key for key in re.findall("<Key>(.*?)</Key>", objects) if "/.torchferry-" in key]
        return re.findall("<Key>(.*?)</Key>", listed) + components

    def _call(self, method: str, target: str, data: bytes | None = None) -> requests.Response:
        return self._session.request(
            method, f"http://{HOST}:{self._port}/{self.bucket}/{target}", data=data, timeout=60
        )


class Azure(Store):
    cloud = "azure"
    carries_data = ("PUT", "comp=block&|/[^?]*$")
    publishes = ("PUT", "comp=blocklist")

    def __init__(self, port: int) -> None:
        super().__init__()
        self._port = port
        self._client = BlobServiceClient.from_connection_string(self._connection_string(port))
        self._container = self._client.create_container(self.bucket)

    @staticmethod
    def _connection_string(port: int) -> str:
        endpoint = f"http://{HOST}:{port}/{ACCOUNT}"
        return connection_string_for(endpoint, AccountName=ACCOUNT, AccountKey=ACCOUNT_KEY)

    def url(self, key: str) -> str:
        return f"abfs://{self.bucket}/{key}"

    def proxy(self, *faults: Fault, bandwidth: float | None = None) -> FaultProxy:
        return FaultProxy(self._port, *faults, bandwidth=bandwidth)

    def options(self, proxy: FaultProxy) -> dict[str, Any]:
        return {"connection_string": self._connection_string(proxy.port)}

    def read(self, key: str) -> bytes | None:
        try:
            data: bytes = self._container.download_blob(key).readall()
        except ResourceNotFoundError:
            return None
        return data

    def write(self, key: str, data: bytes) -> None:
        self._container.upload_blob(key, data, overwrite=True)

    def names(self, prefix: str) -> list[str]:
        return [blob.name for blob in self._container.list_blobs(prefix)]

    def renew(self) -> None:
        self._container.delete_container()
        self.bucket = _name()
        self._container = self._client.create_container(self.bucket)

    def staged(self, prefix: str = "") -> list[str]:
        """Blobs that are nothing but uncommitted blocks: those of a blob that exists stay, where nobody sees them."""
        names = [blob.name for blob in self._container.list_blobs(prefix or None, include=["uncommittedblobs"])]
        return [name for name in names if not self._container.get_blob_client(name).exists()]


def _name() -> str:
    return f"ferry-{uuid.uuid4().hex[:12]}"


@contextmanager
def _s3() -> Iterator[Store]:
    with seaweedfs() as server:
        yield S3(server)


@contextmanager
def _gcs() -> Iterator[Store]:
    with gcs_xml_api() as (_, server):
        yield Gcs(server.port)


@contextmanager
def _azure() -> Iterator[Store]:
    with azurite(program=AZURITE if AZURITE.exists() else None) as server:
        yield Azure(server.port)


CLOUDS: dict[str, Callable[[], AbstractContextManager[Store]]] = {"s3": _s3, "gcs": _gcs, "azure": _azure}
