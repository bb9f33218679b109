"""The stand-in for Google Cloud Storage answers as Google's documentation says."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import uuid
from collections.abc import Iterator
from typing import Any

import gcsfs
import google_crc32c
import pytest
import requests
from google.oauth2.credentials import Credentials

from torchferry.testing.faultproxy import Fault
from torchferry.testing.gcs import GcsServer, TokenProxy

PART = bytes(range(256)) * (5 << 12)  # 5 MiB
ANOTHER_PART = PART[::-1]


def crc32c(data: bytes) -> str:
    return base64.b64encode(google_crc32c.value(data).to_bytes(4, "big")).decode()


class Client:
    """Plain requests with a token."""

    def __init__(self, endpoint: str, token: str = "ferry-test-token") -> None:
        self.endpoint = endpoint
        self._session = requests.Session()
        self._session.trust_env = False
        self._session.headers["Authorization"] = f"Bearer {token}"

    def __call__(self, method: str, target: str, data: Any = None, **headers: str) -> requests.Response:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        return self._session.request(method, self.endpoint + target, data=data, headers=sent, timeout=60)

    def close(self) -> None:
        self._session.close()

    def start(self, target: str, **headers: str) -> str:
        return field("UploadId", self("POST", f"{target}?uploads", **headers))

    def complete(self, target: str, upload: str, *etags: str) -> requests.Response:
        parts = "".join(
            f"<Part><PartNumber>{number}</PartNumber><ETag>{etag}</ETag></Part>" for number, etag in enumerate(etags, 1)
        )
        document = f"<CompleteMultipartUpload>{parts}</CompleteMultipartUpload>"
        return self("POST", f"{target}?uploadId={upload}", document)


def field(name: str, answer: requests.Response) -> str:
    found = re.search(f"<{name}>(.*?)</{name}>", answer.text)
    assert found, answer.text
    return found[1]


@pytest.fixture
def client(gcs_xml: tuple[TokenProxy, GcsServer]) -> Iterator[Client]:
    client = Client(gcs_xml[0].endpoint)
    yield client
    client.close()


@pytest.fixture
def bucket(client: Client) -> str:
    name = f"ferry-{uuid.uuid4().hex[:12]}"
    assert client("POST", "/storage/v1/b?project=p", json.dumps({"name": name})).ok
    return name


def test_xml_put_is_seen_by_both_apis(client: Client, bucket: str) -> None:
    sent = {"x_goog_hash": f"crc32c={crc32c(b'12345')}", "x_goog_meta_step": "1", "Content_Type": "application/x"}
    put = client("PUT", f"/{bucket}/a/b%20c", b"12345", **sent)
    assert put.status_code == 200
    md5 = hashlib.md5(b"12345", usedforsecurity=False)
    assert put.headers["ETag"] == f'"{md5.hexdigest()}"'
    assert f"crc32c={crc32c(b'12345')}" in put.headers["x-goog-hash"]
    generation = put.headers["x-goog-generation"]
    resource = client("GET", f"/storage/v1/b/{bucket}/o/a%2Fb%20c").json()
    expected = {
        "name": "a/b c",
        "bucket": bucket,
        "generation": generation,
        "size": "5",
        "crc32c": crc32c(b"12345"),
        "md5Hash": base64.b64encode(md5.digest()).decode(),
        "metadata": {"step": "1"},
        "contentType": "application/x",
    }
    assert resource.items() >= expected.items()
    head = client("HEAD", f"/{bucket}/a/b%20c").headers
    assert (head["x-goog-meta-step"], head["x-goog-generation"], head["Content-Length"]) == ("1", generation, "5")


@pytest.mark.parametrize("digest", ["crc32c=AAAAAA==", "md5=AAAAAAAAAAAAAAAAAAAAAA=="])
def test_xml_upload_that_is_not_what_its_hash_says_is_refused_and_not_stored(
    client: Client, bucket: str, digest: str
) -> None:
    refused = client("PUT", f"/{bucket}/x", b"12345", x_goog_hash=digest)
    assert (refused.status_code, field("Code", refused)) == (400, "BadDigest")
    assert client("GET", f"/{bucket}/x").status_code == 404
    upload = client.start(f"/{bucket}/x")
    refused = client("PUT", f"/{bucket}/x?partNumber=1&uploadId={upload}", b"12345", x_goog_hash=digest)
    assert (refused.status_code, field("Code", refused)) == (400, "BadDigest")
    assert "<Part>" not in client("GET", f"/{bucket}/x?uploadId={upload}").text


def test_part_that_is_damaged_on_the_way_is_refused(gcs_xml: tuple[TokenProxy, GcsServer], bucket: str) -> None:
    with TokenProxy(gcs_xml[1].port, Fault(method="PUT", corrupt_upload_byte=3)) as proxy:
        client = Client(proxy.endpoint)
        upload = client.start(f"/{bucket}/x")
        target, sent = f"/{bucket}/x?partNumber=1&uploadId={upload}", f"crc32c={crc32c(PART)}"
        assert client("PUT", target, PART, x_goog_hash=sent).status_code == 400
        assert client("PUT", target, PART, x_goog_hash=sent).status_code == 200
        client.close()


def test_multipart_upload_is_published_at_its_end_with_the_crc32c_of_the_whole(client: Client, bucket: str) -> None:
    upload = client.start(f"/{bucket}/x", x_goog_meta_step="2")
    etags = []
    for number, part in enumerate((PART, ANOTHER_PART, b"end"), 1):
        answer = client("PUT", f"/{bucket}/x?partNumber={number}&uploadId={upload}", part)
        assert f"crc32c={crc32c(part)}" in answer.headers["x-goog-hash"]
        etags.append(answer.headers["ETag"])
    assert client("GET", f"/{bucket}/x").status_code == 404
    assert field("UploadId", client("GET", f"/{bucket}?uploads&prefix=x")) == upload
    assert client("GET", f"/{bucket}/x?uploadId={upload}").text.count("<Part>") == 3
    done = client.complete(f"/{bucket}/x", upload, *etags)
    whole = PART + ANOTHER_PART + b"end"
    assert done.headers["x-goog-hash"] == f"crc32c={crc32c(whole)}"
    found = client("GET", f"/{bucket}/x")
    assert found.content == whole
    assert found.headers["x-goog-generation"] == done.headers["x-goog-generation"]
    assert found.headers["x-goog-meta-step"] == "2"
    assert "<Upload>" not in client("GET", f"/{bucket}?uploads").text
    gone = client.complete(f"/{bucket}/x", upload, *etags)
    assert (gone.status_code, field("Code", gone)) == (404, "NoSuchUpload")


def test_aborted_upload_is_gone_with_its_parts(client: Client, bucket: str) -> None:
    upload = client.start(f"/{bucket}/x")
    client("PUT", f"/{bucket}/x?partNumber=1&uploadId={upload}", b"12345")
    assert client("DELETE", f"/{bucket}/x?uploadId={upload}").status_code == 204
    assert client("PUT", f"/{bucket}/x?partNumber=2&uploadId={upload}", b"12345").status_code == 404
    assert client("DELETE", f"/{bucket}/x?uploadId={upload}").status_code == 404


@pytest.mark.parametrize(
    ("parts", "named", "code"),
    [
        ([b"small", b"end"], [0, 1], "EntityTooSmall"),
        ([b"12345"], [0, 0], "InvalidPart"),
        ([], [], "MalformedCompleteMultipartUploadRequest"),
    ],
)
def test_completion_that_google_refuses_is_refused(
    client: Client, bucket: str, parts: list[bytes], named: list[int], code: str
) -> None:
    upload = client.start(f"/{bucket}/x")
    etags = [
        client("PUT", f"/{bucket}/x?partNumber={number}&uploadId={upload}", part).headers["ETag"]
        for number, part in enumerate(parts, 1)
    ]
    refused = client.complete(f"/{bucket}/x", upload, *(etags[index] for index in named))
    assert (refused.status_code, field("Code", refused)) == (400, code)


def test_every_write_is_another_generation_and_the_old_one_is_gone(client: Client, bucket: str) -> None:
    first = client("PUT", f"/{bucket}/x", b"12345").headers["x-goog-generation"]
    second = client("PUT", f"/{bucket}/x", b"12345").headers["x-goog-generation"]
    assert int(second) > int(first)
    assert client("GET", f"/{bucket}/x?generation={first}").status_code == 404
    assert client("GET", f"/{bucket}/x?generation={second}").content == b"12345"
    assert client("GET", f"/download/storage/v1/b/{bucket}/o/x?alt=media&generation={first}").status_code == 404


def test_preconditions_hold_in_both_apis(client: Client, bucket: str) -> None:
    generation = client("PUT", f"/{bucket}/x", b"1", x_goog_if_generation_match="0").headers["x-goog-generation"]
    refused = client("PUT", f"/{bucket}/x", b"2", x_goog_if_generation_match="0")
    assert (refused.status_code, field("Code", refused)) == (412, "PreconditionFailed")
    upload = f"/upload/storage/v1/b/{bucket}/o?uploadType=media&name=x&ifGenerationMatch="
    assert client("POST", f"{upload}0", b"3").status_code == 412
    assert client("POST", upload + generation, b"3").status_code == 200
    assert client("DELETE", f"/storage/v1/b/{bucket}/o/x?ifGenerationMatch={generation}").status_code == 412
    assert client("GET", f"/{bucket}/x").content == b"3"


def related(resource: dict[str, Any], data: bytes) -> tuple[bytes, dict[str, str]]:
    head = f"--limit\r\nContent-Type: application/json\r\n\r\n{json.dumps(resource)}\r\n--limit\r\n"
    body = head.encode() + b"Content-Type: application/x\r\n\r\n" + data + b"\r\n--limit--"
    return body, {"Content_Type": "multipart/related; boundary=limit"}


def test_json_multipart_upload_is_checked_against_the_crc32c_in_its_metadata(client: Client, bucket: str) -> None:
    target = f"/upload/storage/v1/b/{bucket}/o?uploadType=multipart"
    data = b"\r\n12345\n--\r\n"
    body, headers = related({"name": "x", "crc32c": "AAAAAA=="}, data)
    refused = client("POST", target, body, **headers)
    assert refused.status_code == 400
    assert "doesn't match calculated CRC32C" in refused.json()["error"]["message"]
    assert client("GET", f"/storage/v1/b/{bucket}/o/x").status_code == 404
    body, headers = related({"name": "x", "crc32c": crc32c(data), "metadata": {"name": "ü"}}, data)
    assert client("POST", target, body, **headers).json()["crc32c"] == crc32c(data)
    found = client("GET", f"/{bucket}/x")
    assert (found.content, found.headers["Content-Type"]) == (data, "application/x")


@pytest.mark.parametrize(("asked", "expected"), [("bytes=2-5", (2, 6)), ("bytes=7-", (7, 10)), ("bytes=-4", (6, 10))])
def test_ranges_are_exact_across_parts(client: Client, bucket: str, asked: str, expected: tuple[int, int]) -> None:
    client("PUT", f"/{bucket}/x", b"0123456789")
    answer = client("GET", f"/{bucket}/x", Range=asked)
    start, stop = expected
    assert answer.headers["Content-Range"] == f"bytes {start}-{stop - 1}/10"
    assert (answer.status_code, answer.content) == (206, b"0123456789"[start:stop])
    assert client("GET", f"/{bucket}/x", Range="bytes=10-11").status_code == 416


def test_range_may_begin_in_one_part_and_end_in_another(client: Client, bucket: str) -> None:
    upload = client.start(f"/{bucket}/x")
    parts = (PART, ANOTHER_PART, PART)
    etags = [
        client("PUT", f"/{bucket}/x?partNumber={number}&uploadId={upload}", part).headers["ETag"]
        for number, part in enumerate(parts, 1)
    ]
    client.complete(f"/{bucket}/x", upload, *etags)
    whole = b"".join(parts)
    for start, stop in ((0, 1), (len(PART) - 3, 2 * len(PART) + 5), (len(PART), 2 * len(PART)), (100, len(whole))):
        assert client("GET", f"/{bucket}/x", Range=f"bytes={start}-{stop - 1}").content == whole[start:stop]


def test_listing_has_pages_and_common_prefixes(client: Client, bucket: str) -> None:
    for name in ("a/1", "a/2", "b", "c/1"):
        client("PUT", f"/{bucket}/{name}", b"1")
    page = client("GET", f"/storage/v1/b/{bucket}/o?delimiter=/&maxResults=2").json()
    assert (page["prefixes"], [item["name"] for item in page["items"]]) == (["a/"], ["b"])
    rest = client("GET", f"/storage/v1/b/{bucket}/o?delimiter=/&pageToken={page['nextPageToken']}").json()
    assert (rest["prefixes"], "items" in rest, "nextPageToken" in rest) == (["c/"], False, False)
    listed = client("GET", f"/{bucket}?list-type=2&prefix=a/")
    assert re.findall("<Key>(.*?)</Key>", listed.text) == ["a/1", "a/2"]


def test_token_is_asked_for_in_the_words_of_each_api(gcs_xml: tuple[TokenProxy, GcsServer], bucket: str) -> None:
    for token, status in (("ferry-powerless-token", 403), ("unknown", 401)):
        stranger = Client(gcs_xml[0].endpoint, token)
        assert stranger("GET", f"/storage/v1/b/{bucket}/o/x").json()["error"]["code"] == status
        refused = stranger("GET", f"/{bucket}/x")
        assert refused.status_code == status
        assert field("Code", refused)
        stranger.close()


def test_gcsfs_works_with_it(gcs_xml: tuple[TokenProxy, GcsServer], bucket: str) -> None:
    options = {"endpoint_url": gcs_xml[0].endpoint, "project": "p", "token": Credentials("ferry-test-token")}
    fs = gcsfs.GCSFileSystem(**options, skip_instance_cache=True, consistency="md5")
    fs.pipe(f"{bucket}/dir/small", b"12345")
    with fs.open(f"{bucket}/dir/large", "wb", block_size=1 << 18) as file:  # a resumable upload
        file.write(PART[: 1 << 20])
    assert fs.cat(f"{bucket}/dir/small") == b"12345"
    assert fs.cat(f"{bucket}/dir/large") == PART[: 1 << 20]
    assert fs.find(f"{bucket}/dir") == [f"{bucket}/dir/large", f"{bucket}/dir/small"]
    assert fs.info(f"{bucket}/dir/large")["crc32c"] == crc32c(PART[: 1 << 20])
    fs.rm(f"{bucket}/dir/small")
    assert not fs.exists(f"{bucket}/dir/small")
