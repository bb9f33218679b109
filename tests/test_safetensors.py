"""Safetensors: loaded, inspected, verified, saved and copied, in both directions with the real library."""

from __future__ import annotations

import json
import random
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import nn

import torchferry
from torchferry.errors import (
    CheckpointCorruptError,
    CheckpointFormatError,
    CheckpointKeyError,
    CheckpointNotFoundError,
    CheckpointValueError,
)
from torchferry.formats import safetensors_dtypes as module
from torchferry.testing.peak import peak_of_python

if TYPE_CHECKING:
    from conftest import CountingStore  # type: ignore[attr-defined]

DTYPES = [dtype for dtype in module._NAME_OF if dtype not in {torch.float8_e4m3fnuz, torch.float8_e5m2fnuz}]


def every_dtype() -> dict[str, torch.Tensor]:
    tensors = {f"{dtype}".removeprefix("torch."): torch.arange(7).to(dtype) for dtype in DTYPES}
    return {**tensors, "scalar": torch.tensor(1.5), "none": torch.empty(0, 3), "ü/1": torch.ones(2, 3, 4)}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype
        and first[name].shape == second[name].shape
        and first[name].reshape(-1).view(torch.uint8).tolist() == second[name].reshape(-1).view(torch.uint8).tolist()
        for name in first
    )


def test_what_the_library_wrote_is_loaded_and_the_other_way_round(tmp_path: Path) -> None:
    tensors = every_dtype()
    save_file(tensors, tmp_path / "theirs.safetensors")
    assert same(torchferry.load(tmp_path / "theirs.safetensors"), tensors)
    torchferry.save(tensors, tmp_path / "ours.safetensors")
    assert same(load_file(tmp_path / "ours.safetensors"), tensors)


def test_what_is_written_is_byte_for_byte_what_the_library_writes(tmp_path: Path) -> None:
    tensors = {
        **every_dtype(),
        "large": torch.rand(700_000),
        "turned": torch.rand(3, 5).T,
        "wide": torch.rand(900, 2000).T,
    }
    torchferry.save(tensors, tmp_path / "x.safetensors")
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    assert (tmp_path / "x.safetensors").read_bytes() == save(contiguous, metadata={"format": "pt"})


@pytest.mark.parametrize("past_torch", [False, True])
def test_a_tensor_that_changes_while_it_is_saved_is_noticed(tmp_path: Path, past_torch: bool) -> None:
    tensor = torch.rand(5 << 20)

    class Changing(fsspec.callbacks.Callback):
        def relative_update(self, inc: int = 1) -> None:
            del inc
            (tensor.data if past_torch else tensor).add_(1)

    torchferry.save({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(torchferry.ChangedWhileSavingError, match=r"x\.safetensors.*save_in_background"):
        torchferry.save({"a": tensor}, tmp_path / "x.safetensors", callback=Changing())
    assert torchferry.load(tmp_path / "x.safetensors")["a"].shape == (1,)


def test_the_url_tells_how_to_save_and_the_content_how_to_load(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(3)}
    torchferry.save(tensors, tmp_path / "x.bin", format="safetensors")
    assert torchferry.inspect(tmp_path / "x.bin").format == "safetensors"
    torchferry.save(tensors, tmp_path / "y.safetensors", format="torch")
    assert torchferry.inspect(tmp_path / "y.safetensors").format == "torch"
    for name in ("x.bin", "y.safetensors"):
        assert same(torchferry.load(tmp_path / name), tensors)


def test_a_module_is_saved_and_its_metadata_is_in_the_header() -> None:
    net = nn.Linear(3, 4)
    torchferry.save(net, "memory://st/x.safetensors", metadata={"epoch": "7"})
    manifest = torchferry.verify("memory://st/x.safetensors")
    assert manifest.metadata == {"format": "pt", "epoch": "7"}
    assert [(tensor.key, tensor.shape, tensor.nbytes) for tensor in manifest.tensors] == [
        ("bias", (4,), 16),
        ("weight", (4, 3), 48),
    ]
    assert manifest.storage_nbytes == 64
    assert torchferry.load("memory://st/x.safetensors", into=nn.Linear(3, 4)) == ([], [])


@pytest.mark.parametrize(
    ("obj", "message"),
    [
        ({"a": torch.ones(1), "epoch": 1}, "leave out 'epoch' .int."),
        ({"model": {"a": torch.ones(1)}}, "save the state dict in it"),
        ([torch.ones(1)], "not a list"),
        ({"a": torch.eye(3).to_sparse()}, "'a' is sparse"),
        ({"a": torch.empty(2, device="meta")}, "'a' is meta"),
        ({"__metadata__": torch.ones(1)}, "rename it"),
        ({1: torch.ones(1)}, "leave out 1"),
    ],
)
def test_what_safetensors_cannot_hold_is_refused_with_what_to_do(tmp_path: Path, obj: Any, message: str) -> None:
    with pytest.raises(CheckpointValueError, match=message):
        torchferry.save(obj, tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_tensors_that_share_memory_are_refused_and_others_of_one_storage_are_not(tmp_path: Path) -> None:
    base = torch.arange(6.0)
    with pytest.raises(CheckpointValueError, match=r"'a' and 'b' share memory.*tied weights, leave one out"):
        torchferry.save({"a": base, "b": base[2:]}, tmp_path / "x.safetensors")
    torchferry.save({"a": base[:2], "b": base[2:]}, tmp_path / "x.safetensors")
    assert load_file(tmp_path / "x.safetensors")["b"].tolist() == [2, 3, 4, 5]


def test_keys_read_only_what_they_need(counting_store: CountingStore) -> None:
    counting_store.range_size = 1 << 20
    tensors = {f"layers.{i}.{name}": torch.rand(1 << 18) for i in range(16) for name in ("weight", "bias")}
    url = counting_store.put(save(tensors))
    loaded = torchferry.load(url, keys=["layers.3", "layers.1?.bias"], exclude="layers.3.bias")
    assert sorted(loaded) == ["layers.3.weight", *(f"layers.{i}.bias" for i in range(10, 16))] or len(loaded) == 7
    assert all(torch.equal(loaded[name], tensors[name]) for name in loaded)
    assert counting_store.nbytes < 8 << 20  # of 32, with both ends
    with pytest.raises(CheckpointKeyError, match="Did you mean 'layers"):
        torchferry.load(url, keys=["layer.3.weight"])


@pytest.mark.parametrize("map_location", ["cpu", torch.device("cpu"), {"cpu": "meta"}, "meta", lambda s, _: s])
def test_map_location_is_torchs(tmp_path: Path, map_location: Any) -> None:
    tensors = every_dtype()
    save_file(tensors, tmp_path / "x.safetensors")
    loaded = torchferry.load(tmp_path / "x.safetensors", map_location=map_location)
    if loaded["scalar"].is_meta:
        assert {name: tensor.shape for name, tensor in loaded.items()} == {n: t.shape for n, t in tensors.items()}
    else:
        assert same(loaded, tensors)


# Shards


def shards() -> dict[str, torch.Tensor]:
    return {f"layer.{i}": torch.full((1 << 18,), float(i)) for i in range(5)}


def test_a_large_checkpoint_is_saved_in_shards_with_an_index(tmp_path: Path) -> None:
    torchferry.save(shards(), tmp_path / "model.safetensors", max_shard_size=2 << 20)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)] + ["model.safetensors.index.json"]
    index = json.loads((tmp_path / names[-1]).read_text())
    assert index["metadata"]["total_size"] == 5 << 20
    merged: dict[str, torch.Tensor] = {}
    for name in names[:-1]:
        merged |= load_file(tmp_path / name)
    assert same(merged, shards())
    url = tmp_path / names[-1]
    assert same(torchferry.load(url), shards())
    assert list(torchferry.load(url, keys="layer.4")) == ["layer.4"]
    state = {name: torch.zeros_like(tensor) for name, tensor in shards().items()}
    assert torchferry.load(url, into=state) == ([], [])
    assert same(state, shards())
    assert len(torchferry.verify(url).tensors) == 5
    torchferry.save(shards(), tmp_path / "small.safetensors", max_shard_size=1 << 30)
    assert same(load_file(tmp_path / "small.safetensors"), shards())


def test_saving_over_shards_leaves_the_old_ones_whole_until_the_index_is_there(tmp_path: Path) -> None:
    url = tmp_path / "model.safetensors.index.json"
    torchferry.save(shards(), url, max_shard_size=2 << 20)

    class Stop(Exception):  # noqa: N818 - of the test
        pass

    from fsspec.callbacks import Callback

    class Stopping(Callback):  # type: ignore[misc]
        def call(self, *_: Any, **__: Any) -> None:
            if self.value > 3 << 20:
                raise Stop

    other = {name: tensor + 1 for name, tensor in shards().items()}
    before = sorted(tmp_path.iterdir())
    with pytest.raises(Stop):
        torchferry.save(other, url, max_shard_size=1 << 20, callback=Stopping())
    assert sorted(tmp_path.iterdir()) == before
    assert same(torchferry.load(url), shards())
    torchferry.save(other, url, max_shard_size=1 << 20)
    assert same(torchferry.load(url), other)
    assert len(list(tmp_path.iterdir())) == 6


def test_a_save_over_an_index_removes_its_own_shards_alone(tmp_path: Path) -> None:
    for name in ("other.safetensors", "m2-00001-of-00002.safetensors", "m-00001-of-00002.safetensors"):
        save_file({"a": torch.ones(1)}, tmp_path / name)
    (tmp_path / "precious.pt").write_bytes(b"x")
    named = [path.name for path in tmp_path.iterdir()]
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {f"{i}": name for i, name in enumerate(named)}}))
    torchferry.save(shards(), tmp_path / "m.safetensors", max_shard_size=4 << 20)
    assert {*named} - {path.name for path in tmp_path.iterdir()} == {"m-00001-of-00002.safetensors"}
    assert same(torchferry.load(index), shards())


def test_a_save_takes_no_name_of_a_shard_that_is_there(tmp_path: Path) -> None:
    torchferry.save(shards(), tmp_path / "model.safetensors", max_shard_size=2 << 20)
    (tmp_path / "model.safetensors.index.json").rename(tmp_path / "run1.index.json")
    other = {name: tensor + 1 for name, tensor in shards().items()}
    torchferry.save(other, tmp_path / "model.safetensors", max_shard_size=2 << 20)
    assert same(torchferry.load(tmp_path / "run1.index.json"), shards())
    assert same(torchferry.load(tmp_path / "model.safetensors.index.json"), other)


@pytest.mark.parametrize("source", ["", "x.pt", "x.dcp"])
def test_with_max_shard_size_the_other_form_of_the_name_does_not_stay(tmp_path: Path, source: str) -> None:
    """Neither may go on to load by a name that was saved to."""
    state = shards()
    if source == "x.dcp":
        torchferry.save(state, tmp_path / "x.pt")
        torchferry.convert(tmp_path / "x.pt", tmp_path / "x.dcp", format="sharded")
    elif source:
        torchferry.save(state, tmp_path / source)

    def put(name: str, most: int | None) -> set[str]:
        if source:
            torchferry.convert(tmp_path / source, tmp_path / "to" / name, max_shard_size=most)
        else:
            torchferry.save(state, tmp_path / "to" / name, max_shard_size=most)
        return {path.name for path in (tmp_path / "to").iterdir()}

    several = {"m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors", "m.safetensors.index.json"}
    assert put("m.safetensors", None) == {"m.safetensors"}
    assert put("m.safetensors", 4 << 20) == several
    assert put("m.safetensors", 1 << 30) == {"m.safetensors"}
    assert put("m.safetensors.index.json", 4 << 20) == several
    assert put("m.safetensors", None) == {*several, "m.safetensors"}


def test_a_save_to_an_index_writes_one_whatever_the_size(tmp_path: Path) -> None:
    index = tmp_path / "m.safetensors.index.json"
    torchferry.save(shards(), index)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m-00001-of-00001.safetensors", index.name]
    assert same(torchferry.load(index), shards())


@pytest.mark.parametrize(
    ("index", "error"),
    [
        ({"weight_map": {"a": "../secret.safetensors"}}, CheckpointCorruptError),
        ({"weight_map": {"a": "/etc/passwd"}}, CheckpointCorruptError),
        ({"weight_map": {"a": "s3://other/x"}}, CheckpointCorruptError),
        ({"weight_map": {"a": "gone.safetensors"}}, CheckpointNotFoundError),
        ({"weight_map": {"b": "x.safetensors"}}, CheckpointCorruptError),
        ({"weight_map": {"a": 1}}, CheckpointCorruptError),
        ({"metadata": {}}, CheckpointFormatError),
        ('{"weight_map": {"a": "x.safetensors", "a": "x.safetensors"}}', CheckpointCorruptError),
        ('{"metadata": ' + "[" * 100_000 + ', "weight_map": {}}', CheckpointCorruptError),
        ({"other": 1}, CheckpointFormatError),
    ],
)
def test_a_hostile_index_is_a_documented_error(tmp_path: Path, index: Any, error: type[Exception]) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    (tmp_path / "i.json").write_text(index if isinstance(index, str) else json.dumps(index))
    for verb in (torchferry.load, torchferry.inspect, torchferry.verify):
        with pytest.raises(error):
            verb(tmp_path / "i.json")


# Hostile headers


def stored(header: Any, data: bytes = b"\0" * 8, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HOSTILE = {
    "longer than the file": stored({"a": entry()}, length=1 << 20),
    "longer than any": stored({"a": entry()}, length=(1 << 32) - 1),
    "2**63 long": stored({"a": entry()}, length=1 << 63),
    "no length": b"\x02\0\0\0\0\0\0\0{",
    "beyond the end": stored({"a": entry(shape=[4], offsets=[0, 16])}),
    "backwards": stored({"a": entry(offsets=[8, 0])}),
    "negative": stored({"a": entry(offsets=[-8, 0])}),
    "overlap": stored({"a": entry(), "b": entry(offsets=[4, 12])}, b"\0" * 12),
    "the same bytes": stored({"a": entry(), "b": entry()}),
    "a gap": stored({"a": entry(), "b": entry(offsets=[12, 20])}, b"\0" * 20),
    "bytes left": stored({"a": entry()}, b"\0" * 9),
    "shape of other bytes": stored({"a": entry(shape=[3])}),
    "overflowing shape": stored({"a": entry(shape=[1 << 62, 1 << 62, 4])}),
    "shape beyond 64 bits": stored({"a": entry(shape=[1 << 63, 0], offsets=[0, 0])}, b""),
    "shape that overflows to nothing": stored({"a": entry(shape=[1 << 62, 1 << 62, 0], offsets=[0, 0])}, b""),
    "negative shape": stored({"a": entry(shape=[-1, -2])}),
    "many dimensions": stored({"a": entry(shape=[1] * 100_000 + [2])}),
    "real numbers": stored({"a": entry(shape=[2.0])}),
    "huge integer": stored(b'{"a":{"dtype":"F32","shape":[' + b"9" * 100_000 + b'],"data_offsets":[0,8]}}'),
    "unknown dtype": stored({"a": entry(dtype="F7")}),
    "dtype of no text": stored({"a": entry(dtype=7)}),
    "three offsets": stored({"a": entry(offsets=[0, 4, 8])}),
    "no shape": stored({"a": {"dtype": "F32", "data_offsets": [0, 8]}}),
    "a name twice": stored(b'{"a":' + json.dumps(entry()).encode() + b',"a":' + json.dumps(entry()).encode() + b"}"),
    "a field twice": stored(b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}'),
    "metadata twice": stored(b'{"__metadata__":null,"__metadata__":{},"a":' + json.dumps(entry()).encode() + b"}"),
    "metadata of numbers": stored({"__metadata__": {"a": 1}, "a": entry()}),
    "nested deep": stored(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "an array": stored(b"{" + b"[]," * 100_000 + b"}"),
    "not UTF-8": stored(b'{"\xff":1}'),
    "more after it": stored(json.dumps({"a": entry()}).encode() + b"{}"),
    "unfinished": stored(b'{"a":{"dtype":"F32"'),
    "half an escape": stored(b'{"\\u12":1}'),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_a_documented_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "x").write_bytes(HOSTILE[name])
    for verb in (torchferry.load, torchferry.inspect, torchferry.verify):
        with pytest.raises(CheckpointFormatError):
            verb(tmp_path / "x")


@pytest.mark.parametrize(
    "content",
    [
        stored({"__metadata__": None, "a": entry()}),
        stored({"a": {**entry(), "more": {"than": [1, None, {"that": 1e5}]}}}),
        stored(b" \t\r\n" + json.dumps({"a": entry()}).encode() + b"  "),
        stored({"a": entry(), "b": entry(shape=[(1 << 62), 0], offsets=[8, 8])}),
    ],
    ids=["no metadata", "another field", "space before", "a large shape of nothing"],
)
def test_what_the_library_reads_is_read(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    assert [*load_file(tmp_path / "x.safetensors")] == [*torchferry.load(tmp_path / "x.safetensors")]
    torchferry.verify(tmp_path / "x.safetensors")
    torchferry.convert(tmp_path / "x.safetensors", tmp_path / "x.pt")


def test_a_dtype_that_is_not_known_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(stored({"a": entry(dtype="F4", shape=[16])}))
    with pytest.raises(CheckpointFormatError, match="'F4', which torchferry does not know"):
        torchferry.load(tmp_path / "x.safetensors")


def test_hostile_headers_take_no_64_mib_beside_their_size(tmp_path: Path) -> None:
    bodies = (b"{" + b'"a":{"shape":[],' * 500_000, b'{"__metadata__":{' + b'"":"",' * 1_000_000, b'{"a":[' * 1_000_000)
    for number, body in enumerate((b"{}", *bodies)):
        (tmp_path / f"{number}").write_bytes(stored(body, b""))
    code = f"""
import torchferry
for number in range(4):
    if number == 1: begin()
    try: torchferry.load({str(tmp_path)!r} + f"/{{number}}")
    except torchferry.CheckpointFormatError: assert number
end()
"""
    assert peak_of_python(code) - 8_000_000 < 64 << 20


@pytest.mark.parametrize("seed", range(4))
def test_mutants_are_right_or_documented_errors(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    data = save({"a": torch.arange(3.0), "b": torch.arange(4), "c": torch.ones(2, 2)}, metadata={"x": "y"})
    length = int.from_bytes(data[:8], "little") + 8
    for _ in range(100):
        mutant = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            mutant[rng.randrange(length)] = rng.randrange(256)
        (tmp_path / "x").write_bytes(mutant)
        with suppress(torchferry.TorchferryError):
            torchferry.load(tmp_path / "x")
