"""Rules of the commands beside training."""

from __future__ import annotations

from collections.abc import Iterator

from anyflow_train.config.commands import EvaluateConfig, PrepareConfig, SampleConfig
from anyflow_train.config.findings import Finding
from anyflow_train.config.rules.geometry import WAN_PATCH, frame_count, side_length


def prepare(config: PrepareConfig) -> Iterator[Finding]:
    """Something to encode, at sizes that Wan's VAE and patch divide."""
    yield from frame_count("frames", config.frames)
    yield from side_length("height", config.height, WAN_PATCH)
    yield from side_length("width", config.width, WAN_PATCH)
    if config.source is None and config.prompts is None:
        yield Finding(
            ("source", "prompts"), "null; give a folder or manifest of clips, or prompts=FILE for prompts only"
        )
    if config.source is not None and config.prompts is not None:
        yield Finding(
            ("prompts", "source"),
            f"{config.prompts!r} is for prompt-only shards, and source={config.source} has captions; give one",
        )


def sample(config: SampleConfig) -> Iterator[Finding]:
    """Something to sample, at possible sizes."""
    if not config.prompts and config.prompt_file is None:
        yield Finding(("prompts", "prompt_file"), "is empty; give prompts='[\"a red car\"]' or prompt_file=FILE")
    if config.frames is not None:
        yield from frame_count("frames", config.frames)
    for key, pixels in (("height", config.height), ("width", config.width)):
        if pixels is not None:
            yield from side_length(key, pixels, WAN_PATCH)
    if config.image is not None and config.video is not None:
        yield Finding(("image", "video"), f"{config.image!r}, but video={config.video} is given too; give one of them")
    if config.context_frames is not None:
        yield from frame_count("context_frames", config.context_frames)
        if config.video is None:
            yield Finding(
                ("context_frames", "video"),
                f"{config.context_frames}, but there is no video to take them from; give video=FILE",
            )


def evaluate(config: EvaluateConfig) -> Iterator[Finding]:
    """A guided reference needs guidance, the data has none; held-out clips are not those of the training."""
    if config.training_shards == config.held_out:
        yield Finding(
            ("training_shards", "held_out"),
            f"{config.held_out!r} is both; give the shards that the models were trained on",
        )
    guided = config.reference == "guided_teacher"
    if guided and config.guidance_scale <= 1:
        yield Finding(
            ("guidance_scale", "reference"),
            f"{config.guidance_scale:g} is no guidance, but reference=guided_teacher; "
            "set a scale above 1, or reference=data",
        )
    if not guided and config.guidance_scale != 1:
        yield Finding(
            ("reference", "guidance_scale"),
            f"data is compared with unguided samples, but guidance_scale={config.guidance_scale:g}; "
            "set reference=guided_teacher, or guidance_scale=1",
        )
