"""Keys of `anyflow evaluate`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from anyflow_train.config.base import Log
from anyflow_train.config.commands.sampling import SamplingConfig
from anyflow_train.config.commands.types import Calls, Texts


class EvaluateConfig(SamplingConfig):
    """`anyflow evaluate`: compare teacher and students at several numbers of calls, from the same noise.

    out: folder for the report, plots and videos.
    models: runs, checkpoints, sweeps or exported folders of students; an empty list measures only the teacher.
    held_out: shards that samples are compared with.
    teacher: Wan2.1 pipeline folder or hub id; null is the teacher that the runs of `models` were trained with.
    guidance_scale: CFG scale w of the teacher; 1 means no guidance.
    calls: numbers of network calls to compare.
    samples: samples per model and number of calls.
    held_out_samples: number of held-out samples to compare with.
    reference: data (held-out shards) or guided_teacher (the teacher's guided samples at fine_steps).
    fine_steps: Euler steps of the teacher's fine ODE solution.
    shifts: timestep shifts to try for the teacher; the best one is reported.
    shift: timestep shift of the students' samples and of the teacher's fine solution.
    oracle_samples: number of samples to decode for the oracle; decoding takes longer than sampling.
    conditioning_frames: latent frames of held-out clips that students continue. Samples are compared with other clips.
    training_shards: shards that the models were trained on; if set, the distance of samples to them is measured too.
    bootstrap: number of bootstrap resamples for the confidence intervals.
    videos: number of sample videos to write.
    log: auto (a bar on a terminal, plain lines elsewhere), plain, or json (one JSON object per line).
    """

    renamed: ClassVar[Mapping[str, str]] = {"steps": "calls"}

    out: str
    models: Texts
    held_out: str
    teacher: str | None = None
    training_shards: str | None = None
    reference: Literal["data", "guided_teacher"] = "data"
    calls: Calls = (1, 2, 4, 8, 16)
    samples: PositiveInt = 512
    held_out_samples: PositiveInt = 2048
    fine_steps: PositiveInt = 128
    shifts: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (1.0, 3.0, 5.0)
    oracle: Literal["none", "shapes"] = "none"
    oracle_samples: PositiveInt = 512
    conditioning_frames: NonNegativeInt = 0
    bootstrap: PositiveInt = 1000
    batch: PositiveInt = 32
    seed: NonNegativeInt = 0
    videos: NonNegativeInt = 4
    log: Log = "auto"
