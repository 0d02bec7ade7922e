"""Keys that commands which sample networks share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from anyflow_train.config.base import Model


class SamplingConfig(Model):
    """Keys of `anyflow evaluate`, `sample` and `demo`.

    weights: ema (moving average) or raw (last weights of the run).
    guidance_scale: CFG scale w; 1 means no guidance.
    shift: timestep shift of the sampler.
    text_length: tokens to which texts are padded with zeros; stock pipelines pad to 512.
    codec: pipeline folder or hub id of the VAE and text encoder; null uses the model's.
    threads: CPU threads of torch; 0 lets torch choose.
    """

    weights: Literal["ema", "raw"] = "ema"
    guidance_scale: PositiveFloat = 1.0
    shift: PositiveFloat = 5.0
    text_length: PositiveInt = 512
    codec: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "bf16"
    threads: NonNegativeInt = 0


class ClipConfig(SamplingConfig):
    """Keys of `anyflow sample` and `demo`, which make clips with one model.

    model: run, checkpoint, exported folder or hub id; `checkpoint` is another name of this key.
    frames: frames per video, 4n + 1; null uses the size of the training clips.
    height, width: size of the videos in pixels; null uses the size of the training clips.
    chunk_partition: latent frames of each chunk of a causal student; null uses the chunks of its training.
    """

    aliases: ClassVar[Mapping[str, str]] = {"checkpoint": "model"}

    model: str
    frames: PositiveInt | None = None
    height: PositiveInt | None = None
    width: PositiveInt | None = None
    fps: PositiveFloat = 16.0
    chunk_partition: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] | None = None
    negative_prompt: str = ""
