"""The engine for one process, and for several processes that each hold all parameters (DDP)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from anyflow_train.config.run import Optimizer as OptimizerConfig
from anyflow_train.training.checkpoints.tensor_handle import Entry
from anyflow_train.training.engine.adamw import MOMENTS, adamw, set_rate, start_moments
from anyflow_train.training.engine.adamw_8bit import STATE, adamw_8bit
from anyflow_train.training.engine.types import Outcome
from anyflow_train.training.processes.world import World

BUCKET = 1 << 24


class ReplicatedEngine:
    """Engine that holds all parameters and moments on every process. Also used with a single process.

    Gradients are summed over the processes once per step, not once per micro-batch, in a few large messages. At Wan's
    sizes this takes about 1 % of a step, so it is not overlapped with the backward pass.
    """

    def __init__(
        self, world: World, network: nn.Module, parameters: Mapping[str, Parameter], config: OptimizerConfig
    ) -> None:
        self.world = world
        self.network = network
        self._parameters = dict(parameters)
        self._clip_norm = config.clip_norm
        if config.moments == "8bit":
            self.optimizer, self._state = adamw_8bit(self._parameters, config), STATE
        else:
            self.optimizer, self._state = adamw(self._parameters, config), {kind: kind for kind in MOMENTS}
            start_moments(self.optimizer, self._parameters.values())
        for parameter in self._parameters.values():
            world.broadcast_tensor(parameter.detach())

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, learning_rate: float, watched: Tensor) -> Outcome:
        gradients = self._gradients()
        self._add_up(gradients)
        norm = get_total_norm(gradients)
        report = torch.cat([norm.reshape(1), self.world.all_reduce_sum(watched)])
        gradient_norm, *values = report.tolist()
        applied = all(math.isfinite(value) for value in (gradient_norm, *values))
        if applied:
            clip_grads_with_norm_(self._parameters.values(), self._clip_norm, norm)
            set_rate(self.optimizer, learning_rate)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Outcome(applied, gradient_norm, tuple(values))

    def shards(self) -> dict[str, Tensor]:
        return dict(self._parameters)

    def entry(self, name: str, shard: Tensor) -> Entry:
        return Entry.of(shard)

    @property
    def kinds(self) -> tuple[str, ...]:
        return ("weights", *(kind for kind in self._state if self.entries(kind)))

    def entries(self, kind: str) -> dict[str, Entry]:
        if kind == "weights":
            return {name: self.entry(name, parameter) for name, parameter in self._parameters.items()}
        states = {name: self.optimizer.state[parameter] for name, parameter in self._parameters.items()}
        key = self._state[kind]
        return {name: self.entry(name, state[key]) for name, state in states.items() if key in state}

    def _gradients(self) -> list[Tensor]:
        """Collect all gradients. Parameters without a gradient get zeros, so that all step counts stay equal."""
        for parameter in self._parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in self._parameters.values() if parameter.grad is not None]

    def _add_up(self, gradients: list[Tensor]) -> None:
        if self.world.size == 1:
            return
        self.world.activity.touch()  # marks progress before the blocking all-reduce, to identify a hung process
        for bucket in _buckets(gradients):
            message = bucket[0] if len(bucket) == 1 else torch.cat([gradient.flatten() for gradient in bucket])
            dist.all_reduce(message)
            if len(bucket) > 1:
                for gradient, part in zip(bucket, message.split([one.numel() for one in bucket]), strict=True):
                    gradient.copy_(part.view_as(gradient))


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """Group consecutive gradients into buckets of at most `BUCKET` elements. A larger gradient gets its own bucket."""
    bucket: list[Tensor] = []
    filled = 0
    for gradient in gradients:
        if bucket and filled + gradient.numel() > BUCKET:
            yield bucket
            bucket, filled = [], 0
        bucket.append(gradient)
        filled += gradient.numel()
    yield bucket
