"""``load(into=...)``: tensors that exist are filled, in their own memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import torchferry
from torchferry.errors import CheckpointCorruptError, CheckpointFormatError, CheckpointMismatchError

if TYPE_CHECKING:
    from conftest import CountingStore  # type: ignore[attr-defined]


def net(width: int = 600) -> nn.Module:
    """Its weights have more than 1 MiB, so that they are filled in place; its biases have less."""
    return nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.Linear(width, width))


@pytest.fixture(params=["torch", "safetensors", "legacy"])
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, nn.Module]:
    """A stored state dict, and the module that it is of."""
    module = net()
    path = tmp_path / "x"
    if request.param == "safetensors":
        save_file(module.state_dict(), path)
    else:
        torch.save(module.state_dict(), path, _use_new_zipfile_serialization=request.param == "torch")
    return str(path), module


def equal(first: nn.Module, second: nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_module_is_filled_in_its_own_memory(stored: tuple[str, nn.Module]) -> None:
    url, original = stored
    module = net()
    weight = module[0].weight
    address, version = weight.data_ptr(), weight._version
    assert torchferry.load(url, into=module) == ([], [])
    assert equal(module, original)
    assert module[0].weight is weight
    assert weight.data_ptr() == address
    assert weight.requires_grad
    assert weight._version > version


def test_a_state_dict_is_filled_and_tensors_of_another_dtype_are_converted(stored: tuple[str, nn.Module]) -> None:
    url, original = stored
    state = {name: torch.zeros_like(tensor) for name, tensor in original.state_dict().items()}
    state["0.weight"] = state["0.weight"].double()
    state["2.weight"] = torch.zeros(600, 1200)[:, ::2]  # not contiguous
    views = dict(state)
    assert torchferry.load(url, into=state) == ([], [])
    assert all(state[name] is views[name] for name in state)
    assert all(torch.equal(state[name].float(), tensor.float()) for name, tensor in original.state_dict().items())


@pytest.mark.parametrize("like", ["double", "turned"])
def test_tensors_at_the_same_offset_of_two_files_are_two(tmp_path: Path, like: str) -> None:
    state = {"a": torch.rand(600, 600), "b": torch.rand(600, 600)}
    torchferry.save(state, tmp_path / "x.safetensors", max_shard_size=2_000_000)
    into = {"a": torch.zeros(600, 600), "b": torch.zeros(600, 600)}
    into["b"] = into["b"].double() if like == "double" else into["b"].T
    torchferry.load(tmp_path / "x.safetensors.index.json", into=into)
    assert torch.equal(into["a"], state["a"])
    assert torch.equal(into["b"].float(), state["b"])


def test_two_tensors_of_the_same_bytes_are_filled_each_in_its_own_way(tmp_path: Path) -> None:
    matrix = torch.rand(600, 600)
    numbers = torch.randint(0, 120, (2 << 20,), dtype=torch.uint8).view(torch.float8_e4m3fn)
    state = {
        "matrix": matrix, "flat": matrix.view(-1), "again": matrix,
        "e4m3": numbers, "e5m2": numbers.view(torch.float8_e5m2),
    }  # fmt: skip
    torch.save(state, tmp_path / "x.pt")
    into = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    torchferry.load(tmp_path / "x.pt", into=into)
    for name, tensor in state.items():
        assert torch.equal(into[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_tensors_made_in_inference_mode_are_filled(stored: tuple[str, nn.Module]) -> None:
    url, original = stored
    with torch.inference_mode():
        module = net()
        assert torchferry.load(url, into=module) == ([], [])
    assert equal(module, original)


def test_a_module_on_the_meta_device_is_assigned(stored: tuple[str, nn.Module]) -> None:
    url, original = stored
    with torch.device("meta"):
        module = net()
    assert torchferry.load(url, into=module) == ([], [])
    assert equal(module, original)
    assert isinstance(module[0].weight, nn.Parameter)
    state = {"0.weight": torch.empty(600, 600, device="meta")}
    torchferry.load(url, into=state, strict=False)
    assert torch.equal(state["0.weight"], original.state_dict()["0.weight"])


def test_names_that_do_not_match_are_reported_as_load_state_dict_does(stored: tuple[str, nn.Module]) -> None:
    url, original = stored
    module = nn.Sequential(nn.Linear(600, 600), nn.BatchNorm1d(600), nn.Identity(), nn.Linear(600, 600))
    expected = module.load_state_dict(original.state_dict(), strict=False)
    result = torchferry.load(url, into=module, strict=False)
    assert result.missing_keys == expected.missing_keys
    assert sorted(result.unexpected_keys) == sorted(expected.unexpected_keys)
    before = module[0].weight.clone().zero_()
    nn.init.zeros_(module[0].weight)
    with pytest.raises(CheckpointMismatchError, match=r"lacks '3.weight', '3.bias'.*also has '2\."):
        torchferry.load(url, into=module)
    assert torch.equal(module[0].weight, before)  # nothing was read into it


def test_another_shape_is_refused_before_anything_is_read(stored: tuple[str, nn.Module]) -> None:
    url, _ = stored
    for strict in (True, False):
        with pytest.raises(CheckpointMismatchError, match=r"0.weight is 600 x 600 there and 601 x 601 here"):
            torchferry.load(url, into=net(601), strict=strict)


def test_parts_of_a_checkpoint_fill_modules_and_optimizers_state(tmp_path: Path) -> None:
    original = net()
    optimizer = torch.optim.Adam(original.parameters())
    original(torch.ones(2, 600)).sum().backward()
    optimizer.step()
    torch.save({"model": original.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 1}, tmp_path / "x.pt")
    module = net()
    assert torchferry.load(tmp_path / "x.pt", into={"model": module}, keys="model") == ([], [])
    assert equal(module, original)
    with pytest.raises(CheckpointMismatchError, match=r"into=\{'model': ...\} with keys='model'"):
        torchferry.load(tmp_path / "x.pt", into=module)
    state = {"optimizer": {"state": optimizer.state_dict()["state"]}}
    first = state["optimizer"]["state"][0]["exp_avg"]
    expected = first.clone()
    first.zero_()
    assert torchferry.load(tmp_path / "x.pt", into=state, keys="optimizer.state") == ([], [])
    assert torch.equal(optimizer.state_dict()["state"][0]["exp_avg"], expected)


def test_tied_weights_and_views_are_filled_one_after_the_other(tmp_path: Path) -> None:
    big = torch.rand(1 << 20)
    rows = torch.rand(4, 1 << 19)
    original = {"a": big, "b": big, "c": torch.rand(1 << 20), "row": rows[1], "rows": rows}
    torch.save(original, tmp_path / "x.pt")
    saved = torch.load(tmp_path / "x.pt")
    shared = torch.zeros(1 << 20)
    state = {name: torch.zeros_like(tensor) for name, tensor in original.items()}
    state["b"] = torch.zeros(1 << 20, dtype=torch.float64)
    torchferry.load(tmp_path / "x.pt", into=state)
    assert all(torch.equal(state[name].float(), saved[name]) for name in state)
    state = {"a": shared, "c": shared}  # torch lets the last one win
    torchferry.load(tmp_path / "x.pt", into=state, strict=False)
    assert torch.equal(shared, saved["c"])


class Renames(nn.Linear):
    """A module with a say in what it takes from a checkpoint."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        state_dict[f"{prefix}weight"] = state_dict.pop(f"{prefix}old_weight") * 2
        super()._load_from_state_dict(state_dict, prefix, *args)


def test_modules_that_rename_what_they_load_are_given_all_of_it(tmp_path: Path) -> None:
    torch.save({"old_weight": torch.ones(700, 700), "bias": torch.ones(700)}, tmp_path / "x.pt")
    module = Renames(700, 700)
    assert torchferry.load(tmp_path / "x.pt", into=module) == ([], [])
    assert module.weight.eq(2).all()


def test_what_is_damaged_is_found_while_it_is_filled(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1 << 20)}, tmp_path / "x.pt")
    data = bytearray((tmp_path / "x.pt").read_bytes())
    data[2 << 20] ^= 1
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(CheckpointCorruptError, match="data/0"):
        torchferry.load(tmp_path / "x.pt", into={"a": torch.zeros(1 << 20)})


def test_only_what_is_filled_is_read(counting_store: CountingStore) -> None:
    url = counting_store.put({"a": torch.ones(1 << 20), "b": torch.ones(4 << 20)})
    state = {"a": torch.zeros(1 << 20)}
    assert torchferry.load(url, into=state, strict=False).unexpected_keys == ["b"]
    assert state["a"].eq(1).all()
    assert counting_store.nbytes < 5 << 20


def test_filling_takes_no_second_copy(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from torchferry.testing.peak import peak_of_python

    path = tmp_path / "x.pt"
    torch.save({f"w{i}": torch.ones(8 << 20) for i in range(4)}, path)
    code = f"""
import torch, torchferry
state = {{f"w{{i}}": torch.zeros(8 << 20) for i in range(4)}}
for tensor in state.values(): tensor.fill_(2)
torchferry.load({str(path)!r}, into={{"w0": torch.zeros(8 << 20)}}, keys="w0")
begin()
torchferry.load({str(path)!r}, into=state)
end()
assert all(tensor.eq(1).all() for tensor in state.values())
"""
    assert peak_of_python(code) < 16 << 20
    assert not capfd.readouterr().err


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "value", ["text", None, torch.float32, torch.eye(4).to_sparse(), torch.empty(4, device="meta")], ids=str
)
def test_what_cannot_be_copied_into_a_tensor_does_not_fit(value: Any, legacy: bool, tmp_path: Path) -> None:
    torch.save({"a": value}, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    for into in ({"a": torch.zeros(4)}, nn.ParameterDict({"a": torch.zeros(4)})):
        with pytest.raises(CheckpointMismatchError, match=r"x\.pt does not fit into=.*\ba\b"):
            torchferry.load(tmp_path / "x.pt", into=into, strict=False)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("value", "into"),
    [
        (3, torch.zeros(4)),
        (torch.eye(4).to_sparse(), torch.zeros(4, 4)),
        (torch.zeros(4, 4), torch.eye(4).to_sparse()),
        (torch.empty(4, device="meta"), torch.zeros(4)),
        (torch.ones(4), torch.zeros(1).expand(4)),
        (torch.ones(5), torch.zeros(4)),
    ],
    ids=lambda value: str(value).replace("\n", ""),
)
def test_nothing_is_changed_where_the_check_finds_what_does_not_fit(
    value: Any, into: torch.Tensor, legacy: bool, tmp_path: Path
) -> None:
    first = torch.ones(1 << 19)
    torch.save({"a": first, "b": value}, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    state = {"a": torch.zeros(1 << 19), "b": into}
    for strict in (True, False):
        with pytest.raises(CheckpointMismatchError, match=r"\bb is "):
            torchferry.load(tmp_path / "x.pt", into=state, strict=strict)
    assert state["a"].eq(0).all()


@pytest.mark.filterwarnings("ignore")  # deprecated, but in files
def test_a_quantized_tensor_fills_a_quantized_one_only(tmp_path: Path) -> None:
    quantized = torch.quantize_per_tensor(torch.ones(4), 0.5, 1, torch.qint8)
    torch.save({"a": torch.ones(1 << 19), "b": quantized}, tmp_path / "x.pt")
    state = {"a": torch.zeros(1 << 19), "b": torch.zeros(4)}
    with pytest.raises(CheckpointMismatchError, match="b is a quantized tensor there and a dense tensor here"):
        torchferry.load(tmp_path / "x.pt", into=state)
    assert state["a"].eq(0).all()
    state["b"] = torch.quantize_per_tensor(torch.zeros(4), 0.5, 1, torch.qint8)
    torchferry.load(tmp_path / "x.pt", into=state)
    assert state["b"].dequantize().eq(1).all()


def test_nothing_is_changed_by_a_sharded_checkpoint_that_does_not_fit(tmp_path: Path) -> None:
    torchferry.save({"a": torch.ones(2), "b": 3}, tmp_path / "x.pt")
    torchferry.convert(tmp_path / "x.pt", f"{tmp_path / 'x'}/")
    state = {"a": torch.zeros(2), "b": torch.zeros(1)}
    with pytest.raises(CheckpointMismatchError, match="b is no tensor there"):
        torchferry.load(tmp_path / "x", into=state)
    assert state["a"].eq(0).all()


def test_a_tensor_with_an_attribute_is_not_broadcast(tmp_path: Path) -> None:
    tensor = torch.full((1,), 3.0)
    tensor.note = "x"  # type: ignore[attr-defined]
    torch.save({"a": torch.ones(1 << 19), "w": tensor}, tmp_path / "x.pt")
    state = {"a": torch.zeros(1 << 19), "w": torch.zeros(5)}
    with pytest.raises(CheckpointMismatchError, match="w is 1 there and 5 here"):
        torchferry.load(tmp_path / "x.pt", into=state)
    assert state["a"].eq(0).all()
    state["w"] = torch.zeros(1)
    torchferry.load(tmp_path / "x.pt", into=state)
    assert state["w"].item() == 3


@pytest.mark.parametrize(
    ("stored", "reason"),
    [
        ({"m": {"old_weight": torch.ones(2, 2), "bias": torch.ones(2)}}, "lacks 'ema'"),
        ({"m": {"old_weight": torch.ones(2, 2), "bias": torch.ones(2)}, "ema": torch.ones(1)}, "ema is 1 there"),
        (
            {"m": {"old_weight": torch.ones(2, 2), "bias": torch.ones(2)}, "ema": torch.ones(3), "x": torch.ones(1)},
            "also has 'x'",
        ),
    ],
)
def test_what_is_beside_a_module_that_has_a_say_is_checked(stored: Any, reason: str, tmp_path: Path) -> None:
    torch.save(stored, tmp_path / "x.pt")
    with pytest.raises(CheckpointMismatchError, match=reason):
        torchferry.load(tmp_path / "x.pt", into={"m": Renames(2, 2), "ema": torch.zeros(3)})


def test_what_a_module_that_has_a_say_refuses_is_a_mismatch(tmp_path: Path) -> None:
    torch.save({"old_weight": torch.ones(2, 2), "bias": torch.ones(3)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointMismatchError, match=r"size mismatch for bias.*may have been changed"):
        torchferry.load(tmp_path / "x.pt", into=Renames(2, 2))


def test_what_cannot_be_filled_is_a_type_error_before_anything_is_read() -> None:
    module = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(module.parameters())
    for other, name in ((optimizer, "opt"), ("x", "opt"), (None, "opt"), ({"lr": 0.5}, r"opt\.lr")):
        with pytest.raises(TypeError, match=rf"'{name}' is of type .*load it with keys="):
            torchferry.load("memory://nowhere", into={"m": module, "opt": other})
    with pytest.raises(TypeError, match=r"two tensors that are called 'a\.b'"):
        torchferry.load("memory://nowhere", into={"a.b": torch.zeros(1), "a": {"b": torch.zeros(1)}})


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_num_batches_tracked_may_be_missing_where_torch_says_so(version: int, device: str, tmp_path: Path) -> None:
    state = nn.BatchNorm1d(2).state_dict()
    del state["num_batches_tracked"]
    state._metadata[""]["version"] = version  # type: ignore[attr-defined]
    torch.save(state, tmp_path / "x.pt")
    with torch.device(device):
        module = nn.BatchNorm1d(2)
    if version == 1:
        assert torchferry.load(tmp_path / "x.pt", into=module) == ([], [])
        assert module.num_batches_tracked is not None
        assert module.num_batches_tracked.device.type == "cpu"
    else:
        with pytest.raises(CheckpointMismatchError, match="lacks 'num_batches_tracked'"):
            torchferry.load(tmp_path / "x.pt", into=module)
        assert torchferry.load(tmp_path / "x.pt", into=module, strict=False).missing_keys == ["num_batches_tracked"]
    with pytest.raises(CheckpointMismatchError, match="lacks 'num_batches_tracked'"):  # a name in a dict is a name
        torchferry.load(tmp_path / "x.pt", into={**nn.BatchNorm1d(2).state_dict()})


class Keeps(nn.Module):
    """A module with an extra state."""

    def __init__(self, extra: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.extra = extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


@pytest.mark.parametrize("kind", ["torch", "legacy", "sharded"])
@pytest.mark.parametrize("extra", [{"step": 3}, {}, [1, 2], None, torch.arange(5)], ids=str)
@pytest.mark.parametrize("before", [{"step": 0}, torch.zeros(0)], ids=str)
def test_an_extra_state_is_any_value(extra: Any, before: Any, kind: str, tmp_path: Path) -> None:
    torch.save({"m": Keeps(extra).state_dict()}, tmp_path / "x.pt", _use_new_zipfile_serialization=kind != "legacy")
    url = tmp_path / "x.pt"
    if kind == "sharded":
        if extra == {}:
            pytest.skip("DCP stores no empty dict")
        torchferry.convert(url, f"{tmp_path / 'x'}/")
        url = tmp_path / "x"
    module = Keeps(before)
    assert torchferry.load(url, into={"m": module}) == ([], [])
    assert torch.equal(module.extra, extra) if isinstance(extra, torch.Tensor) else module.extra == extra


def test_post_hooks_and_lazy_parameters_load_as_in_torch(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2, 2)}, tmp_path / "x.pt")
    module = nn.Linear(2, 2)
    module.register_load_state_dict_post_hook(lambda _, keys: keys.missing_keys.clear())
    assert torchferry.load(tmp_path / "x.pt", into=module) == ([], [])
    assert module.weight.eq(1).all()
    torch.save(nn.Linear(4, 3).state_dict(), tmp_path / "y.pt")
    lazy = nn.LazyLinear(3)
    assert torchferry.load(tmp_path / "y.pt", into=lazy) == ([], [])
    assert lazy.weight.shape == (3, 4)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("values", "places"),
    [
        ({"a.b": 1, "a": {"b": torch.ones(2)}}, r"'a\.b': \['a\.b'\] and \['a'\]\['b'\]"),
        ({1: torch.ones(2), "1": torch.zeros(2)}, r"'1': \[1\] and \['1'\]"),
        ({"t": {(0, 1): torch.ones(2), (0, 2): torch.ones(2)}}, r"'t\.tuple': .*\(0, 1\).* and .*\(0, 2\)"),
    ],
)
def test_two_values_of_one_name_are_an_error_that_names_both(
    values: Any, places: str, legacy: bool, tmp_path: Path
) -> None:
    stored = {"w": torch.ones(2), **values}
    torch.save(stored, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointFormatError, match=places):
        torchferry.load(tmp_path / "x.pt", into={"w": torch.zeros(2)}, strict=False)
    if not legacy:
        with pytest.raises(CheckpointFormatError, match=places):
            torchferry.convert(tmp_path / "x.pt", tmp_path / "y.safetensors")
    assert repr(torchferry.load(tmp_path / "x.pt")) == repr(stored)
    assert repr(torchferry.load(tmp_path / "x.pt", keys="*")) == repr(stored)
    state = {"w": torch.zeros(2)}
    torchferry.load(tmp_path / "x.pt", into=state, keys="w")
    assert state["w"].eq(1).all()
