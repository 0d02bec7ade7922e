"""Rules for causal students, and for conditioning frames."""

from __future__ import annotations

from collections.abc import Iterator

from anyflow_train.config.derived import SPATIAL_FACTOR, latent_shape
from anyflow_train.config.findings import Finding
from anyflow_train.config.network import Causal
from anyflow_train.config.run import Data, RunConfig

CAUSAL = "student.architecture.causal"
PARTITION = f"{CAUSAL}.chunk_partition"
LIMIT = f"{CAUSAL}.full_chunk_limit"
COMPRESSED = f"{CAUSAL}.compressed_patch_size"


def chunks(config: RunConfig) -> Iterator[Finding]:
    """Check that the chunks add up to a clip, and that the patches of the context fit."""
    causal = config.student.architecture.causal
    if causal is None:
        return
    frames = latent_shape(config.data, config.student.architecture.in_channels)[0]
    partition, total = list(causal.chunk_partition), sum(causal.chunk_partition)
    if total != frames:
        yield Finding(
            (PARTITION, "data.frames"),
            f"{partition} sums to {total}, but data.frames={config.data.frames} is {frames} latent frames; the sum "
            "must be equal to them",
        )
    if len(partition) < causal.full_chunk_limit:
        yield Finding(
            (LIMIT, PARTITION),
            f"{causal.full_chunk_limit} is more than the {len(partition)} chunks of {PARTITION}={partition}; lower it",
        )
    if causal.full_chunk_limit < 2:
        yield Finding((LIMIT,), "1 compresses every earlier chunk; set it to 2 or more")
    yield from _patches(causal, config.student.architecture.patch_size[1], config.data)


def _patches(causal: Causal, patch: int, data: Data) -> Iterator[Finding]:
    first, far, across = causal.compressed_patch_size
    if first != 1 or far != across or far % patch:
        size = list(causal.compressed_patch_size)
        yield Finding(
            (COMPRESSED,), f"{size} must have the form [1, p, p], with p a multiple of the patch size {patch}"
        )
        return
    for axis, pixels in (("height", data.height), ("width", data.width)):
        if (pixels // SPATIAL_FACTOR) % far:
            yield Finding(
                (f"data.{axis}", COMPRESSED),
                f"{pixels} pixels are {pixels // SPATIAL_FACTOR} latents, which is not a multiple of {far}, the patch "
                f"size in {COMPRESSED}",
            )


def context(config: RunConfig) -> Iterator[Finding]:
    """Check the conditioning options against the kind of student."""
    causal, given = config.student.architecture.causal, config.context
    follows = config.objective.follows_teacher
    if causal is None:
        if given.i2v_probability and config.data.frames == 1:
            yield Finding(
                ("context.i2v_probability", "data.frames"),
                f"{given.i2v_probability} would give the only latent frame of data.frames=1; set it to 0",
            )
        if given.i2v_probability and follows:
            yield Finding(
                ("context.i2v_probability", "objective.velocity"),
                f"{given.i2v_probability} would give clean frames to a teacher that was not trained on them; set it to "
                "0, or objective.velocity=data",
            )
        return
    if given.i2v_probability:
        yield Finding(
            ("context.i2v_probability", CAUSAL),
            f"{given.i2v_probability} is not needed, because a causal student always learns to continue a frame; set "
            "it to 0",
        )
    if follows:
        yield Finding(
            ("objective.velocity", CAUSAL),
            "'teacher' gives velocities of whole clips, but a causal student sees only earlier frames; set it to data",
        )
    if config.engine.sequence_parallel > 1:
        yield Finding(
            ("engine.sequence_parallel", CAUSAL),
            f"{config.engine.sequence_parallel} is not supported for a causal student; set it to 1",
        )
    if given.long_share and len(causal.chunk_partition) <= causal.full_chunk_limit:
        yield Finding(
            ("context.long_share", PARTITION, LIMIT),
            f"{given.long_share} has no effect: {len(causal.chunk_partition)} chunks with "
            f"{LIMIT}={causal.full_chunk_limit} are never compressed; set it to 0, or use more chunks",
        )
