# ruff: noqa: E501 - a hostile pickle stands on one line
"""No file crashes, hangs, takes memory that its size does not explain, or raises anything but documented errors."""

from __future__ import annotations

import collections
import io
import json
import pickle
import re
import subprocess
import zipfile
from typing import TYPE_CHECKING, Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies

import torchferry
from torchferry.errors import (
    CheckpointCorruptError,
    CheckpointFormatError,
    CheckpointKeyError,
    UnsafeCheckpointError,
)
from torchferry.formats.graph import read_graph
from torchferry.formats.opcodes import scan_pickle
from torchferry.printable import printable
from torchferry.testing import hostile
from torchferry.testing.forkserver import python
from torchferry.testing.hostile import PICKLES, archive_of, legacy_of, saved

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.timeout(280),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated", "ignore:.*protocol", "ignore:.*torch.jit"),
]


def test_no_hostile_file_hangs_fills_memory_deceives_or_raises_anything_but_documented_errors() -> None:
    """Load, keys=, inspect, verify, copy, the command, the Deck: two with each file, in turn; ``nox -s reliability`` all.

    In a process that they may end.
    """
    command = [*python(), "-W", "ignore", "-m", "torchferry.testing.hostile", "--short"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 0, f"{done.stderr.splitlines()[-1]} ended the process"
    report = json.loads(done.stdout)
    kinds = [kind for kind in hostile.UNWANTED if kind != "long"]
    assert {kind: report[kind] for kind in kinds} == {kind: [] for kind in kinds}
    assert report["tried"] == report["right"] + report["clear error"] + len(report["long"])


def test_a_hostile_pickle_is_refused_with_weights_only_false_as_well(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    for name in ("memo index", "shared tuples as key", "deep tuple as key", "600,000 sets", "bytearray8 of a size"):
        path.write_bytes(archive_of(PICKLES[name]))
        for verify in (True, False):
            with pytest.raises(CheckpointCorruptError):
                torchferry.load(path, weights_only=False, verify=verify)


@pytest.mark.parametrize("name", ["memo index", "shared tuples as key", "deep tuple as key", "bytearray of a size"])
def test_a_hostile_pickle_in_the_legacy_format_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(legacy_of(PICKLES[name]))
    for act in (torchferry.load, torchferry.inspect):
        with pytest.raises(CheckpointCorruptError, match=r"data\.pkl"):
            act(tmp_path / "x.pt")


def test_a_legacy_checkpoint_of_storages_longer_than_itself_is_refused(tmp_path: Path) -> None:
    data = saved({"a": torch.ones(300)}, _use_new_zipfile_serialization=False)
    (tmp_path / "x.pt").write_bytes(data.replace(b"M\x2c\x01", b"M\xff\xff", 1))
    with pytest.raises(CheckpointCorruptError, match="longer than the file"):
        torchferry.load(tmp_path / "x.pt")


def shared(kind: str) -> dict[str, Any]:
    """Containers that hold each other so often that nobody lists all names in them."""
    value: Any = {"a": 1}
    for _ in range(100_000 if kind == "deep" else 40):
        value = {"a": value} if kind == "deep" else [value, value] if kind == "lists" else {"a": value, "b": value}
    if kind == "cycle":
        value = {}
        value["a"] = value
    return {"x": value, "w": torch.zeros(2)}


def dumped(obj: dict[str, Any]) -> bytes:
    """In the legacy format, which torch loads whole; without recursion, which ends at a depth of 1,000."""
    if not isinstance(obj["x"], dict) or len(obj["x"]) != 1 or obj["x"]["a"] is obj["x"]:
        return saved(obj, _use_new_zipfile_serialization=False)
    data = saved({"x": 5, "w": obj["w"]}, _use_new_zipfile_serialization=False)
    deep = b"}X\x01\x00\x00\x00a" * 100_000 + b"K\x05" + b"s" * 100_000
    assert data.count(b"K\x05") == 1
    return data.replace(b"K\x05", deep)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["lists", "dicts", "deep", "cycle"])
def test_names_of_a_legacy_checkpoint_are_not_listed_without_end(kind: str, tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(dumped(shared(kind)))
    into = {"w": torch.ones(2)}
    with pytest.raises(CheckpointCorruptError, match="names"):
        torchferry.load(tmp_path / "x.pt", into=into, strict=False)
    if kind in {"dicts", "lists"}:
        with pytest.raises(CheckpointCorruptError, match="names"):
            torchferry.load(tmp_path / "x.pt", keys="*no")
    if kind == "cycle":  # what holds itself is looked into once
        with pytest.raises(CheckpointKeyError):
            torchferry.load(tmp_path / "x.pt", keys="*no")
    if kind == "deep":
        with pytest.raises(CheckpointCorruptError):
            torchferry.load(tmp_path / "x.pt", keys="*no")
    assert torch.equal(torchferry.load(tmp_path / "x.pt", keys="w")["w"], torch.zeros(2))


@pytest.mark.parametrize("name", ["memo index", "nested keys", "shared tuples as key", "600,000 sets"])
def test_a_hostile_pickle_is_refused_before_it_is_unpickled(name: str) -> None:
    with pytest.raises(CheckpointCorruptError, match=r"^test://x: data\.pkl"):
        list(read_graph(PICKLES[name], "test://x").tensors())


def test_a_name_acts_on_no_terminal() -> None:
    assert printable("a\x1b]0;title\x07\n\u202eb") == r"a\x1b]0;title\x07\n\u202eb"
    assert printable("\ud800") == r"\ud800"
    assert printable("weights.ü") == "weights.ü"
    assert len(printable("a" * 1000)) < 210


def test_names_of_globals_act_on_no_terminal(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(archive_of(b"\x80\x04" + hostile._text("evil\x1b[2J") + hostile._text("a\u202eb") + b"\x93."))
    with pytest.raises(UnsafeCheckpointError, match=r"evil\\x1b\[2J\.a\\u202eb") as raised:
        torchferry.load(path)
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_no_usual_pickle_is_refused(protocol: int) -> None:
    lists = [[], [[] for _ in range(10_000)], {i: i for i in range(300, 30_000)}, list(range(300, 60_000)), "a" * 10**6]
    values = [
        lists,
        "\U0001f600" * 10_000,
        (((1, 2),) * 1000,) * 10,
        {(i, str(i)): None for i in range(10_000)},
        2**500,
    ]
    data = pickle.dumps(values, protocol)
    assert scan_pickle(data + b"more", "test://x") == len(data)
    nested: Any = None
    for _ in range(300):
        nested = [(nested, {"a": nested})]
    data = pickle.dumps(nested, protocol)
    assert scan_pickle(b"before" + data, "test://x", 6) == 6 + len(data)


def test_what_torch_saves_costs_a_tenth_of_the_limits() -> None:
    tensors = {f"layer.{i}.weight": torch.empty(0) for i in range(2000)}
    data = zipfile.ZipFile(io.BytesIO(saved(tensors))).read("archive/data.pkl")
    assert scan_pickle(data, "test://x") == len(data)
    assert len(list(read_graph(data, "test://x").tensors())) == 2000


class Row(dict[str, int]):
    """A dict of the user's."""


def test_a_global_that_cannot_be_allowed_is_not_advised_to_be_allowed(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    counts = collections.defaultdict(int, a=1)
    for value in (counts, Row(a=1), collections.deque([1])):
        torch.save(value, path)
        with pytest.raises(UnsafeCheckpointError, match="To allow them does not help") as raised:
            torchferry.load(path)
        assert "add_safe_globals" not in str(raised.value)
    path.write_bytes(archive_of(PICKLES["a blocked module"]))
    with pytest.raises(UnsafeCheckpointError, match=r"lets nobody allow posix\.system") as raised:
        torchferry.load(path)
    assert "add_safe_globals" not in str(raised.value)


@pytest.mark.parametrize("legacy", [False, True])
def test_what_an_error_advises_to_allow_makes_numpys_values_load(tmp_path: Path, legacy: bool) -> None:
    values = {"scalar": np.float64(1.5), "array": np.arange(3), "text": np.array(["a"]), "flag": np.bool_(True)}
    torch.save(values, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UnsafeCheckpointError) as raised:
        torchferry.load(tmp_path / "x.pt")
    advised = re.search(r"add_safe_globals\((\[.*?\])\)", str(raised.value))
    assert advised is not None
    with torch.serialization.safe_globals(eval(advised[1], {"numpy": np})):
        assert torchferry.load(tmp_path / "x.pt")["scalar"] == 1.5


# Anything else

VALUES = strategies.recursive(
    strategies.none() | strategies.booleans() | strategies.integers() | strategies.floats() | strategies.text()
    | strategies.binary() | strategies.builds(torch.arange, strategies.integers(0, 5)),
    lambda children: strategies.lists(children) | strategies.tuples(children, children)
    | strategies.dictionaries(strategies.text() | strategies.integers() | strategies.tuples(strategies.text()), children),
    max_leaves=20,
)  # fmt: skip


@hypothesis.settings(max_examples=100, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
@hypothesis.given(VALUES, strategies.sampled_from([2, 4]))
def test_whatever_is_saved_is_scanned_and_read(value: Any, protocol: int) -> None:
    data = zipfile.ZipFile(io.BytesIO(saved(value, pickle_protocol=protocol))).read("archive/data.pkl")
    assert scan_pickle(data, "test://x") == len(data)
    list(read_graph(data, "test://x").tensors())


@hypothesis.settings(max_examples=400, deadline=None)
@hypothesis.given(strategies.data())
def test_any_opcodes_are_read_or_refused(data: strategies.DataObject) -> None:
    opcode = strategies.sampled_from([bytes([op]) for op in b"(.0126]}))NKhqtRbsue\x85\x86\x87\x81\x89\x8fQ"])
    pieces = [
        hostile._tensor(),
        hostile._storage(),
        hostile._text("a"),
        hostile._put(3),
        b"K\x01",
        b"h\0",
        b"q\0",
        hostile._EMPTY,
        b"ctorch\nfloat32\n",
    ]
    parts = data.draw(strategies.lists(opcode | strategies.sampled_from(pieces) | strategies.binary(max_size=3)))
    try:
        graph = read_graph(b"\x80\x02" + b"".join(parts) + b".", "test://x")
        list(graph.tensors())
        graph.storages_of(graph.root)
    except CheckpointFormatError:
        pass


def test_mutants_of_files_of_every_format_are_right_or_clear_errors() -> None:
    """In a process of its own: a mutant might end it. ``nox -s reliability`` tries 20,000."""
    command = [*python(), "-W", "ignore", "-m", "torchferry.testing.fuzz", "120", "--share", "7"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 0, f"mutant {done.stderr.split()[-1]} ended the process"
    report = json.loads(done.stdout)
    assert report["tried"] == 120
    kinds = ("wrong", "other error", "memory", "acts on a terminal")
    assert {kind: report[kind] for kind in kinds} == {kind: [] for kind in kinds}
