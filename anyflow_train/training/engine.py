"""Where a step runs: processes, device, precision, and one optimizer per trainable role.

The only module of the package that may import accelerate or DeepSpeed. A single process needs neither, and also runs
as it is under `accelerate launch --num_processes 1`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from anyflow_train.config.run import Engine as EngineConfig
from anyflow_train.config.run import Optimizer as OptimizerConfig
from anyflow_train.errors import UserError


@dataclass(frozen=True)
class World:
    """The processes of a run, as one of them sees it."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the terminal."""
        return self.rank == 0

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Sum of a small tensor over all processes; with one process the tensor itself."""
        return values


def start_world(config: EngineConfig) -> World:
    """Choose the device and check the launcher's world.

    Raises:
        UserError: more than one process, or a GPU asked for where there is none.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        raise UserError("WORLD_SIZE", f"the launcher started {size} processes; this version trains with one")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("engine.device", "is 'cuda', but torch sees no GPU here; use 'auto' or 'cpu'")
    if config.threads:
        torch.set_num_threads(config.threads)
    kind = "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"
    return World(torch.device(kind))


def autocast_dtype(precision: str) -> torch.dtype | None:
    """The type in which matrix products run: bfloat16 over float32 masters, or None for float32 throughout."""
    return torch.bfloat16 if precision == "bf16" else None


@dataclass(frozen=True)
class Outcome:
    """What became of one optimizer step.

    Attributes:
        applied: False if a watched value or the gradient was not finite; then nothing has changed.
        gradient_norm: before clipping.
        values: the watched values, summed over all processes.
    """

    applied: bool
    gradient_norm: float
    values: tuple[float, ...]


class Engine:
    """Optimizer of one trainable role, with an explicit step boundary.

    `backward` only accumulates gradients; `step` clips them and updates the parameters. So one step may hold any
    number of losses and micro-batches.

    Args:
        world: the processes.
        parameters: float32 masters by model name; all on `world.device`.
        config: AdamW and clipping.
    """

    def __init__(self, world: World, parameters: Mapping[str, Parameter], config: OptimizerConfig) -> None:
        half = [name for name, parameter in parameters.items() if parameter.dtype != torch.float32]
        if half:
            raise ValueError(f"masters must be float32, but {half[0]} is {parameters[half[0]].dtype}")
        self.world = world
        self.parameters = dict(parameters)
        self._clip_norm = config.clip_norm
        self._optimizer = torch.optim.AdamW(
            list(self.parameters.values()),
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self._start_moments()

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of a scalar loss."""
        loss.backward()

    def step(self, learning_rate: float, watched: Tensor) -> Outcome:
        """Clip, update, and forget the gradients; one host synchronisation.

        Args:
            learning_rate: of this step.
            watched: (K,) float32, sums over this process's samples, such as losses. They come back as numbers together
                with the gradient norm; if any of them is not finite, the step is not applied.
        """
        gradients = self._gradients()
        norm = get_total_norm(gradients)
        report = torch.cat([norm.reshape(1), self.world.all_reduce_sum(watched)])
        gradient_norm, *values = report.tolist()
        applied = all(math.isfinite(value) for value in (gradient_norm, *values))
        if applied:
            clip_grads_with_norm_(self.parameters.values(), self._clip_norm, norm)
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return Outcome(applied, gradient_norm, tuple(values))

    @property
    def adam_steps(self) -> int:
        """How many updates Adam's bias correction has counted."""
        return int(self._optimizer.state[next(iter(self.parameters.values()))]["step"].item())

    @adam_steps.setter
    def adam_steps(self, count: int) -> None:
        for parameter in self.parameters.values():
            self._optimizer.state[parameter]["step"].fill_(count)

    def tensors(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """Whole tensors by model name, one at a time: `weights` (masters), `exp_avg` or `exp_avg_sq`."""
        for name, parameter in self.parameters.items():
            yield name, parameter.detach() if kind == "weights" else self._optimizer.state[parameter][kind]

    def _gradients(self) -> list[Tensor]:
        """All gradients. A parameter that no loss reached gets zeros, so that every step count stays the same."""
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]

    def _start_moments(self) -> None:
        """Adam's state exists from the start, so that saving and restoring need no special first step."""
        for parameter in self.parameters.values():
            self._optimizer.state[parameter] = {
                # the fused kernel reads its step count on the parameter's device
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
