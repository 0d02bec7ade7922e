"""Keys of `anyflow vbench`, and the rules that they follow; no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal, get_args

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from anyflow_train.config.base import Model
from anyflow_train.config.commands import Steps
from anyflow_train.config.findings import Finding
from anyflow_train.config.rules.geometry import WAN_PATCH, frame_count, side_length

Dimension = Literal[
    "subject_consistency",
    "background_consistency",
    "temporal_flickering",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
    "object_class",
    "multiple_objects",
    "human_action",
    "color",
    "spatial_relationship",
    "scene",
    "appearance_style",
    "temporal_style",
    "overall_consistency",
]
"""What VBench measures, in the order of its tables."""

DIMENSIONS: tuple[Dimension, ...] = get_args(Dimension)

OF_THE_SUITE = frozenset(
    {
        "object_class",
        "multiple_objects",
        "human_action",
        "color",
        "spatial_relationship",
        "scene",
        "appearance_style",
    }
)
"""Dimensions that are measured on VBench's own prompts only.

VBench refuses six of them for other prompts, because it needs to know what is to be seen; of human_action it reads that
off the names of the files.
"""


class VBenchConfig(Model):
    """`anyflow vbench`: VBench's scores of the videos of models; VBench has a Python environment of its own.

    models: runs, checkpoints, exported folders or hub ids.
    codec: pipeline folder or hub id with VAE and text encoder; null: that of each model.
    steps: numbers of network calls per video.
    text_length: tokens to which texts are padded with zeros; stock pipelines pad to 512.
    python: interpreter that VBench is installed for; null: this one.
    score: false writes the videos, and prints the commands that score them.
    dimensions: what is measured, and so of which prompts videos are made; null: all that apply.
    info: VBench's list of prompts, `VBench_full_info.json`; null: the installed one.
    texts: file with a line for each entry of `info`, in its order: what a model is given in place of the prompt.
    prompts: file of prompts of your own, one a line, in place of `info`.
    videos: made of every prompt; VBench's own prompts require 5.
    frames, height, width: of the videos; null: as the model was trained.
    chunk_partition: latent frames of a causal student's chunks; null: those that it was trained with.
    gpus: that VBench scores on.
    """

    out: str
    models: tuple[str, ...]
    codec: str | None = None
    weights: Literal["ema", "raw"] = "ema"
    steps: Steps = (1, 2, 4, 8, 16)
    shift: PositiveFloat = 5.0
    guidance_scale: PositiveFloat = 1.0
    negative_prompt: str = ""
    seed: NonNegativeInt = 0
    text_length: PositiveInt = 512
    python: str | None = None
    score: bool = True
    dimensions: tuple[Dimension, ...] | None = None
    info: str | None = None
    texts: str | None = None
    prompts: str | None = None
    videos: Annotated[int, Field(ge=1, le=5)] = 5
    frames: PositiveInt | None = None
    height: PositiveInt | None = None
    width: PositiveInt | None = None
    chunk_partition: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] | None = None
    fps: PositiveFloat = 16.0
    gpus: PositiveInt = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "bf16"
    threads: NonNegativeInt = 0

    @property
    def chosen(self) -> tuple[Dimension, ...]:
        """The dimensions to measure, in the order of VBench's tables."""
        if self.dimensions is not None:
            return tuple(name for name in DIMENSIONS if name in self.dimensions)
        return DIMENSIONS if self.prompts is None else tuple(name for name in DIMENSIONS if name not in OF_THE_SUITE)


def rules(config: VBenchConfig) -> Iterator[Finding]:
    """Models, VBench's prompts or others, dimensions that can be measured on them, at possible sizes."""
    if not config.models:
        yield Finding(("models",), "is empty; VBench needs at least one model")
    if config.dimensions == ():
        yield Finding(("dimensions",), "is empty; score=false writes the videos without measuring them")
    sides = {"height": config.height, "width": config.width}
    if config.frames is not None:
        yield from frame_count("frames", config.frames)
    for key, pixels in sides.items():
        if pixels is not None:
            yield from side_length(key, pixels, WAN_PATCH)
    if config.prompts is None:
        return
    for key in ("info", "texts"):
        if getattr(config, key) is not None:
            yield Finding(
                (key, "prompts"),
                f"{getattr(config, key)!r} goes with VBench's own prompts, but prompts={config.prompts}; "
                "leave out one of them",
            )
    if refused := sorted(OF_THE_SUITE & set(config.chosen)):
        yield Finding(
            ("dimensions", "prompts"),
            f"{', '.join(refused)}: measured on VBench's own prompts only; leave out prompts",
        )
