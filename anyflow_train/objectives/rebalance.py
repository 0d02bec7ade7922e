"""Per-sample rebalancing: every sample with r < t counts as much as the average diffusion sample of the global batch.

Pure functions of a `Loss` and that average, which the trainer all-reduces once a step. Per sample this minimises E log
loss, whose minimum is the flow map only where the velocity is symmetric given x_t; yet without it training is much
worse. With the teacher's velocity, which is one number given x_t, the minimum is the flow map.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from anyflow_train.objectives.types import Branch, Loss

Rebalance = Literal["weighted", "unweighted", "none"]

FLOOR = 1e-5  # keeps the scale of a sample that is already learned finite


def balance_value(loss: Loss, mode: Rebalance) -> Tensor:
    """(B,) without gradient: what is averaged over all diffusion samples, weighted unless `unweighted`."""
    value = loss.per_sample.detach()
    return value if mode == "unweighted" else value * loss.weight


def rebalanced(loss: Loss, diffusion_mean: Tensor, mode: Rebalance, smallest_mean: float = 0.0) -> Tensor:
    """The final losses, (B,), weight included, to be summed over the global batch and divided by its size.

    Args:
        loss: of B samples.
        diffusion_mean: () mean of `balance_value` over the global batch's diffusion samples.
        mode: `weighted` scales the weighted losses, which cancels the weight on all samples with r < t (as published);
            `unweighted` scales the bare losses and weights after; `none` only weights.
        smallest_mean: what `diffusion_mean` counts as at least. With the teacher's velocity a student that starts as
            the teacher has no loss at r = t, and the others would be scaled to nothing.
    """
    weighted = loss.per_sample * loss.weight
    if mode == "none" or loss.branch is None:
        return weighted
    scale = diffusion_mean.detach().clamp_min(smallest_mean) / (balance_value(loss, mode) + FLOOR)
    return torch.where(loss.branch == Branch.DIFFUSION, weighted, weighted * scale)
