"""The teacher's fine solutions as the reference of validation, and what is measured against them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from anyflow_train.config.run import Evaluation, RunConfig
from anyflow_train.evaluation.clip_choice import strata
from anyflow_train.evaluation.intervals import (
    Estimate,
    Resampling,
    mean_of_pairs,
    percentile,
    resample,
    single_stratum,
    weighted_means,
)
from anyflow_train.evaluation.metrics import pairwise_distances, self_distances, squared_errors
from anyflow_train.files import atomic_file
from anyflow_train.flow.sampler import guided
from anyflow_train.flow.types import Condition, FlowMap
from anyflow_train.training.checkpoints.run_directory import RunDirectory
from anyflow_train.training.processes.world import World

REPLICATES = 1000
LUMA = (0.2126, 0.7152, 0.0722)
"""Share of red, green and blue in the brightness (Rec. 709)."""


@dataclass(frozen=True)
class TeacherReference:
    """The teacher's fine solutions, in the run directory: one file per sample, written atomically by rank 0.

    Attributes:
        teacher: velocity of the teacher, with the guidance that the student is expected to have.
        folder: folder of the files.
        facts: for each sample, what its solution depends on. A file with other facts is made again.
    """

    teacher: FlowMap
    folder: Path
    facts: tuple[str, ...]

    def complete(self, sample: Callable[[Sequence[int]], Tensor], at_once: int, world: World) -> None:
        """Make the solutions that are missing. All processes must call it; it may be interrupted at any time.

        Args:
            sample: solves from the noise of some of the samples on all processes together, (rows, F, C, H, W) float32.
            at_once: samples in one call; they are lost if it is interrupted.
        """
        missing = world.on_main(lambda: [row for row in range(len(self.facts)) if self._read(row) is None])
        for start in range(0, len(missing), at_once):
            rows = missing[start : start + at_once]
            world.on_main(partial(self._write, rows, sample(rows)))

    def latents(self) -> Tensor:
        """Read all solutions, (n, F, C, H, W) float32; for rank 0, after `complete`."""
        found = [latents for row in range(len(self.facts)) if (latents := self._read(row)) is not None]
        assert len(found) == len(self.facts)
        return torch.stack(found)

    def _read(self, row: int) -> Tensor | None:
        """Read a solution; None if there is none with these facts."""
        with suppress(OSError, SafetensorError), safe_open(str(self._file(row)), "pt") as file:
            if (file.metadata() or {}).get("facts") == self.facts[row]:
                return file.get_tensor("latents")
        return None

    def _write(self, rows: Sequence[int], solutions: Tensor) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for row, latents in zip(rows, solutions, strict=True):
            with atomic_file(self._file(row)) as file:
                file.write(save({"latents": latents.contiguous()}, {"facts": self.facts[row]}))

    def _file(self, row: int) -> Path:
        return self.folder / f"{row:05d}.safetensors"


def reference_scale(config: RunConfig) -> float:
    """Return the CFG scale of the reference: the student's, whether it learns guidance or is sampled with it."""
    return config.objective.held_scale if config.objective.holds_guidance else config.evaluation.guidance_scale


def teacher_reference(config: RunConfig, teacher: FlowMap, negative: Condition, texts: Tensor) -> TeacherReference:
    """Describe the reference of a run.

    Args:
        config: config of the run.
        teacher: velocity of the teacher, not yet guided.
        negative: the negative prompt, text (1, L, D).
        texts: (n, L, D) float32 text embeddings of the samples, in the order of their noise.
    """
    evaluation, scale = config.evaluation, reference_scale(config)
    common = {
        "teacher": config.teacher.source,
        "guidance_scale": scale,
        "negative": None if scale == 1 else _checksum(negative.text),
        "calls": evaluation.reference_calls,
        "shift": evaluation.shift,
        "seed": evaluation.seed,
        "precision": config.engine.precision,
        "clip": [config.data.frames, config.data.height, config.data.width],
    }
    facts = [json.dumps({**common, "sample": row, "text": _checksum(text)}) for row, text in enumerate(texts)]
    folder = RunDirectory.of(config).path / "teacher_reference"
    return TeacherReference(guided(teacher, negative, scale), folder, tuple(facts))


def _checksum(text: Tensor) -> str:
    return hashlib.sha256(text.cpu().numpy().tobytes()).hexdigest()


def measure_against(
    fine: Tensor,
    samples: Mapping[int, Tensor],
    captions: Sequence[str],
    config: Evaluation,
    decode: Callable[[Tensor], Tensor] | None,
) -> dict[str, Estimate]:
    """Compare samples with the teacher's fine solutions from the same noise.

    Args:
        fine: (n, F, C, H, W) fine solutions.
        samples: samples of the student by number of calls, each like `fine`.
        captions: n captions of the samples.
        config: config of the validation.
        decode: function from latents to videos (B, 3, F, H, W) in [-1, 1]; None decodes nothing.

    Returns:
        By `<name>_<calls>`: `energy_distance` (see `paired_energy_distance`), `rms` (root mean square difference), and,
        as ratios to the teacher's, `contrast`, `saturation` and `motion` (see `appearance`).
    """
    resampling = resample(strata(list(captions), list(captions))[0], REPLICATES, config.seed)
    metrics: dict[str, Estimate] = {}
    for calls, latents in samples.items():
        errors = weighted_means(squared_errors(latents, fine), resampling)
        metrics[f"energy_distance_{calls}"] = percentile(paired_energy_distance(latents, fine, resampling))
        metrics[f"rms_{calls}"] = percentile(errors.sqrt())
    if decode is None:
        return metrics
    videos = config.reference_videos
    teacher = appearance(fine[:videos], decode)
    clips = resample(single_stratum(len(fine[:videos])), REPLICATES, config.seed)
    for calls, latents in samples.items():
        for name, values in appearance(latents[:videos], decode).items():
            means = [weighted_means(each, clips) for each in (values, teacher[name])]
            metrics[f"{name}_{calls}"] = percentile(means[0] / means[1])
    return metrics


def paired_energy_distance(x: Tensor, y: Tensor, resampling: Resampling) -> Tensor:
    """Compute energy distances of two sets of n samples of which x[i] and y[i] come from the same noise.

    Pairs of equal index are left out of the cross term: all others are independent, so the value is unbiased as in
    `intervals.EnergyReference`. It is exactly 0 if both sets are equal.

    Returns:
        (R + 1,) float64, the value first.
    """
    cross = pairwise_distances(x, y).fill_diagonal_(0)
    return mean_of_pairs(2 * cross - self_distances(x) - self_distances(y), resampling, resampling)


def appearance(latents: Tensor, decode: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Decode clips one by one and measure what users see of them.

    Args:
        latents: (n, F, C, H, W) float32.
        decode: function from latents to videos (B, 3, F, H, W) in [-1, 1].

    Returns:
        (n,) values by name. `contrast`: standard deviation of the brightness within a frame. `saturation`: largest
        minus smallest of red, green and blue. `motion`: root mean square difference between consecutive frames, left
        out for images.
    """
    clips: list[dict[str, Tensor]] = []
    for one in latents.split(1):
        video = decode(one).float().cpu()[0]
        brightness = (video * torch.tensor(LUMA)[:, None, None, None]).sum(0)
        values = {
            "contrast": brightness.flatten(1).std(1, correction=0).mean(),
            "saturation": (video.amax(0) - video.amin(0)).mean(),
        }
        if video.shape[1] > 1:
            values["motion"] = video.diff(dim=1).square().mean().sqrt()
        clips.append(values)
    return {name: torch.stack([values[name] for values in clips]).double() for name in clips[0]}
