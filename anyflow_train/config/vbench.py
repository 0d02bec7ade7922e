"""Config of `anyflow evaluate metric=vbench`."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, PositiveFloat, PositiveInt

from anyflow_train.config.base import Model

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


class VBenchOptions(Model):
    """VBench, where metric=vbench. It is installed in a Python environment of its own, see docs/running.md.

    python: interpreter that VBench is installed for; null: this one.
    score: false writes the videos, and prints the commands that score them.
    dimensions: what is measured, and so of which prompts videos are made; null: all that apply.
    info: VBench's list of prompts, `VBench_full_info.json`; null: the installed one.
    texts: file with a line for each entry of `info`, in its order: what a model is given in place of the prompt.
    prompts: file of prompts of your own, one a line, in place of `info`.
    videos: made of every prompt; VBench's own prompts want 5.
    frames, height, width: of the videos; null: as the model was trained.
    chunk_partition: latent frames of a causal student's chunks; null: those that it was trained with.
    gpus: that VBench scores on.
    """

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
    negative_prompt: str = ""
    gpus: PositiveInt = 1

    @property
    def chosen(self) -> tuple[Dimension, ...]:
        """The dimensions to measure, in the order of VBench's tables."""
        if self.dimensions is not None:
            return tuple(name for name in DIMENSIONS if name in self.dimensions)
        return DIMENSIONS if self.prompts is None else tuple(name for name in DIMENSIONS if name not in OF_THE_SUITE)
