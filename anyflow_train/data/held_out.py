"""Held-out samples for evaluations, in the order of the shards."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from anyflow_train.data.shards import BadSampleError, Sample, ShardSet
from anyflow_train.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldOut:
    """Samples for an evaluation: latents (n, F, C, H, W) float32; texts (L_i, D) float32; captions; keys."""

    latents: Tensor
    texts: list[Tensor]
    captions: list[str]
    keys: list[str]

    def part(self, rows: slice) -> HeldOut:
        """Return some of the samples."""
        return HeldOut(self.latents[rows], self.texts[rows], self.captions[rows], self.keys[rows])


def good_samples(shards: ShardSet, purpose: str) -> Iterator[Sample]:
    """Yield the readable samples in order. Bad ones are logged as left out of `purpose`."""
    for index in range(len(shards)):
        try:
            yield shards.read(index)
        except BadSampleError as error:
            log.warning("left out of the %s: %s", purpose, error)


def check_count(shards: ShardSet, found: int, count: int) -> None:
    """Raise UserError if fewer than `count` good samples were found."""
    if found < count:
        raise UserError(shards.location, f"holds {found} good samples of {count}; lower held_out_samples")


def load_samples(shards: ShardSet, count: int) -> HeldOut:
    """Load the first `count` good samples of shards with video. Raises UserError if there are fewer."""
    samples = list(islice(good_samples(shards, "held-out samples"), count))
    check_count(shards, len(samples), count)
    latents = [sample.latents for sample in samples if sample.latents is not None]
    if len(latents) < count:
        raise UserError(shards.location, "holds prompts without video")
    return HeldOut(
        torch.stack(latents).float(),
        [sample.text.float() for sample in samples],
        [sample.caption for sample in samples],
        [sample.key for sample in samples],
    )
