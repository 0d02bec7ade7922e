"""Test torch.compile on the device before a run uses it."""

from __future__ import annotations

import logging
import os
import warnings

import torch
from torch import Tensor
from torch._logging._internal import set_logs
from torch.nn import functional as F

from anyflow_train.config.run import RunConfig
from anyflow_train.errors import ConfigWarning
from anyflow_train.training.processes.world import World


def with_working_compiler(config: RunConfig, world: World) -> RunConfig:
    """Return the config, with `engine.compile` switched off if torch cannot compile on the device of any process.

    All processes must call it.

    Warns:
        ConfigWarning: it was switched off.
    """
    if not config.engine.compile:
        return config
    _silence()
    problems = [problem for problem in world.gather(_problem(world.device)) if problem]
    if not problems:
        return config
    text = f"engine.compile: torch.compile does not work here ({problems[0]}); the run continues without it"
    warnings.warn(text, ConfigWarning, stacklevel=2)
    return config.model_copy(update={"engine": config.engine.model_copy(update={"compile": False})})


def _problem(device: torch.device) -> str | None:
    """Compile a small function forward and backward. Returns the first line of the error, or None if it works."""
    x = torch.ones(16, 16, device=device, requires_grad=True)
    try:
        torch.compile(_trial, fullgraph=True)(x).sum().backward()
    except Exception as error:  # of many kinds: no C compiler, no Triton, a GPU that is too old, a full disk
        return f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"
    return None


def _trial(x: Tensor) -> Tensor:
    """A product, and operations that a compiler fuses."""
    return F.layer_norm(F.gelu(x @ x), x.shape[-1:])


def _silence() -> None:
    """Keep the compiler's advice to its developers off the terminal, unless the user asks for it with TORCH_LOGS."""
    if "TORCH_LOGS" not in os.environ:
        set_logs(all=logging.ERROR)
    warnings.filterwarnings("ignore", module=r"torch\._(dynamo|functorch|inductor)\b")
