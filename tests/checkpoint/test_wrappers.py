"""The state of a wrapped module fills a bare one, and the other way round."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from torchferry.checkpoint import LoadedCheckpoint
from torchferry.checkpoint.wrappers import matched_to

# torch.compile warns of its own code
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


class Net(torch.nn.Module):
    """Parameters, buffers, a tied weight, extra state, and modules whose state has a version."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
        self.head = torch.nn.Linear(4, 4)
        self.head.weight = self.body[0].weight
        self.extra = seed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.body(x))
        return result

    def get_extra_state(self) -> int:
        return self.extra

    def set_extra_state(self, state: int) -> None:
        self.extra = state


class Inside(torch.nn.Module):
    """A wrapper whose keys look like those of DistributedDataParallel."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.fixture(scope="module", autouse=True)
def _process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    file: Path = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def compiled_body(net: Any) -> Any:
    net.body = torch.compile(net.body)
    return net


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "bare": lambda net: net,
    "DDP": DistributedDataParallel,
    "DataParallel": torch.nn.DataParallel,
    "compiled": torch.compile,
    "compiled in DDP": lambda net: DistributedDataParallel(torch.compile(net)),
    "DDP compiled": lambda net: torch.compile(DistributedDataParallel(net)),
    "a compiled part": compiled_body,
    "a compiled part in DDP": lambda net: DistributedDataParallel(compiled_body(net)),
}


@pytest.mark.parametrize("target", WRAPPERS)
@pytest.mark.parametrize("source", WRAPPERS)
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
def test_restore_fills_a_module_whatever_wraps_it_now_or_did_before(source: str, target: str, strict: bool) -> None:
    saved, filled = Net(1), Net(2)
    saved.body[1].running_mean += 1
    expected = {key: value.clone() for key, value in saved.state_dict().items() if isinstance(value, torch.Tensor)}
    module = WRAPPERS[target](filled)
    loaded = LoadedCheckpoint({"module_state_dict": WRAPPERS[source](saved).state_dict()})
    restored = loaded.restore(module=module, strict=strict)
    assert restored.missing_keys == restored.unexpected_keys == []
    torch.testing.assert_close(
        {key.replace("_orig_mod.", ""): value for key, value in filled.state_dict().items() if "extra" not in key},
        expected,
        rtol=0,
        atol=0,
    )
    assert filled.extra == 1


def test_keys_that_differ_in_more_than_wrappers_are_reported_under_their_saved_names() -> None:
    state = torch.nn.DataParallel(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))).state_dict()
    module = torch.nn.Sequential(torch.nn.Linear(2, 2))
    restored = LoadedCheckpoint({"module_state_dict": state}).restore(module=module, strict=False)
    assert restored.unexpected_keys == ["module.1.weight", "module.1.bias"]
    assert torch.equal(module[0].weight, state["module.0.weight"])


def test_a_part_that_is_called_module_is_no_wrapper() -> None:
    state = Inside(torch.nn.Linear(2, 2)).state_dict()
    same = Inside(torch.nn.Linear(2, 2))
    assert matched_to(same, state)[0] is state
    wrapped = DistributedDataParallel(Inside(torch.nn.Linear(2, 2)))
    LoadedCheckpoint({"module_state_dict": state}).restore(module=wrapped)
    assert torch.equal(wrapped.module.module.weight, state["module.weight"])


def test_a_module_with_a_part_called_module_and_others_is_left_as_it_is() -> None:
    module = Inside(torch.nn.Linear(2, 2))
    module.other = torch.nn.Linear(2, 2)
    state = {"module.weight": torch.ones(2, 2), "unknown": torch.ones(1)}
    assert matched_to(module, state)[0] is state


def test_the_versions_of_its_parts_go_with_the_keys() -> None:
    state = torch.nn.DataParallel(Net(1)).state_dict()
    matched, _ = matched_to(Net(2), state)
    assert matched._metadata["body.1"] == state._metadata["module.body.1"]  # type: ignore[attr-defined]
    assert matched._metadata["body.1"]["version"] == 2  # type: ignore[attr-defined]


def test_it_does_not_ask_the_module_for_its_state() -> None:
    class Sharded(torch.nn.Linear):
        def state_dict(self, *_args: Any, **_kwargs: Any) -> Any:
            raise AssertionError("this would gather the module from all ranks")

    state = torch.nn.DataParallel(torch.nn.Linear(2, 2)).state_dict()
    module = Sharded(2, 2)
    LoadedCheckpoint({"module_state_dict": state}).restore(module=module)
    assert torch.equal(module.weight, state["module.weight"])


def test_what_is_on_the_meta_device_gets_memory_of_its_own() -> None:
    saved = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    with torch.device("meta"):
        module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    module[0].weight.requires_grad_(False)
    LoadedCheckpoint({"module_state_dict": saved.state_dict()}).restore(module=module)
    for name, tensor in saved.state_dict().items():
        assert torch.equal(module.state_dict()[name], tensor)
        assert module.state_dict()[name].data_ptr() != tensor.data_ptr()
    assert not module[0].weight.requires_grad
    assert module[0].bias.requires_grad


class Tied(torch.nn.Module):
    """Two names of one weight, of another dtype than was saved, and a buffer that no state has."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(4, 4, bias=False, dtype=torch.float64)
        self.second = torch.nn.Linear(4, 4, bias=False, dtype=torch.float64)
        self.second.weight = self.first.weight
        self.register_buffer("scratch", torch.ones(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def test_an_optimizer_of_a_module_on_the_meta_device_trains_what_was_restored() -> None:
    with torch.device("meta"):
        module = Tied()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    saved = Tied()
    trained = torch.optim.Adam(saved.parameters(), lr=0.1)
    checkpoint = LoadedCheckpoint(
        {"module_state_dict": saved.to(torch.float32).state_dict(), "optimizer_state_dict": trained.state_dict()}
    )
    checkpoint.restore(module, optimizer)
    assert module.first.weight is module.second.weight
    assert module.first.weight.dtype == torch.float64
    before = module.first.weight.detach().clone()
    module(torch.ones(1, 4, dtype=torch.float64)).sum().backward()
    optimizer.step()
    assert not torch.equal(module.first.weight, before)
    assert torch.equal(checkpoint.module_state_dict["first.weight"].double(), before)


def test_training_changes_no_checkpoint_that_was_restored() -> None:
    module = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(module.parameters())

    def step() -> None:
        module(torch.ones(1, 2)).sum().backward()
        optimizer.step()

    step()
    checkpoint = LoadedCheckpoint(
        {"module_state_dict": module.state_dict(), "optimizer_state_dict": deepcopy(optimizer.state_dict())}
    )
    checkpoint.restore(optimizer=optimizer)
    before = deepcopy(checkpoint.optimizer_state_dict)
    step()
    for name in ("step", "exp_avg"):
        assert torch.equal(checkpoint.optimizer_state_dict["state"][0][name], before["state"][0][name])
