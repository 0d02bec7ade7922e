"""Rules of causal students, and of what of its clip a sample is given."""

from __future__ import annotations

from collections.abc import Iterator

from anyflow_train.config.derived import latent_shape
from anyflow_train.config.findings import Finding
from anyflow_train.config.network import Causal
from anyflow_train.config.run import RunConfig

CAUSAL = "student.architecture.causal"
PARTITION = f"{CAUSAL}.chunk_partition"
LIMIT = f"{CAUSAL}.full_chunk_limit"
COMPRESSED = f"{CAUSAL}.compressed_patch_size"


def chunks(config: RunConfig) -> Iterator[Finding]:
    """The chunks make up the clips, and the context has patches that fit them."""
    causal = config.student.architecture.causal
    if causal is None:
        return
    frames, _, height, width = latent_shape(config.data, config.student.architecture.in_channels)
    partition, total = list(causal.chunk_partition), sum(causal.chunk_partition)
    if total != frames:
        yield Finding(
            (PARTITION, "data.frames"),
            f"{partition} sums to {total}, but data.frames={config.data.frames} gives {frames} latent frames",
        )
    if len(partition) < causal.full_chunk_limit:
        yield Finding(
            (LIMIT, PARTITION),
            f"{causal.full_chunk_limit} is more than the {len(partition)} chunks of {PARTITION}={partition}",
        )
    if causal.full_chunk_limit < 2:
        yield Finding((LIMIT,), "1 leaves no chunk before the new one at its full resolution; give 2 or more")
    yield from _patches(causal, config.student.architecture.patch_size[1], height, width)


def _patches(causal: Causal, patch: int, height: int, width: int) -> Iterator[Finding]:
    first, far, across = causal.compressed_patch_size
    if first != 1 or far != across or far % patch:
        size = list(causal.compressed_patch_size)
        yield Finding((COMPRESSED,), f"{size} is not of the form [1, p, p] with p a multiple of the patch, {patch}")
        return
    for axis, length in (("height", height), ("width", width)):
        if length % far:
            yield Finding(
                (f"data.{axis}", COMPRESSED),
                f"gives {length} latents along that axis, which {far}, the patch of the context, does not divide",
            )


def context(config: RunConfig) -> Iterator[Finding]:
    """What the options mean for this student, and what cannot go with them."""
    causal, given = config.student.architecture.causal, config.context
    follows = config.objective.follows_teacher
    if causal is None:
        if given.i2v_probability and config.data.frames == 1:
            yield Finding(
                ("context.i2v_probability", "data.frames"),
                f"{given.i2v_probability} gives the only latent frame of data.frames=1; set it to 0",
            )
        if given.i2v_probability and follows:
            yield Finding(
                ("context.i2v_probability", "objective.velocity"),
                f"{given.i2v_probability} gives a teacher clean frames, which it never saw; set it to data",
            )
        return
    if given.i2v_probability:
        yield Finding(
            ("context.i2v_probability", CAUSAL),
            f"{given.i2v_probability}, but a causal student learns to continue a frame anyway; set it to 0",
        )
    if follows:
        yield Finding(
            ("objective.velocity", CAUSAL),
            "'teacher' is the velocity of whole clips, and a causal student sees only what came before; set it to data",
        )
    if config.engine.sequence_parallel > 1:
        yield Finding(
            ("engine.sequence_parallel", CAUSAL),
            f"{config.engine.sequence_parallel} splits sequences of one kind of token; a causal student needs 1",
        )
    if given.long_share and len(causal.chunk_partition) <= causal.full_chunk_limit:
        yield Finding(
            ("context.long_share", PARTITION, LIMIT),
            f"{given.long_share}, but {len(causal.chunk_partition)} chunks with {LIMIT}={causal.full_chunk_limit} are "
            "never compressed; set it to 0, or give more chunks",
        )
