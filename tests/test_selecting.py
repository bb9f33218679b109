"""``keys=`` and ``exclude=``: which values a load takes, how they are nested, and what is read for them."""

from __future__ import annotations

import collections
import gc
import io
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import torchferry
from torchferry.errors import CheckpointCorruptError, CheckpointKeyError, TorchferryError, UnsafeCheckpointError
from torchferry.formats.graph import read_graph
from torchferry.formats.repickle import repickle

if TYPE_CHECKING:
    from conftest import CountingStore  # type: ignore[attr-defined]


class Refused:
    """What ``weights_only`` refuses."""


def model(width: int = 8) -> torch.nn.Module:
    encoder = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.Linear(width, width))
    return torch.nn.ModuleDict({"encoder": encoder, "decoder": torch.nn.Linear(width, width)})


def checkpoint(width: int = 8) -> dict[str, Any]:
    module = model(width)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.5)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return {"model": module.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 7, "sizes": [1, (2, 3)]}


def names(value: Any, name: str = "") -> list[str]:
    if not isinstance(value, dict):
        return [name]
    return [found for key, item in value.items() for found in names(item, f"{name}.{key}" if name else str(key))]


WEIGHTS = ["model.encoder.0.weight", "model.encoder.1.weight", "model.decoder.weight"]


@pytest.mark.parametrize(
    ("keys", "exclude", "expected"),
    [
        ("epoch", None, ["epoch"]),
        ("model.encoder.0.weight", None, ["model.encoder.0.weight"]),
        (["model.encoder"], "model.encoder.1", ["model.encoder.0.weight", "model.encoder.0.bias"]),
        ("model.*.weight", None, WEIGHTS),
        ("model.encoder.?", "*.bias", WEIGHTS[:2]),
        (lambda name: name.endswith("coder.weight") or name == "epoch", None, ["model.decoder.weight", "epoch"]),
        (["optimizer.state.0.exp_avg"], None, ["optimizer.state.0.exp_avg"]),
        (["optimizer.param_groups.0.lr", "sizes.1.0"], None, ["optimizer.param_groups.0.lr", "sizes.1.0"]),
        (None, ["optimizer", lambda _name: False][:1], [*WEIGHTS, "epoch", "sizes"]),
        (["model", "model.decoder.weight"], lambda name: "bias" in name, WEIGHTS),
    ],
)
def test_keys_take_names_at_any_depth_prefixes_globs_and_functions(
    tmp_path: Path, keys: Any, exclude: Any, expected: list[str]
) -> None:
    original = checkpoint()
    torch.save(original, tmp_path / "x.pt")
    loaded = torchferry.load(tmp_path / "x.pt", keys=keys, exclude=exclude)
    found = [name for name in names(loaded) if not name.endswith("bias") or any("bias" in name for name in expected)]
    assert sorted(found) == sorted(expected)
    for name in found:
        ours, theirs = _at(loaded, name), _at(original, name)
        assert torch.equal(ours, theirs) if isinstance(theirs, torch.Tensor) else ours == theirs


def _at(value: Any, name: str) -> Any:
    """The value of a name; keys of dicts may contain dots."""
    if not name:
        return value
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        if name == str(key):
            return item
        if name.startswith(f"{key}.") and (isinstance(item, dict | list | tuple)):
            return _at(item, name[len(str(key)) + 1 :])
    raise KeyError(name)


def test_what_is_taken_as_a_whole_keeps_its_type_and_what_it_shares(tmp_path: Path) -> None:
    shared = torch.arange(3.0)
    state = collections.OrderedDict(weight=torch.nn.Parameter(shared), tied=shared)
    state._metadata = {"": {"version": 2}}  # type: ignore[attr-defined]
    original = {"model": {"state": state, "list": [1, (2.5, None, b"x", 1 << 70)], "other": torch.ones(3)}, "rest": 1}
    torch.save(original, tmp_path / "x.pt")
    part = torchferry.load(tmp_path / "x.pt", keys=["model.state", "model.list"])["model"]
    assert list(part) == ["state", "list"]
    assert part["list"] == original["model"]["list"]
    assert type(part["state"]) is collections.OrderedDict
    assert part["state"]._metadata == {"": {"version": 2}}
    assert type(part["state"]["weight"]) is torch.nn.Parameter
    assert part["state"]["weight"].data_ptr() == part["state"]["tied"].data_ptr()


def test_only_the_needed_bytes_are_read(counting_store: CountingStore) -> None:
    url = counting_store.put(checkpoint(1024))
    loaded = torchferry.load(url, keys="model.encoder.1.weight")
    assert list(loaded["model"]) == ["encoder.1.weight"]
    assert counting_store.nbytes < (4 << 20) + 0.03 * len(counting_store.objects["x"])


def test_what_weights_only_refuses_elsewhere_does_not_matter(tmp_path: Path) -> None:
    torch.save({"model": {"weight": torch.ones(3)}, "config": Refused(), "path": Path("x")}, tmp_path / "x.pt")
    assert torchferry.load(tmp_path / "x.pt", keys="model")["model"]["weight"].tolist() == [1, 1, 1]
    assert list(torchferry.load(tmp_path / "x.pt", exclude=["config", "path"])) == ["model"]
    for keys in ("config", "*"):
        with pytest.raises(UnsafeCheckpointError, match="Refused"):
            torchferry.load(tmp_path / "x.pt", keys=keys)
    assert type(torchferry.load(tmp_path / "x.pt", keys="config", weights_only=False)["config"]) is Refused


def test_a_tuple_that_holds_itself_is_taken_as_it_is(tmp_path: Path) -> None:
    inner: list[Any] = []
    inner.append((inner,))
    original = {"part": {"t": inner[0], "name": "fresh", "again": inner[0], "last": "x"}, "w": torch.ones(2)}
    torch.save(original, tmp_path / "x.pt")
    part = torchferry.load(tmp_path / "x.pt", keys="part", weights_only=False)["part"]
    assert part["again"] is part["t"]
    assert part["t"][0][0] is part["t"]
    assert (part["name"], part["last"]) == ("fresh", "x")


def test_the_weights_of_a_pickled_module_load_without_its_class(tmp_path: Path) -> None:
    torch.save({"module": model()}, tmp_path / "x.pt")
    names = [tensor.key for tensor in torchferry.inspect(tmp_path / "x.pt").tensors]
    weight = next(name for name in names if name.endswith("decoder._parameters.weight"))
    loaded = torchferry.load(tmp_path / "x.pt", keys=weight)
    while isinstance(loaded, dict):
        (loaded,) = loaded.values()
    assert loaded.shape == (8, 8)


def test_every_name_that_inspect_prints_is_a_key(tmp_path: Path) -> None:
    original = {
        **checkpoint(),
        "sparse": torch.eye(3).to_sparse(),
        "pair": (torch.ones(1), [torch.zeros(2)]),
        5: {6: torch.ones(2)},
    }
    torch.save(original, tmp_path / "x.pt")
    for tensor in torchferry.inspect(tmp_path / "x.pt").tensors:
        loaded = torchferry.load(tmp_path / "x.pt", keys=[tensor.key])
        assert tensor.key.startswith(*names(loaded))  # a list that is taken as a whole is a list


def test_a_key_that_takes_nothing_names_one_that_would(tmp_path: Path) -> None:
    torch.save(checkpoint(), tmp_path / "x.pt")
    with pytest.raises(CheckpointKeyError, match=r"no key 'modle'.*Did you mean 'model'"):
        torchferry.load(tmp_path / "x.pt", keys=["epoch", "modle"])
    with pytest.raises(CheckpointKeyError, match=r"no key 'model\.\*\.nothing'"):
        torchferry.load(tmp_path / "x.pt", keys=["model.*.nothing"])


@pytest.mark.parametrize(
    "choice",
    [
        {"keys": ["model.encoder.0", "epoch"], "exclude": "*.bias"},
        {"keys": "sizes.1.0"},
        {"keys": "sizes.*"},
        {"exclude": "sizes.0"},
        {"exclude": "model.decoder"},
        {"keys": lambda name: name in {"sizes.0", "model.decoder.bias"}},
    ],
)
def test_the_legacy_format_is_taken_apart_as_the_zip_format_is(tmp_path: Path, choice: dict[str, Any]) -> None:
    original = checkpoint()
    torch.save(original, tmp_path / "x.pt")
    torch.save(original, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    ours = torchferry.load(tmp_path / "old.pt", **choice)
    theirs = torchferry.load(tmp_path / "x.pt", **choice)
    assert repr(ours) == repr(theirs)  # with the classes of dicts
    if "model" in ours:
        assert ours["model"]._metadata == theirs["model"]._metadata == original["model"]._metadata


def _recurses(name: str) -> bool:
    return _recurses(name)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("argument", ["keys", "exclude"])
@pytest.mark.parametrize(("function", "error"), [(int, ValueError), (_recurses, RecursionError)])
def test_an_error_of_the_users_function_is_no_damage(
    tmp_path: Path, function: Any, error: type[Exception], argument: str, legacy: bool
) -> None:
    torch.save(checkpoint(), tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(error) as raised:
        torchferry.load(tmp_path / "x.pt", **{argument: function})
    assert not isinstance(raised.value, TorchferryError)


def test_an_error_of_the_users_function_makes_restore_take_no_older_step(tmp_path: Path) -> None:
    with torchferry.CheckpointManager(tmp_path, max_to_keep=3) as manager:
        for step in (1, 2, 3):
            manager.save(step, {"model": {"layer.0": torch.ones(2)}})
        manager.wait_until_finished()
        with pytest.raises(ValueError, match="invalid literal"):
            manager.restore(keys=int)
        assert manager.all_steps() == [1, 2, 3]


@pytest.mark.parametrize("map_location", ["meta", None])
def test_a_selection_to_the_meta_device_reads_no_storage(counting_store: CountingStore, map_location: Any) -> None:
    url = counting_store.put({"model": {"a": torch.ones(1 << 20), "b": torch.ones(1 << 20)}})
    loaded = torchferry.load(url, keys=["model.b"], map_location=map_location)
    assert loaded["model"]["b"].shape == (1 << 20,)
    assert loaded["model"]["b"].is_meta == (map_location == "meta")
    assert (counting_store.nbytes < 300_000) == (map_location == "meta")


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_a_small_selection_lies_in_memory_of_its_own(tmp_path: Path) -> None:
    torch.save({"big": torch.ones(16 << 20), "bias": torch.ones(8)}, tmp_path / "x.pt")
    bias = torchferry.load(tmp_path / "x.pt", keys="bias")["bias"]
    assert bias.untyped_storage().nbytes() == 32
    with open("/proc/self/maps") as maps:  # noqa: PTH123 - /proc
        ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in maps]
    mapping = next(stop - start for start, stop in ranges if start <= bias.data_ptr() < stop)
    assert mapping < 64 << 20


def test_one_tensor_of_a_whole_load_does_not_keep_the_memory_of_the_others(tmp_path: Path) -> None:
    torch.save({"big": torch.ones(32 << 20), "bias": torch.ones(8)}, tmp_path / "x.pt")
    loaded = torchferry.load(tmp_path / "x.pt")
    bias = loaded["bias"]
    gc.collect()
    before = resident()
    del loaded
    assert before - resident() > 120 << 20
    assert bias.tolist() == [1] * 8


def test_a_part_is_pickled_as_torch_would(tmp_path: Path) -> None:
    """What torch makes of the part's pickle is what it makes of the part of the whole."""
    original = checkpoint()
    file = io.BytesIO()
    torch.save(original, file)
    torch.save(original, tmp_path / "x.pt")
    loaded = torchferry.load(tmp_path / "x.pt", keys="*")
    again, whole = io.BytesIO(), io.BytesIO()
    torch.save(loaded, again)
    torch.save(torch.load(tmp_path / "x.pt"), whole)
    assert again.getvalue() == whole.getvalue()


@pytest.mark.parametrize(
    "value",
    [
        *(True, None, 255, 65535, -1, 1 << 31, -(1 << 63), 1.5, "é", "", (), (1,), (1, 2, 3, 4)),
        *([1] * 2500, {1: [2]}, b"\xff\0", b"", {1, 2}, 1j, bytearray(b"x")),
    ],
)
def test_plain_values_are_pickled_as_they_are(value: Any) -> None:
    pickled = repickle(read_graph(pickle.dumps([value, value], protocol=2), "test://x").root).pickled
    first, second = pickle.loads(pickled)
    assert (first, type(first)) == (value, type(value))
    assert first is second or not isinstance(value, list | dict | set | bytearray)


def test_a_hostile_pickle_of_very_many_names_is_refused(tmp_path: Path) -> None:
    """Thirty dicts, each of which holds the next one twice, have a thousand million names."""
    inner: dict[str, Any] = {"t": torch.ones(1)}
    for _ in range(30):
        inner = {"a": inner, "b": inner}
    torch.save({"x": inner, "y": 1}, tmp_path / "x.pt")
    with pytest.raises(CheckpointCorruptError, match="more names"):
        torchferry.load(tmp_path / "x.pt", keys="*.t")
    assert torchferry.load(tmp_path / "x.pt", keys="y") == {"y": 1}


def test_a_hostile_pickle_that_is_nested_very_deep_is_refused(tmp_path: Path) -> None:
    value: Any = torch.ones(1)
    for _ in range(450):  # torch.save takes them
        value = [value]
    torch.save({"x": value, "y": 1}, tmp_path / "x.pt")
    with pytest.raises(CheckpointCorruptError, match="nested"):
        torchferry.load(tmp_path / "x.pt", keys="*.0.w")
    assert torchferry.load(tmp_path / "x.pt", keys="y") == {"y": 1}


def test_the_empty_key_takes_nothing_else_and_one_key_may_be_given_in_two_ways(tmp_path: Path) -> None:
    torch.save({".y": 1, "model": {"a": 2}}, tmp_path / "x.pt")
    for key in ("", "."):
        with pytest.raises(CheckpointKeyError, match="no key"):
            torchferry.load(tmp_path / "x.pt", keys=key)
    assert torchferry.load(tmp_path / "x.pt", keys=["model", "model."]) == {"model": {"a": 2}}
    assert torchferry.load(tmp_path / "x.pt", keys={"model", ".y"}) == {".y": 1, "model": {"a": 2}}


@pytest.mark.parametrize(
    "choice",
    [
        *({"keys": "l.1"}, {"exclude": "l.0"}, {"keys": "l"}, {"keys": "l.*"}, {"exclude": "m.1.b"}),
        *({"keys": ["m.0", "m.1.b"]}, {"keys": "m.1"}, {"keys": lambda name: name == "m.1.a"}, {"exclude": "t"}),
    ],
)
def test_of_a_list_in_a_sharded_checkpoint_remains_a_dict_by_index(tmp_path: Path, choice: dict[str, Any]) -> None:
    inner = [torch.ones(1), {"a": torch.ones(2), "b": torch.zeros(3)}]
    torch.save({"l": [torch.ones(1), torch.ones(2)], "m": inner, "t": torch.ones(1)}, tmp_path / "x.pt")
    torchferry.convert(tmp_path / "x.pt", f"{tmp_path / 'x'}/")
    assert repr(torchferry.load(tmp_path / "x", **choice)) == repr(torchferry.load(tmp_path / "x.pt", **choice))


@pytest.mark.parametrize("kind", ["torch", "safetensors", "sharded"])
def test_a_function_for_keys_may_call_torchferry(tmp_path: Path, kind: str) -> None:
    torchferry.save({"a": torch.ones(1), "b": torch.ones(2)}, tmp_path / "x.pt")
    url = {"torch": "x.pt", "safetensors": "x.safetensors", "sharded": "x/"}[kind]
    if kind != "torch":
        torchferry.convert(tmp_path / "x.pt", f"{tmp_path}/{url}")

    def is_short(name: str) -> bool:
        return {tensor.key: tensor.nbytes for tensor in torchferry.inspect(tmp_path / "x.pt").tensors}[name] == 4

    assert list(torchferry.load(f"{tmp_path}/{url}", keys=is_short)) == ["a"]
    if kind == "sharded":
        torchferry.convert(f"{tmp_path}/{url}", tmp_path / "y.pt", keys=is_short)
        assert list(torchferry.load(tmp_path / "y.pt")) == ["a"]
