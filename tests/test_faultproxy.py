"""The proxy itself, before a server that says what it received."""

from __future__ import annotations

import hashlib
import http.client
import http.server
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from torchferry.testing.faultproxy import Fault, FaultProxy, Request, _Link

DATA = bytes(range(256)) * (3 << 12)  # 3 MiB


class Upstream(http.server.ThreadingHTTPServer):
    """Answers PUT with the hash of the body, GET with DATA; keeps what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        self.seen: list[str] = []
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Upstream

    def do_PUT(self) -> None:
        self.server.seen.append(self.path)
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size + 2)[:-2]
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(hashlib.sha256(body).hexdigest().encode())

    def do_GET(self) -> None:
        self.server.seen.append(self.path)
        self._answer(DATA)

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    with Upstream() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@contextmanager
def connected(proxy: FaultProxy) -> Iterator[http.client.HTTPConnection]:
    with closing(http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=30)) as connection:
        connection.connect()
        yield connection


def get(connection: http.client.HTTPConnection, target: str = "/x") -> bytes:
    connection.request("GET", target)
    return connection.getresponse().read()


def put(connection: http.client.HTTPConnection, body: bytes, target: str = "/x") -> str:
    connection.request("PUT", target, body)
    return connection.getresponse().read().decode()


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_bodies_pass_whole_on_one_connection(upstream: Upstream) -> None:
    with FaultProxy(upstream.server_port) as proxy, connected(proxy) as connection:
        assert put(connection, DATA) == sha(DATA)
        assert get(connection) == DATA
        connection.request("PUT", "/x", iter([DATA[:1000], DATA[1000:]]), encode_chunked=True)
        assert connection.getresponse().read().decode() == sha(DATA)
    assert upstream.seen == ["/x"] * 3


def test_one_bit_of_the_chosen_byte_is_flipped_each_way(upstream: Upstream) -> None:
    damaged = bytearray(DATA)
    damaged[2_000_000] ^= 1
    up = Fault(method="PUT", corrupt_upload_byte=2_000_000)
    down = Fault(method="GET", corrupt_download_byte=2_000_000)
    with FaultProxy(upstream.server_port, up, down) as proxy, connected(proxy) as connection:
        assert put(connection, DATA) == sha(damaged)
        assert get(connection) == damaged
        assert get(connection) == DATA


# --- what the log says


def test_log_has_the_headers_and_names_what_is_secret(upstream: Upstream) -> None:
    with FaultProxy(upstream.server_port) as proxy, connected(proxy) as connection:
        connection.request("GET", "/x", headers={"X-Goog-Hash": "crc32c=AAAAAA==", "Authorization": "Bearer t"})
        connection.getresponse().read()
        get(connection, "/x?X-Amz-Signature=abc&partNumber=1")
        get(connection, "/x?sp=r&sig=abc")
        get(connection)
    assert proxy.log[0].headers["x-goog-hash"] == "crc32c=AAAAAA=="
    assert [request.secrets for request in proxy.log] == [{"authorization"}, {"x-amz-signature"}, {"sig"}, set()]


def test_customers_keys_and_session_tokens_are_secret() -> None:
    headers = {"x-amz-security-token": "t", "x-amz-server-side-encryption-customer-key": "k", "range": "bytes=0-1"}
    assert Request("HEAD", "/x", None, headers).secrets == headers.keys() - {"range"}


# --- answers


def test_answer_has_the_faults_status_and_headers(upstream: Upstream) -> None:
    elsewhere = Fault(status=307, headers={"Location": "http://127.0.0.1:9/x"})
    with FaultProxy(upstream.server_port, elsewhere) as proxy, connected(proxy) as connection:
        connection.request("GET", "/x")
        answer = connection.getresponse()
        answer.read()
    assert (answer.status, answer.headers["Location"]) == (307, "http://127.0.0.1:9/x")
    assert upstream.seen == []


# --- bandwidth


def test_link_carries_one_after_the_other() -> None:
    link = _Link(1.0)  # one byte a second
    assert 999 < link.take(1000) < 1001
    assert 1499 < link.take(500) < 1501


def test_all_connections_share_one_link_each_way(upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[_Link, int]] = []
    monkeypatch.setattr(_Link, "take", lambda self, nbytes: taken.append((self, nbytes)) or 0.0)
    with FaultProxy(upstream.server_port, bandwidth=1.0) as proxy:
        for _ in range(2):
            with connected(proxy) as connection:
                assert put(connection, DATA) == sha(DATA)
                assert get(connection) == DATA
    assert sum(nbytes for link, nbytes in taken if link is proxy._up) == 2 * len(DATA)
    assert sum(nbytes for link, nbytes in taken if link is proxy._down) == 2 * (len(DATA) + 64)


# --- outages


def test_refusing_outage_resets_connections_and_refuses_new_ones_until_it_ends(upstream: Upstream) -> None:
    with FaultProxy(upstream.server_port) as proxy, connected(proxy) as connection:
        assert get(connection) == DATA
        with proxy.outage("refuse"):
            with pytest.raises(ConnectionRefusedError), connected(proxy):
                pass
            with pytest.raises(ConnectionError):
                get(connection)
        with connected(proxy) as again:
            assert get(again) == DATA


def test_refusing_outage_resets_a_body_under_way(upstream: Upstream) -> None:
    with FaultProxy(upstream.server_port) as proxy, connected(proxy) as connection:
        connection.putrequest("PUT", "/x")
        connection.putheader("Content-Length", "10")
        connection.endheaders(b"12345")
        proxy.wait_for("PUT")
        with proxy.outage("refuse"), pytest.raises(ConnectionError):
            connection.getresponse()


def test_after_a_silent_outage_what_was_under_way_goes_on(upstream: Upstream) -> None:
    with FaultProxy(upstream.server_port) as proxy, connected(proxy) as connection, connected(proxy) as other:
        connection.putrequest("PUT", "/x")
        connection.putheader("Content-Length", str(len(DATA)))
        connection.endheaders(DATA[:1000])
        proxy.wait_for("PUT")
        with proxy.outage("silence"):
            other.request("GET", "/in-the-outage")
            proxy.wait_for("GET")
            assert "/in-the-outage" not in upstream.seen
        connection.send(DATA[1000:])
        assert connection.getresponse().read().decode() == sha(DATA)
        assert other.getresponse().read() == DATA


def test_what_a_client_gives_up_in_a_silent_outage_is_never_forwarded(upstream: Upstream) -> None:
    with FaultProxy(upstream.server_port) as proxy:
        with proxy.outage("silence"), connected(proxy) as connection:
            connection.request("PUT", "/given-up", b"12345")
            proxy.wait_for("PUT")
        with connected(proxy) as connection:
            assert get(connection) == DATA
    assert upstream.seen == ["/x"]


def test_outage_with_a_status_answers_new_requests_and_lets_the_others_end(upstream: Upstream) -> None:
    hang = Fault(method="GET", hang=True, times=None)
    with FaultProxy(upstream.server_port, hang) as proxy, connected(proxy) as connection, connected(proxy) as other:
        connection.putrequest("PUT", "/x")
        connection.putheader("Content-Length", "5")
        connection.endheaders(b"123")
        proxy.wait_for("PUT")
        with proxy.outage(503, retry_after=7):
            connection.send(b"45")
            assert connection.getresponse().read().decode() == sha(b"12345")
            other.request("GET", "/x")
            answer = other.getresponse()
            assert (answer.status, answer.headers["Retry-After"]) == (503, "7")
            answer.read()
        assert put(other, b"12345") == sha(b"12345")
    assert [request.fault and request.fault.status for request in proxy.log] == [None, 503, None]


def test_proxy_ends_while_connections_are_open_hang_or_wait(upstream: Upstream) -> None:
    with FaultProxy(upstream.server_port, Fault(method="GET", hang=True), bandwidth=1.0) as proxy:
        sockets = [socket.create_connection(("127.0.0.1", proxy.port)) for _ in range(3)]
        sockets[1].sendall(b"GET /x HTTP/1.1\r\n\r\n")
        sockets[2].sendall(b"PUT /x HTTP/1.1\r\nContent-Length: 1000\r\n\r\n" + bytes(1000))
        proxy.wait_for(count=2)
    for sock in sockets:
        sock.settimeout(30)
        with sock, pytest.raises((ConnectionResetError, AssertionError)):
            assert sock.recv(1)
