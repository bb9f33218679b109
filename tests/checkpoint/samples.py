"""What the tests share: hyperparameters, a checkpoint, and changes of one that was loaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from torchferry.checkpoint import LoadedCheckpoint, PyTorchCheckpoint


@dataclass
class Progress:
    """Hyperparameters."""

    epochs: int = 3
    loss: float = 0.25


def make_checkpoint(seed: int = 0, width: int = 16) -> PyTorchCheckpoint:
    """A module and Adam after a step, and hyperparameters."""
    torch.manual_seed(seed)
    module = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.ReLU(), torch.nn.Linear(width, 4))
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.randn(2, width)).sum().backward()
    optimizer.step()
    return PyTorchCheckpoint(module=module, hyperparameters=Progress(), optimizer=optimizer)


def in_place(loaded: LoadedCheckpoint) -> None:
    loaded.module_state_dict["0.weight"][3, 3] += 1


def through_an_alias(loaded: LoadedCheckpoint) -> None:
    loaded.module_state_dict["0.weight"].view(-1)[7:9].zero_()


def under_inference_mode(loaded: LoadedCheckpoint) -> None:
    with torch.inference_mode():
        loaded.module_state_dict["2.bias"].mul_(2)


def through_data(loaded: LoadedCheckpoint) -> None:
    loaded.optimizer_state_dict["state"][0]["exp_avg"].data[0] = 9


def another_hyperparameter(loaded: LoadedCheckpoint) -> None:
    loaded["epochs"] = 4


def a_hyperparameter_of_another_type(loaded: LoadedCheckpoint) -> None:
    loaded["epochs"] = 3.0


def one_hyperparameter_more(loaded: LoadedCheckpoint) -> None:
    loaded["more"] = None


def one_key_less(loaded: LoadedCheckpoint) -> None:
    del loaded["optimizer_state_dict"]


def another_order(loaded: LoadedCheckpoint) -> None:
    loaded["epochs"] = loaded.pop("epochs")


def another_type(loaded: LoadedCheckpoint) -> None:
    state = loaded.module_state_dict
    state["0.weight"] = state["0.weight"].to(torch.float64)


def another_shape(loaded: LoadedCheckpoint) -> None:
    state = loaded.module_state_dict
    state["0.weight"] = state["0.weight"].view(4, -1)


def two_tensors_swapped(loaded: LoadedCheckpoint) -> None:
    state = loaded.optimizer_state_dict["state"][0]
    state["exp_avg"], state["exp_avg_sq"] = state["exp_avg_sq"], state["exp_avg"]


CHANGES = [
    in_place,
    through_an_alias,
    under_inference_mode,
    through_data,
    another_hyperparameter,
    a_hyperparameter_of_another_type,
    one_hyperparameter_more,
    one_key_less,
    another_order,
    another_type,
    another_shape,
    two_tensors_swapped,
]
