"""Check, before anything slow, that the device fits the config and that the run may start from `student.init`."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch

from anyflow_train.config.pipelines import VAE
from anyflow_train.config.run import Data, Engine, Optimizer, RunConfig, Tracker, WandbTracker
from anyflow_train.config.schedule import stages
from anyflow_train.data.fingerprint import known_fingerprint
from anyflow_train.data.remote import is_remote
from anyflow_train.data.shards import ShardSet
from anyflow_train.errors import UserError, raise_all
from anyflow_train.files import read_object
from anyflow_train.training.checkpoints.reading import read_network, resolve_checkpoint
from anyflow_train.training.checkpoints.state import is_run
from anyflow_train.training.differences import differences
from anyflow_train.training.engine.adamw_8bit import library
from anyflow_train.training.reporting.tracking import has_key

LATENT_SPACE = ("z_dim", "latents_mean", "latents_std")
# The first GPUs that multiply in fp8: L40, RTX 40, H100.
FP8_CAPABILITY = (8, 9)


def refused_under(config: RunConfig, strategy: str) -> dict[str, tuple[str, str]]:
    """Keys that a strategy (a file of `launch/`) refuses -> reason and advice, and the value that it takes instead."""
    refused, roles = {}, [stage.config.objective.derivative_role for stage in stages(config)]
    if strategy.startswith("zero3") and config.engine.fp8 != "none":
        refused["engine.fp8"] = ("which shards the weights; choose ddp to zero2", "none")
    if strategy.startswith("zero3") and any(role is not None and role.exact for role in roles):
        refused["objective.derivative"] = ("because jvp requires whole weights; choose ddp to zero2", "difference")
    if strategy.startswith("zero") and config.optimizer.moments != "fp32":
        refused["optimizer.moments"] = ("which shards the moments; choose ddp", "fp32")
    return refused


def check_strategy(config: RunConfig, strategy: str) -> None:
    """Check that the launcher's strategy supports the config.

    Raises:
        UserErrors: one line for every key that the strategy refuses.
    """
    problem, refused = f"is refused under strategy={strategy}", refused_under(config, strategy)
    raise_all([UserError(key, f"{problem}, {why}, or set it to {value}") for key, (why, value) in refused.items()])


def check_fp8(engine: Engine, device: torch.device) -> None:
    """Check that `engine.fp8` works on the device. A CPU supports fp8 too, slowly.

    Raises:
        UserError: the GPU does not support fp8.
    """
    if engine.fp8 != "none" and device.type == "cuda" and torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        major, minor = torch.cuda.get_device_capability(device)
        problem = f"is frozen, which requires compute capability 8.9, but {torch.cuda.get_device_name(device)} has"
        raise UserError("engine.fp8", f"{problem} {major}.{minor}; set it to none")


def check_moments(optimizer: Optimizer) -> None:
    """Check that `optimizer.moments` works with the installed packages.

    Raises:
        UserError: bitsandbytes is missing.
    """
    if optimizer.moments == "fp32":
        return
    try:
        library()
    except ImportError as error:
        problem = f"is 8bit, which requires bitsandbytes, but it cannot be imported ({error})"
        advice = "pip install 'anyflow_train[bitsandbytes]', or set it to fp32"
        raise UserError("optimizer.moments", f"{problem}; {advice}") from error


def check_tracker(tracker: Tracker) -> None:
    """Check that the tracker has its key, without a connection.

    Raises:
        UserError: wandb is online, but has no API key.
    """
    if isinstance(tracker, WandbTracker) and tracker.mode == "online" and not has_key():
        problem = "is online, but wandb has no API key; run `wandb login`, or set WANDB_API_KEY"
        raise UserError("tracker.mode", f"{problem}, or set it to offline and upload later with `wandb sync`")


def check_start(config: RunConfig) -> None:
    """Compare a config with the run or exported folder that its student starts from.

    The weights only make sense with the same gate, second time and VAE. The number of frames, their size and the
    distribution of times may change.

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
    except UserError as error:
        return [UserError("student.init", f"cannot be read: {error}")]
    errors = differences(config.student, before.arguments, checkpoint)
    vae = _vae(config.teacher.codec_source, config.data.locations[0], config.data)
    vae_before = _vae(before.codec, before.shards, config.data)
    if vae is not None and vae_before is not None and vae != vae_before:
        problem = f"has the VAE {vae}, but {checkpoint} was trained with {vae_before}; use the same VAE"
        errors.append(UserError("teacher.codec", problem))
    return errors


def _unlike_folder(config: RunConfig, folder: Path) -> list[UserError]:
    """Compare the VAE of a pipeline folder."""
    vae, codec = read_object(folder / VAE), config.teacher.codec_source
    ours = {} if codec is None else read_object(Path(codec).expanduser() / VAE)
    different = [name for name in LATENT_SPACE if ours and vae and ours.get(name) != vae.get(name)]
    return [UserError("teacher.codec", f"is {codec}, whose VAE differs from {folder} in {name}") for name in different]


def _vae(codec: str | None, shards: str | None, data: Data) -> str | None:
    """Fingerprint of a run's VAE, from its files or from its shards. None if neither can be read."""
    found = known_fingerprint(codec, "vae")
    # A checkpoint's location of shards was written by others: a shell would run the command of a `pipe:` location.
    if found is None and shards is not None and (shards in data.locations or not is_remote(shards)):
        with suppress(UserError):
            found = ShardSet.open(shards, data.cache, data.cache_gib).manifest.codec.known_vae
    return found
