"""Keys of `anyflow sample`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from anyflow_train.config.base import Model
from anyflow_train.config.commands.types import Calls, Seeds, Texts


class SampleConfig(Model):
    """`anyflow sample`: videos from a run, a checkpoint or an exported folder.

    model: run, checkpoint, exported folder or hub id.
    out: folder for the videos.
    prompt: one prompt; commas belong to it.
    prompts: list of prompts, or a `.txt` file with one prompt per line.
    image: image file that becomes the first frame of every clip.
    video: video file that every clip continues.
    context_frames: number of frames to use from the video, 4n + 1; null uses as many whole chunks as it has (one
        frame for a student that is not causal).
    chunk_partition: latent frames of each chunk of a causal student; null uses the chunks of its training.
    calls: numbers of network calls; each makes its own video.
    seeds: seeds of the noise; each makes its own video.
    weights: ema (moving average) or raw (last weights of the run).
    frames: frames per video, 4n + 1; null uses the size of the training clips.
    height, width: size of the videos in pixels; null uses the size of the training clips.
    guidance_scale: CFG scale w; 1 means no guidance.
    shift: timestep shift of the sampler.
    text_length: tokens to which texts are padded with zeros; stock pipelines pad to 512.
    codec: pipeline folder or hub id of the VAE and text encoder; null uses the model's.
    threads: CPU threads of torch; 0 lets torch choose.
    """

    aliases: ClassVar[Mapping[str, str]] = {"checkpoint": "model"}
    renamed: ClassVar[Mapping[str, str]] = {"prompt_file": "prompts", "steps": "calls"}

    model: str
    out: str
    prompt: str = ""
    prompts: Texts = ()
    image: str | None = None
    video: str | None = None
    context_frames: PositiveInt | None = None
    chunk_partition: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] | None = None
    calls: Calls = (4,)
    seeds: Seeds = (0,)
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
