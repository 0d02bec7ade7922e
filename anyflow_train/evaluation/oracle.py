"""Closed-form check that a video shows its caption, for data sets that have such an oracle."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from anyflow_train.evaluation.intervals import Estimate
from anyflow_train.tiny.world import label_of, recognise


@dataclass(frozen=True)
class Recognition:
    """Result of the oracle for a set of videos.

    Attributes:
        accuracy: share of videos that show the class of their caption.
        purity: mean share of a video's variation that the recognised pattern explains; low for blur and noise.
    """

    accuracy: Estimate
    purity: float


@torch.inference_mode()
def judge_stripes(latents: Tensor, captions: list[str], decode: Callable[[Tensor], Tensor], batch: int) -> Recognition:
    """Decode the first n latents in batches and recognise the stripes in them.

    Args:
        latents: (m >= n, F, C, H, W) normalised, float32.
        captions: n captions of the stripes world.
        decode: function from latents to videos (B, 3, F, H, W) in [-1, 1].
        batch: videos per call of `decode`.
    """
    labels = torch.tensor([label_of(caption) for caption in captions])
    latents, right, purity = latents[: len(captions)], [], []
    for start in range(0, len(labels), batch):
        reading = recognise(decode(latents[start : start + batch]).float().cpu())
        right.append(reading.labels == labels[start : start + batch])
        purity.append(reading.purity)
    hits = int(torch.cat(right).sum())
    return Recognition(wilson(hits, len(labels)), float(torch.cat(purity).mean()))


def wilson(hits: int, trials: int) -> Estimate:
    """Estimate a share with Wilson's 95 % interval. At 0 and 1 a bootstrap interval would have no width."""
    z = 1.959964
    share, spread = hits / trials, z * z / trials
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
    # For shares 0 and 1 the interval ends exactly there. Rounding must not exclude the value.
    return Estimate(share, max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half)))
