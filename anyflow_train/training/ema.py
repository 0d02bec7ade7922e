"""Exponential moving average of the trained parameters, on their device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from anyflow_train.config.run import Ema as EmaConfig
from anyflow_train.flow.types import CausalFlowMap, Condition, FlowMap


class Ema:
    """Averages by model name. Before `start_step` they are copies of the parameters. The tensors are its only state.

    Args:
        shards: this process's part of every parameter, from `Engine.shards`; the whole parameter except under ZeRO-3.
    """

    def __init__(self, shards: Mapping[str, Tensor], config: EmaConfig) -> None:
        self._config = config
        self._live = list(shards.values())
        self._names = tuple(shards)
        self._averages = [shard.detach().clone() for shard in self._live]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the averages after 0-based `step`: `average += (1 - decay) (parameter - average)`."""
        if step < self._config.start_step:
            torch._foreach_copy_(self._averages, self._live)  # pyright: ignore[reportPrivateImportUsage]
        else:
            share = 1 - self._config.decay
            torch._foreach_lerp_(self._averages, self._live, share)  # pyright: ignore[reportPrivateImportUsage]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the averages into the network for a block. Storage is swapped, not copied: which is cheap.

        The block may only run forwards without gradient. Graphs that were recorded before stay valid, because the
        parameters have their own storage again when their backward runs.
        """
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the averages, or this process's parts of them, by model name."""
        yield from zip(self._names, self._averages, strict=True)

    def _swap(self) -> None:
        for index, shard in enumerate(self._live):
            shard.data, self._averages[index] = self._averages[index], shard.data


@dataclass(frozen=True)
class AveragedFlowMap:
    """A network's flow map under its averaged weights, without gradient."""

    live: FlowMap
    ema: Ema

    def __call__(self, x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        with torch.no_grad(), self.ema.applied():
            return self.live(x, t, r, condition)

    def encode_context(self, x: Tensor, chunks: tuple[int, ...], condition: Condition) -> object:
        with self.ema.applied():
            return cast(CausalFlowMap, self.live).encode_context(x, chunks, condition)
