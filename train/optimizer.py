"""Optimizers, and their state as named tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .config import TrainConfig

MOMENTUM = 0.9


def build_optimizer(network: nn.Module, config: TrainConfig, *, scaled: bool) -> torch.optim.Optimizer:
    """AdamW with betas 0.9 and 0.999, or SGD with Nesterov momentum 0.9.

    Weight decay acts on convolutions' and linear layers' weights only.

    On a GPU either takes one fused pass over all parameters, but SGD with scaled gradients: if the first step's are not
    finite, it leaves that step out, and its momentum then begins with whatever the memory held.

    Args:
        network: already on its device.
        config: optimizer, lr and weight_decay are read.
        scaled: gradients come from a GradScaler, which has steps left out.
    """
    decayed_ids = {id(m.weight) for m in network.modules() if isinstance(m, _ConvNd | nn.Linear)}
    parameters = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if id(p) in decayed_ids], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if id(p) not in decayed_ids], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError(f"the network {type(network).__name__} has no parameter that can be trained")
    if any(parameter.is_inference() for parameter in network.parameters()):
        raise ValueError("weights made within torch.inference_mode() cannot be trained; make the network outside it")
    fused = parameters[0].is_cuda
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=MOMENTUM, nesterov=True, fused=fused and not scaled)
    return torch.optim.AdamW(groups, lr=config.lr, fused=fused)


def trainable(network: nn.Module) -> dict[str, Tensor]:
    """The parameters that an optimizer changes, by name, detached."""
    return {name: p.detach() for name, p in network.named_parameters() if p.requires_grad}


def optimizer_tensors(optimizer: torch.optim.Optimizer, network: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state by name: `<parameter>.<entry>`, for instance `readout.weight.exp_avg`.

    Every entry of AdamW's and SGD's state is a tensor; the rest, its parameter groups, follows from the configuration.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in network.named_parameters():
        for entry, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                tensors[f"{name}.{entry}"] = value
    return tensors


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, network: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave, on the parameters' devices.

    Raises:
        ValueError: a tensor belongs to no parameter of the network or is no entry of such an optimizer, or one is
            missing.
    """
    index = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    parameters = {name: p for name, p in network.named_parameters() if id(p) in index}
    wanted = {"momentum_buffer"} if isinstance(optimizer, torch.optim.SGD) else {"step", "exp_avg", "exp_avg_sq"}
    state: dict[int, dict[str, Any]] = {}
    for name, value in tensors.items():
        parameter_name, _, entry = name.rpartition(".")
        if parameter_name not in parameters:
            raise ValueError(f"the optimizer state {name} belongs to no parameter of the network")
        parameter = parameters[parameter_name]
        if value.shape != (() if entry == "step" else parameter.shape):
            raise ValueError(f"the optimizer state {name} has the shape {list(value.shape)}")
        if entry != "step":
            # A file knows no memory layout; fused updates want that of the parameter (channels last, say).
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        state.setdefault(index[id(parameter)], {})[entry] = value
    for entries in state.values():
        if entries.keys() != wanted:
            names = [", ".join(sorted(of)) for of in (entries, wanted)]
            raise ValueError(f"the optimizer state of a parameter has {names[0]}, wanted {names[1]}")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
