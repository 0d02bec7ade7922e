"""The interface of an engine: the optimizer of one trained role."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer

from anyflow_train.training.checkpoints.tensor_handle import Entry
from anyflow_train.training.processes.world import World


@dataclass(frozen=True)
class Outcome:
    """The result of one optimizer step.

    Attributes:
        applied: False if a watched value or the gradient was not finite; then nothing has changed.
        gradient_norm: norm of the gradient summed over all processes, before clipping.
        values: watched values, summed over all processes.
    """

    applied: bool
    gradient_norm: float
    values: tuple[float, ...]


class Engine(Protocol):
    """Optimizer of one trained role.

    `backward` only accumulates gradients; `step` clips them and updates the parameters. So one step may have any number
    of losses and micro-batches. A loss is the sum over this process's samples, divided by the global batch. The engine
    sums the gradients of all processes.

    Attributes:
        world: the processes.
        network: the network to call: the network itself, or a wrapper that forwards calls and attributes.
        optimizer: torch optimizer, whose state exists before the first step.
    """

    world: World
    network: Any
    optimizer: Optimizer

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of a scalar loss."""
        ...

    def step(self, learning_rate: float, watched: Tensor) -> Outcome:
        """Clip the gradients, update the parameters, and release the gradients, with one host synchronisation.

        Args:
            learning_rate: learning rate of this step.
            watched: (K,) float32, sums over this process's samples, such as losses. They are returned as numbers with
                the gradient norm. If one of them is not finite, the step is not applied.
        """
        ...

    def shards(self) -> dict[str, Tensor]:
        """This process's part of every trained parameter, by model name. Averages are sharded in the same way."""
        ...

    def entry(self, name: str, shard: Tensor) -> Entry:
        """Wrap a tensor that is sharded like the parameter `name`, such as its average."""
        ...

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of saved tensors: `weights` (masters), `exp_avg`, `exp_avg_sq`, and the scales of 8-bit moments."""
        ...

    def entries(self, kind: str) -> dict[str, Entry]:
        """Tensors of one kind, by model name. Small weights have no scales."""
        ...
