"""AdamW whose state exists before the first step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from anyflow_train.config.run import Optimizer as OptimizerConfig

# Names of the optimizer's state for every parameter.
MOMENTS = ("exp_avg", "exp_avg_sq")


def options(parameters: Mapping[str, Parameter], config: OptimizerConfig) -> dict[str, Any]:
    """Arguments of any AdamW.

    Raises:
        ValueError: a master parameter is not float32. In half precision small updates would be lost.
    """
    for name, parameter in parameters.items():
        if parameter.dtype != torch.float32:
            raise ValueError(f"masters must be float32, but {name} is {parameter.dtype}")
    return {"params": list(parameters.values()), **config.model_dump(include={"lr", "betas", "eps", "weight_decay"})}


def adamw(parameters: Mapping[str, Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """Build torch's AdamW. Its state is created by `start_moments`."""
    return torch.optim.AdamW(**options(parameters, config), fused=True)


def start_moments(optimizer: torch.optim.Optimizer, masters: Iterable[Tensor]) -> None:
    """Create Adam's state before the first step, so that saving and restoring need no special case."""
    for master in masters:
        optimizer.state[master] = {
            # the fused kernel reads its step count on the parameter's device
            "step": torch.zeros((), dtype=torch.float32, device=master.device),
            "exp_avg": torch.zeros_like(master),
            "exp_avg_sq": torch.zeros_like(master),
        }


def adam_steps(optimizer: torch.optim.Optimizer) -> int:
    """Number of updates that the bias correction has counted."""
    return int(next(iter(optimizer.state.values()))["step"])


def set_adam_steps(optimizer: torch.optim.Optimizer, count: int) -> None:
    """Set the number of updates, which torch keeps in a tensor and bitsandbytes in an int."""
    for state in optimizer.state.values():
        if isinstance(state["step"], Tensor):
            state["step"].fill_(count)
        else:
            state["step"] = count


def set_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
