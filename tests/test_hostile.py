# ruff: noqa: E501 - a hostile pickle stands on one line
"""No file crashes, hangs, takes memory that its size does not explain, or raises anything but documented errors."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
import textwrap
import zipfile
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
import torch
from hypothesis import strategies

import torchferry
from torchferry.errors import CheckpointCorruptError, CheckpointFormatError, TorchferryError, UnsafeCheckpointError
from torchferry.formats.graph import read_graph
from torchferry.formats.opcodes import scan_pickle
from torchferry.formats.printable import printable

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [
    pytest.mark.timeout(280),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated", "ignore:.*protocol", "ignore:.*torch.jit"),
]


def saved(obj: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(obj, file, **options)
    return file.getvalue()


def archive_of(pickled: bytes, *storages: bytes) -> bytes:
    """A whole archive with right CRC32s around any pickle."""
    file = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(file)
    records = {"data.pkl": pickled, "byteorder": b"little"} | {f"data/{i}": data for i, data in enumerate(storages)}
    for name, content in records.items():
        writer.write_record(name, content, len(content))
    writer.write_end_of_file()
    return file.getvalue()


def put(index: int) -> bytes:
    return b"r" + index.to_bytes(4, "little")


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + len(data).to_bytes(4, "little") + data


def storage(key: bytes = text("0"), numel: bytes = b"K\x04", kind: bytes = b"ctorch\nFloatStorage\n") -> bytes:
    return b"(" + text("storage") + kind + key + text("cpu") + numel + b"tQ"


def tensor(
    shape: bytes = b"K\x04\x85", stride: bytes = b"K\x01\x85", of: bytes = storage(), offset: bytes = b"K\0"
) -> bytes:
    hooks = b"ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + of + offset + shape + stride + b"\x89" + hooks + b"tR"


DOUBLING = b")" + b"".join(put(i) + b"h" + bytes([i]) + b"\x86" for i in range(40))  # y = (y, y), 40 times
DEEP = b")" + b"\x85" * 1_000_000
EMPTY = b"ccollections\nOrderedDict\n)R"


def pickled(*values: bytes) -> bytes:
    """A pickle of a dict with these values."""
    items = b"".join(text(f"k{i}") + value for i, value in enumerate(values))
    return b"\x80\x02}(" + items + b"u."


HOSTILE: dict[str, bytes] = {
    "memo index": b"\x80\x02]" + put(1 << 27) + b".",
    "memo index as text": b"\x80\x02]p4000000000\n.",
    "shape is text": pickled(tensor(shape=text("abcd" * 1000))),
    "shape is a list": pickled(tensor(shape=b"](K\x04e")),
    "shape is a list of text": pickled(tensor(shape=b"](" + text("a" * 5000) + b"e")),
    "shape is negative": pickled(tensor(shape=b"J\xff\xff\xff\xff\x85")),
    "shape of large numbers": pickled(tensor(shape=b"(" + (b"\x8a\xff" + b"\x7f" * 255) * 3000 + b"t")),
    "number of elements is text": pickled(tensor(of=storage(numel=text("4" * 1000)))),
    "number of elements is negative": pickled(tensor(of=storage(numel=b"J\xff\xff\xff\xff"))),
    "number of elements is huge": pickled(tensor(of=storage(numel=b"\x8b\x00\x40\0\0" + b"\x7f" * 0x4000))),
    "offset is huge": pickled(tensor(offset=b"\x8a\x07" + b"\x7f" * 7)),
    "key is a number": pickled(tensor(of=storage(key=b"K\0"))),
    "nested keys": b"\x80\x02" + (b"}(" + text("t") + tensor() + text("k" * 2000)) * 2000 + b"N" + b"u" * 2000 + b".",
    "nested keys of emoji": b"\x80\x02" + (b"}(" + text("t") + tensor() + text("\U0001f600" * 500)) * 2000 + b"N" + b"u" * 2000 + b".",
    "nested lists": b"\x80\x02" + b"]" * 300_000 + tensor() + b"a" * 300_000 + b".",
    "shared tuples as key": b"\x80\x02}" + DOUBLING + b"Ns.",
    "shared tuples as value": pickled(DOUBLING),
    "shared tuples as persistent id": b"\x80\x02" + DOUBLING + b"Q.",
    "shared tuples as storage key": pickled(tensor(of=storage(key=DOUBLING))),
    "shared tuples as shape": pickled(tensor(shape=DOUBLING)),
    "shared tuples as layout": pickled(b"ctorch._utils\n_rebuild_sparse_tensor\n(" + DOUBLING + DOUBLING + b"tR"),
    "shared tuples in a set": b"\x80\x02c__builtin__\nset\n](" + DOUBLING + b"e\x85R.",
    "shared lists in a tensor": b"\x80\x02ctorch\nFloatTensor\n](K\x01e" + b"".join(put(i) + b"]h" + bytes([i]) + b"ah" + bytes([i]) + b"a" for i in range(30)) + b"\x85R.",
    "a million keys of shared tuples": b"\x80\x02}(" + (b")" + b"".join(put(i) + b"h" + bytes([i]) + b"\x86" for i in range(15))) + put(99) + b"N" + b"h\x63N" * 200_000 + b"u.",
    "deep tuple": b"\x80\x02" + DEEP + b".",
    "deep tuple as key": b"\x80\x02}" + DEEP + b"Ns.",
    "deep tuple as persistent id": b"\x80\x02" + DEEP + b"Q.",
    "two million lists": b"\x80\x02](" + b"]" * 2_000_000 + b"e.",
    "two million sets": b"\x80\x04](" + b"\x8f" * 2_000_000 + b"e.",
    "a million globals": b"\x80\x02](" + b"".join(b"ca\nb%d\n" % i for i in range(200_000)) + b"e.",
    "bytearray of a size": pickled(b"c__builtin__\nbytearray\n\x8a\x05\0\0\0\0\x01\x85R"),
    "bytearray of a size, popped": pickled(b"c__builtin__\nbytearray\n\x8a\x05\0\0\0\0\x01\x85R0N"),
    "bytearray through a tensor": pickled(b"ctorch._tensor\n_rebuild_from_type_v2\n(c__builtin__\nbytearray\nctorch\nTensor\n\x8a\x05\0\0\0\0\x01\x85}tR"),
    "bytearray8 of a size": b"\x80\x05\x96\0\0\0\0\x04\0\0\0.",
    "bytes of a size": b"\x80\x04\x8e\0\0\0\0\x04\0\0\0.",
    "tensor of a size": pickled(b"ctorch\nFloatTensor\n\x8a\x06\0\0\0\0\0\x01\x85R"),
    "storage of a size": pickled(b"ctorch.storage\nUntypedStorage\n\x8a\x06\0\0\0\0\0\x01\x85R"),
    "punycode": pickled(b"c_codecs\nencode\n" + text("\xfc" * 300_000) + text("punycode") + b"\x86R"),
    "repeated values, copied": pickled(
        b"ctorch._utils\n_rebuild_device_tensor_from_cpu_tensor\n("
        + tensor(shape=b"\x8a\x05\0\0\0\0\x01\x85", stride=b"K\0\x85")
        + b"ctorch\nfloat64\n" + text("cpu") + b"\x89tR"
    ),
    "half of a surrogate pair as key": pickled(tensor(of=storage(key=text("\ud800")))),
    "half of a surrogate pair as global": b"\x80\x04" + text("\ud800") + text("a\nb") + b"\x93.",
    "number of a million digits": b"\x80\x02L" + b"9" * 1_000_000 + b"L\n.",
    "set attribute of a class": b"\x80\x02ccollections\nOrderedDict\nN}(" + text("path") + b"K\x01u\x86b.",
    "set dict of a class": b"\x80\x02ctorch\nTensor\n}(" + text("path") + b"K\x01ub.",
    "dtype that is none": pickled(b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n(ctorch\n_dynamo\nK\x04\x85K\x01\x85\x89tR"),
    "meta tensor that is huge": pickled(b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n(ctorch\nfloat32\n(" + b"\x8a\x07" + b"\x7f" * 7 + b"\x8a\x07" + b"\x7f" * 7 + b"tK\x01\x85\x89tR"),
    "call of nothing": b"\x80\x02N)R.",
    "stack that is empty": b"\x80\x02RRR.",
    "memo that is empty": b"\x80\x02h\x05.",
    "no end": b"\x80\x02]",
    "no opcode": b"\x80\x02\xff.",
    "extension code": b"\x80\x02\x82\x01.",
    "nothing": b"",
    "tensors shared 300,000 times": b"\x80\x02](" + tensor() + put(0) + b"h\x00" * 300_000 + b"e.",
    "byte of a list": pickled(b"c__builtin__\nbytearray\n](K\x01K\x02e\x85R"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(HOSTILE))
def test_a_hostile_pickle_is_a_documented_error_or_loads(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(archive_of(HOSTILE[name], bytes(16)))
    acts: list[Callable[[], Any]] = [
        lambda: torchferry.inspect(path),
        lambda: torchferry.verify(path),
        lambda: torchferry.load(path),
        lambda: torchferry.load(path, verify=False),
        lambda: torchferry.load(path, keys=["k0"]),
        lambda: torchferry.load(path, map_location="meta"),
    ]
    for act in acts:
        try:
            act()
        except TorchferryError as error:
            assert str(error).isprintable()  # noqa: PT017 - any of ours will do
            assert len(str(error)) < 10_000  # noqa: PT017


def test_no_hostile_pickle_takes_64_mib_beyond_its_size(tmp_path: Path) -> None:
    for number, name in enumerate(HOSTILE):
        (tmp_path / f"{number:03}.pt").write_bytes(archive_of(HOSTILE[name], bytes(16)))
    torch.save({"a": torch.ones(3)}, tmp_path / "small.pt")
    program = """
        import json, pathlib, sys, warnings, torchferry
        warnings.simplefilter("ignore")
        def status(field):
            return int(pathlib.Path("/proc/self/status").read_text().split(field)[1].split()[0]) << 10
        for act in (torchferry.inspect, torchferry.verify, torchferry.load):
            act(sys.argv[1] + "/small.pt")  # imports and threads are there
        taken = {}
        for path in sorted(pathlib.Path(sys.argv[1]).glob("[0-9]*.pt")):
            for act in (torchferry.inspect, torchferry.verify, torchferry.load):
                pathlib.Path("/proc/self/clear_refs").write_text("5")
                before = status("VmRSS:")
                try:
                    act(path)
                except torchferry.TorchferryError:
                    pass
                taken[f"{path.stem} {act.__name__}"] = status("VmHWM:") - before - path.stat().st_size
        print(json.dumps(taken))
    """
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program), str(tmp_path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=250)
    names = list(HOSTILE)
    taken = {f"{names[int(key[:3])]}: {key[4:]}": nbytes >> 20 for key, nbytes in json.loads(done.stdout).items()}
    assert {key: mib for key, mib in taken.items() if mib >= 64} == {}


def test_a_hostile_pickle_is_refused_with_weights_only_false_as_well(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    for name in ("memo index", "shared tuples as key", "deep tuple as key", "two million sets", "bytearray8 of a size"):
        path.write_bytes(archive_of(HOSTILE[name]))
        for verify in (True, False):
            with pytest.raises(CheckpointCorruptError):
                torchferry.load(path, weights_only=False, verify=verify)


@pytest.mark.parametrize("name", ["memo index", "shared tuples as key", "deep tuple as key", "bytearray of a size"])
def test_a_hostile_pickle_in_the_legacy_format_is_refused(name: str, tmp_path: Path) -> None:
    data = saved({"a": torch.ones(3)}, _use_new_zipfile_serialization=False)
    start = 0
    for _ in range(3):
        start = scan_pickle(data, "test://x", start)
    (tmp_path / "x.pt").write_bytes(data[:start] + HOSTILE[name] + data[scan_pickle(data, "test://x", start) :])
    with pytest.raises(CheckpointCorruptError, match=r"data\.pkl"):
        torchferry.load(tmp_path / "x.pt")


def test_a_legacy_checkpoint_of_storages_longer_than_itself_is_refused(tmp_path: Path) -> None:
    data = saved({"a": torch.ones(300)}, _use_new_zipfile_serialization=False)
    (tmp_path / "x.pt").write_bytes(data.replace(b"M\x2c\x01", b"M\xff\xff", 1))
    with pytest.raises(CheckpointCorruptError, match="longer than the file"):
        torchferry.load(tmp_path / "x.pt")


@pytest.mark.parametrize("name", ["memo index", "nested keys", "shared tuples as key", "two million sets"])
def test_a_hostile_pickle_is_refused_before_it_is_unpickled(name: str) -> None:
    with pytest.raises(CheckpointCorruptError, match=r"^test://x: data\.pkl"):
        list(read_graph(HOSTILE[name], "test://x").tensors())


def test_a_name_acts_on_no_terminal() -> None:
    assert printable("a\x1b]0;title\x07\n\u202eb") == r"a\x1b]0;title\x07\n\u202eb"
    assert printable("\ud800") == r"\ud800"
    assert printable("weights.ü") == "weights.ü"
    assert len(printable("a" * 1000)) < 210


def test_names_of_globals_act_on_no_terminal(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(archive_of(b"\x80\x04" + text("evil\x1b[2J") + text("a\u202eb") + b"\x93."))
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


# Anything else

VALUES = strategies.recursive(
    strategies.none() | strategies.booleans() | strategies.integers() | strategies.floats() | strategies.text()
    | strategies.binary() | strategies.builds(torch.arange, strategies.integers(0, 5)),
    lambda children: strategies.lists(children) | strategies.tuples(children, children)
    | strategies.dictionaries(strategies.text() | strategies.integers() | strategies.tuples(strategies.text()), children),
    max_leaves=20,
)  # fmt: skip


@hypothesis.settings(max_examples=200, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
@hypothesis.given(VALUES, strategies.sampled_from([2, 4]))
def test_whatever_is_saved_is_scanned_and_read(value: Any, protocol: int) -> None:
    data = zipfile.ZipFile(io.BytesIO(saved(value, pickle_protocol=protocol))).read("archive/data.pkl")
    assert scan_pickle(data, "test://x") == len(data)
    list(read_graph(data, "test://x").tensors())


@hypothesis.settings(max_examples=1000, deadline=None)
@hypothesis.given(strategies.data())
def test_any_opcodes_are_read_or_refused(data: strategies.DataObject) -> None:
    opcode = strategies.sampled_from([bytes([op]) for op in b"(.0126]}))NKhqtRbsue\x85\x86\x87\x81\x89\x8fQ"])
    pieces = [tensor(), storage(), text("a"), put(3), b"K\x01", b"h\0", b"q\0", EMPTY, b"ctorch\nfloat32\n"]
    parts = data.draw(strategies.lists(opcode | strategies.sampled_from(pieces) | strategies.binary(max_size=3)))
    try:
        graph = read_graph(b"\x80\x02" + b"".join(parts) + b".", "test://x")
        list(graph.tensors())
        graph.storages_of(graph.root)
    except CheckpointFormatError:
        pass


def test_1000_mutants_of_files_of_every_format_are_right_or_clear_errors() -> None:
    """In a process of its own: a mutant might end it."""
    command = [sys.executable, "-W", "ignore", "-m", "torchferry.testing.fuzz", "1000"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 0, f"mutant {done.stderr.split()[-1]} ended the process"
    report = json.loads(done.stdout)
    assert report["tried"] == 1000
    assert {kind: report[kind] for kind in ("wrong", "other error", "memory")} == {
        "wrong": [],
        "other error": [],
        "memory": [],
    }
