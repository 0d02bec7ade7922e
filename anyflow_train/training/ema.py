"""Exponential moving average of the trained parameters, on their device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from anyflow_train.config.run import Ema as EmaConfig


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
        """Put the averages into the network for a block without gradient. Storage is swapped, which is cheap.

        Graphs that were recorded before stay valid, because the parameters have their own storage again when their
        backward runs.
        """
        self._swap()
        try:
            with torch.no_grad():
                yield
        finally:
            self._swap()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the averages, or this process's parts of them, by model name."""
        yield from zip(self._names, self._averages, strict=True)

    def _swap(self) -> None:
        for index, shard in enumerate(self._live):
            shard.data, self._averages[index] = self._averages[index], shard.data
