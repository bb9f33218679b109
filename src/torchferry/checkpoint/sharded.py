"""Fills modules and optimizers that are sharded over ranks (FSDP2) from a whole state, which every rank has."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["is_sharded", "load_module", "load_optimizer"]


def is_sharded(module: torch.nn.Module) -> bool:
    """Whether this rank has only a part of some parameter: it is a ``DTensor``."""
    distributed = sys.modules.get("torch.distributed.tensor")  # what is a DTensor has imported it
    return distributed is not None and any(isinstance(value, distributed.DTensor) for value in module.parameters())


def load_module(module: torch.nn.Module, state: Mapping[str, Any], *, strict: bool) -> tuple[list[str], list[str]]:
    """Gives every rank its part of ``state``. No rank waits for another.

    Returns:
        The keys that are missing in ``state``, and those that the module does not have.

    Raises:
        RuntimeError: ``strict``, and keys do not match; or shapes do not.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    own = [_without_wrappers(key) for key in module.state_dict()]  # of FSDP2's modules: nothing is gathered
    given = {_without_wrappers(key): key for key in state}
    missing = [key for key in own if key not in given]
    unexpected = [given[key] for key in given.keys() - {*own}]
    if strict and (missing or unexpected):  # torch would fill what is missing from the module itself, and say nothing
        raise RuntimeError(
            f"Error(s) in loading state_dict for {type(module).__qualname__}: missing keys {missing}, unexpected keys "
            f"{unexpected}."
        )
    known = {key: state[given[key]] for key in own if key in given}
    set_model_state_dict(module, known, options=StateDictOptions(full_state_dict=True, strict=False))
    return missing, unexpected


def load_optimizer(module: torch.nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Gives every rank its part of an optimizer's state.

    Args:
        module: Whose parameters ``optimizer`` has.
        optimizer: What to fill.
        state: What ``optimizer.state_dict()`` was where nothing was sharded; or what
            ``get_optimizer_state_dict(full_state_dict=True)`` returned, which names the parameters.

    Raises:
        ValueError: it is the state of an optimizer of other parameters, or of one that is not sharded by module.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    options = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(module, optimizer, _by_name(module, optimizer, state), options=options)


def _by_name(module: torch.nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    groups = state["param_groups"]
    saved = [key for group in groups for key in group["params"]]
    if any(isinstance(key, str) for key in saved):
        return dict(state)
    names = {id(parameter): _without_wrappers(name) for name, parameter in module.named_parameters()}
    own = [names.get(id(parameter)) for group in optimizer.param_groups for parameter in group["params"]]
    if len(own) != len(saved) or None in own:
        raise ValueError(
            f"The optimizer has {len(own)} parameters, {own.count(None)} of them not the module's; that of the "
            f"checkpoint had {len(saved)}. Build it on the parameters of the module that is restored."
        )
    name_of = dict(zip(saved, own, strict=True))
    return {
        "state": {name_of[key]: value for key, value in state["state"].items()},
        "param_groups": [{**group, "params": [name_of[key] for key in group["params"]]} for group in groups],
    }


def _without_wrappers(key: str) -> str:
    return key.replace("_orig_mod.", "")  # as torch's own names for the keys of a sharded module
