"""`anyflow train`: train a run, with validation."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from anyflow_train.config.run import RunConfig
from anyflow_train.errors import LostProcess, UserError, reason_of
from anyflow_train.evaluation.validation import build_validator
from anyflow_train.training import run as training
from anyflow_train.training.checkpoints.run_directory import RunDirectory
from anyflow_train.training.memory_check import Forecast, GpuMemory
from anyflow_train.training.processes import launched
from anyflow_train.training.reporting.notify import Notifier


def train(config: RunConfig) -> Path:
    """Train or resume a run from Python: `train(compose("train", ["experiment=tiny"]))`.

    Returns:
        The run directory. If a signal stopped the run early, call this again to resume it.

    Raises:
        UserError: the run cannot start, resume or continue.
        LostProcess: another process of the run has died.
    """
    run(config)
    return RunDirectory.of(config).path


def run(config: RunConfig) -> int:
    """Train or resume the run of `config`, and return the exit code. Tells `notify` how it ended.

    Raises:
        UserError: the run cannot start, resume or continue, for example because a disk or GPU is full.
        LostProcess: another process of the run has died.
    """
    notifier = Notifier(config if launched.rank() == 0 else config.model_copy(update={"notify": None}))
    try:
        code = _run(config)
    except BaseException as error:
        notifier.send("failed", f"failed: {reason_of(error)}")
        raise
    done = RunDirectory.of(config).read_done()
    state = "stopped" if done is None else "finished"
    notifier.send(state, state, None if done is None else done.get("step"))
    return code


def _run(config: RunConfig) -> int:
    try:
        return training.run(config, build_validator, _foresee)
    except torch.OutOfMemoryError as error:
        problem = f"{config.engine.micro_batch} needs more memory than the GPU has"
        advice = "use a smaller value, or student.gradient_checkpointing=block"
        raise UserError("engine.micro_batch", f"{problem}; {advice} ({error})") from error
    except OSError as error:
        raise UserError.of_file(error, RunDirectory.of(config).path) from error
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):  # gloo has no type of its own for that
            raise
        advice = "start again to resume from the last checkpoint"
        cause = f"{socket.gethostname()}: {reason_of(error)}"
        raise LostProcess(f"lost contact with another process; {advice} ({cause})") from error


def _foresee(config: RunConfig, strategy: str, gpus: Sequence[GpuMemory]) -> Forecast:
    """Dry-run a config. Imported here, because only a start on GPUs needs it."""
    from anyflow_train.plan.shortage import foresee

    return foresee(config, strategy, gpus)
