"""AdamW whose state exists before the first step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.nn import Parameter

from anyflow_train.config.run import Optimizer as OptimizerConfig

# Names of the optimizer's state for every parameter.
MOMENTS = ("exp_avg", "exp_avg_sq")


def check_masters(parameters: Mapping[str, Parameter]) -> None:
    """Check that master parameters are float32. In half precision small updates would be lost.

    Raises:
        ValueError: a parameter has another dtype.
    """
    half = [name for name, parameter in parameters.items() if parameter.dtype != torch.float32]
    if half:
        raise ValueError(f"masters must be float32, but {half[0]} is {parameters[half[0]].dtype}")


def adamw(parameters: Mapping[str, Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """Build torch's AdamW. Its state is created by `start_moments`."""
    check_masters(parameters)
    return torch.optim.AdamW(
        list(parameters.values()),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


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
