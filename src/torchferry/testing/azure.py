"""Starts what stands in for Azure Blob Storage on this machine. Nothing here needs pytest."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchferry.testing.servers import HOST, find_executable, free_ports, run_server

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["AzureServer", "azurite", "connection_string_for"]

ACCOUNT = "ferrytest"
ACCOUNT_KEY = "ZmVycnktdGVzdC1rZXktZm9yLWF6dXJpdGU="  # guards nothing but a server on loopback


@dataclass(frozen=True, slots=True)
class AzureServer:
    """A blob service of this machine, and the account that it knows.

    Attributes:
        endpoint: The account's URL, ``http://127.0.0.1:<port>/<account>``, or https.
        port: Its port.
        account_name: The account.
        account_key: Its key, in base64. Requests signed with another one are refused (403).
    """

    endpoint: str
    port: int
    account_name: str = ACCOUNT
    account_key: str = ACCOUNT_KEY

    @property
    def connection_string(self) -> str:
        """What Azure's tools take to reach this account."""
        return connection_string_for(self.endpoint, AccountName=self.account_name, AccountKey=self.account_key)

    @property
    def storage_options(self) -> dict[str, Any]:
        """What fsspec's ``abfs://`` filesystem takes to reach this account."""
        return {"connection_string": self.connection_string}


def connection_string_for(endpoint: str, **credentials: str) -> str:
    """The connection string of an account at ``endpoint``; credentials as Azure names them (``AccountKey``, ...)."""
    return ";".join(f"{name}={value}" for name, value in {"BlobEndpoint": endpoint, **credentials}.items())


@contextmanager
def azurite(
    directory: Path | None = None, *, program: Path | None = None, certificate: tuple[Path, Path] | None = None
) -> Iterator[AzureServer]:
    """Runs Azurite's blob service (``npm install azurite``) on a free port until the block ends.

    It checks keys, shared access signatures and preconditions.

    Args:
        directory: Where it keeps its data and ``server.log``; a temporary directory by default, deleted at the end.
        program: Its ``azurite-blob``; by default the one on the PATH.
        certificate: The files of a certificate for 127.0.0.1 and of its key, in PEM. With them it speaks https, and
            takes bearer tokens too.

    Raises:
        ServerStartError: it is not installed, or did not answer within a minute.
    """
    where = str(program) if program else "azurite-blob"
    command = [find_executable(where, "npm ci --prefix tests/azurite (needs Node.js), or npm install -g azurite")]
    (port,) = free_ports(1)
    options = {"blobHost": HOST, "blobPort": port}
    with ExitStack() as stack:
        if directory is None:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="azurite-")))
        command += [text for name, value in options.items() for text in (f"--{name}", str(value))]
        command += ["--location", str(directory), "--silent", "--disableTelemetry", "--skipApiVersionCheck"]
        if certificate:
            command += ["--cert", str(certificate[0]), "--key", str(certificate[1]), "--oauth", "basic"]
        environment = {"AZURITE_ACCOUNTS": f"{ACCOUNT}:{ACCOUNT_KEY}"}
        stack.enter_context(run_server(command, directory, port, environment=environment, tls=bool(certificate)))
        yield AzureServer(f"{'https' if certificate else 'http'}://{HOST}:{port}/{ACCOUNT}", port)
