"""One micro-batch of training samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anyflow_train.flow.types import Condition


@dataclass(frozen=True)
class Batch:
    """B samples of the step's global batch.

    Attributes:
        latents: (B, F, C, H, W) float32, normalised.
        condition: text (B, L, D) padded with zeros to the step's length.
        negative: the negative prompt's condition, text (1, L, D), same padding.
        keys: the samples' names in the shards.
        positions: the samples' places in the step's global batch (see `flow.draw`).
    """

    latents: Tensor
    condition: Condition
    negative: Condition
    keys: tuple[str, ...]
    positions: tuple[int, ...]

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device; copies from pinned memory do not wait."""

        def move(condition: Condition) -> Condition:
            return Condition(condition.text.to(device, non_blocking=True))

        latents = self.latents.to(device, dtype=torch.float32, non_blocking=True)
        return Batch(latents, move(self.condition), move(self.negative), self.keys, self.positions)
