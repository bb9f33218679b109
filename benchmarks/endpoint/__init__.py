"""The S3 endpoints that the benchmark measures against.

* :func:`nginx`: takes next to no CPU, counts what it received and sent, and can behave like a distant store.
* :func:`seaweedfs`: a real object store from PyPI, for a machine without nginx and for the smoke run.

And :func:`disk`, for what is measured without any.
"""

from __future__ import annotations

import getpass
import http.client
import json
import os
import shutil
import ssl
import tempfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec

from benchmarks.works import MIB
from torchferry.testing import servers

if TYPE_CHECKING:
    from collections.abc import Iterator

BUCKET = "bench"

# How S3 behaves from a machine in the same region: each request waits, and one connection carries this much.
SHAPED_LATENCY = 0.030  # seconds
SHAPED_RATE = 90e6  # bytes a second, per connection, each way

INSTALL_NGINX = "apt-get install --no-install-recommends nginx-light libnginx-mod-http-lua"
_HERE = Path(__file__).parent
_MODULE_DIRECTORIES = ("/usr/lib/nginx/modules", "/usr/lib64/nginx/modules", "/usr/share/nginx/modules")
_MODULES = ("ndk_http_module.so", "ngx_http_lua_module.so")


@dataclass(frozen=True, slots=True)
class Store:
    """Where a measurement finds its endpoint. Travels to the process that measures as JSON.

    Attributes:
        url: Of the endpoint.
        key: The access key id.
        secret: The secret access key.
        region: The region to sign for.
        certificate: The file with the certificate of the authority that vouches for the endpoint (https only).
        data: The directory that the endpoint serves objects from, where files can simply be put; None: upload them.
        counts: Whether the endpoint counts the bytes it received and sent.
        checks_signatures: Whether a request without a signature is refused.
        bucket: The bucket to use.
    """

    url: str
    key: str
    secret: str
    region: str
    certificate: str | None = None
    data: str | None = None
    counts: bool = False
    checks_signatures: bool = True
    bucket: str = BUCKET

    @property
    def host(self) -> str:
        """The endpoint's host and port."""
        return self.url.partition("://")[2]

    @property
    def storage_options(self) -> dict[str, Any]:
        """What fsspec's ``s3://`` filesystem takes to reach the endpoint."""
        return servers.storage_options_for(self.url, self.key, self.secret, self.region)

    def environment(self) -> dict[str, str]:
        """The settings that cloud clients read from the environment: the same for every contender."""
        variables = {
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": self.region,
            "AWS_REGION": self.region,
            "AWS_ENDPOINT_URL": self.url,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }
        if self.certificate:
            variables |= dict.fromkeys(("AWS_CA_BUNDLE", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"), self.certificate)
        return variables

    def connect(self) -> http.client.HTTPConnection:
        """A plain connection to the endpoint."""
        if self.certificate:
            return http.client.HTTPSConnection(self.host, context=ssl.create_default_context(cafile=self.certificate))
        return http.client.HTTPConnection(self.host)

    def counters(self) -> dict[str, int]:
        """How many bytes of request bodies the endpoint ``received`` and of answers it ``sent`` so far."""
        return self._ask("/-/counters")

    def requests(self) -> dict[str, int]:
        """How many requests of each kind the endpoint (nginx) took so far; "slowed" are those it answered 503."""
        return self._ask("/-/requests")

    def _ask(self, path: str) -> dict[str, int]:
        connection = self.connect()
        try:
            connection.request("GET", path)
            counters: dict[str, int] = json.load(connection.getresponse())
            return counters
        finally:
            connection.close()

    def target(self, method: str, key: str) -> str:
        """What a bare request for ``key`` asks for: a path, with a signature where the endpoint wants one."""
        if not self.checks_signatures:
            return f"/{self.bucket}/{key}"
        import botocore.session

        client = botocore.session.get_session().create_client(
            "s3",
            endpoint_url=self.url,
            region_name=self.region,
            aws_access_key_id=self.key,
            aws_secret_access_key=self.secret,
        )
        operation = {"GET": "get_object", "HEAD": "head_object", "PUT": "put_object"}[method]
        url: str = client.generate_presigned_url(operation, Params={"Bucket": self.bucket, "Key": key})
        return url.removeprefix(self.url)

    def path(self, key: str) -> Path:
        """Where the object is in the file system, if the endpoint serves files."""
        assert self.data is not None
        return Path(self.data, self.bucket, key)

    def publish(self, directory: Path, prefix: str) -> None:
        """Makes the files under ``directory`` objects under ``prefix``; they are gone from ``directory`` then."""
        if self.data is None:
            fs = fsspec.filesystem("s3", **self.storage_options)
            for path in sorted(directory.rglob("*")):
                if path.is_file():
                    fs.put_file(str(path), f"{self.bucket}/{prefix}/{path.relative_to(directory)}")
            return
        target = Path(self.data, self.bucket, prefix)
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(directory, target)

    def read_through(self, prefix: str) -> None:
        """Has the objects under ``prefix`` in the system's page cache, if the endpoint serves them from files.

        The system may have dropped them to make room, or for no reason; then the endpoint would wait for its disk.
        """
        if self.data is None:
            return
        buffer = bytearray(MIB)
        for path in Path(self.data, self.bucket, prefix).rglob("*"):
            if path.is_file():
                with path.open("rb", buffering=0) as file:
                    while file.readinto(buffer):
                        pass

    def remove(self, prefix: str) -> None:
        """Removes the objects under ``prefix``."""
        if self.data is None:
            fs = fsspec.filesystem("s3", **self.storage_options)
            if fs.exists(f"{self.bucket}/{prefix}"):
                fs.rm(f"{self.bucket}/{prefix}", recursive=True)
        else:
            shutil.rmtree(Path(self.data, self.bucket, prefix), ignore_errors=True)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@contextmanager
def nginx(*, scheme: str = "http", shaped: bool = False, most: int = 0, keeps: bool = False) -> Iterator[Store]:
    """Runs nginx as a near-free S3 until the block ends; see ``s3.lua`` for what it does and does not.

    Args:
        scheme: "http", or "https" with a certificate of its own making.
        shaped: Adds latency to each request and limits each connection, as S3 does.
        most: Requests a second that it takes; it answers the others 503 SlowDown. 0 for all.
        keeps: Whether it keeps what is uploaded, in memory; over http only.

    Raises:
        servers.ServerStartError: nginx or its Lua module is not installed, or did not start.
    """
    program, modules = _find_nginx()
    memory = "/dev/shm" if keeps and Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="benchmark-nginx-", dir=memory) as name:
        directory = Path(name)
        (directory / "data" / BUCKET).mkdir(parents=True)
        (directory / "tmp").mkdir()
        authority, certificate = _certificates(directory) if scheme == "https" else (None, None)
        port = servers.free_ports(1)[0]
        values = {
            "LOAD_MODULES": "\n".join(f"load_module {modules / module};" for module in _MODULES),
            "USER": f"user {getpass.getuser()};" if os.geteuid() == 0 else "",  # only root may, and must, choose
            "HERE": _HERE,
            "PORT": port,
            "LATENCY": SHAPED_LATENCY if shaped else 0,
            "RATE": f"{SHAPED_RATE:.0f}" if shaped else 0,
            "MOST": most,
            "KEEPS": str(keeps).lower(),
            "SSL": "ssl" if certificate else "",
            "CERTIFICATE": f"ssl_certificate {certificate}; ssl_certificate_key {certificate};" if certificate else "",
        }
        config = (_HERE / "nginx.conf.in").read_text()
        for word, value in values.items():
            config = config.replace(f"@{word}@", str(value))
        (directory / "nginx.conf").write_text(config)
        command = [program, "-p", f"{directory}/", "-e", "stderr", "-c", "nginx.conf"]
        with servers.run_server(command, directory, port):
            yield Store(
                url=f"{scheme}://127.0.0.1:{port}",
                key="benchmark",
                secret="benchmark",
                region=servers.REGION,
                certificate=authority,
                data=str(directory / "data"),
                counts=True,
                checks_signatures=False,
            )


@contextmanager
def seaweedfs() -> Iterator[Store]:
    """Runs SeaweedFS until the block ends.

    Raises:
        servers.ServerStartError: it is not installed, or did not start.
    """
    with servers.seaweedfs() as server:
        fs = fsspec.filesystem("s3", **server.storage_options)
        fs.mkdir(BUCKET)
        yield Store(url=server.endpoint, key=server.key, secret=server.secret, region=server.region)


@contextmanager
def disk() -> Iterator[Store]:
    """A directory for files, no endpoint: on the disk of the temporary directory (``TMPDIR``)."""
    with tempfile.TemporaryDirectory(prefix="benchmark-disk-") as directory:
        yield Store(url="", key="", secret="", region="", data=directory)


def disk_name() -> str:
    """The filesystem that :func:`disk` is on: "ext4"."""
    where = Path(tempfile.gettempdir()).resolve()
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    return max((len(point), kind) for point, kind in mounts if where.is_relative_to(point))[1]


def _find_nginx() -> tuple[str, Path]:
    program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    directories = [Path(name) for name in _MODULE_DIRECTORIES]
    modules = next((d for d in directories if all((d / module).exists() for module in _MODULES)), None)
    if program is None or modules is None:
        missing = "nginx" if program is None else "nginx's Lua module"
        raise servers.ServerStartError(
            f"{missing} is not installed: {INSTALL_NGINX} (Debian, Ubuntu). "
            "Or measure against SeaweedFS, which is slower and counts nothing: --endpoint seaweedfs"
        )
    return program, modules


def _certificates(directory: Path) -> tuple[str, str]:
    """Makes a certificate authority, and a certificate by it for 127.0.0.1.

    Two, because Rust's TLS does not take an authority's own certificate from a server.

    Returns:
        The files with the authority's certificate, and with the server's and its key.
    """
    import trustme

    issuer = trustme.CA(key_type=trustme.KeyType.ECDSA)
    authority, server = directory / "authority.pem", directory / "server.pem"
    authority.write_bytes(issuer.cert_pem.bytes())
    issued = issuer.issue_cert("127.0.0.1", key_type=trustme.KeyType.ECDSA)
    server.write_bytes(issued.private_key_and_cert_chain_pem.bytes())
    return str(authority), str(server)
