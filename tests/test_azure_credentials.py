from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import trustme
from adlfs import AzureBlobFileSystem
from azure.storage.blob import AccountSasPermissions, ResourceTypes, generate_account_sas
from azure.storage.blob import BlobServiceClient as SyncBlobServiceClient
from azure.storage.blob.aio import BlobServiceClient

from torchferry.engine.loops import run_on
from torchferry.engine.transfer import Transfer
from torchferry.engine.types import MIB
from torchferry.errors import StorageError
from torchferry.storage.registry import open_backend
from torchferry.testing.azure import AzureServer, azurite, connection_string_for
from torchferry.testing.conformance import stream
from torchferry.testing.faultproxy import FaultProxy
from torchferry.testing.tokens import TokenServer

DATA = bytes(range(256)) * (12 * 4096)  # 12 MiB: three blocks of 5 MiB


async def round_trip(client: Any, url: str, **options: Any) -> None:
    """Writes blocks and a small blob, reads and deletes them, with the credentials of these options: by the engine."""
    backend, prefix = open_backend(url, **options)
    path = f"{prefix}/checkpoint.pt"
    container, _, name = path.partition("/")
    transfer = Transfer("test")
    with transfer.running(None):
        for size in (len(DATA), 10):
            plan = backend.upload_plan(size, 5 * MIB)
            written = await run_on(backend.loop, backend.write, path, stream(DATA[:size], MIB), plan=plan)
            assert bytes(await run_on(backend.loop, backend.read, path, 0, size, written)) == DATA[:size]
            await run_on(backend.loop, backend.delete, path)
            assert not client.get_blob_client(container, name).exists()
    assert transfer.report().client_reasons == ()


async def test_shared_access_signature_is_enough(azure_client: Any, azure_url: str, azure_server: AzureServer) -> None:
    signature = generate_account_sas(
        azure_server.account_name,
        azure_server.account_key,
        ResourceTypes(container=True, object=True),
        AccountSasPermissions(read=True, write=True, delete=True, list=True, create=True),
        datetime.now(UTC) + timedelta(hours=1),
    )
    connection = connection_string_for(azure_server.endpoint, SharedAccessSignature=signature)
    await round_trip(azure_client, azure_url, storage_options={"connection_string": connection})


async def test_what_is_signed_with_the_accounts_key_is_good_for_an_hour_and_one_blob(
    azure_client: Any, azure_url: str, azure_server: AzureServer
) -> None:
    with FaultProxy(azure_server.port) as proxy:
        connection = connection_string_for(
            f"{proxy.endpoint}/{azure_server.account_name}",
            AccountName=azure_server.account_name,
            AccountKey=azure_server.account_key,
        )
        await round_trip(azure_client, azure_url, storage_options={"connection_string": connection})
        bodies = [r for r in proxy.requests("PUT") if "comp=blocklist" not in r.target] + proxy.requests("GET")
        queries = [parse_qs(urlsplit(request.target).query) for request in bodies]
        assert {(query["sr"][0], query["sp"][0]) for query in queries} == {("b", "r"), ("b", "cw")}
        for query in queries:
            left = datetime.fromisoformat(query["se"][0]) - datetime.now(UTC)
            assert timedelta(minutes=50) < left <= timedelta(hours=1)


async def test_public_container_is_read_anonymously(azure_client: Any, azure_server: AzureServer) -> None:
    container = f"public-{uuid.uuid4().hex[:12]}"
    azure_client.create_container(container, public_access="container")
    fs = AzureBlobFileSystem(account_name=azure_server.account_name, anon=True, skip_instance_cache=True)
    # adlfs speaks https to accounts; Azurite here does not.
    fs.service_client = BlobServiceClient(azure_server.endpoint)
    backend, path = open_backend(f"abfs://{container}/checkpoint.pt", filesystem=fs)
    azure_client.get_blob_client(container, "checkpoint.pt").upload_blob(DATA)

    async def read() -> bytes:
        return bytes(await backend.read(path, 5, 100, await backend.stat(path)))

    assert await run_on(backend.loop, read) == DATA[5:100]
    with pytest.raises(StorageError):
        await run_on(backend.loop, backend.write, path, stream(DATA, MIB), plan=backend.upload_plan(len(DATA)))
    assert azure_client.get_blob_client(container, "checkpoint.pt").download_blob().readall() == DATA


# --- over TLS, which adlfs insists on for everything but connection strings


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    """Who issues certificates for 127.0.0.1."""
    return trustme.CA(key_type=trustme.KeyType.ECDSA)


def write_certificate(stem: Path, authority: trustme.CA) -> tuple[Path, Path]:
    """Writes a certificate for 127.0.0.1; returns its file and its key's."""
    issued = authority.issue_cert("127.0.0.1", key_type=trustme.KeyType.ECDSA)
    files = stem.with_suffix(".pem"), stem.with_suffix(".key")
    files[0].write_bytes(issued.cert_chain_pems[0].bytes())
    files[1].write_bytes(issued.private_key_pem.bytes())
    return files


@pytest.fixture(scope="session")
def tls_server(
    azurite_program: Path, authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[AzureServer, Path]]:
    """Azurite over TLS, where it also takes bearer tokens; and the certificate of who issued its own."""
    directory = tmp_path_factory.mktemp("azurite-tls")
    trusted = directory / "authority.pem"
    trusted.write_bytes(authority.cert_pem.bytes())
    with azurite(
        directory, program=azurite_program, certificate=write_certificate(directory / "server", authority)
    ) as server:
        yield server, trusted


class TokenIssuer(TokenServer):
    """What Microsoft Entra ID is to service principals: over TLS, gives out tokens for their secret.

    https://learn.microsoft.com/entra/identity-platform/v2-oauth2-client-creds-grant-flow
    """

    tenant = "ferry-tenant"
    secret = "ferry-secret"

    def __init__(self, certificate: tuple[Path, Path]) -> None:
        super().__init__(certificate)
        self.served: list[str] = []  # the ids of those who got a token
        self.refused = 0  # how often somebody got none

    def answer(self, path: str, **form: str) -> tuple[int, dict[str, Any]]:
        assert path == f"/{self.tenant}/oauth2/v2.0/token"
        assert form["grant_type"] == "client_credentials"
        assert form["scope"] == "https://storage.azure.com/.default"
        if form["client_secret"] != self.secret:
            self.refused += 1
            return 401, {"error": "invalid_client", "error_description": "AADSTS7000215: Invalid client secret."}
        self.served.append(form["client_id"])
        return 200, {"access_token": bearer_token(), "expires_in": 3600, "token_type": "Bearer"}


@pytest.fixture
def token_issuer(authority: trustme.CA, tmp_path: Path) -> Iterator[TokenIssuer]:
    with TokenIssuer(write_certificate(tmp_path / "issuer", authority)) as issuer:
        yield issuer


def bearer_token() -> str:
    """Azurite checks who issued it, for whom and until when, and not who signed it."""
    now = int(datetime.now(UTC).timestamp())
    claims = {
        "aud": "https://storage.azure.com",
        "iss": "https://sts.windows.net/ab1f708d-50f6-404c-a006-d71b2ac7a606/",
        "iat": now - 60,
        "nbf": now - 60,
        "exp": now + 3600,
    }
    parts = [{"alg": "none", "typ": "JWT"}, claims]
    encoded = [base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts]
    return ".".join([*encoded, "c2lnbmF0dXJl"])


CREDENTIALS = {  # how a filesystem is told, and who is given a token then
    "account key": ('{"account_key": server["account_key"]}', []),
    "shared access signature": ('{"sas_token": server["signature"]}', []),
    "signature that may be replaced": ('{"credential": AzureSasCredential(server["signature"])}', []),
    "service principal": (
        '{"tenant_id": "ferry-tenant", "client_id": "principal", "client_secret": "ferry-secret"}',
        ["principal"],
    ),
    "default credential": ('{"anon": False}', ["of the environment"]),
    "credential": (
        '{"credential": ClientSecretCredential("ferry-tenant", "of the user", "ferry-secret")}',
        ["of the user"],
    ),
    "credential that keeps no tokens": (
        '{"credential": Forgetful()}',
        ["forgetful"] * 3,
    ),  # the client, the save, the load
}

PROGRAM = """
import json, sys
import torch, torchferry
from adlfs import AzureBlobFileSystem
from azure.core.credentials import AzureSasCredential
from azure.identity.aio import ClientSecretCredential

class Forgetful:
    async def get_token(self, *scopes, **options):
        async with ClientSecretCredential("ferry-tenant", "forgetful", "ferry-secret") as credential:
            return await credential.get_token(*scopes)

    async def close(self):
        pass

server = json.loads(sys.argv[1])
url = f"abfs://{server['container']}/checkpoint.pt"
"""

ROUND_TRIPS = """
tensors = [torch.arange(1 << 21), torch.arange(1 << 21)]
for kind, credentials in server["credentials"].items():
    fs = AzureBlobFileSystem(account_name="ferrytest", account_host=server["host"], **eval(credentials))
    reports = []
    torchferry.save(tensors, url, filesystem=fs, part_size=5 << 20, report=reports.append)
    loaded = torchferry.load(url, filesystem=fs, report=reports.append)
    assert all(map(torch.equal, loaded, tensors))
    print(kind, *(report.client_bytes for report in reports))
"""

REFUSED = """
refused = {"tenant_id": "ferry-tenant", "client_id": "principal", "client_secret": "wrong"}
fs = AzureBlobFileSystem(account_name="ferrytest", account_host=server["host"], **refused)
try:
    torchferry.save(torch.arange(10), url, filesystem=fs)
except torchferry.StoragePermissionError as error:
    assert "Invalid client secret" in str(error), error
    print("refused")
"""


@pytest.fixture
def tls_run(
    tls_server: tuple[AzureServer, Path], token_issuer: TokenIssuer
) -> Callable[[str], subprocess.CompletedProcess[str]]:
    """Runs a program in a process of its own, which trusts the certificates from its start."""
    server, certificate = tls_server
    signature = generate_account_sas(
        server.account_name,
        server.account_key,
        ResourceTypes(container=True, object=True),
        AccountSasPermissions(read=True, write=True, delete=True, list=True, create=True),
        datetime.now(UTC) + timedelta(hours=1),
    )
    container = f"ferry-{uuid.uuid4().hex[:12]}"
    connection = connection_string_for(server.endpoint, AccountName=server.account_name, AccountKey=server.account_key)
    with SyncBlobServiceClient.from_connection_string(connection, connection_verify=str(certificate)) as client:
        client.create_container(container)
    known = {
        "host": server.endpoint.removeprefix("https://"),
        "account_key": server.account_key,
        "signature": signature,
        "container": container,
        "credentials": {kind: told for kind, (told, _) in CREDENTIALS.items()},
    }
    environment = {
        "SSL_CERT_FILE": str(certificate),
        "AZURE_AUTHORITY_HOST": f"127.0.0.1:{token_issuer.port}",
        "AZURE_TENANT_ID": TokenIssuer.tenant,
        "AZURE_CLIENT_ID": "of the environment",
        "AZURE_CLIENT_SECRET": TokenIssuer.secret,
    }

    def run(program: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", program, json.dumps(known)],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    return run


def test_credentials_of_the_filesystem_serve_the_engine(
    tls_run: Callable[[str], subprocess.CompletedProcess[str]], token_issuer: TokenIssuer
) -> None:
    """With azure-identity's own credentials: one token, got over TLS, serves the engine and the client."""
    done = tls_run(PROGRAM + ROUND_TRIPS)
    assert done.stdout.splitlines() == [f"{kind} 0 0" for kind in CREDENTIALS], done.stderr
    assert token_issuer.served == [each for _, served in CREDENTIALS.values() for each in served]


def test_service_principal_that_is_refused_a_token_is_a_permission_error_at_once(
    tls_run: Callable[[str], subprocess.CompletedProcess[str]], token_issuer: TokenIssuer
) -> None:
    """The client library would ask four times, in 86 seconds."""
    done = tls_run(PROGRAM + REFUSED)
    assert done.stdout == "refused\n", done.stderr
    assert token_issuer.served == []
    assert token_issuer.refused == 1
