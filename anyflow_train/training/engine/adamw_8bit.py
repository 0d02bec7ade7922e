"""AdamW whose moments are kept in 8 bits (bitsandbytes; arXiv 2110.02861): blocks of 256 codes, each with a scale.

Weights of fewer than 4096 numbers keep moments in float32. On a GPU the library waits for the device after each weight.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from typing import Any

from torch.nn import Parameter
from torch.optim import Optimizer

from anyflow_train.config.run import Optimizer as OptimizerConfig
from anyflow_train.training.engine.adamw import check_masters

# Its names of what a checkpoint holds: codes, and the scales of their blocks.
STATE = {"exp_avg": "state1", "exp_avg_sq": "state2", "exp_avg_scale": "absmax1", "exp_avg_sq_scale": "absmax2"}


def library() -> Any:
    """The library's optimizers. Raises ImportError."""
    log = logging.getLogger("bitsandbytes")
    before = log.level
    log.setLevel(logging.ERROR)  # it warns of kernels that only inference would use
    try:
        return importlib.import_module("bitsandbytes.optim")
    finally:
        log.setLevel(before)


def adamw_8bit(parameters: Mapping[str, Parameter], config: OptimizerConfig) -> Optimizer:
    """Its moments exist from the start."""
    check_masters(parameters)
    optimizer = library().AdamW8bit(
        list(parameters.values()), lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
    )
    (group,) = optimizer.param_groups
    for number, parameter in enumerate(group["params"]):
        optimizer.init_state(group, parameter, 0, number)
    return optimizer
