"""Quantities derived from a run's config, used by `anyflow check` and by the rules."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from anyflow_train.config.chunks import Chunks
from anyflow_train.config.network import Architecture, Lora
from anyflow_train.config.positions import BranchCounts
from anyflow_train.config.run import Data, RunConfig
from anyflow_train.config.schedule import stages
from anyflow_train.errors import UserError

# Wan2.1's VAE: 8x in height and width, 4x in time after the first frame, 16 channels.
SPATIAL_FACTOR = 8
TEMPORAL_FACTOR = 4


@dataclass(frozen=True)
class Derived:
    """Quantities derived from a run's config.

    shares: number of process groups (of `sequence_parallel` processes each) that split the global batch.
    latent: (F, C, H, W) of one sample; grid: tokens along (F, H, W).
    branches: samples of each branch per step; None if the objective has no branches or stage 2 leaves it out.
    turns: steps in which the student is updated in stage 2; None outside stage 2, where every step updates it.
    chunks: chunks of a causal student; None for other students.
    schedule: steps of each stage of the run; one stage without a schedule.
    """

    shares: int
    sequence_parallel: int
    accumulation: int
    global_batch: int
    branches: BranchCounts | None
    latent: tuple[int, int, int, int]
    grid: tuple[int, int, int]
    steps: int
    turns: int | None
    chunks: Chunks | None
    schedule: tuple[range, ...]

    @property
    def samples(self) -> int:
        """Number of samples that the run reads from its data."""
        return self.steps * self.global_batch

    @property
    def tokens(self) -> int:
        """Number of tokens of one sample."""
        frames, height, width = self.grid
        return frames * height * width


def derive(config: RunConfig, world: int) -> Derived:
    """Derive the quantities of a config without errors, on `world` processes."""
    latent = latent_shape(config.data, config.student.architecture.in_channels)
    shares = world // config.engine.sequence_parallel
    matching = config.on_policy.matching
    return Derived(
        shares=shares,
        sequence_parallel=config.engine.sequence_parallel,
        accumulation=config.engine.global_batch // (config.engine.micro_batch * shares),
        global_batch=config.engine.global_batch,
        branches=_branches(config),
        latent=latent,
        grid=token_grid(latent, config.student.architecture),
        steps=config.steps,
        turns=math.ceil(config.steps / matching.fake_score.updates) if matching else None,
        chunks=Chunks.of(config.student.architecture),
        schedule=tuple(stage.steps for stage in stages(config)),
    )


def latent_shape(data: Data, channels: int) -> tuple[int, int, int, int]:
    """Return (F, C, H, W) of the latents of one clip."""
    frames = (data.frames - 1) // TEMPORAL_FACTOR + 1
    return frames, channels, data.height // SPATIAL_FACTOR, data.width // SPATIAL_FACTOR


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


def world_size() -> int:
    """Return the number of processes that the launcher started (`WORLD_SIZE`); 1 without a launcher.

    Raises:
        UserError: the variable is not a positive number.
    """
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise UserError("WORLD_SIZE", f"{text!r} in the environment is not a number of processes; unset it")
    return int(text)


def table(derived: Derived) -> list[tuple[str, str]]:
    """List the names and values that `anyflow check` prints."""
    frames, channels, height, width = derived.latent
    micro_batch = derived.global_batch // (derived.accumulation * derived.shares)
    share = "process" if derived.sequence_parallel == 1 else f"group of {derived.sequence_parallel} processes"
    plural = f"{share}es" if share == "process" else share.replace("group", "groups")
    rows = [
        (
            "global batch",
            f"{derived.global_batch} = {derived.shares} {share if derived.shares == 1 else plural} x "
            f"{derived.accumulation} accumulation x {micro_batch} micro-batch",
        ),
        ("latent", f"{frames} frames x {channels} channels x {height} x {width}"),
        ("tokens", f"{derived.tokens:,} per sample ({' x '.join(map(str, derived.grid))})"),
        *_chunk_rows(derived),
        *_on_policy_rows(derived),
        ("samples seen", f"{derived.samples:,}"),
    ]
    if len(derived.schedule) > 1:
        rows.append(("stages", ", ".join(f"steps {steps[0]:,} to {steps[-1]:,}" for steps in derived.schedule)))
    if derived.branches is not None:
        counts = derived.branches
        text = (
            f"{counts.diffusion} diffusion, {counts.consistency} consistency, {counts.free} free (in each global batch)"
        )
        rows.insert(1, ("branches", text))
    return rows


def _chunk_rows(derived: Derived) -> list[tuple[str, str]]:
    if derived.chunks is None:
        return []
    chunks, limit = " + ".join(map(str, derived.chunks.partition)), derived.chunks.full_limit
    return [("chunks", f"{chunks} latent frames, all except the newest {limit} of a sequence compressed")]


def _on_policy_rows(derived: Derived) -> list[tuple[str, str]]:
    if derived.turns is None:
        return []
    steps = f"{derived.turns:,} steps ({derived.turns * derived.global_batch:,} samples)"
    return [("updates", f"student in {steps}, fake score in all {derived.steps:,}")]


def _branches(config: RunConfig) -> BranchCounts | None:
    if config.on_policy.objective_weight == 0:
        return None
    return config.objective.branch_counts(config.times, config.engine.global_batch)
