"""Keys and rules of `anyflow vbench`; this module does not import torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal, get_args

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from anyflow_train.config.base import Model
from anyflow_train.config.commands.types import Calls
from anyflow_train.config.findings import Finding
from anyflow_train.config.rules.geometry import video_size

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
"""Dimensions that VBench scores, in the order of its tables."""

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
"""Dimensions that are scored only on VBench's own prompts.

VBench refuses six of them for other prompts, because it needs to know the expected content. For human_action it takes
the content from the file names.
"""


class VBenchConfig(Model):
    """`anyflow vbench`: score videos of models with VBench, which runs in a separate Python environment.

    models: runs, checkpoints, exported folders or hub ids.
    codec: pipeline folder or hub id with VAE and text encoder; null uses the codec of each model.
    calls: numbers of network calls per video.
    text_length: tokens to which texts are padded with zeros; stock pipelines pad to 512.
    python: Python interpreter with VBench installed; null uses the current one.
    score: false writes the videos, and prints the commands that score them.
    dimensions: dimensions to score; videos are made only for their prompts. null means all that apply.
    info: VBench's list of prompts, `VBench_full_info.json`; null uses the installed one.
    texts: file with one line for each entry of `info`, in order; models get this text instead of the prompt.
    prompts: file with your own prompts, one per line, instead of `info`.
    videos: number of videos per prompt; VBench's own prompts require 5.
    frames: frames of a video; null uses the model's training size.
    height, width: size of a video in pixels; null uses the model's training size.
    chunk_partition: latent frames of each chunk of a causal student; null uses the chunks of its training.
    gpus: number of GPUs that VBench uses.
    """

    out: str
    models: tuple[str, ...]
    codec: str | None = None
    weights: Literal["ema", "raw"] = "ema"
    calls: Calls = (1, 2, 4, 8, 16)
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
        """Dimensions to score, in the order of VBench's tables."""
        if self.dimensions is not None:
            return tuple(name for name in DIMENSIONS if name in self.dimensions)
        return DIMENSIONS if self.prompts is None else tuple(name for name in DIMENSIONS if name not in OF_THE_SUITE)


def rules(config: VBenchConfig) -> Iterator[Finding]:
    """Check models, sizes, and whether the dimensions can be scored on the prompts."""
    if not config.models:
        yield Finding(("models",), "is empty; VBench needs at least one model")
    if config.dimensions == ():
        yield Finding(
            ("dimensions",), "is empty; give at least one, or score=false to write videos without scoring them"
        )
    yield from video_size(config.frames, config.height, config.width)
    if config.prompts is None:
        return
    for key in ("info", "texts"):
        if getattr(config, key) is not None:
            yield Finding(
                (key, "prompts"),
                f"{getattr(config, key)!r} requires VBench's own prompts, but prompts={config.prompts}; "
                "leave out one of them",
            )
    if refused := sorted(OF_THE_SUITE & set(config.chosen)):
        yield Finding(
            ("dimensions", "prompts"),
            f"{', '.join(refused)} can be scored only on VBench's prompts; leave out prompts",
        )
