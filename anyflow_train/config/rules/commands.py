"""Rules for the commands other than `train`."""

from __future__ import annotations

import codecs
from collections.abc import Collection, Iterator

from anyflow_train.config.commands import DistilOptions, EvaluateConfig, PrepareConfig, SampleConfig
from anyflow_train.config.findings import Finding
from anyflow_train.config.rules.geometry import frame_count, video_size

# Keys of `anyflow prepare` that work only with another one.
OF_TEACHER = ("steps", "guidance_scale", "shift", "seed")
OF_SOURCE = ("windows", "hdr", "min_size", "min_seconds", "max_upscale")
NOT_OF_LATENTS = ("caption_key", "encoding", "prune", "dry_run")


def prepare(config: PrepareConfig, typed: Collection[str] = ()) -> Iterator[Finding]:
    """Check that there is something to encode, at sizes that Wan's VAE and patches divide.

    Args:
        config: config of the command.
        typed: keys that the user gave; one that others make useless must not be ignored.
    """
    for number, size in enumerate(config.buckets):
        found = video_size(*size)
        yield from (Finding((f"buckets.{number}",), f"{size}: {one.text}") for one in found)
    if not config.buckets:
        yield from video_size(config.frames, config.height, config.width)
    if len({*config.buckets}) < len(config.buckets):
        yield Finding(("buckets",), f"{[str(size) for size in config.buckets]} names a size twice; name each one once")
    if config.buckets:
        for key in {"frames", "height", "width"}.intersection(typed):
            problem = f"{getattr(config, key)} has no effect, as buckets say the sizes; leave one of them out"
            yield Finding((key, "buckets"), problem)
    for owner, keys in (("teacher", OF_TEACHER), ("source", OF_SOURCE)):
        for key in keys if getattr(config, owner) is None else ():
            if (value := getattr(config, key)) != PrepareConfig.model_fields[key].default:
                yield Finding((key, owner), f"{value} has no effect, as {owner} is null; leave {key} out")
    for key in NOT_OF_LATENTS if config.latents else ():
        if value := getattr(config, key):
            yield Finding((key, "latents"), f"{value} has no effect on latents that exist; leave {key} out")
    if config.buckets and config.prompts and not config.teacher:
        yield Finding(("buckets", "teacher"), "prompts have no size, and teacher is null; leave buckets out")
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
