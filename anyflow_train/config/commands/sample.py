"""Keys of `anyflow sample`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import PositiveInt

from anyflow_train.config.commands.sampling import ClipConfig
from anyflow_train.config.commands.types import Calls, Seeds, Texts


class SampleConfig(ClipConfig):
    """`anyflow sample`: videos from a run, a checkpoint or an exported folder.

    out: folder for the videos.
    prompt: one prompt; commas belong to it.
    prompts: list of prompts, or a file with one prompt per line.
    image: image file that becomes the first frame of every clip.
    video: video file that every clip continues.
    context_frames: number of frames to use from the video, 4n + 1; null uses as many whole chunks as it has (one
        frame for a student that is not causal).
    calls: numbers of network calls; each makes its own video.
    seeds: seeds of the noise; each makes its own video.
    """

    renamed: ClassVar[Mapping[str, str]] = {"prompt_file": "prompts", "steps": "calls"}

    out: str
    prompt: str = ""
    prompts: Texts = ()
    image: str | None = None
    video: str | None = None
    context_frames: PositiveInt | None = None
    calls: Calls = (4,)
    seeds: Seeds = (0,)
