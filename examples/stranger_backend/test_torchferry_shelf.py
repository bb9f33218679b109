"""What a backend's tests are: its store for the conformance suite, and what is peculiar about it."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torchferry_shelf
from shelf_server import Shelf, Stored
from torchferry_shelf import ShelfBackend

import torchferry
from torchferry.storage import open_backend
from torchferry.testing import BackendConformance, StoreUnderTest
from torchferry.testing.faultproxy import Fault, FaultProxy

TOKEN = "ferry-test-token"


@pytest.fixture
def shelf(tmp_path: Path) -> Iterator[Shelf]:
    with Shelf(tmp_path, TOKEN) as server:
        yield server


def options_for(endpoint: str) -> dict[str, Any]:
    return {"storage_options": {"endpoint": endpoint, "token": TOKEN}}


class ShelfStore(StoreUnderTest):
    keeps_metadata = True

    def __init__(self, shelf: Shelf) -> None:
        self.options = options_for(shelf.endpoint)
        self.backend, self._prefix = open_backend("shelf://prefix", **self.options)
        self._shelf = shelf

    def path(self, name: str) -> str:
        return f"{self._prefix}/{name}"

    def raw_write(self, path: str, data: bytes) -> None:
        with self._shelf.lock:
            stored = Stored("{}")
            stored.parts[0] = self._shelf.directory / f"{stored.etag[1:-1]}.raw"
            stored.parts[0].write_bytes(data)
            self._shelf.put(path, stored)

    def raw_read(self, path: str) -> bytes:
        with self._shelf.lock:
            return b"".join(part.read_bytes() for _, part in sorted(self._shelf.objects[path].parts.items()))

    def raw_exists(self, path: str) -> bool:
        return path in self._shelf.objects

    def leftovers(self) -> list[str]:
        return [upload_id for _, upload_id in self._shelf.uploads]

    def staged(self) -> list[str]:
        return [upload_id for (_, upload_id), upload in list(self._shelf.uploads.items()) if upload.parts]


class TestShelf(BackendConformance):
    @pytest.fixture
    def store(self, shelf: Shelf) -> ShelfStore:
        return ShelfStore(shelf)


def test_installing_it_is_enough(shelf: Shelf) -> None:
    url, options = "shelf://run/step-1.pt", options_for(shelf.endpoint)
    written = torchferry.save({"weight": torch.arange(5)}, url, metadata={"step": "1"}, **options)
    assert written.url == url
    loaded: Any = torchferry.load(url, **options)
    assert torch.equal(loaded["weight"], torch.arange(5))
    assert json.loads(shelf.objects["run/step-1.pt"].metadata) == {"step": "1"}


def test_engine_moves_all_bytes(shelf: Shelf) -> None:
    reports: list[torchferry.TransferReport] = []
    weight, options = torch.ones(10_000_000), options_for(shelf.endpoint)
    torchferry.save({"weight": weight}, "shelf://x.pt", report=reports.append, **options)
    torchferry.load("shelf://x.pt", report=reports.append, **options)
    assert [report.client_bytes for report in reports] == [0, 0]
    assert reports[0].parts > 1


def test_wrong_token_is_a_permission_error(shelf: Shelf) -> None:
    options = {"storage_options": {"endpoint": shelf.endpoint, "token": "wrong"}}
    with pytest.raises(torchferry.StoragePermissionError, match="WrongToken"):
        torchferry.save({"a": 1}, "shelf://x.pt", **options)
    with pytest.raises(torchferry.StoragePermissionError, match=r"shelf://x\.pt"):
        torchferry.load("shelf://x.pt", **options)


@pytest.mark.parametrize(
    "fault",
    [
        Fault(method="PUT", target="part=1", status=503),
        Fault(method="PUT", target="part=1", corrupt_upload_byte=100_000),
        Fault(method="PUT", target="part=1", reset_upload_after=1_000_000),
        Fault(method="PUT", target="part=1", lose_reply=True),
        Fault(method="PUT", target="id=[0-9a-f]*$", lose_reply=True),
        Fault(method="POST", lose_reply=True),
        Fault(method="GET", reset_download_after=1_000),
        Fault(method="GET", truncate_after=1_000),
    ],
    ids=str,
)
def test_faults_of_the_network_are_survived(shelf: Shelf, fault: Fault) -> None:
    with FaultProxy(shelf.server_port, fault) as proxy:
        options = options_for(proxy.endpoint)
        weight = torch.arange(10_000_000)
        torchferry.save({"weight": weight}, "shelf://x.pt", **options)
        loaded: Any = torchferry.load("shelf://x.pt", **options)
        assert torch.equal(loaded["weight"], weight)
        assert [request.fault for request in proxy.log if request.fault] == [fault]
    assert shelf.uploads == {}


def test_misspelt_option_is_named(shelf: Shelf) -> None:
    with pytest.raises(torchferry.UnsupportedOptionError, match=r"no option 'tokn'\. Did you mean token\?"):
        open_backend("shelf://x.pt", storage_options={"endpoint": shelf.endpoint, "tokn": TOKEN})


def test_backend_is_found_by_its_entry_point(shelf: Shelf) -> None:
    assert isinstance(open_backend("shelf://x.pt", **options_for(shelf.endpoint))[0], ShelfBackend)


def test_it_needs_what_is_public_only() -> None:
    tree = ast.parse(Path(torchferry_shelf.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    ours = [(node.module or "", name.name) for node in imports for name in node.names if "torchferry" in node.module]
    assert ours
    for module, name in ours:
        assert name in import_module(module).__all__, f"{module}.{name}"
