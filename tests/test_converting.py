"""``convert``: from torch.save to safetensors and back; copies of safetensors."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.callbacks import Callback
from safetensors.torch import load_file, save_file

import torchferry
from torchferry.engine.types import Chunk
from torchferry.errors import (
    CheckpointCorruptError,
    CheckpointFormatError,
    CheckpointKeyError,
    CheckpointValueError,
    TorchferryError,
)
from torchferry.formats.item_stream import memory_of
from torchferry.formats.lazy import LazyTensors


def state() -> dict[str, torch.Tensor]:
    """Tensors above and below 1 MiB, of several dtypes, a part of a storage, and one that is not contiguous."""
    rows = torch.rand(4, 1000)
    return {
        "large": torch.rand(700_000),
        **{f"small.{i}": torch.full((100,), i, dtype=torch.int16) for i in range(200)},
        "half": torch.rand(500).half(),
        "row": rows[1],
        "turned": torch.rand(300, 200).T,
        "none": torch.empty(0, 2),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "second": torch.rand(600_000),
    }


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype for name in first
    )


def test_a_checkpoint_of_torch_becomes_safetensors_and_back(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "x.pt")
    original = torch.load(tmp_path / "x.pt")
    torchferry.convert(tmp_path / "x.pt", tmp_path / "x.safetensors")
    assert same(load_file(tmp_path / "x.safetensors"), original)
    torchferry.convert(tmp_path / "x.safetensors", tmp_path / "y.pt")
    assert same(torch.load(tmp_path / "y.pt"), original)
    torchferry.verify(tmp_path / "y.pt")


def test_what_is_converted_to_torch_is_byte_for_byte_what_torch_saves(tmp_path: Path) -> None:
    tensors = {"a": torch.rand(700_000), "b": torch.arange(5), "c": torch.rand(400_000, 2)}
    save_file(tensors, tmp_path / "x.safetensors")
    torchferry.convert(tmp_path / "x.safetensors", tmp_path / "x.pt")
    ordered = {tensor.key: tensors[tensor.key] for tensor in torchferry.inspect(tmp_path / "x.safetensors").tensors}
    torchferry.save(ordered, tmp_path / "y.pt")
    assert (tmp_path / "x.pt").read_bytes() == (tmp_path / "y.pt").read_bytes()


def test_a_part_is_converted_and_a_prefix_taken_off(tmp_path: Path) -> None:
    torch.save({"model": {"a.weight": torch.ones(3), "a.bias": torch.ones(1)}, "epoch": 1}, tmp_path / "x.pt")
    with pytest.raises(CheckpointValueError, match="also has 'epoch': choose with keys="):
        torchferry.convert(tmp_path / "x.pt", tmp_path / "x.safetensors")
    torchferry.convert(tmp_path / "x.pt", tmp_path / "x.safetensors", keys="model", strip_prefix="model.a.")
    assert sorted(load_file(tmp_path / "x.safetensors")) == ["bias", "weight"]
    torchferry.convert(tmp_path / "x.safetensors", tmp_path / "y.pt", exclude="bias")
    assert sorted(torch.load(tmp_path / "y.pt")) == ["weight"]


def test_shards_are_made_and_joined(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "x.pt")
    torchferry.convert(tmp_path / "x.pt", tmp_path / "m.safetensors", max_shard_size=2 << 20)
    assert len(list(tmp_path.glob("m-*"))) >= 3
    index = tmp_path / "m.safetensors.index.json"
    assert same(torchferry.load(index), torch.load(tmp_path / "x.pt"))
    torchferry.convert(index, tmp_path / "y.pt")
    assert same(torch.load(tmp_path / "y.pt"), torch.load(tmp_path / "x.pt"))


def test_what_safetensors_cannot_hold_is_refused_with_what_to_do(tmp_path: Path) -> None:
    tied = torch.ones(5)
    torch.save({"a": tied, "b": tied}, tmp_path / "x.pt")
    with pytest.raises(CheckpointValueError, match="exclude='b'"):
        torchferry.convert(tmp_path / "x.pt", tmp_path / "x.safetensors")
    torchferry.convert(tmp_path / "x.pt", tmp_path / "x.safetensors", exclude="b")
    with pytest.raises(CheckpointFormatError, match="already"):
        torchferry.convert(tmp_path / "x.safetensors", tmp_path / "y", format="safetensors")
    torch.save({"a": torch.eye(3).to_sparse()}, tmp_path / "x.pt")
    with pytest.raises(CheckpointValueError, match="also has 'a'"):
        torchferry.convert(tmp_path / "x.pt", tmp_path / "y.safetensors")


def test_conjugated_and_negated_tensors_are_stored_by_their_values(tmp_path: Path) -> None:
    """Contiguous ones, too: their memory is that of other values."""
    numbers = torch.complex(torch.arange(4.0), torch.arange(4.0, 8.0))
    tensors = {"conj": numbers.conj(), "turned": numbers.clone().reshape(2, 2).mH}
    tensors["negated"] = torch._neg_view(torch.arange(3.0))  # there is no public way to one that is contiguous
    torch.save(tensors, tmp_path / "x.pt")
    torchferry.convert(tmp_path / "x.pt", tmp_path / "x.safetensors")
    assert same(load_file(tmp_path / "x.safetensors"), tensors)


def test_memory_that_is_not_a_tensors_values_is_never_read() -> None:
    for tensor in (torch.ones(2, dtype=torch.complex64).conj(), torch._neg_view(torch.ones(2))):
        with pytest.raises(ValueError, match="not its values"):
            memory_of(tensor)


def test_tensors_that_are_not_contiguous_are_converted_from_any_container(tmp_path: Path) -> None:
    first, second, third = (torch.rand(2, 3).T for _ in range(3))
    torch.save({"layers": [first, second], "by": {0: third, None: torch.rand(2, 3).T}}, tmp_path / "x.pt")
    torchferry.convert(tmp_path / "x.pt", tmp_path / "x.safetensors")
    stored = load_file(tmp_path / "x.safetensors")
    assert sorted(stored) == ["by.0", "by.NoneType", "layers.0", "layers.1"]
    assert all(torch.equal(stored[name], value) for name, value in (("layers.1", second), ("by.0", third)))


@pytest.mark.parametrize(
    "state",
    [
        {"a.b": torch.zeros(2), "a": {"b": torch.ones(2)}},
        {1: torch.zeros(2), "1": torch.ones(2)},
        {(0, 1): torch.zeros(2), (0, 2): torch.ones(2)},
    ],
    ids=["a.b", "1", "tuple"],
)
@pytest.mark.parametrize("target", ["y.safetensors", "sharded/"])
def test_two_values_of_one_name_are_refused(tmp_path: Path, state: Any, target: str) -> None:
    torch.save(state, tmp_path / "x.pt")
    if target == "sharded/" and (0, 1) in state:
        torchferry.convert(tmp_path / "x.pt", tmp_path / "sharded", format="sharded")
        assert [*torchferry.load(tmp_path / "sharded")] == [*state]  # there they have other names
        return
    with pytest.raises(
        TorchferryError, match=r"'?(a\.b|1|tuple)'?.* names|two values that are called '(a\.b|1|tuple)'"
    ):
        torchferry.convert(tmp_path / "x.pt", f"{tmp_path}/{target}")
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


@pytest.mark.parametrize("crc32s", ["streamed", "computed"])
def test_two_tensors_that_would_have_one_name_are_refused_before_anything_is_written(
    tmp_path: Path, crc32s: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if crc32s == "computed":  # as by a torch that does it itself
        monkeypatch.setattr("torchferry.converting.fills_crc32s", lambda: False)
    save_file({"model.w": torch.ones(4), "w": torch.zeros(4)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointValueError, match="two values would be called 'w'"):
        torchferry.convert(tmp_path / "x.safetensors", tmp_path / "x.pt", strip_prefix="model.")
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_untouched_memory_is_never_taken_for_a_tensors() -> None:
    lazy = LazyTensors([("a", torch.float32, (4,)), ("b", torch.float32, (4,))])
    addresses = [lazy.tensors[name].data_ptr() for name in "ab"]

    async def nothing() -> AsyncIterator[Chunk]:
        return
        yield Chunk(b"")

    take = lazy.reading(nothing())
    outside = torch.ones(4)
    assert take(outside.data_ptr(), 16) is None
    for address, nbytes in ((addresses[1], 16), (addresses[0] + 4, 12)):
        with pytest.raises(RuntimeError, match="in another order, or in pieces"):
            lazy.reading(nothing())(address, nbytes)
    assert take(addresses[0], 16) is not None
    assert lazy.left == 1


def test_a_key_that_takes_nothing_is_named_with_those_that_would(tmp_path: Path) -> None:
    save_file({"model.w": torch.ones(4)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointKeyError, match=r"has no key 'nope'; its keys are 'model\.w'"):
        torchferry.convert(tmp_path / "x.safetensors", tmp_path / "x.pt", keys="nope")


def test_a_name_that_is_no_text_is_refused_by_its_name(tmp_path: Path) -> None:
    state = {"\ud800": torch.ones(2)}
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(CheckpointValueError, match=r"\\ud800.*rename it"):
        torchferry.save(state, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointValueError, match=r"\\ud800.*rename it"):
        torchferry.convert(tmp_path / "x.pt", tmp_path / "x.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


def test_damage_is_found_before_anything_appears(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1 << 20)}, tmp_path / "x.pt")
    data = bytearray((tmp_path / "x.pt").read_bytes())
    data[2 << 20] ^= 1
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(CheckpointCorruptError, match="data/0"):
        torchferry.convert(tmp_path / "x.pt", tmp_path / "x.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


def test_a_conversion_in_the_store_tells_its_progress(s3_url: str, s3_storage_options: dict[str, Any]) -> None:
    options = {"source_storage_options": s3_storage_options, "target_storage_options": s3_storage_options}
    tensors = {f"w{i}": torch.rand(1 << 20) for i in range(6)}
    torchferry.save(tensors, f"{s3_url}/x.safetensors", storage_options=s3_storage_options)
    callback = Callback()
    stat = torchferry.convert(f"{s3_url}/x.safetensors", f"{s3_url}/x.pt", callback=callback, **options)
    assert callback.value == callback.size == stat.size
    torchferry.convert(f"{s3_url}/x.pt", f"{s3_url}/y.safetensors", **options)
    assert same(torchferry.load(f"{s3_url}/y.safetensors", storage_options=s3_storage_options), tensors)
    torchferry.copy(f"{s3_url}/y.safetensors", f"{s3_url}/z", **options)
    state = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    assert torchferry.load(f"{s3_url}/z", into=state, storage_options=s3_storage_options) == ([], [])
    assert same(state, tensors)


def test_safetensors_and_their_shards_are_copied(tmp_path: Path) -> None:
    tensors = {f"w{i}": torch.rand(1 << 18) for i in range(4)}
    torchferry.save(tensors, tmp_path / "m.safetensors", max_shard_size=2 << 20)
    copies = tmp_path / "copy"
    copies.mkdir()
    torchferry.copy(tmp_path / "m.safetensors.index.json", copies / "m.safetensors.index.json")
    assert same(torchferry.load(copies / "m.safetensors.index.json"), tensors)
    names = {path.name for path in copies.iterdir()}
    assert names == {path.name for path in tmp_path.iterdir()} - {"copy"}
    torchferry.copy(tmp_path / "m.safetensors.index.json", copies / "m.safetensors.index.json")
    assert same(torchferry.load(copies / "m.safetensors.index.json"), tensors)
    assert len(list(copies.iterdir())) == 3
    torchferry.copy(tmp_path / "m-00001-of-00002.safetensors", copies / "one")
    assert (copies / "one").read_bytes() == (tmp_path / "m-00001-of-00002.safetensors").read_bytes()
    (copies / "one").write_bytes((copies / "one").read_bytes()[:-1])
    with pytest.raises(CheckpointCorruptError):
        torchferry.copy(copies / "one", copies / "two")


def test_a_conversion_takes_little_memory(tmp_path: Path) -> None:
    from torchferry.testing.peak import peak_of_python

    torch.save({f"w{i}": torch.zeros(16 << 20) for i in range(5)}, tmp_path / "x.pt")
    torch.save({"w": torch.zeros(1 << 20)}, tmp_path / "small.pt")
    code = f"""
import torchferry
from pathlib import Path
here = Path({str(tmp_path)!r})
torchferry.convert(here / "small.pt", here / "small.safetensors")
torchferry.convert(here / "small.safetensors", here / "small2.pt")
begin()
torchferry.convert(here / "x.pt", here / "x.safetensors")
torchferry.convert(here / "x.safetensors", here / "y.pt")
end()
"""
    assert peak_of_python(code) < 150 << 20  # of 320
