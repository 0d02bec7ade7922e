"""Closed-form check that a video shows its caption, for data sets that have such an oracle."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from anyflow_train.evaluation.intervals import Estimate
from anyflow_train.tiny import shapes


@dataclass(frozen=True)
class Recognition:
    """Result of the oracle for a set of videos.

    Attributes:
        accuracy: share of videos that show all of what their caption says.
        sharpness: mean match of a video's edges with those of the recognised pattern.
    """

    accuracy: Estimate
    sharpness: Estimate

    def measures(self) -> dict[str, Estimate]:
        """Name what is reported: the accuracy and the sharpness."""
        return {"accuracy": self.accuracy, "sharpness": self.sharpness}


@torch.inference_mode()
def judge_clips(latents: Tensor, captions: list[str], decode: Callable[[Tensor], Tensor], batch: int) -> Recognition:
    """Decode the first n latents in batches and recognise what they show.

    Args:
        latents: (m >= n, F, C, H, W) normalised, float32.
        captions: n captions of the moving shapes.
        decode: function from latents to videos (B, 3, F, H, W) in [-1, 1].
        batch: videos per call of `decode`.
    """
    labels = shapes.labels_of(captions)
    latents, readings = latents[: len(captions)], []
    for start in range(0, len(labels), batch):
        readings.append(shapes.recognise(decode(latents[start : start + batch]).float().cpu()))
    readings = [torch.cat(values) for values in zip(*readings, strict=True)]
    return Recognition(wilson(int((readings[0] == labels).sum()), len(labels)), mean_of(readings[2]))


def mean_of(values: Tensor) -> Estimate:
    """The mean of (n,) values with the 95 % interval of its normal approximation."""
    mean, half = float(values.mean()), float(1.959964 * values.std(correction=0) / math.sqrt(len(values)))
    return Estimate(mean, mean - half, mean + half)


def wilson(hits: int, trials: int) -> Estimate:
    """Estimate a share with Wilson's 95 % interval. At 0 and 1 a bootstrap interval would have no width."""
    z = 1.959964
    share, spread = hits / trials, z * z / trials
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
    # For shares 0 and 1 the interval ends exactly there. Rounding must not exclude the value.
    return Estimate(share, max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half)))
