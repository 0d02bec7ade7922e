"""How near samples come to the training clips. A model that memorised them comes nearer than unseen clips do."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anyflow_train.data.fingerprint import NAMED
from anyflow_train.data.shards import BadSampleError, ShardSet
from anyflow_train.errors import UserError
from anyflow_train.evaluation.intervals import Estimate, Resampling, percentile, weighted_means, weighted_quantiles
from anyflow_train.evaluation.metrics import pairwise_distances

BLOCK = 64
"""Training clips in memory at a time."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Nearest:
    """Distances from the clips of a set to the nearest training clip of each, in latent space.

    Attributes:
        mean: over the set.
        percentile_1: the distance that 1 % of the set do not exceed.
        minimum: of the whole set; smaller in larger sets.
    """

    mean: Estimate
    percentile_1: Estimate
    minimum: float


@dataclass(frozen=True)
class TrainingSet:
    """What samples are held against.

    Attributes:
        clips: training clips.
        held_out: the same distances for held-out clips.
    """

    clips: int
    held_out: Nearest


def open_training(location: str, held_out: ShardSet) -> ShardSet:
    """Open the training shards. Raises UserError where their latents are no neighbours of the held-out ones."""
    shards = ShardSet.open(location)
    found, wanted = shards.manifest, held_out.manifest
    if found.latent_shape != wanted.latent_shape:
        problem = f"{location} has latents {found.latent_shape}, but held_out has {wanted.latent_shape}"
        raise UserError("training_shards", f"{problem}; give the shards that the models were trained on")
    vaes = {codec.vae for codec in (found.codec, wanted.codec) if codec.vae and not codec.vae.startswith(NAMED)}
    if len(vaes) > 1:
        problem = f"{location} was encoded by the VAE of {found.codec.source} ({found.codec.vae})"
        raise UserError("training_shards", f"{problem}, held_out by another ({wanted.codec.vae})")
    return shards


def nearest_distances(training: ShardSet, sets: Sequence[Tensor]) -> list[Tensor]:
    """Distances to the nearest training clip: roots of the sum of squares over a clip's latents.

    Args:
        training: shards of video, read once for all sets, `BLOCK` clips at a time; unreadable clips are logged.
        sets: (n, F, C, H, W) float32 each.

    Returns:
        For each set (n,) float64; exact to about 1e-8 of the clips' spread.

    Raises:
        UserError: no training clip is readable.
    """
    nearest = [torch.full((len(samples),), torch.inf, dtype=torch.float64) for samples in sets]
    for block in _blocks(training):
        for least, samples in zip(nearest, sets, strict=True):
            torch.minimum(least, pairwise_distances(samples, block).amin(1), out=least)
    if any(least.isinf().any() for least in nearest):
        raise UserError("training_shards", f"{training.location} holds no readable clip")
    return nearest


def summarise(distances: Tensor, resampling: Resampling) -> Nearest:
    """Figures of (n,) distances, with intervals from the set's resampling."""
    lowest = weighted_quantiles(distances, resampling.weights, torch.tensor([0.01], dtype=torch.float64))[:, 0]
    return Nearest(percentile(weighted_means(distances, resampling)), percentile(lowest), float(distances.min()))


def _blocks(shards: ShardSet) -> Iterator[Tensor]:
    block: list[Tensor] = []
    for index in range(len(shards)):
        try:
            latents = shards.read(index).latents
        except BadSampleError as error:
            log.warning("left out of the training clips: %s", error)
            continue
        if latents is not None:
            block.append(latents.float())
        if len(block) == BLOCK:
            yield torch.stack(block)
            block = []
    if block:
        yield torch.stack(block)
