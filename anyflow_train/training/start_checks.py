"""Whether a run may start from what `student.init` names, and where it does: refused before anything slow is done."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

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
    """A CPU multiplies in fp8 too, slowly.

    Raises:
        UserError: the GPU cannot, or the launcher cuts the weights into shards.
    """
    if engine.fp8 == "none":
        return
    if zero_stage() == 3:
        problem = "frozen takes whole weights, and ZeRO-3 leaves each process a shard; start with zero2 or ddp"
        raise UserError("engine.fp8", f"{problem}, or set it to none")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        problem = f"frozen needs a GPU of compute capability 8.9 or more, and {torch.cuda.get_device_name(device)} has"
        major, minor = torch.cuda.get_device_capability(device)
        raise UserError("engine.fp8", f"{problem} {major}.{minor}; set it to none")


def check_moments(optimizer: Optimizer) -> None:
    """Where Adam's moments may be kept in 8 bits.

    Raises:
        UserError: the library is missing, or the launcher cuts the moments into shards.
    """
    if optimizer.moments == "fp32":
        return
    if zero_stage():
        problem = "8bit is for one process and DDP, and ZeRO cuts the moments over the processes instead"
        raise UserError("optimizer.moments", f"{problem}; set it to fp32, or start with ddp")
    try:
        library()
    except ImportError as error:
        problem = f"8bit needs bitsandbytes, which cannot be imported ({error})"
        advice = "pip install 'anyflow_train[bitsandbytes]', or set it to fp32"
        raise UserError("optimizer.moments", f"{problem}; {advice}") from error


def check_start(config: RunConfig) -> None:
    """Compare a config with the run, or exported folder, that its student starts from.

    Another gate, second time or shift gives the same weights another meaning, and so does another VAE. Another number
    of frames, or another size of the picture, is a change that training may make.

    Raises:
        UserErrors: all the differences, with the config key and both values.
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
    except DamagedCheckpoint as damage:
        return [UserError("student.init", f"is damaged: {damage}")]
    except UserError as error:
        return [UserError("student.init", str(error))]
    ours = NetworkFile.of_student(config.student)
    pairs = [(f"student.{name}", value, before.times[name]) for name, value in ours.times.items()]
    # Whether it is causal, and how, is compared where it is opened: another network can become it.
    shape = config.student.architecture.model_dump(exclude={"causal"})
    pairs += [(f"student.architecture.{name}", value, before.arguments.get(name)) for name, value in shape.items()]
    pairs.append(("times.shift", config.times.shift, before.sampling.shift))
    errors = mismatches(pairs, checkpoint)
    vae = _vae(config.teacher.codec_source, config.data.shards, config.data)
    vae_before = _vae(before.codec, before.shards, config.data)
    if vae is not None and vae_before is not None and vae != vae_before:
        problem = (
            f"has another VAE ({vae}) than {checkpoint} was trained with ({vae_before}); its latents mean nothing here"
        )
        errors.append(UserError("teacher.codec", problem))
    return errors


def _unlike_folder(config: RunConfig, folder: Path) -> list[UserError]:
    """An AnyFlow pipeline says its shift and its latents; a Wan2.1 pipeline was trained with all shifts."""
    scheduler, vae = _json(folder / "scheduler" / "scheduler_config.json"), _json(folder / "vae" / "config.json")
    errors = []
    if scheduler.get("_class_name") == "FlowMapEulerDiscreteScheduler":
        errors += mismatches([("times.shift", config.times.shift, scheduler.get("shift"))], folder)
    codec = config.teacher.codec_source
    ours = {} if codec is None else _json(Path(codec).expanduser() / "vae" / "config.json")
    for name in LATENT_SPACE if ours and vae else ():
        if ours.get(name) != vae.get(name):
            errors.append(UserError("teacher.codec", f"{codec} has another VAE than {folder}: their {name} differ"))
    return errors


def _vae(codec: str | None, shards: str | None, data: Data) -> str | None:
    """The fingerprint of a run's VAE, of its files or else of its shards; None where both are out of reach."""
    found = known_fingerprint(codec, "vae")
    if found is None and shards is not None:
        with suppress(UserError):
            found = ShardSet.open(shards, data.cache, data.cache_gib).manifest.codec.vae
    return None if found is None or found.startswith(NAMED) else found


def _json(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        return json.loads(path.read_text())
    return {}
