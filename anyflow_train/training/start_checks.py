"""Check, before anything slow, that the device fits the config and that the run may start from `student.init`."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from anyflow_train.config.objective import ObjectiveConfig
from anyflow_train.config.run import Data, Engine, Optimizer, RunConfig
from anyflow_train.data.fingerprint import NAMED, known_fingerprint
from anyflow_train.data.shards import ShardSet
from anyflow_train.errors import UserError
from anyflow_train.training.checkpoints.network_file import NetworkFile
from anyflow_train.training.checkpoints.reading import DamagedCheckpoint, read_network, resolve_checkpoint
from anyflow_train.training.engine import zero_stage
from anyflow_train.training.engine.adamw_8bit import library
from anyflow_train.training.weight_source import is_run, mismatches, raise_all

LATENT_SPACE = ("z_dim", "latents_mean", "latents_std")
# The first GPUs that multiply in fp8: L40, RTX 40, H100.
FP8_CAPABILITY = (8, 9)


def check_fp8(engine: Engine, device: torch.device) -> None:
    """Check that `engine.fp8` works on the device. A CPU supports fp8 too, slowly.

    Raises:
        UserError: the GPU does not support fp8, or ZeRO-3 shards the weights.
    """
    if engine.fp8 == "none":
        return
    if zero_stage() == 3:
        problem = "is frozen, which requires whole weights, but ZeRO-3 shards them; start with zero2 or ddp"
        raise UserError("engine.fp8", f"{problem}, or set it to none")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        major, minor = torch.cuda.get_device_capability(device)
        problem = f"is frozen, which requires compute capability 8.9, but {torch.cuda.get_device_name(device)} has"
        raise UserError("engine.fp8", f"{problem} {major}.{minor}; set it to none")


def check_moments(optimizer: Optimizer) -> None:
    """Check that `optimizer.moments` works with the launcher's strategy and the installed packages.

    Raises:
        UserError: bitsandbytes is missing, or ZeRO shards the moments.
    """
    if optimizer.moments == "fp32":
        return
    if zero_stage():
        problem = "is 8bit, which requires one process or DDP, but ZeRO shards the moments"
        raise UserError("optimizer.moments", f"{problem}; set it to fp32, or start with ddp")
    try:
        library()
    except ImportError as error:
        problem = f"is 8bit, which requires bitsandbytes, but it cannot be imported ({error})"
        advice = "pip install 'anyflow_train[bitsandbytes]', or set it to fp32"
        raise UserError("optimizer.moments", f"{problem}; {advice}") from error


def check_derivative(objective: ObjectiveConfig) -> None:
    """Check that the objective's derivative works with the launcher's strategy.

    Raises:
        UserError: the derivative is exact, and ZeRO-3 shards the weights.
    """
    role = objective.derivative_role
    if role is not None and role.exact and zero_stage() == 3:
        problem = "is jvp, which requires whole weights, but ZeRO-3 shards them; set it to difference"
        raise UserError("objective.derivative", f"{problem}, or start with zero2 or ddp")


def check_start(config: RunConfig) -> None:
    """Compare a config with the run or exported folder that its student starts from.

    The weights only make sense with the same gate, second time, shift and VAE. The number of frames and their size may
    change.

    Raises:
        UserErrors: one line for every difference, with the config key and both values.
    """
    init = config.student.init
    if init is None:
        return
    if is_run(init):
        raise_all(_unlike_run(config, resolve_checkpoint(init)))
    elif Path(init).expanduser().is_dir():
        raise_all(_unlike_folder(config, Path(init).expanduser()))


def _unlike_run(config: RunConfig, checkpoint: Path) -> list[UserError]:
    try:
        before = read_network(checkpoint)
    except (DamagedCheckpoint, UserError) as error:
        return [UserError("student.init", f"cannot be read: {error}")]
    ours = NetworkFile.of_student(config.student)
    pairs = [(f"student.{name}", value, before.times[name]) for name, value in ours.times.items()]
    # `causal` is compared when the weights are opened: a network that is not causal can become causal.
    shape = config.student.architecture.model_dump(exclude={"causal"})
    pairs += [(f"student.architecture.{name}", value, before.arguments.get(name)) for name, value in shape.items()]
    pairs.append(("times.shift", config.times.shift, before.sampling.shift))
    errors = mismatches(pairs, checkpoint)
    vae = _vae(config.teacher.codec_source, config.data.shards, config.data)
    vae_before = _vae(before.codec, before.shards, config.data)
    if vae is not None and vae_before is not None and vae != vae_before:
        problem = f"has the VAE {vae}, but {checkpoint} was trained with {vae_before}; use the same VAE"
        errors.append(UserError("teacher.codec", problem))
    return errors


def _unlike_folder(config: RunConfig, folder: Path) -> list[UserError]:
    """Compare the shift and the VAE of a pipeline folder. A Wan2.1 pipeline has no shift: it works with any."""
    scheduler, vae = _json(folder / "scheduler" / "scheduler_config.json"), _json(folder / "vae" / "config.json")
    errors = []
    if scheduler.get("_class_name") == "FlowMapEulerDiscreteScheduler":
        errors += mismatches([("times.shift", config.times.shift, scheduler.get("shift"))], folder)
    codec = config.teacher.codec_source
    ours = {} if codec is None else _json(Path(codec).expanduser() / "vae" / "config.json")
    for name in LATENT_SPACE if ours and vae else ():
        if ours.get(name) != vae.get(name):
            errors.append(UserError("teacher.codec", f"is {codec}, whose VAE differs from {folder} in {name}"))
    return errors


def _vae(codec: str | None, shards: str | None, data: Data) -> str | None:
    """Fingerprint of a run's VAE, from its files or from its shards. None if neither can be read."""
    found = known_fingerprint(codec, "vae")
    if found is None and shards is not None:
        with suppress(UserError):
            found = ShardSet.open(shards, data.cache, data.cache_gib).manifest.codec.vae
    return None if found is None or found.startswith(NAMED) else found


def _json(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        return json.loads(path.read_text())
    return {}
