"""Rules of video sizes, of the network's shape, and of adapters."""

from __future__ import annotations

from collections.abc import Iterator

from anyflow_train.config.derived import SPATIAL_FACTOR, TEMPORAL_FACTOR, latent_shape, shares_base, token_grid
from anyflow_train.config.findings import Finding
from anyflow_train.config.network import Architecture, Lora
from anyflow_train.config.parameters import in_modules, linear_layers, matches, parameter_names
from anyflow_train.config.run import RunConfig
from anyflow_train.text import nearest_hint

# Wan2.1's patch in height and width; where the network is known, its own patch is used instead.
WAN_PATCH = 2
# The published networks by the last part of their hub id, which is also the usual name of a local copy.
PUBLISHED = {
    "Wan2.1-T2V-1.3B-Diffusers": Architecture(num_attention_heads=12, ffn_dim=8960, num_layers=30),
    "Wan2.1-T2V-14B-Diffusers": Architecture(),
}
SIZES = ("num_layers", "num_attention_heads", "attention_head_dim", "ffn_dim", "text_dim", "in_channels")


def frame_count(key: str, frames: int) -> Iterator[Finding]:
    """The VAE turns one frame into the first latent and every 4 after it into one more."""
    beyond = (frames - 1) % TEMPORAL_FACTOR
    if beyond:
        lower = frames - beyond
        yield Finding((key,), f"{frames} frames are not 4n+1; nearest are {lower} and {lower + TEMPORAL_FACTOR}")


def side_length(key: str, pixels: int, patch: int) -> Iterator[Finding]:
    """A side must divide into VAE cells and those into patches."""
    unit = SPATIAL_FACTOR * patch
    if pixels % unit:
        lower = pixels // unit * unit
        nearest = f"{lower} and {lower + unit}" if lower else f"{unit}"
        yield Finding(
            (key,), f"{pixels} pixels are not a multiple of {unit} (VAE 8 x patch {patch}); nearest are {nearest}"
        )


def run_sizes(config: RunConfig) -> Iterator[Finding]:
    """Frames, height and width of the training clips against the VAE, the patch and the rotary table."""
    architecture = config.student.architecture
    size = [
        *frame_count("data.frames", config.data.frames),
        *side_length("data.height", config.data.height, architecture.patch_size[1]),
        *side_length("data.width", config.data.width, architecture.patch_size[2]),
    ]
    yield from size
    if size:
        return
    latent = latent_shape(config.data, architecture.in_channels)
    longest = architecture.rope_max_seq_len
    for axis, tokens in zip(("frames", "height", "width"), token_grid(latent, architecture), strict=True):
        if tokens > longest:
            yield Finding(
                (f"data.{axis}", "student.architecture.rope_max_seq_len"),
                f"{getattr(config.data, axis)} gives {tokens} tokens along that axis, more than "
                f"student.architecture.rope_max_seq_len={longest}",
            )


def network_shape(config: RunConfig) -> Iterator[Finding]:
    """What the transformer's constructor would refuse later."""
    architecture = config.student.architecture
    prefix = "student.architecture"
    patch = architecture.patch_size
    if patch[0] != 1 or patch[1] != patch[2]:
        yield Finding((f"{prefix}.patch_size",), f"{list(patch)} is not of the form [1, p, p] (Wan2.1: [1, 2, 2])")
    if architecture.attention_head_dim % 2:
        yield Finding(
            (f"{prefix}.attention_head_dim",),
            f"{architecture.attention_head_dim} is odd; the rotary embedding turns pairs, so it must be even",
        )
    if architecture.freq_dim % 2:
        yield Finding(
            (f"{prefix}.freq_dim",),
            f"{architecture.freq_dim} is odd; time features are sine and cosine, so it must be even",
        )
    if architecture.in_channels != architecture.out_channels:
        yield Finding(
            (f"{prefix}.out_channels", f"{prefix}.in_channels"),
            f"{architecture.out_channels} differs from {prefix}.in_channels={architecture.in_channels}; "
            "a velocity has the shape of its latents",
        )


def student_start(config: RunConfig) -> Iterator[Finding]:
    """Random weights and adapters, each where it makes sense."""
    student = config.student
    if student.init is None and isinstance(student.adapter, Lora):
        yield Finding(
            ("student.adapter", "student.init"),
            "kind=lora would leave random weights frozen; give student.init=..., or choose student/adapter=full",
        )
    if student.init is not None and student.time_frequency_limit is not None:
        yield Finding(
            ("student.time_frequency_limit", "student.init"),
            f"{student.time_frequency_limit} is only for random weights, and student.init={student.init} gives "
            "trained ones; set student.time_frequency_limit=null",
        )


def known_shapes(config: RunConfig) -> Iterator[Finding]:
    """A published network that the student starts from, or shares with the teacher, has the student's shape.

    Other networks are compared where their weights are opened.
    """
    init, teacher = config.student.init, config.teacher.source
    if difference := _difference(config, init):
        ours = [name for name, shape in PUBLISHED.items() if _fits(config, shape)]
        advice = f"give student.init=Wan-AI/{ours[0]}" if ours else "give a network of the student's shape"
        whose = " (the teacher)" if init == teacher else ""
        yield Finding(("student.init", "student.architecture"), f"{init}{whose} {difference}; {advice}")
    elif shares_base(config) and (difference := _difference(config, teacher)):
        key = "on_policy.fake_score.adapter"
        yield Finding((key, "teacher.source"), f"lora shares one base, but {teacher} {difference}; set {key}.kind=full")


def _difference(config: RunConfig, source: str | None) -> str | None:
    """The first size in which a published network differs from the student; None where none does, or none is known."""
    shape = PUBLISHED.get(source.rstrip("/").rpartition("/")[2]) if source else None
    ours = config.student.architecture
    for name in SIZES if shape is not None else ():
        if getattr(shape, name) != getattr(ours, name):
            return f"has {name}={getattr(shape, name)}, but student.architecture.{name}={getattr(ours, name)}"
    return None


def _fits(config: RunConfig, shape: Architecture) -> bool:
    return all(getattr(shape, name) == getattr(config.student.architecture, name) for name in SIZES)


def adapter_targets(config: RunConfig) -> Iterator[Finding]:
    """Adapters must name layers that exist, and nothing twice."""
    adapter = config.student.adapter
    if not isinstance(adapter, Lora):
        return
    layers = linear_layers(config.student.architecture)
    if not adapter.targets:
        yield Finding(("student.adapter.targets",), "is empty; name at least one layer")
    for target in adapter.targets:
        if not any(matches(layer, [target]) for layer in layers):
            yield Finding(
                ("student.adapter.targets",),
                f"{target!r} matches no linear layer{_nearest(target, _last_parts(layers))}",
            )
    names = parameter_names(config.student.architecture)
    for module in adapter.full_modules:
        inside = [name for name in names if in_modules(name, [module])]
        if not inside:
            modules = _last_parts([parent for name in names for parent in _parents(name)])
            yield Finding(("student.adapter.full_modules",), f"{module!r} matches no module{_nearest(module, modules)}")
        elif any(matches(name.removesuffix(".weight"), adapter.targets) for name in inside):
            yield Finding(
                ("student.adapter.full_modules", "student.adapter.targets"),
                f"{module!r} holds layers that student.adapter.targets adapts too; leave it in one of them",
            )


def _last_parts(names: list[str]) -> list[str]:
    """`blocks.0.attn1.to_q` -> `attn1.to_q`; names outside of the blocks lose `condition_embedder.` only."""
    shortened = (
        name.split(".", 2)[2] if name.startswith("blocks.") and name.count(".") > 1 else name for name in names
    )
    return list(dict.fromkeys(name.removeprefix("condition_embedder.") for name in shortened if name))


def _parents(name: str) -> list[str]:
    """`a.b.c` -> `a`, `a.b`."""
    parts = name.split(".")[:-1]
    return [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]


def _nearest(wrong: str, valid: list[str]) -> str:
    return nearest_hint(wrong, valid) or f"; valid are {', '.join(valid)}"
