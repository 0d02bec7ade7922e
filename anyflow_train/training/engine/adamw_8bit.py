"""AdamW with 8-bit moments (bitsandbytes; arXiv 2110.02861): blocks of 256 codes, each with a scale.

Weights with fewer than 4096 elements keep float32 moments. On a GPU bitsandbytes synchronises after each weight.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from typing import Any

from torch.nn import Parameter
from torch.optim import Optimizer

from anyflow_train.config.run import Optimizer as OptimizerConfig
from anyflow_train.training.engine.adamw import options

# Name in a checkpoint -> name in bitsandbytes: codes, and the scales of their blocks.
STATE = {"exp_avg": "state1", "exp_avg_sq": "state2", "exp_avg_scale": "absmax1", "exp_avg_sq_scale": "absmax2"}


def library() -> Any:
    """Import the optimizers of bitsandbytes."""
    log = logging.getLogger("bitsandbytes")
    before = log.level
    log.setLevel(logging.ERROR)  # hides warnings about kernels that only inference uses
    try:
        return importlib.import_module("bitsandbytes.optim")
    finally:
        log.setLevel(before)


def adamw_8bit(parameters: Mapping[str, Parameter], config: OptimizerConfig) -> Optimizer:
    """Build bitsandbytes' AdamW. Its moments exist before the first step."""
    optimizer = library().AdamW8bit(**options(parameters, config))
    (group,) = optimizer.param_groups
    for number, parameter in enumerate(group["params"]):
        optimizer.init_state(group, parameter, 0, number)
    return optimizer
