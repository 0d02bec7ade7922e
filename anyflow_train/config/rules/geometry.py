"""Rules for video sizes, the network's shape, and adapters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import accumulate

from anyflow_train.config.base import ClipSize
from anyflow_train.config.derived import SPATIAL_FACTOR, TEMPORAL_FACTOR, latent_shape, shares_base, token_grid
from anyflow_train.config.findings import Finding
from anyflow_train.config.network import PUBLISHED, Architecture, Lora, is_in, is_target, published
from anyflow_train.config.parameters import layers
from anyflow_train.config.run import RunConfig
from anyflow_train.text import nearest_hint

# Wan2.1's patch size in height and width, for commands that do not know the network.
WAN_PATCH = 2
SIZES = ("num_layers", "num_attention_heads", "attention_head_dim", "ffn_dim", "text_dim", "in_channels")


def video_size(
    frames: int | None, height: int | None, width: int | None, patch: int = WAN_PATCH, prefix: str = ""
) -> Iterator[Finding]:
    """Check frames, height and width, if they are set. The keys start with `prefix`."""
    if frames is not None:
        yield from frame_count(f"{prefix}frames", frames)
    unit = SPATIAL_FACTOR * patch
    for name, pixels in (("height", height), ("width", width)):
        if pixels is not None and pixels % unit:
            lower = pixels // unit * unit
            nearest = f"{lower} and {lower + unit}" if lower else f"{unit}"
            problem = f"{pixels} pixels are not a multiple of {unit} (VAE 8 x patch {patch}); nearest are {nearest}"
            yield Finding((f"{prefix}{name}",), problem)


def frame_count(key: str, frames: int) -> Iterator[Finding]:
    """Check for 4n + 1 frames: the VAE encodes the first frame alone, and then 4 frames into one latent frame."""
    if beyond := (frames - 1) % TEMPORAL_FACTOR:
        lower = frames - beyond
        yield Finding((key,), f"{frames} frames are not 4n + 1; nearest are {lower} and {lower + TEMPORAL_FACTOR}")


def run_sizes(config: RunConfig) -> Iterator[Finding]:
    """Check frames, height and width of the training clips against the VAE, the patch and the rotary table."""
    architecture, data = config.student.architecture, config.data
    yield from _clip_size(data.size, architecture, None)
    for number, size in enumerate(data.buckets):
        yield from _clip_size(size, architecture, f"data.buckets.{number}")
    key = "data.buckets"
    if len({*data.buckets}) < len(data.buckets):
        yield Finding((key,), f"{_listed(data.buckets)} names a size twice; name each one once")
    if data.buckets and data.size not in data.buckets:
        problem = f"{_listed(data.buckets)} does not have {data.size}, the size of validation"
        advice = "add it, or set data.frames, data.height and data.width to one of them"
        yield Finding((key, "data.frames", "data.height", "data.width"), f"{problem}; {advice}")


def _listed(sizes: Iterable[ClipSize]) -> str:
    return f"[{', '.join(map(str, sizes))}]"


def _clip_size(size: ClipSize, architecture: Architecture, bucket: str | None) -> Iterator[Finding]:
    """Check one size of training clips. Findings name their own key, or that of a bucket."""
    found = [*video_size(*size, architecture.patch_size[1], "data.")]
    if not found:
        latent, longest = latent_shape(size, architecture.in_channels), architecture.rope_max_seq_len
        for axis, tokens in zip(("frames", "height", "width"), token_grid(latent, architecture), strict=True):
            if tokens > longest:
                key, value = "student.architecture.rope_max_seq_len", getattr(size, axis)
                problem = f"{value} is {tokens} tokens along this axis, more than {key}={longest}; lower it"
                found.append(Finding((f"data.{axis}", key), problem))
    yield from (Finding((bucket or one.keys[0], *one.keys[1:]), one.text) for one in found)


def network_shape(config: RunConfig) -> Iterator[Finding]:
    """Check the shape that the transformer's constructor requires."""
    architecture = config.student.architecture
    prefix = "student.architecture"
    patch = architecture.patch_size
    if patch[0] != 1 or patch[1] != patch[2]:
        yield Finding((f"{prefix}.patch_size",), f"{list(patch)} must have the form [1, p, p] (Wan2.1: [1, 2, 2])")
    for name, reason in (("attention_head_dim", "rotary embedding rotates pairs"), ("freq_dim", "features are pairs")):
        if (size := getattr(architecture, name)) % 2:
            yield Finding((f"{prefix}.{name}",), f"{size} must be even, because {reason}")
    if architecture.in_channels != architecture.out_channels:
        problem = f"{architecture.out_channels} must be equal to {prefix}.in_channels={architecture.in_channels}"
        keys = (f"{prefix}.out_channels", f"{prefix}.in_channels")
        yield Finding(keys, f"{problem}, because a velocity has the shape of the latents")


def student_start(config: RunConfig) -> Iterator[Finding]:
    """Check that adapters have trained weights, and that options for random weights have random weights."""
    student = config.student
    if student.init is None and isinstance(student.adapter, Lora):
        problem = "kind=lora would freeze random weights; give student.init=..., or choose student/adapter=full"
        yield Finding(("student.adapter", "student.init"), problem)
    key, limit = "student.time_frequency_limit", student.time_frequency_limit
    if student.init is not None and limit is not None:
        problem = f"{limit} is only for random weights, but student.init={student.init} is trained; set {key}=null"
        yield Finding((key, "student.init"), problem)


def known_shapes(config: RunConfig) -> Iterator[Finding]:
    """Check the student's shape against the published network that it starts from or shares with the teacher.

    Other networks are checked when their weights are loaded.
    """
    init, teacher = config.student.init, config.teacher.source
    if difference := _difference(config, init):
        ours = [name for name in PUBLISHED if not _difference(config, name)]
        advice = f"give student.init=Wan-AI/{ours[0]}" if ours else "give a network of the student's shape"
        whose = " (the teacher)" if init == teacher else ""
        yield Finding(("student.init", "student.architecture"), f"{init}{whose} {difference}; {advice}")
    elif shares_base(config) and (difference := _difference(config, teacher)):
        key = "on_policy.fake_score.adapter"
        problem = f"lora requires one base for all roles, but {teacher} {difference}; set {key}.kind=full"
        yield Finding((key, "teacher.source"), problem)


def _difference(config: RunConfig, source: str | None) -> str | None:
    """Describe the first size in which a published network differs from the student.

    Returns None if no size differs or the network is not a published one.
    """
    shape = published(source)
    ours = config.student.architecture
    for name in SIZES if shape is not None else ():
        if getattr(shape, name) != getattr(ours, name):
            return f"has {name}={getattr(shape, name)}, but student.architecture.{name}={getattr(ours, name)}"
    return None


def adapter_targets(config: RunConfig) -> Iterator[Finding]:
    """Check that adapters name existing layers, and no layer twice."""
    adapter, key = config.student.adapter, "student.adapter"
    if not isinstance(adapter, Lora):
        return
    known = layers(config.student.architecture)
    linear = [name for name, sides in known.items() if sides is not None]
    if not adapter.targets:
        yield Finding((f"{key}.targets",), "is empty; name at least one layer")
    for target in adapter.targets:
        if not any(is_target(name, (target,)) for name in linear):
            yield Finding((f"{key}.targets",), f"{target!r} matches no linear layer{_nearest(target, linear)}")
    for module in adapter.full_modules:
        inside = [name for name in known if is_in(name, (module,))]
        if not inside:
            modules = [parent for name in known for parent in accumulate(name.split("."), "{}.{}".format)]
            yield Finding((f"{key}.full_modules",), f"{module!r} matches no module{_nearest(module, modules)}")
        elif any(is_target(name, adapter.targets) for name in inside):
            problem = f"{module!r} has layers that are also in {key}.targets; remove them from one of the two"
            yield Finding((f"{key}.full_modules", f"{key}.targets"), problem)


def _nearest(wrong: str, names: list[str]) -> str:
    """Name the nearest one of `names`, or all of them, without the parts that a user need not write."""
    short = dict.fromkeys(re.sub(r"^(blocks\.\d+|condition_embedder)\.", "", name) for name in names)
    return nearest_hint(wrong, short) or f"; valid are {', '.join(short)}"
