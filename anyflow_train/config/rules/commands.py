"""Rules for the commands other than `train`."""

from __future__ import annotations

import codecs
from collections.abc import Iterator

from anyflow_train.config.commands import DistilOptions, EvaluateConfig, PrepareConfig, SampleConfig
from anyflow_train.config.findings import Finding
from anyflow_train.config.rules.geometry import frame_count, video_size


def prepare(config: PrepareConfig) -> Iterator[Finding]:
    """Check that there is something to encode, at sizes that Wan's VAE and patches divide."""
    for number, size in enumerate(config.buckets):
        found = video_size(*size)
        yield from (Finding((f"buckets.{number}",), f"{size}: {one.text}") for one in found)
    if not config.buckets:
        yield from video_size(config.frames, config.height, config.width)
    if len({*config.buckets}) < len(config.buckets):
        yield Finding(("buckets",), f"{[str(size) for size in config.buckets]} names a size twice; name each one once")
    if config.source is None:
        for key, value in (("buckets", config.buckets), ("windows", config.windows)):
            if value not in ((), "first"):
                problem = f"{value if key == 'windows' else [*map(str, value)]} is for clips, but source is null"
                yield Finding((key, "source"), f"{problem}; leave {key} out")
    try:
        codecs.lookup(config.encoding or "utf-8")
    except (LookupError, ValueError):
        yield Finding(("encoding",), f"{config.encoding!r} is unknown; give a name of Python, such as cp1252 or gbk")
    given = {key: getattr(config, key) for key in ("source", "prompts", "latents") if getattr(config, key) is not None}
    if not given:
        problem = "null; give a folder or list of clips, prompts=FILE to encode only prompts, or latents=FOLDER"
        yield Finding(("source", "prompts", "latents"), problem)
    if len(given) > 1:
        (first, value), (second, other), *_ = given.items()
        yield Finding((second, first), f"{other!r}, but {first}={value} is also set; give only one")
    if config.teacher is not None and config.prompts is None:
        problem = f"{config.teacher!r} makes clips from prompts, but prompts is null; give prompts=FILE"
        yield Finding(("teacher", "prompts"), problem)


def sample(config: SampleConfig) -> Iterator[Finding]:
    """Check that there is a prompt, and that sizes and conditioning are possible."""
    if not config.prompts and not config.prompt:
        yield Finding(("prompt", "prompts"), "is empty; give prompt='a red car, at night' or prompts=FILE")
    yield from video_size(config.frames, config.height, config.width)
    if config.image is not None and config.video is not None:
        yield Finding(("image", "video"), f"{config.image!r}, but video={config.video} is also set; give only one")
    if config.context_frames is not None:
        yield from frame_count("context_frames", config.context_frames)
        if config.video is None:
            problem = f"{config.context_frames} has no effect without a video; give video=FILE"
            yield Finding(("context_frames", "video"), problem)


def evaluate(config: EvaluateConfig) -> Iterator[Finding]:
    """Check that guidance fits the reference, and that training clips are not held-out clips."""
    if config.training_shards == config.held_out:
        problem = f"{config.held_out!r} is also held_out; give the shards that the models were trained on"
        yield Finding(("training_shards", "held_out"), problem)
    guided = config.reference == "guided_teacher"
    if guided and config.guidance_scale <= 1:
        problem = f"{config.guidance_scale:g} means no guidance, but reference=guided_teacher"
        yield Finding(("guidance_scale", "reference"), f"{problem}; set a scale above 1, or reference=data")
    if not guided and config.guidance_scale != 1:
        problem = f"'data' requires unguided samples, but guidance_scale={config.guidance_scale:g}"
        advice = "set reference=guided_teacher, or guidance_scale=1"
        yield Finding(("reference", "guidance_scale"), f"{problem}; {advice}")


def distil(config: DistilOptions) -> Iterator[Finding]:
    """Check that there are clips or prompts, and a first stage."""
    if (config.source is None) == (config.prompts is None):
        yield Finding(("source", "prompts"), "give either source=CLIPS or prompts=FILE")
    if not config.stage1:
        yield Finding(("stage1", "experiment"), "is empty; give experiment=wan1_3b, or arguments of `anyflow train`")
