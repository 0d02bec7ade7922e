"""Held-out samples, for evaluations: all at once, in the order of the shards."""

from __future__ import annotations

import logging
from dataclasses import dataclass

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
        """Some of the samples."""
        return HeldOut(self.latents[rows], self.texts[rows], self.captions[rows], self.keys[rows])


def load_samples(shards: ShardSet, count: int) -> HeldOut:
    """The first `count` good samples of shards with video. Raises UserError if there are fewer."""
    samples: list[Sample] = []
    for index in range(len(shards)):
        if len(samples) == count:
            break
        try:
            samples.append(shards.read(index))
        except BadSampleError as error:
            log.warning("left out of the held-out samples: %s", error)
    if len(samples) < count:
        raise UserError(shards.location, f"holds {len(samples)} good samples, {count} are asked for")
    latents = [sample.latents for sample in samples if sample.latents is not None]
    if len(latents) < count:
        raise UserError(shards.location, "holds prompts without video")
    return HeldOut(
        torch.stack(latents).float(),
        [sample.text.float() for sample in samples],
        [sample.caption for sample in samples],
        [sample.key for sample in samples],
    )
