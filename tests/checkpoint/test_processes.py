"""A checkpoint goes to another process as its states: what a rank of a distributed training returns."""

from __future__ import annotations

import copy
import pickle
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import Progress, make_checkpoint
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.nn.parallel import DistributedDataParallel

from torchferry.checkpoint import LoadedCheckpoint, PyTorchCheckpoint
from torchferry.checkpoint.content import content_of, loadable
from torchferry.errors import CheckpointValueError


class Mine(PyTorchCheckpoint):
    pass


def train() -> PyTorchCheckpoint:
    """What every rank runs."""
    torch.distributed.init_process_group("gloo")
    made = make_checkpoint()
    assert made.module is not None
    module = DistributedDataParallel(made.module)
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(2, 16)).sum().backward()
    optimizer.step()
    torch.distributed.destroy_process_group()
    return PyTorchCheckpoint(module=module, hyperparameters=Progress(), optimizer=optimizer)


def test_a_rank_returns_a_checkpoint_of_a_ddp_module_to_a_process_without_ranks() -> None:
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", start_method="spawn", max_restarts=0,
    )  # fmt: skip
    returned = elastic_launch(config, train)()[0]
    assert not torch.distributed.is_initialized()
    content = loadable(content_of(returned)).content
    assert list(content) == ["module_state_dict", "epochs", "loss", "optimizer_state_dict"]
    made = make_checkpoint(seed=1)
    assert made.module is not None
    assert made.optimizer is not None
    LoadedCheckpoint(content).restore(module=made.module, optimizer=made.optimizer)
    torch.testing.assert_close(made.module.state_dict()["0.weight"], content["module_state_dict"]["module.0.weight"])
    assert returned.hyperparameters == Progress()


def test_the_class_and_the_states_survive_pickling_more_than_once() -> None:
    made = make_checkpoint()
    checkpoint = Mine(made.module, made.hyperparameters, made.optimizer)
    again = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(checkpoint))))
    assert type(again) is Mine
    torch.testing.assert_close(content_of(again), content_of(checkpoint), rtol=0, atol=0)
    assert repr(again) == (
        "Mine(module=state of Sequential, hyperparameters=Progress(epochs, loss), optimizer=state of Adam)"
    )


def test_pickling_needs_nothing_of_the_module_but_its_state() -> None:
    module = torch.nn.Linear(2, 2)
    module.register_forward_hook(lambda *_: None)  # cannot be pickled
    again = pickle.loads(pickle.dumps(PyTorchCheckpoint(module)))
    torch.testing.assert_close(again.module.state_dict(), module.state_dict(), rtol=0, atol=0)


def test_a_copy_has_the_live_module() -> None:
    checkpoint = make_checkpoint()
    assert copy.copy(checkpoint).module is checkpoint.module
    deep = copy.deepcopy(checkpoint)
    assert isinstance(deep.module, torch.nn.Sequential)
    assert deep.module is not checkpoint.module
    assert deep.optimizer is not None
    assert deep.optimizer.param_groups[0]["params"][0] is deep.module[0].weight


@pytest.fixture
def _process_group(tmp_path: Path) -> Any:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("_process_group")
def test_a_sharded_state_is_refused_with_the_way_that_works() -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    module = torch.nn.Sequential(torch.nn.Linear(4, 4))
    expected = copy.deepcopy(module.state_dict())
    fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
    optimizer = torch.optim.Adam(module.parameters())
    with pytest.raises(CheckpointValueError, match=r"'0.weight' is a DTensor.*full_state_dict=True.*LoadedCheckpoint"):
        pickle.dumps(PyTorchCheckpoint(module=module, optimizer=optimizer))
    states = get_state_dict(module, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    returned = LoadedCheckpoint(dict(zip(("module_state_dict", "optimizer_state_dict"), states, strict=True)))
    torch.testing.assert_close(pickle.loads(pickle.dumps(returned)).module_state_dict, expected, rtol=0, atol=0)


@pytest.mark.usefixtures("_process_group")
@pytest.mark.parametrize("by_name", [False, True])
def test_a_module_that_is_sharded_and_its_optimizer_are_restored(by_name: bool) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def sharded(seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        made = make_checkpoint(seed)
        assert made.module is not None
        fully_shard(made.module, mesh=init_device_mesh("cpu", (1,)))
        optimizer = torch.optim.Adam(made.module.parameters())
        made.module(torch.ones(2, 16)).sum().backward()
        optimizer.step()
        return made.module, optimizer

    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    saved = LoadedCheckpoint(copy.deepcopy(content_of(make_checkpoint(seed=1))))
    expected = saved.optimizer_state_dict["state"][0]["exp_avg"]
    if by_name:
        saved["optimizer_state_dict"] = get_optimizer_state_dict(*sharded(seed=1), options=whole)
        expected = saved.optimizer_state_dict["state"]["0.weight"]["exp_avg"]
    module, optimizer = sharded(seed=2)
    saved.restore(module=module, optimizer=optimizer)
    restored = module.state_dict()["0.weight"].full_tensor()
    torch.testing.assert_close(restored, saved.module_state_dict["0.weight"], rtol=0, atol=0)
    states = get_optimizer_state_dict(module, optimizer, options=whole)
    torch.testing.assert_close(states["state"]["0.weight"]["exp_avg"], expected, rtol=0, atol=0)
    # what does not match is said
    del saved.module_state_dict["0.bias"]
    with pytest.raises(RuntimeError, match=r"0\.bias"):
        saved.restore(module=module)
    assert saved.restore(module=module, strict=False).missing_keys == ["0.bias"]
