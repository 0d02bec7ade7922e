"""The learning rate as a function of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from anyflow_train.config.run import Optimizer


def learning_rate(step: int, steps: int, config: Optimizer) -> float:
    """Learning rate of 0-based `step` of a run of `steps`.

    Linear warm-up that reaches `lr` in step `warmup_steps - 1`, then constant, or a half cosine from `lr` at the end of
    the warm-up to `final_lr_share * lr` at the run's end.
    """
    warm = min((step + 1) / config.warmup_steps, 1.0) if config.warmup_steps else 1.0
    if config.schedule == "constant" or step < config.warmup_steps:
        return config.lr * warm
    progress = min((step - config.warmup_steps) / max(steps - config.warmup_steps, 1), 1.0)
    fall = 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (config.final_lr_share + (1 - config.final_lr_share) * fall)
