"""Closed-form check that a video shows its caption, for data sets that have such an oracle."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from anyflow_train.evaluation.intervals import Estimate
from anyflow_train.tiny.worlds import WORLDS


@dataclass(frozen=True)
class Recognition:
    """Result of the oracle for a set of videos.

    Attributes:
        accuracy: share of videos that show all of what their caption says.
        purity: mean share of a video's variation that the recognised pattern explains; low for blur and noise.
        sharpness: mean match of a video's edges with those of the recognised pattern; None if the world has none.
    """

    accuracy: Estimate
    purity: Estimate
    sharpness: Estimate | None = None

    def measures(self) -> dict[str, Estimate]:
        """Name what is reported: the accuracy, and the sharpness or, in a world without one, the purity."""
        clear = {"purity": self.purity} if self.sharpness is None else {"sharpness": self.sharpness}
        return {"accuracy": self.accuracy, **clear}


@torch.inference_mode()
def judge_clips(
    latents: Tensor, captions: list[str], decode: Callable[[Tensor], Tensor], batch: int, world: str
) -> Recognition:
    """Decode the first n latents in batches and recognise what they show.

    Args:
        latents: (m >= n, F, C, H, W) normalised, float32.
        captions: n captions of the world.
        decode: function from latents to videos (B, 3, F, H, W) in [-1, 1].
        batch: videos per call of `decode`.
        world: name of the embedded world (`tiny.worlds`).
    """
    oracle = WORLDS[world]
    labels = torch.tensor([oracle.label_of(caption) for caption in captions])
    latents, readings = latents[: len(captions)], []
    for start in range(0, len(labels), batch):
        readings.append(oracle.recognise(decode(latents[start : start + batch]).float().cpu()))
    seen, *shares = (torch.cat(values) for values in zip(*readings, strict=True))
    return Recognition(wilson(int((seen == labels).sum()), len(labels)), *map(mean_of, shares))


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
