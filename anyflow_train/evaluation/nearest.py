"""Distances from samples to the nearest training clips. Samples of a model that memorised clips are nearer than
held-out clips.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from anyflow_train.config.base import ClipSize
from anyflow_train.data.held_out import good_samples
from anyflow_train.data.shards import ShardSet
from anyflow_train.errors import UserError
from anyflow_train.evaluation.intervals import Estimate, Resampling, percentile, weighted_means, weighted_quantiles
from anyflow_train.evaluation.metrics import pairwise_distances

BLOCK = 64
"""Training clips in memory at a time."""


@dataclass(frozen=True)
class Nearest:
    """Distances from each clip of a set to its nearest training clip, in latent space.

    Attributes:
        mean: mean over the set.
        percentile_1: first percentile of the set.
        minimum: minimum of the set; it is smaller in larger sets.
    """

    mean: Estimate
    percentile_1: Estimate
    minimum: float


@dataclass(frozen=True)
class TrainingSet:
    """The training clips, and for comparison the distances of held-out clips.

    Attributes:
        clips: number of training clips.
        held_out: distances from held-out clips to the nearest training clips.
    """

    clips: int
    held_out: Nearest


def open_training(location: str, held_out: ShardSet) -> ShardSet:
    """Open the training shards. Raises UserError if their latents cannot be compared with the held-out ones."""
    shards, wanted = ShardSet.open(location), held_out.manifest
    for size in {*shards.manifest.clip_sizes} & {ClipSize(wanted.frames or 0, wanted.height or 0, wanted.width or 0)}:
        shards = shards.of_size(size)
    found = shards.manifest
    if found.latent_shape != wanted.latent_shape:
        problem = f"{location} has latents {found.latent_shape}, but held_out has {wanted.latent_shape}"
        raise UserError("training_shards", f"{problem}; name the shards that the models were trained on")
    if len({found.codec.known_vae, wanted.codec.known_vae} - {None}) > 1:
        problem = f"{location} was encoded by the VAE of {found.codec.source} ({found.codec.vae})"
        raise UserError("training_shards", f"{problem}, but held_out by another VAE ({wanted.codec.vae})")
    return shards


def nearest_distances(training: ShardSet, sets: Sequence[Tensor]) -> list[Tensor]:
    """Compute Euclidean distances to the nearest training clip.

    Args:
        training: shards of video. They are read once for all sets, `BLOCK` clips at a time. Bad samples are logged.
        sets: (n, F, C, H, W) float32 each.

    Returns:
        For each set (n,) float64, exact to about 1e-8 of the clips' spread.

    Raises:
        UserError: no training clip is readable.
    """
    nearest = [torch.full((len(samples),), torch.inf, dtype=torch.float64) for samples in sets]
    clips = (sample.latents for sample in good_samples(training, "training clips") if sample.latents is not None)
    while block := list(islice(clips, BLOCK)):
        clean = torch.stack(block).float()
        for least, samples in zip(nearest, sets, strict=True):
            torch.minimum(least, pairwise_distances(samples, clean).amin(1), out=least)
    if any(least.isinf().any() for least in nearest):
        raise UserError("training_shards", f"{training.location} holds no readable clip; run `anyflow prepare` again")
    return nearest


def summarise(distances: Tensor, resampling: Resampling) -> Nearest:
    """Summarise (n,) distances, with intervals from the set's resampling."""
    lowest = weighted_quantiles(distances, resampling.weights, torch.tensor([0.01], dtype=torch.float64))[:, 0]
    return Nearest(percentile(weighted_means(distances, resampling)), percentile(lowest), float(distances.min()))
