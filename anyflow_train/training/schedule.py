"""The learning rate as a function of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from anyflow_train.config.run import Optimizer


def learning_rate(step: int, steps: int, config: Optimizer) -> float:
    """Learning rate of 0-based `step` in a run of `steps` steps.

    A linear warm-up reaches `lr` in step `warmup_steps - 1`. Then the rate is constant, or it follows a half cosine
    from `lr` down to `final_lr_share * lr` at the end of the run.
    """
    warm = min((step + 1) / config.warmup_steps, 1.0) if config.warmup_steps else 1.0
    if config.schedule == "constant" or step < config.warmup_steps:
        return config.lr * warm
    progress = min((step - config.warmup_steps) / max(steps - config.warmup_steps, 1), 1.0)
    fall = 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (config.final_lr_share + (1 - config.final_lr_share) * fall)
