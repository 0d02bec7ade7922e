"""`anyflow train`: a run, with validation."""

from __future__ import annotations

import errno
import socket
from pathlib import Path

import torch
import torch.distributed as dist

from anyflow_train.config.run import RunConfig
from anyflow_train.errors import LostProcess, UserError
from anyflow_train.evaluation.validation import build_validator
from anyflow_train.training import run as training
from anyflow_train.training.checkpoints.run_directory import RunDirectory
from anyflow_train.training.memory_check import Forecast

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def train(config: RunConfig) -> Path:
    """Train, or continue, a run from Python: `train(compose("train", ["experiment=tiny"]))`.

    Returns:
        The run's directory. A run that a signal stopped early goes on when this is called again.

    Raises:
        UserError: the run cannot start, continue, or go on.
        LostProcess: another process of the run is gone.
    """
    run(config)
    return RunDirectory.of(config).path


def run(config: RunConfig) -> int:
    """Train, or continue, the run of `config`. Returns the exit code.

    Raises:
        UserError: the run cannot start, continue, or go on; a full disk or GPU included.
        LostProcess: another process of the run is gone.
    """
    try:
        return training.run(config, build_validator, _foresee)
    except torch.OutOfMemoryError as error:
        sizes = f"engine.micro_batch={config.engine.micro_batch}"
        advice = "use a smaller engine.micro_batch, or student.gradient_checkpointing=true"
        raise UserError(
            "engine.micro_batch", f"the GPU has too little memory for {sizes}; {advice} ({error})"
        ) from error
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        problem = f"has no room left ({error.strerror}: {error.filename or config.name})"
        raise UserError(config.out, f"{problem}; the checkpoints are intact, make room and start again") from error
    except RuntimeError as error:
        if not _is_communication(error):
            raise
        reason = str(error).strip().splitlines()[0]
        advice = "start again to go on from the last checkpoint"
        raise LostProcess(f"lost contact with another process; {advice} ({socket.gethostname()}: {reason})") from error


def _foresee(config: RunConfig, world: int) -> Forecast:
    """Dry-run a config. Imported here, because only a start on GPUs needs it."""
    from anyflow_train.plan.shortage import foresee

    return foresee(config, world)


def _is_communication(error: RuntimeError) -> bool:
    """Whether it says that another process has gone: gloo has no type for it."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)
