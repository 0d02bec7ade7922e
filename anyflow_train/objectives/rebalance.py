"""Per-sample rebalancing: each sample with r < t gets the loss of an average diffusion sample of the global batch.

These are pure functions of a `Loss` and of that average, which the trainer all-reduces once per step. Rebalancing
minimises `E log loss`. With velocities of data, the minimum is the flow map only if the velocity is symmetrically
distributed given x_t. Training without rebalancing is nevertheless much worse. With the velocity of a teacher, which is
a function of x_t, the minimum is the flow map.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anyflow_train.config.objective import Rebalance
from anyflow_train.objectives.types import Branch, Loss

FLOOR = 1e-5  # keeps the scale finite for a sample with a loss near 0


def balance_value(loss: Loss, mode: Rebalance) -> Tensor:
    """Compute the (B,) losses that are averaged over the diffusion samples, detached. Some modes use no weights."""
    value = loss.per_sample.detach()
    return value if mode in ("unweighted", "sqrt") else value * loss.weight


def rebalanced(loss: Loss, diffusion_mean: Tensor, mode: Rebalance, smallest_mean: float = 0.0) -> Tensor:
    """Compute the final (B,) losses with weights. The step's loss is their mean over the global batch.

    Args:
        loss: losses of B samples.
        diffusion_mean: () mean of `balance_value` over the global batch's diffusion samples.
        mode: `weighted` scales the weighted losses, as published; this cancels the weight of samples with r < t.
            `unweighted` scales the unweighted losses and then applies the weights. `sqrt` does the same with the
            square root of the scale. `none` only applies the weights.
        smallest_mean: lower bound of `diffusion_mean`. A student that starts as its teacher has no diffusion loss, so
            without a bound the other losses would vanish.
    """
    weighted = loss.per_sample * loss.weight
    if mode == "none" or loss.branch is None:
        return weighted
    scale = diffusion_mean.detach().clamp_min(smallest_mean) / (balance_value(loss, mode) + FLOOR)
    scale = scale.sqrt() if mode == "sqrt" else scale
    return torch.where(loss.branch == Branch.DIFFUSION, weighted, weighted * scale)
