"""The command: what it prints, and how it fails."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import socket
import struct
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import torchferry
from torchferry.cli import main
from torchferry.cli.printing import print_json
from torchferry.testing.faultproxy import Fault


def save_sharded(state: dict[str, Any], url: str | Path, **options: Any) -> None:
    from torchferry.distributed import save

    save(state, url, no_dist=True, **options)


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    path = str(tmp_path / "model.pt")
    module = torch.nn.Linear(30, 20)
    torchferry.save({"module_state_dict": module.state_dict(), "epoch": 3}, path)
    return path


def test_inspect_lists_the_tensors_values_and_totals(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", checkpoint]) == 0
    output = capsys.readouterr().out
    assert "module_state_dict.weight" in output
    assert "20 x 30" in output
    assert "epoch = 3" in output
    assert "2 tensors in 2 storages" in output


def test_inspect_prints_keys_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = ["w[/b]", "x[red]y", ":smile:"]
    torch.save({key: torch.ones(1) for key in keys}, tmp_path / "x.pt")
    assert main(["inspect", str(tmp_path / "x.pt")]) == 0
    output = capsys.readouterr().out
    assert [key for key in keys if key in output] == keys


def test_inspect_cuts_no_key_off_in_a_pipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = "module." * 40 + "weight"
    torch.save({key: torch.ones(1)}, tmp_path / "x.pt")
    assert main(["inspect", str(tmp_path / "x.pt")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines if key in line] == [[key, "float32", "1", "4", "bytes", "data/0"]]


def test_what_acts_on_a_terminal_is_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "a\x1b[2J\u202eb\n" + "long" * 100 + "\x07"
    torch.save({hostile: torch.ones(1), "text": hostile[:100]}, tmp_path / "x.pt")
    torch.save({"b": torch.ones(1)}, tmp_path / "y.pt")
    for arguments in (["inspect"], ["inspect", "--depth", "1"], ["inspect", "--json"]):
        assert main([*arguments, str(tmp_path / "x.pt")]) == 0
    assert main(["diff", str(tmp_path / "x.pt"), str(tmp_path / "y.pt")]) == 1
    assert main(["verify", str(tmp_path / hostile[:40])]) == 1
    captured = capsys.readouterr()
    assert not any(character in captured.out + captured.err for character in "\x1b\x07\u202e")
    assert "a\\x1b[2J" in captured.out


def test_inspect_shows_a_tree_to_a_depth_and_chooses_by_name_and_sorts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = {f"layer.{i}.{name}": torch.zeros(i + 1) for i in range(30) for name in ("weight", "bias")}
    torch.save({"model": tensors, "other": torch.zeros(3, dtype=torch.int8)}, tmp_path / "x.pt")
    url = str(tmp_path / "x.pt")
    main(["inspect", url, "--depth", "1"])
    output = capsys.readouterr().out
    assert "model.layer  60 tensors" in output
    assert "weight" not in output
    assert "by dtype: float32 3.7 kB in 60, int8 3 bytes in 1" in output
    main(["inspect", url, "model.layer.2*.bias", "--sort", "size"])
    lines = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("model")]
    assert lines == [f"model.layer.{i}.bias" for i in (29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 2)]


def test_inspect_takes_names_as_keys_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": {"a": torch.ones(1), "b": torch.ones(1)}, "step": 3}, tmp_path / "x.pt")
    for name in ("model", "model.", "m?del", "mod*"):
        assert main(["inspect", str(tmp_path / "x.pt"), name]) == 0
        output = capsys.readouterr().out
        assert "model.a" in output, name
        assert "step" not in output, name


def test_inspect_prints_json_for_programs(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", checkpoint, "--json"]) == 0
    manifest = json.loads(capsys.readouterr().out)
    assert manifest["tensors"][0] == {
        "key": "module_state_dict.weight",
        "dtype": "float32",
        "shape": [20, 30],
        "nbytes": 2400,
        "record": "data/0",
    }
    assert {record["name"] for record in manifest["records"]} >= {"data.pkl", "data/0", "data/1"}
    assert manifest["values"] == {"epoch": 3}
    assert manifest["format"] == "torch"


def test_diff_tells_what_was_added_removed_reshaped_and_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = {"same": torch.ones(3), "gone": torch.ones(1), "shape": torch.ones(2), "changed": torch.ones(5), "lr": 0.1}
    second = {"same": torch.ones(3), "new": torch.ones(1), "shape": torch.ones(3), "changed": torch.zeros(5), "lr": 0.2}
    torch.save(first, tmp_path / "a.pt")
    torch.save(second, tmp_path / "b.pt")
    a, b = str(tmp_path / "a.pt"), str(tmp_path / "b.pt")
    assert main(["diff", a, a]) == 0
    assert "4 tensors the same" in capsys.readouterr().out
    assert main(["diff", a, b]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "- gone",
        "+ new",
        "! shape: float32 2 -> float32 3",
        "~ changed: other content",
        "~ lr: 0.1 -> 0.2",
        "1 removed; 1 added; 1 of another shape or dtype; 1 of other content; 1 other value; 1 tensor the same",
    ]
    assert main(["diff", "--json", a, b]) == 1
    assert json.loads(capsys.readouterr().out)["changed"] == ["changed"]
    assert main(["diff", a, str(tmp_path / "missing")]) == 2
    assert main(["diff", a]) == 2


def test_diff_reads_what_carries_no_checksums(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {"a": torch.arange(300_000), "b": torch.ones(5)}
    torchferry.save(tensors, tmp_path / "x.pt")
    torchferry.save(tensors, tmp_path / "x.safetensors")
    torchferry.save({**tensors, "b": torch.zeros(5)}, tmp_path / "y.safetensors")
    assert main(["diff", str(tmp_path / "x.pt"), str(tmp_path / "x.safetensors")]) == 0
    assert main(["diff", str(tmp_path / "y.safetensors"), str(tmp_path / "x.safetensors")]) == 1
    assert "~ b" in capsys.readouterr().out


def test_diff_compares_elements_and_not_how_they_are_stored(tmp_path: Path) -> None:
    """Transposed, and a view of a larger storage, whose other bytes do not matter."""
    whole = torch.rand(4, 300)
    tensors = {"turned": torch.rand(30, 20).t(), "view": whole[1], "plain": torch.rand(7)}
    torch.save(tensors, tmp_path / "a.pt")
    torchferry.save({name: value.contiguous() for name, value in tensors.items()}, tmp_path / "b.safetensors")
    whole[2] = 0
    torch.save(tensors, tmp_path / "c.pt")
    for second in ("b.safetensors", "c.pt"):
        assert not torchferry.diff(tmp_path / "a.pt", tmp_path / second)
    tensors["turned"][1, 2] = 9
    whole[1, 3] = 9
    torch.save(tensors, tmp_path / "d.pt")
    for first in ("a.pt", "b.safetensors"):
        assert sorted(torchferry.diff(tmp_path / first, tmp_path / "d.pt").changed) == ["turned", "view"]


_ROW = torch.arange(100.0)
_SHARED = {"w": torch.ones(2)}
_TIED = torch.nn.Parameter(torch.ones(2))
_PLACES = torch.tensor([[0, 1]])


@pytest.mark.parametrize(
    ("first", "second", "where"),
    [
        ({"losses": [0.0] * 20}, {"losses": [0.0] * 19 + [5.0]}, "losses.19"),
        (
            {"v": dict.fromkeys(map(str, range(1200)), 1)},
            {"v": dict.fromkeys(map(str, range(1200)), 1) | {"1100": 2}},
            "v.1100",
        ),
        ({"text": "a" * 300}, {"text": "a" * 299 + "b"}, "text"),
        ({"data": b"a"}, {"data": b"b"}, "data.0"),
        ({"number": 1 << 70}, {"number": 1 << 71}, "number"),
        ({"set": {1, 2}}, {"set": {1, 3}}, "set.1"),
        ({"flag": True}, {"flag": 1}, "flag"),
        ({"number": 1}, {"number": 1.0}, "number"),
        ({"empty": {}, "n": 1}, {"n": 1}, "empty"),
        ({"kind": [torch.ones(2)]}, {"kind": (torch.ones(2),)}, "kind"),
        ({"key": {0: torch.ones(2)}}, {"key": {"0": torch.ones(2)}}, "key.0"),
        ({(0, 1): 1}, {(0, 2): 1}, "tuple (its key).1"),
        ({"a": torch.ones(2)}, {"a": torch.ones(2, device="meta")}, "a"),
        ({"model": _SHARED, "ema": _SHARED}, {"model": _SHARED}, "ema.w"),
        ({"a": _TIED, "b": _TIED}, {"a": _TIED}, "b"),
        (
            {"s": torch.sparse_coo_tensor(_PLACES, torch.ones(2), (5,), check_invariants=True)},
            {"s": torch.sparse_coo_tensor(_PLACES, torch.ones(2), (500,), check_invariants=True)},
            "s.2.0.0",
        ),
        (
            {"a.b": torch.zeros(2), "a": {"b": torch.ones(2)}},
            {"a.b": torch.zeros(2), "a": {"b": torch.zeros(2)}},
            "a.b [2]",
        ),
        ({"a.b": torch.zeros(2), "a": {"b": 1}}, {"a.b": torch.zeros(2), "a": {"b": 2}}, "a.b"),
        ({(0, 1): torch.zeros(2), (0, 2): _ROW}, {(0, 1): torch.ones(2), (0, 2): _ROW}, "tuple"),
    ],
)
def test_diff_looks_at_everything(tmp_path: Path, first: Any, second: Any, where: str) -> None:
    for name, value in (("a", first), ("b", second)):
        torch.save(value, tmp_path / f"{name}.pt")
        assert not torchferry.diff(tmp_path / f"{name}.pt", tmp_path / f"{name}.pt")
    for found in (
        torchferry.diff(tmp_path / "a.pt", tmp_path / "b.pt"),
        torchferry.diff(tmp_path / "b.pt", tmp_path / "a.pt"),
    ):
        assert {*found.added, *found.removed, *found.reshaped, *found.changed, *found.values} == {where}
    assert main(["diff", str(tmp_path / "a.pt"), str(tmp_path / "b.pt")]) == 1


def test_diff_takes_nan_and_other_orders_for_the_same(tmp_path: Path) -> None:
    torch.save({"a": float("nan"), "b": {"x": 1, "y": {"u", "v", "w"}}}, tmp_path / "a.pt")
    torch.save({"b": {"y": {"w", "v", "u"}, "x": 1}, "a": float("nan")}, tmp_path / "b.pt")
    assert not torchferry.diff(tmp_path / "a.pt", tmp_path / "b.pt")


def test_diff_fails_where_it_cannot_look_at_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    round_and_round: dict[str, Any] = {"w": torch.ones(2)}
    round_and_round["self"] = round_and_round
    torch.save(round_and_round, tmp_path / "a.pt")
    assert main(["diff", str(tmp_path / "a.pt"), str(tmp_path / "a.pt")]) == 2
    assert "too often, or themselves" in capsys.readouterr().err


class Scaled(torch.Tensor):
    """A tensor of a class of its own."""


def _with_attribute(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    tensor.scale = 1  # type: ignore[attr-defined]
    return tensor


_COMPLEX = torch.complex(_ROW, _ROW + 1)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (_ROW[:50], _ROW[50:]),
        (_ROW.view(10, 10), _ROW.view(10, 10).t()),
        (_COMPLEX.conj(), _COMPLEX),
        (_COMPLEX[:50].conj(), _COMPLEX[50:].conj()),
        (_ROW[:50].as_subclass(Scaled), _ROW[50:].as_subclass(Scaled)),
        (_with_attribute(_ROW[:50]), _with_attribute(_ROW[50:])),
        (_ROW.to_sparse(), (_ROW + 1).to_sparse()),
    ],
    ids=["halves", "transposed", "conj", "conj halves", "subclass", "attribute", "sparse"],
)
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_diff_takes_no_other_values_for_the_same(tmp_path: Path, first: Any, second: Any, legacy: bool) -> None:
    for name, value in (("a", first), ("b", first), ("c", second)):
        torch.save({"w": value}, tmp_path / f"{name}.pt", _use_new_zipfile_serialization=not legacy)
    with torch.serialization.safe_globals([Scaled]):
        assert not torchferry.diff(tmp_path / "a.pt", tmp_path / "b.pt")
        assert torchferry.diff(tmp_path / "a.pt", tmp_path / "c.pt")


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_diff_compares_storages_that_stand_alone_where_torch_loads_them(tmp_path: Path) -> None:
    for name, value in (("a", _ROW), ("b", _ROW), ("c", _ROW + 1)):
        torch.save({"w": value.untyped_storage()}, tmp_path / f"{name}.pt")
    assert not torchferry.diff(tmp_path / "a.pt", tmp_path / "b.pt")
    assert torchferry.diff(tmp_path / "a.pt", tmp_path / "c.pt").changed == ("w",)
    torch.save({"w": _ROW.untyped_storage()}, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(torchferry.CheckpointFormatError, match="legacy format stores and does not load"):
        torchferry.diff(tmp_path / "legacy.pt", tmp_path / "a.pt")


@pytest.mark.filterwarnings("ignore:.*quantize.* are deprecated", "ignore:TypedStorage is deprecated")
def test_diff_compares_the_numbers_that_quantized_tensors_stand_for(tmp_path: Path) -> None:
    for name, scale in (("a", 1.0), ("b", 2.0), ("c", 1.0)):
        torch.save({"w": torch.quantize_per_tensor(_ROW * scale, scale, 0, torch.quint8)}, tmp_path / f"{name}.pt")
    assert torchferry.diff(tmp_path / "a.pt", tmp_path / "b.pt").changed == ("w",)
    assert not torchferry.diff(tmp_path / "a.pt", tmp_path / "c.pt")


def test_diff_finds_equal_tensors_in_the_legacy_format(tmp_path: Path) -> None:
    content = {"a": _ROW, "b": _ROW[3:50], "c": _ROW.view(4, 25).t()}
    torch.save(content, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.save(content, tmp_path / "zip.pt")
    assert not torchferry.diff(tmp_path / "legacy.pt", tmp_path / "zip.pt")


@pytest.mark.parametrize("verb", [["ls"], ["rm", "-r", "--yes"], ["inspect"], ["clean"]], ids=lambda verb: verb[0])
def test_an_empty_url_is_refused_and_is_not_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verb: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "thesis.tex").write_text("x")
    assert main([*verb, ""]) == 1
    assert "The URL is empty" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").exists()


def test_ls_lists_checkpoints_with_step_size_and_age(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (100, 20):
        torchferry.save({"w": torch.ones(step)}, tmp_path / f"step-{step}.pt")
    torchferry.save(
        {f"w{i}": torch.ones(1 << 18) for i in range(3)}, tmp_path / "m.safetensors", max_shard_size=2 << 20
    )
    (tmp_path / "dcp").mkdir()
    for name in (".metadata", "__0_0.distcp"):
        (tmp_path / "dcp" / name).write_bytes(b"x" * 100)
    (tmp_path / "notes.txt").write_text("x")
    assert main(["ls", str(tmp_path), "--sort", "step"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[1:-1]] == [
        "step-20.pt",
        "step-100.pt",
        "dcp/",
        "m.safetensors.index.json",
    ]
    assert lines[-1].startswith("4 checkpoints, 3.2 MB (1 other object:")
    assert main(["ls", str(tmp_path), "--json", "--long"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert (
        rows["step-100.pt"] | {"modified": None, "size": 0}
        == {
            "name": "step-100.pt",
            "step": 100,
            "size": 0,
            "modified": None,
            "objects": 1,
            "format": "torch",
            "tensors": 1,
            "url": str(tmp_path / "step-100.pt"),
        }
        or rows["step-100.pt"]["tensors"] == 1
    )
    assert (rows["m.safetensors.index.json"]["objects"], rows["m.safetensors.index.json"]["tensors"]) == (3, 3)
    assert rows["dcp/"]["format"] == "damaged"


def test_ls_shows_a_sharded_checkpoint_as_one_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (100, 20):
        save_sharded({"w": torch.ones(step), "b": torch.ones(3), "lr": 0.1}, tmp_path / f"run/step-{step}")
    assert main(["ls", str(tmp_path), "--long", "--sort", "step"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [(line[0], *line[-3:]) for line in lines[1:-1]] == [
        ("20", "sharded", "2", "run/step-20/"),
        ("100", "sharded", "2", "run/step-100/"),
    ]
    assert main(["ls", str(tmp_path), "--json"]) == 0
    row = json.loads(capsys.readouterr().out)[0]
    whole = sum(path.stat().st_size for path in (tmp_path / "run/step-100").rglob("*") if path.is_file())
    assert (row["name"], row["format"], row["objects"], row["size"]) == ("run/step-100/", "sharded", 2, whole)
    for url in (row["url"], row["url"].rstrip("/")):
        assert main(["inspect", url]) == 0
        assert main(["verify", url]) == 0


def test_rm_removes_a_sharded_checkpoint_its_metadata_first(
    s3_url: str, s3_storage_options: dict[str, Any], s3_client: Any, faulty_s3: Any, tmp_path: Path
) -> None:
    """Nothing else: what other checkpoints and users have there stays. Dead before the shards, clean finds them."""
    save_sharded({"w": torch.ones(3)}, tmp_path / "c")
    (tmp_path / "c/notes.txt").write_text("mine")
    save_sharded({"w": torch.ones(3)}, tmp_path / "c/d")
    assert main(["rm", "--yes", f"{tmp_path}/c/"]) == 0
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["d", "notes.txt"]
    assert main(["rm", "--yes", f"{tmp_path}/c/d"]) == 0
    assert not (tmp_path / "c/d").exists()
    save_sharded({"w": torch.ones(3)}, s3_url, storage_options=s3_storage_options)
    fault = Fault(method="DELETE", target=".distcp", status=403, code="AccessDenied", times=None)
    options = json.dumps(faulty_s3(fault).storage_options)
    assert main(["rm", "--yes", s3_url, "--storage-options", options]) == 1
    bucket, _, prefix = s3_url.removeprefix("s3://").partition("/")
    (left,) = s3_client.list_objects_v2(Bucket=bucket, Prefix=prefix)["Contents"]
    assert left["Key"].endswith(".distcp")
    assert torchferry.clean(s3_url, older_than=0, storage_options=s3_storage_options).removed


def test_diff_and_convert_take_sharded_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {"w": torch.ones(3), "b": torch.ones(2)}
    save_sharded(tensors, tmp_path / "a")
    assert main(["convert", f"{tmp_path}/a", f"{tmp_path}/a.safetensors"]) == 0
    assert main(["convert", f"{tmp_path}/a/", f"{tmp_path}/a.pt"]) == 0
    assert main(["convert", f"{tmp_path}/a.pt", f"{tmp_path}/b/"]) == 0
    assert main(["convert", f"{tmp_path}/a.pt", f"{tmp_path}/d", "--format", "sharded"]) == 0
    for other in ("a.safetensors", "a.pt", "b", "d/"):
        assert main(["diff", f"{tmp_path}/a", f"{tmp_path}/{other}"]) == 0
    save_sharded({**tensors, "w": torch.zeros(3)}, tmp_path / "b")
    capsys.readouterr()
    assert main(["diff", f"{tmp_path}/a.pt", f"{tmp_path}/b"]) == 1
    assert capsys.readouterr().out.splitlines()[0] == "~ w: other content"


def test_rm_removes_a_checkpoint_with_its_shards_and_asks_before_it_removes_many(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torchferry.save(
        {f"w{i}": torch.ones(1 << 18) for i in range(3)}, tmp_path / "m.safetensors", max_shard_size=1 << 20
    )
    torchferry.save({}, tmp_path / "x.pt")
    index = str(tmp_path / "m.safetensors.index.json")
    assert main(["rm", "--dry-run", index]) == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    assert main(["rm", index]) == 1
    assert len(list(tmp_path.iterdir())) == 5
    assert main(["rm", "--yes", index]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]
    assert main(["rm", str(tmp_path / "x.pt")]) == 0
    assert main(["rm", str(tmp_path / "x.pt")]) == 1
    assert "removed 4 objects" in capsys.readouterr().out


def test_rm_removes_all_files_that_an_index_names(tmp_path: Path) -> None:
    for name in ("a-1.safetensors", "b.safetensors", "c.safetensors"):
        torchferry.save({"w": torch.ones(3)}, tmp_path / name)
    index = tmp_path / "model.safetensors.index.fp16.json"
    index.write_text(json.dumps({"weight_map": {"v": "a-1.safetensors", "w": "b.safetensors"}}))
    assert main(["rm", "--yes", str(index)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["c.safetensors"]


def test_copy_and_verify_across_stores(
    checkpoint: str, s3_url: str, s3_storage_options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    options = json.dumps(s3_storage_options)
    assert main(["copy", checkpoint, f"{s3_url}/copy.pt", "--target-storage-options", options]) == 0
    assert main(["verify", f"{s3_url}/copy.pt", "--storage-options", options]) == 0
    assert capsys.readouterr().out.lower().count("every record matches its crc32") == 2
    assert torchferry.load(f"{s3_url}/copy.pt", storage_options=s3_storage_options)["epoch"] == 3


def test_a_prefix_is_copied_with_the_stores_options_and_then_only_what_is_missing(
    tmp_path: Path, s3_url: str, s3_storage_options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("a.pt", "deep/b.pt"):
        torchferry.save({"w": torch.ones(3)}, tmp_path / name)
    (tmp_path / "notes.txt").write_text("x")
    options = []
    for key, value in s3_storage_options.items():
        options += ["-o", f"{key}={value if isinstance(value, str) else json.dumps(value)}"]
    copy = ["copy", "-r", "--missing", str(tmp_path), f"{s3_url}/all", *options]
    assert main(copy) == 0
    assert "3 copied" in capsys.readouterr().out
    torchferry.save({"w": torch.ones(300)}, tmp_path / "a.pt")
    assert main(copy) == 0
    assert "1 copied" in (output := capsys.readouterr().out)
    assert "2 there already" in output
    assert main(["ls", f"{s3_url}/all", *options]) == 0
    assert "2 checkpoints" in capsys.readouterr().out
    assert main(["rm", "-r", "-y", f"{s3_url}/all", *options]) == 0
    assert "removed 3 objects" in capsys.readouterr().out


def test_a_prefix_is_copied_as_far_as_it_can_be_and_what_cannot_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "from"
    source.mkdir()
    for name in ("a.pt", "d.pt", "z.pt"):
        torchferry.save({"w": torch.ones(300)}, source / name)
    data = bytearray((source / "d.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (source / "d.pt").write_bytes(data)
    (source / "b.zip").write_bytes(b"PK\3\4 but no zip")
    (source / "empty").touch()
    (source / "notes.txt").write_text("x")
    (source / "pytorch_model.bin").write_text("x")
    (source / "pytorch_model.bin.index.json").write_text('{"metadata": {}, "weight_map": {"w": "pytorch_model.bin"}}')
    assert main(["copy", "-r", str(source), str(tmp_path / "to")]) == 1
    captured = capsys.readouterr()
    failed = [line.split(": ")[2] for line in captured.err.splitlines()]
    assert "d.pt" in failed
    assert {path.name for path in (tmp_path / "to").iterdir()} == {path.name for path in source.iterdir()} - {*failed}
    assert {*failed} <= {"d.pt", "b.zip"}
    assert all(line.startswith("torchferry: not copied: ") for line in captured.err.splitlines())


def test_a_copied_prefix_never_mixes_two_versions_of_an_index(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "from", tmp_path / "to"
    index = "m.safetensors.index.json"

    def put(value: float, extra: int = 0) -> None:
        tensors = {"a": torch.full((100,), value), "b": torch.full((100 + extra,), value)}
        torchferry.save(tensors, source / "m.safetensors", max_shard_size=420)

    def values() -> set[float]:
        return {tensor[0].item() for tensor in torchferry.load(target / index).values()}

    copy = ["copy", "-r", str(source), str(target)]
    put(1)
    assert main(copy) == 0
    assert "3 copied" in capsys.readouterr().out
    put(2, extra=3)  # one shard of another size
    assert main([*copy, "--missing"]) == 0
    assert values() == {2.0}
    assert "3 copied" in capsys.readouterr().out
    assert main([*copy, "--missing"]) == 0
    assert "0 copied, 0 bytes; 3 there already" in capsys.readouterr().out
    put(3, extra=3)
    (shard,) = source.glob("*-00002-of-00002.safetensors")
    torchferry.save({"b": torch.zeros(1)}, shard)
    (source / index).write_text((source / index).read_text().replace('"b"', '"c"'))  # now the two are not whole
    assert main(copy) == 1
    assert values() == {2.0}
    put(4)
    assert main(copy) == 0
    assert values() == {4.0}
    assert len(list(target.iterdir())) == 3


def test_missing_knows_a_sharded_checkpoint_that_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_sharded({"w": torch.ones(3)}, tmp_path / "a")
    copy = ["copy", "--missing", str(tmp_path / "a"), str(tmp_path / "b")]
    assert main(copy) == 0
    assert "there already" not in capsys.readouterr().out
    assert main(copy) == 0
    assert "there already" in capsys.readouterr().out
    save_sharded({"w": torch.ones(300)}, tmp_path / "a")
    assert main(copy) == 0
    assert "there already" not in capsys.readouterr().out
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 0


def test_folder_markers_are_not_copied_and_nothing_below_a_prefix_is_a_failure(
    tmp_path: Path, s3_url: str, s3_storage_options: dict[str, Any], s3_client: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--storage-options", json.dumps(s3_storage_options)]
    torchferry.save({"w": torch.ones(3)}, f"{s3_url}/r/x.pt", storage_options=s3_storage_options)
    bucket, _, prefix = s3_url.removeprefix("s3://").partition("/")
    for marker in ("r/", "r/sub/"):
        s3_client.put_object(Bucket=bucket, Key=f"{prefix}/{marker}", Body=b"")
    assert main(["copy", "-r", f"{s3_url}/r", str(tmp_path / "to"), *options]) == 0
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["x.pt"]
    for name, message in (("r/x.pt", "is an object"), ("nosuch", "There is nothing below")):
        verbs = (["ls"], ["rm", "-r", "-y"], ["copy", "-r"])
        for verb in verbs:
            capsys.readouterr()
            to = [str(tmp_path / "other")] if verb[0] == "copy" else []
            assert main([*verb, f"{s3_url}/{name}", *to, *options]) == 1
            assert message in capsys.readouterr().err
    assert main(["ls", f"s3://{bucket}", *options]) == 0


def test_one_broken_checkpoint_does_not_hide_the_others_from_ls(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torchferry.save({"w": torch.ones(3)}, tmp_path / "a.pt")
    (tmp_path / "m.safetensors.index.json").write_text('{"weight_map": {"w": "gone.safetensors"}}')
    assert main(["ls", "-l", str(tmp_path)]) == 0
    rows = {line.split()[-1]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert "damaged" in rows["m.safetensors.index.json"]
    assert "torch" in rows["a.pt"]


def test_an_error_names_options_and_not_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "state.pt"
    torchferry.save({"weight": torch.zeros(3), "step": 7}, source)
    assert main(["convert", str(source), str(tmp_path / "x.safetensors")]) == 1
    assert "choose with --keys, or leave them out with --exclude." in " ".join(capsys.readouterr().err.split())


def test_convert_writes_safetensors_and_back(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.ones(700_000)}, "epoch": 1}, tmp_path / "x.pt")
    target = str(tmp_path / "x.safetensors")
    arguments = ["convert", str(tmp_path / "x.pt"), target, "-k", "model", "--strip-prefix", "model."]
    assert main(arguments) == 0
    assert main(["convert", target, str(tmp_path / "y.pt")]) == 0
    assert list(torch.load(tmp_path / "y.pt")) == ["w"]
    assert main([*arguments[:2], str(tmp_path / "s.safetensors"), "-x", "epoch", "--max-shard-size", "1MB"]) == 0
    assert (tmp_path / "s.safetensors.index.json").exists()


def test_copy_does_not_call_checked_what_carries_no_crc32s(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.serialization.set_crc32_options(compute_crc32=False)
    try:
        torch.save(torch.ones(3), tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(compute_crc32=True)
    copy = ["copy", str(tmp_path / "x.pt"), str(tmp_path / "y.pt")]
    assert main(copy) == 1
    assert "was saved without" in capsys.readouterr().err
    assert main([*copy, "--no-verify"]) == 0
    assert "not checked" in capsys.readouterr().out


def test_a_failure_is_one_line_on_standard_error_and_debug_shows_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(tmp_path / "missing.pt")]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "missing.pt" in captured.err
    with pytest.raises(torchferry.CheckpointNotFoundError):
        main(["verify", "--debug", str(tmp_path / "missing.pt")])


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "memory://x", "--storage-options", "{bad"],
        ["inspect", "memory://x", "--storage-options", "[1]"],
        ["inspect", "memory://x", "-o", "novalue"],
        ["verify", "gs://x/y", "--profile", "me"],
        ["verify", "s3://x/y", "--endpoint-url", "127.0.0.1:9000"],
        ["clean", "memory://x", "--older-than", "soon"],
        ["nothing"],
    ],
)
def test_wrong_arguments_are_told_with_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err


@pytest.mark.parametrize(
    ("url", "given", "expected"),
    [
        (
            "s3://b/x",
            {"endpoint_url": "http://h", "profile": "p", "anon": True, "region": "r"},
            {"endpoint_url": "http://h", "profile": "p", "anon": True, "client_kwargs": {"region_name": "r"}},
        ),
        ("gs://b/x", {"anon": True}, {"token": "anon"}),
        (
            "az://b/x",
            {"endpoint_url": "https://h", "option": ["account_name=a", "n=1"]},
            {"account_host": "h", "account_name": "a", "n": 1},
        ),
        ("s3://b/x", {"option": ["client_kwargs.verify=false"]}, {"client_kwargs": {"verify": False}}),
        ("/local/x", {"profile": "p", "target_option": ()}, None),
    ],
)
def test_the_options_of_a_store_are_those_of_its_filesystem(url: str, given: dict[str, Any], expected: Any) -> None:
    assert main(["--version"]) == 0  # imports what deprecates names
    from torchferry.cli.store import storage_options_for

    assert storage_options_for(url, given) == expected


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "importtime", "-m", "torchferry", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["ls", "."], ["copy", "x.pt", "y.pt"], ["rm", "x.pt"], ["clean", "."], ["--version"]]
)
def test_the_quick_verbs_import_no_torch(arguments: list[str], tmp_path: Path) -> None:
    torch.save({"w": torch.ones(3)}, tmp_path / "x.pt")
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not [line for line in done.stderr.splitlines() if line.rpartition("|")[2].strip() == "torch"]


def test_diff_says_that_they_differ_also_to_a_reader_that_has_enough(tmp_path: Path) -> None:
    for number in (1, 2):
        torch.save({f"t{at}": torch.tensor(at * number) for at in range(1, 500)}, tmp_path / f"{number}.pt")
    diff = f"{sys.executable} -m torchferry diff {tmp_path / '1.pt'} {tmp_path / '2.pt'}"
    command = f"{diff} | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("1\n", "")


@pytest.mark.parametrize(("closed", "verb", "status"), [("1>&-", "ls", 0), ("2>&-", "verify", 1), ("0<&-", "rm -r", 1)])
def test_it_works_with_closed_streams(tmp_path: Path, closed: str, verb: str, status: int) -> None:
    for name in ("a.pt", "b.pt"):
        torch.save({}, tmp_path / name)
    command = f"{sys.executable} -m torchferry {verb} {tmp_path} {closed}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == status
    assert "Traceback" not in done.stderr
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["ls"], "Missing argument 'URL'. See torchferry ls --help."),
        (["nosuch"], "No such command 'nosuch'. See torchferry --help."),
        (["inspect", "x.pt", "-o", "a=1", "-o", "a.b=2"], "a.b is given below a, which has a value of its own."),
        (["convert", "a", "b", "--max-shard-size", "1.2.3"], "'1.2.3' is no size such as 5GB or 500MiB."),
        (["convert", "a", "b", "--max-shard-size", "9" * 400], "is no size such as 5GB or 500MiB."),
    ],
)
def test_wrong_arguments_are_one_line_on_standard_error(
    capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert not printed.out
    assert says in printed.err
    assert printed.err.count("\n") == 1


def test_the_patience_with_a_store_can_be_said(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # and not listened on
        endpoint = f"http://127.0.0.1:{held.getsockname()[1]}"
        options = ["--endpoint-url", endpoint, "-o", "key=a", "-o", "secret=b", "--give-up-after", "0"]
        for arguments in (["ls", "s3://b/x"], ["inspect", "s3://b/x.pt"], ["copy", "s3://b/x.pt", "y.pt"]):
            assert main([*arguments, *options]) == 1
    assert capsys.readouterr().err.count("is not available, after all retries") == 3


@pytest.mark.parametrize(("verb", "status"), [("verify", 1), ("diff", 2)])
def test_a_fault_of_its_own_is_one_line_and_no_difference(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verb: str, status: int
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyError("inside")

    monkeypatch.setattr(torchferry, verb, fail)
    arguments = [verb, "a.pt", "b.pt"][: 1 + status]
    assert main(arguments) == status
    assert "unexpected KeyError" in capsys.readouterr().err
    with pytest.raises(KeyError):
        main([*arguments, "--debug"])


def test_json_has_no_numbers_that_json_has_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {"loss": float("nan"), "best": {"high": float("inf"), "low": [-float("inf"), 1.5]}}
    torch.save(values, tmp_path / "x.pt")
    assert main(["inspect", str(tmp_path / "x.pt"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["values"]
    assert found["loss"] == "NaN"
    assert found["best.high"] == "Infinity"


def test_head_ends_it_without_an_error(tmp_path: Path) -> None:
    for number in range(1000):
        (tmp_path / f"{'long' * 40}-{number}.pt").touch()  # more than a pipe holds
    command = f"{sys.executable} -m torchferry ls {tmp_path} | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[1] == "0"
    assert not done.stderr


def on_a_terminal(arguments: list[str], columns: int, **environment: str) -> str:
    """What a terminal of some width shows. A fork, which has torch: to import it takes seconds."""
    child, terminal = pty.fork()
    if not child:
        status = 70
        try:
            fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
            os.environ.update(TERM="xterm-256color", **environment)
            sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115 - its own
            status = main(arguments)
        finally:
            sys.stdout.flush()
            os._exit(status)
    shown = b""
    with suppress(OSError):  # EIO: nobody has the terminal open any more
        while data := os.read(terminal, 1 << 16):
            shown += data
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, shown
    return shown.decode()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_on_a_narrow_terminal_no_line_is_longer_and_no_colour_is_obeyed(tmp_path: Path) -> None:
    state = {f"transformer.layers.{i}.attention.projection.weight": torch.zeros(3, 4) for i in range(4)}
    torch.save({"model": state, "epoch": 4}, tmp_path / "x.pt")
    for arguments in (["inspect", str(tmp_path / "x.pt")], ["ls", str(tmp_path)]):
        shown = on_a_terminal(arguments, 60, NO_COLOR="1")
        plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)
        assert max(len(line) for line in plain.splitlines() if "tensors in" not in line) <= 60
        assert "\x1b[3" not in shown
    shown = on_a_terminal(["inspect", str(tmp_path / "x.pt")], 60)
    assert "epoch = 4" in shown
    assert "\x1b[1m" in shown  # headings


def test_completion_prints_a_script(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    assert "_TORCHFERRY_COMPLETE" in capsys.readouterr().out


def test_the_command_is_installed(checkpoint: str) -> None:
    command = Path(sys.executable).with_name("torchferry")
    done = subprocess.run([command, "ls", Path(checkpoint).parent], capture_output=True, text=True, check=True)
    assert "model.pt" in done.stdout


ACTING = "a\x1b[2J\x1b]0;title\x07\n  forged  float32  9 x 9\u202egpj.\x9b1m"


def test_inspect_prints_nothing_of_a_key_that_acts_on_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.pt"
    torch.save({ACTING: torch.ones(3), "\ud800": torch.ones(1)}, path)
    for arguments in (["inspect", str(path)], ["inspect", str(path), "--json"], ["verify", str(path)]):
        assert main(arguments) == 0
        output = capsys.readouterr().out
        assert "".join(output.splitlines()).isprintable()
        assert "\n  forged" not in output


def test_an_error_prints_nothing_that_acts_on_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / ACTING)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.rstrip("\n").isprintable()


@pytest.mark.parametrize("module", ["torchferry", "torchferry.cli"])
def test_python_m_runs_the_command(checkpoint: str, module: str) -> None:
    command = [sys.executable, "-m", module, "ls", Path(checkpoint).parent]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "model.pt" in done.stdout


def test_a_terminal_that_cannot_show_a_key_gets_an_escape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"gewicht.ü": torch.ones(1)}, tmp_path / "x.pt")
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert main(["inspect", str(tmp_path / "x.pt")]) == 0
    assert rb"gewicht.\xfc" in written.getvalue()


def test_copy_names_its_own_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.txt").write_bytes(b"no checkpoint")
    assert main(["copy", str(tmp_path / "x.txt"), str(tmp_path / "y")]) == 1
    error = capsys.readouterr().err
    assert "--no-verify" in error
    assert "verify=" not in error


def test_copy_of_a_legacy_checkpoint_goes_on_and_says_what_it_did_not_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "x.pt", tmp_path / "y.pt"
    torch.save({"a": torch.ones(3)}, source, _use_new_zipfile_serialization=False)
    assert main(["copy", str(source), str(target)]) == 0
    assert "not checked" in capsys.readouterr().out
    assert target.read_bytes() == source.read_bytes()


def test_inspect_shows_the_values_of_the_chosen_names_alone_and_refuses_a_name_that_takes_nothing(
    checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", checkpoint, "*.bias"]) == 0
    assert "epoch" not in capsys.readouterr().out
    assert main(["inspect", checkpoint, "epoch"]) == 0
    output = capsys.readouterr().out
    assert "epoch = 3" in output
    assert "shape" not in output
    assert main(["inspect", checkpoint, "module_state_dict.wieght"]) == 1
    assert "Did you mean 'module_state_dict.weight'?" in capsys.readouterr().err


def test_a_prefix_in_place_of_a_checkpoint_is_told_with_what_to_do(
    checkpoint: str, s3_url: str, s3_storage_options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    torchferry.save({}, f"{s3_url}/x.pt", storage_options=s3_storage_options)
    folder, options = str(Path(checkpoint).parent), ["--storage-options", json.dumps(s3_storage_options)]
    for where, further in ((folder, []), (s3_url, options)):
        for verb, advice in (
            (["inspect", where], "torchferry ls "),
            (["verify", where], "torchferry ls "),
            (["copy", where, f"{folder}/copy"], "-r copies"),
            (["rm", where], "-r removes"),
        ):
            assert main([*verb, *further]) == 1
            assert advice in capsys.readouterr().err
    assert main(["inspect", f"{s3_url}-none", *options]) == 1
    assert "torchferry ls" not in capsys.readouterr().err


def test_one_object_is_called_one_object(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rm", "--dry-run", checkpoint]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("1 object,")


@pytest.mark.parametrize("texts", [["a", "b"], ["}, {", "b"], ["a", '"}, {"'], ["a"] * 2500])
def test_json_has_a_line_for_each_entry_whatever_its_texts_are(
    texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    value = {"records": [{"name": text, "size": 1} for text in texts], "mixed": [{"x": 1}, [*texts[:2]]], "empty": []}
    print_json(value)
    printed = capsys.readouterr().out
    assert json.loads(printed) == value
    assert len(printed.splitlines()) == len(texts) + 9
