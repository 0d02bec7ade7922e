"""What an engine is, and what it gives and takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer

from anyflow_train.training.checkpoints.tensor_handle import Entry
from anyflow_train.training.processes.world import World


@dataclass(frozen=True)
class Outcome:
    """What became of one optimizer step.

    Attributes:
        applied: False if a watched value or the gradient was not finite; then nothing has changed.
        gradient_norm: of all processes' gradient together, before clipping.
        values: the watched values, summed over all processes.
    """

    applied: bool
    gradient_norm: float
    values: tuple[float, ...]


class Engine(Protocol):
    """Optimizer of one trainable role.

    `backward` only accumulates gradients; `step` clips them and updates the parameters. So one step may hold any
    number of losses and micro-batches. Losses are sums over this process's samples, divided by the global batch: the
    engine adds up what the processes found.

    Attributes:
        world: the processes.
        network: what to call for a forward: the network itself, or a wrapper that passes calls and attributes on.
        optimizer: its state exists from the start, see `adam_steps`.
    """

    world: World
    network: Any
    optimizer: Optimizer

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of a scalar loss."""
        ...

    def step(self, learning_rate: float, watched: Tensor) -> Outcome:
        """Clip, update, and forget the gradients; one host synchronisation.

        Args:
            learning_rate: of this step.
            watched: (K,) float32, sums over this process's samples, such as losses. They come back as numbers together
                with the gradient norm; if any of them is not finite, the step is not applied.
        """
        ...

    def shards(self) -> dict[str, Tensor]:
        """What this process holds of every trained parameter, by model name: averages are kept likewise."""
        ...

    def entry(self, name: str, shard: Tensor) -> Entry:
        """A tensor that is laid out as the parameter `name` is, such as its average."""
        ...

    @property
    def kinds(self) -> tuple[str, ...]:
        """What a checkpoint holds: `weights` (masters), `exp_avg` and `exp_avg_sq`, of 8 bits with their scales."""
        ...

    def entries(self, kind: str) -> dict[str, Entry]:
        """One of `kinds`, by model name. Small weights have no scales."""
        ...
