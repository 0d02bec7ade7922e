"""One micro-batch of training samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from anyflow_train.flow.types import Condition


@dataclass(frozen=True)
class Batch:
    """B samples of the step's global batch.

    Attributes:
        latents: (B, F, C, H, W) float32, normalised; NaN in a run that makes its own samples, of this shape.
        condition: texts (B, L, D), padded with zeros to the step's length.
        negative: condition of the negative prompt, text (1, L, D), with the same padding.
        keys: names of the samples in the shards.
        positions: positions of the samples in the step's global batch (see `flow.draw`).
        turn: number of the global batch in the step, from 0: steps of small clips take several.
    """

    latents: Tensor
    condition: Condition
    negative: Condition
    keys: tuple[str, ...]
    positions: tuple[int, ...]
    turn: int = 0

    def to(self, device: torch.device) -> Batch:
        """Copy the batch to a device. Copies from pinned memory do not block."""
        return self.map(lambda x: x.to(device, non_blocking=True))

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """Copy the batch with every tensor replaced by `function(tensor)`."""
        condition, negative = Condition(function(self.condition.text)), Condition(function(self.negative.text))
        return replace(self, latents=function(self.latents), condition=condition, negative=negative)
