"""Keys of `anyflow demo`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from anyflow_train.config.base import Model
from anyflow_train.config.commands.types import Port


class DemoConfig(Model):
    """`anyflow demo`: a page in the browser that makes clips. Only this machine can open it.

    model: run, checkpoint, exported folder or hub id.
    teacher: network that makes clips from the same noise, to compare with: pipeline folder, hub id or run; null shows
        the model alone.
    port: port of the page; 0 takes any free one.
    chunk_partition: latent frames of each chunk of a causal student; null uses the chunks of its training.
    weights: ema (moving average) or raw (last weights of the run).
    frames: frames per video, 4n + 1; null uses the size of the training clips.
    height, width: size of the videos in pixels; null uses the size of the training clips.
    guidance_scale: CFG scale w of networks that take Euler steps, such as the teacher; 1 means no guidance.
    shift: timestep shift of the sampler.
    text_length: tokens to which texts are padded with zeros; stock pipelines pad to 512.
    codec: pipeline folder or hub id of the VAE and text encoder; null uses the model's.
    threads: CPU threads of torch; 0 lets torch choose.
    """

    aliases: ClassVar[Mapping[str, str]] = {"checkpoint": "model"}

    model: str
    teacher: str | None = None
    port: Port = 7860
    chunk_partition: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] | None = None
    weights: Literal["ema", "raw"] = "ema"
    frames: PositiveInt | None = None
    height: PositiveInt | None = None
    width: PositiveInt | None = None
    fps: PositiveFloat = 16.0
    guidance_scale: PositiveFloat = 1.0
    negative_prompt: str = ""
    shift: PositiveFloat = 5.0
    text_length: PositiveInt = 512
    codec: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "bf16"
    threads: NonNegativeInt = 0
