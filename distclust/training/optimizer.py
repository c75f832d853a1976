"""Optimisers of a phase, and their state by parameter name."""

from __future__ import annotations

import torch
from torch import Tensor

from distclust.mixture.settings import OptimizerConfig


def build_optimizer(
    config: OptimizerConfig, parameters: dict[str, torch.nn.Parameter]
) -> torch.optim.Optimizer:
    """A fused optimiser: one kernel for all parameters, and it honours `found_inf` without asking the
    host."""
    values = list(parameters.values())
    if config.name == "adam":
        return torch.optim.Adam(
            values, lr=config.learning_rate, eps=config.eps, weight_decay=config.weight_decay, fused=True
        )
    return torch.optim.SGD(
        values,
        lr=config.learning_rate,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        fused=True,
    )


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: dict[str, torch.nn.Parameter]
) -> dict[str, Tensor]:
    """The optimiser's state as `<parameter>/<what>`; a parameter that never had a gradient has none."""
    return {
        f"{name}/{key}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: dict[str, torch.nn.Parameter], tensors: dict[str, Tensor]
) -> None:
    """Put `optimizer_tensors` back."""
    for place, value in tensors.items():
        name, _, key = place.rpartition("/")
        parameter = parameters[name]
        optimizer.state[parameter][key] = value.to(parameter.device).clone()
