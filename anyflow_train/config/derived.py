"""Quantities derived from a run's config, used by `anyflow check` and by the rules."""

from __future__ import annotations

import math
import os

from anyflow_train.config.base import ClipSize
from anyflow_train.config.chunks import Chunks
from anyflow_train.config.network import Architecture, Lora
from anyflow_train.config.run import Data, RunConfig
from anyflow_train.config.schedule import stages
from anyflow_train.errors import UserError

# Wan2.1's VAE: 8x in height and width, 4x in time after the first frame, 16 channels.
SPATIAL_FACTOR = 8
TEMPORAL_FACTOR = 4


def latent_shape(
    size: ClipSize | Data, channels: int, temporal: int = TEMPORAL_FACTOR, spatial: int = SPATIAL_FACTOR
) -> tuple[int, int, int, int]:
    """Return (F, C, H, W) of the latents of one clip.

    Args:
        temporal: frames per latent frame after the first.
        spatial: pixels per latent, in height and in width.
    """
    return (size.frames - 1) // temporal + 1, channels, size.height // spatial, size.width // spatial


def largest(data: Data) -> ClipSize:
    """Find the size of the clips with the most latents, which decides the memory."""
    return max(data.sizes, key=lambda size: math.prod(latent_shape(size, 1)))


def token_grid(latent: tuple[int, int, int, int], architecture: Architecture) -> tuple[int, int, int]:
    """Return the number of tokens along (F, H, W)."""
    frames, _, height, width = latent
    patch = architecture.patch_size
    return frames // patch[0], height // patch[1], width // patch[2]


def needs_teacher(config: RunConfig) -> bool:
    """Whether a run calls the teacher: for its velocity, in stage 2, or as the reference of validation."""
    evaluated = bool(config.evaluation.every) and config.evaluation.reference == "teacher"
    followed = any(stage.config.objective.follows_teacher for stage in stages(config))
    return evaluated or followed or config.on_policy.matching is not None


def adapter_on_shared_base(config: RunConfig) -> Lora | None:
    """Return the fake score's adapter on the student's frozen base; None if each role has its own network."""
    settings = config.on_policy.matching
    adapter = None if settings is None else settings.fake_score.adapter
    return adapter if isinstance(adapter, Lora) else None


def shares_base(config: RunConfig) -> bool:
    """Whether all roles share the student's frozen base.

    In stage 2 the fake score's adapter decides. In stage 1 they do if the student's adapters are on the teacher itself.
    """
    if config.on_policy.matching is not None:
        return adapter_on_shared_base(config) is not None
    student = config.student
    same = student.init is not None and student.init == config.teacher.source
    # With t - r as the second time, the base would not equal the teacher at r = t.
    return needs_teacher(config) and isinstance(student.adapter, Lora) and same and student.deltatime_type == "r"


def most_checkpoints(config: RunConfig) -> int:
    """Checkpoints that are on the disk at once: the last ones, the milestones, the best, and the one being written."""
    keeping = config.checkpoint
    milestones = config.steps // keeping.keep_every if keeping.keep_every else 0
    return keeping.keep + milestones + bool(config.evaluation.every) + 1


def world_size() -> int:
    """Return the number of processes that the launcher started (`WORLD_SIZE`); 1 without a launcher.

    Raises:
        UserError: the variable is not a positive number, or the launcher gave its processes no port to meet at.
    """
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise UserError("WORLD_SIZE", f"{text!r} in the environment is not a number of processes; unset it")
    if "RANK" in os.environ and os.environ.get("MASTER_PORT") == "0":
        problem = "is 0, so that the processes cannot find each other; use torchrun --standalone, or name a free port"
        raise UserError("MASTER_PORT", problem)
    return int(text)


def table(config: RunConfig, world: int) -> list[tuple[str, str]]:
    """List the names and values that `anyflow check` prints about a config without errors, on `world` processes."""
    engine, architecture, matching = config.engine, config.student.architecture, config.on_policy.matching
    latent = latent_shape(config.data, architecture.in_channels)
    grid = token_grid(latent, architecture)
    # Process groups of `sequence_parallel` processes split the global batch.
    shares, width = world // engine.sequence_parallel, engine.sequence_parallel
    several = shares > 1
    unit = f"process{'es' * several}" if width == 1 else f"group{'s' * several} of {width} processes"
    accumulation = engine.global_batch // (engine.micro_batch * shares)
    split = f"{shares} {unit} x {accumulation} accumulation x {engine.micro_batch} micro-batch"
    rows = [("global batch", f"{engine.global_batch} = {split}")]
    counts = config.objective.branch_counts(config.times, engine.global_batch)
    if counts is not None and config.on_policy.objective_weight != 0:
        sizes = f"{counts.diffusion} diffusion, {counts.consistency} consistency, {counts.free} free"
        rows.append(("branches", f"{sizes} (in each global batch)"))
    rows.append(("latent", "{} frames x {} channels x {} x {}".format(*latent)))
    rows.append(("tokens", f"{math.prod(grid):,} per sample ({' x '.join(map(str, grid))})"))
    most = math.prod(latent_shape(largest(config.data), 1))
    for size in config.data.buckets:
        count = math.prod(latent_shape(size, 1))
        turns = most // count
        samples = f"{turns} x {engine.global_batch}" if turns > 1 else str(engine.global_batch)
        tokens = count // math.prod(architecture.patch_size)
        rows.append((f"bucket {size}", f"{tokens:,} tokens per sample, {samples} samples in a step"))
    if chunks := Chunks.of(architecture):
        text = f"{' + '.join(map(str, chunks.partition))} latent frames"
        rows.append(("chunks", f"{text}, all except the newest {chunks.full_limit} of a sequence compressed"))
    if matching:
        turns = math.ceil(config.steps / matching.fake_score.updates)
        text = f"student in {turns:,} steps ({turns * engine.global_batch:,} samples)"
        rows.append(("updates", f"{text}, fake score in all {config.steps:,}"))
    more = " or more" if len(config.data.buckets) > 1 else ""
    rows.append(("samples seen", f"{config.steps * engine.global_batch:,}{more}"))
    if config.objective.schedule:
        parts = [f"steps {stage.steps[0]:,} to {stage.steps[-1]:,}" for stage in stages(config)]
        rows.append(("stages", ", ".join(parts)))
    return rows
