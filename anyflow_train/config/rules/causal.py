"""Rules for causal students, and for conditioning frames."""

from __future__ import annotations

from collections.abc import Iterator

from anyflow_train.config.derived import SPATIAL_FACTOR, latent_shape
from anyflow_train.config.findings import Finding
from anyflow_train.config.run import RunConfig

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
    partition, limit, total = list(causal.chunk_partition), causal.full_chunk_limit, sum(causal.chunk_partition)
    if total != frames:
        problem = f"{partition} sums to {total}, but data.frames={config.data.frames} is {frames} latent frames"
        yield Finding((PARTITION, "data.frames"), f"{problem}; the sum must be equal to them")
    for number, size in enumerate(config.data.buckets):
        if size.frames != config.data.frames:
            problem = f"{size} has other frames than data.frames={config.data.frames}, but {PARTITION}={partition}"
            advice = "divides all clips; give sizes of these frames"
            yield Finding((f"data.buckets.{number}", PARTITION), f"{problem} {advice}")
    if len(partition) < limit:
        problem = f"{limit} is more than the {len(partition)} chunks of {PARTITION}={partition}"
        yield Finding((LIMIT, PARTITION), f"{problem}; lower it")
    if limit < 2:
        yield Finding((LIMIT,), "1 compresses every earlier chunk; set it to 2 or more")
    (first, far, across), patch = causal.compressed_patch_size, config.student.architecture.patch_size[1]
    if first != 1 or far != across or far % patch:
        form = f"the form [1, p, p], with p a multiple of the patch size {patch}"
        yield Finding((COMPRESSED,), f"{list(causal.compressed_patch_size)} must have {form}")
        return
    data = config.data
    sides = [(f"data.{axis}", getattr(data, axis)) for axis in ("height", "width")]
    sides += [(f"data.buckets.{n}", pixels) for n, size in enumerate(data.buckets) for pixels in size[1:]]
    for key, pixels in sides:
        if (latents := pixels // SPATIAL_FACTOR) % far:
            problem = f"{pixels} pixels are {latents} latents, which is not a multiple of {far}"
            yield Finding((key, COMPRESSED), f"{problem}, the patch size in {COMPRESSED}")


def context(config: RunConfig) -> Iterator[Finding]:
    """Check the conditioning options against the kind of student."""
    causal, follows = config.student.architecture.causal, config.objective.follows_teacher
    key, share, long_share = "context.i2v_probability", config.context.i2v_probability, config.context.long_share
    if causal is None:
        if share and any(size.frames == 1 for size in (config.data.size, *config.data.buckets)):
            place = "data.frames=1" if config.data.frames == 1 else "a bucket of pictures"
            problem = f"{share} would give the only latent frame of {place}"
            yield Finding((key, "data.frames", "data.buckets"), f"{problem}; set it to 0")
        if share and follows:
            problem = f"{share} would give clean frames to a teacher that was not trained on them"
            yield Finding((key, "objective.velocity"), f"{problem}; set it to 0, or objective.velocity=data")
        return
    if share:
        problem = f"{share} is not needed, because a causal student always learns to continue a frame"
        yield Finding((key, CAUSAL), f"{problem}; set it to 0")
    if follows:
        problem = "'teacher' gives velocities of whole clips, but a causal student sees only earlier frames"
        yield Finding(("objective.velocity", CAUSAL), f"{problem}; set it to data")
    if (width := config.engine.sequence_parallel) > 1:
        problem = f"{width} is not supported for a causal student; set it to 1"
        yield Finding(("engine.sequence_parallel", CAUSAL), problem)
    count, limit = len(causal.chunk_partition), causal.full_chunk_limit
    if long_share and count <= limit:
        problem = f"{long_share} has no effect: {count} chunks with {LIMIT}={limit} are never compressed"
        yield Finding(("context.long_share", PARTITION, LIMIT), f"{problem}; set it to 0, or use more chunks")
