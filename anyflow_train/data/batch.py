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
        condition: texts (B, L, D), padded with zeros to the step's length.
        negative: condition of the negative prompt, text (1, L, D), with the same padding.
        keys: names of the samples in the shards.
        positions: positions of the samples in the step's global batch (see `flow.draw`).
    """

    latents: Tensor
    condition: Condition
    negative: Condition
    keys: tuple[str, ...]
    positions: tuple[int, ...]

    def to(self, device: torch.device) -> Batch:
        """Copy the batch to a device. Copies from pinned memory do not block."""

        def move(condition: Condition) -> Condition:
            return Condition(condition.text.to(device, non_blocking=True))

        latents = self.latents.to(device, dtype=torch.float32, non_blocking=True)
        return Batch(latents, move(self.condition), move(self.negative), self.keys, self.positions)
