"""Several folders of shards as one sequence of samples."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from anyflow_train.config.base import ClipSize
from anyflow_train.config.run import Data
from anyflow_train.data.manifest import Manifest, PromptTexts
from anyflow_train.data.order import MixedOrder, SampleOrder, slots_of
from anyflow_train.data.shards import Sample, ShardSet, open_shards
from anyflow_train.errors import UserError, raise_all

SLOTS = 10_000
"""Length of the cycle in which weights are met exactly."""


@dataclass(frozen=True)
class ShardMixture:
    """Several sets of shards. Samples are numbered through all of them. Several threads may read at once.

    Attributes:
        sets: the sets.
        weights: shares in which samples come from them; empty draws all samples equally often.
    """

    sets: tuple[ShardSet, ...]
    weights: tuple[float, ...] = ()

    def __len__(self) -> int:
        return sum(map(len, self.sets))

    @property
    def location(self) -> str:
        """All locations, for messages."""
        return ", ".join(one.location for one in self.sets)

    @property
    def manifests(self) -> tuple[Manifest, ...]:
        """Manifest of each set."""
        return tuple(one.manifest for one in self.sets)

    @property
    def texts(self) -> PromptTexts:
        """Embeddings of the prompts of the first set."""
        return self.sets[0].texts

    def read(self, index: int) -> Sample:
        """Read the sample with an index in [0, len). Raises BadSampleError if it cannot be used."""
        starts = (0, *accumulate(map(len, self.sets)))
        number = bisect_right(starts, index) - 1
        return self.sets[number].read(index - starts[number])

    def order(self, seed: int, shuffle_shards: int | None) -> SampleOrder | MixedOrder:
        """Return the order of the samples. That of a single set does not depend on this class."""
        orders = [SampleOrder(seed, one.shard_sizes, shuffle_shards, number) for number, one in enumerate(self.sets)]
        if len(orders) == 1:
            return orders[0]
        shares = self.weights or tuple(map(len, self.sets))
        slots = SLOTS if self.weights else len(self)
        return MixedOrder(seed, tuple(orders), slots_of(shares, slots))

    def cancel(self) -> None:
        """Stop remote copies that are in progress in other threads."""
        for one in self.sets:
            one.cancel()


@dataclass(frozen=True)
class Bucket:
    """The samples of one size.

    Attributes:
        shards: the samples, of one or of several sets.
        turns: global batches that a step of this bucket takes, so that all steps have nearly the same number of tokens.
        share: share of the steps, relative to those of the other buckets.
        latent: shape (F, C, H, W) of the samples that the run makes from the texts; None takes the clips.
    """

    shards: ShardMixture
    turns: int = 1
    share: float = 1.0
    latent: tuple[int, ...] | None = None


def split_by_size(shards: ShardMixture, sizes: Sequence[ClipSize]) -> tuple[Bucket, ...]:
    """Split the samples by size. All samples come equally often, or the sets in the shares of their weights.

    A step of the largest size takes one global batch. One of another size takes as many whole ones as have at most the
    same number of tokens.

    Raises:
        UserError: there are no samples of a size.
    """
    used = [sum(len(one.of_size(size)) for size in {*sizes} & {*one.manifest.clip_sizes}) for one in shards.sets]
    shares = [weight / max(count, 1) for weight, count in zip(shards.weights or used, used, strict=True)]
    found = list[tuple[list[ShardSet], list[float]]]()
    for size in sizes:
        pairs = zip(shards.sets, shares, strict=True)
        held = [(one.of_size(size), share) for one, share in pairs if size in one.manifest.clip_sizes]
        held = [(one, share * len(one)) for one, share in held if len(one)]
        if not held:
            problem = f"{size}: {shards.location} holds no clip of this size; remove it, or add shards that do"
            raise UserError("data.buckets", problem)
        found.append(([one for one, _ in held], [share for _, share in held]))
    tokens = [math.prod(sets[0].manifest.latent_shape or ()) for sets, _ in found]
    turns = [max(tokens) // count for count in tokens]
    return tuple(
        Bucket(ShardMixture(tuple(sets), tuple(own) if shards.weights else ()), number, sum(own) / number)
        for (sets, own), number in zip(found, turns, strict=True)
    )


def size_prompts(shards: ShardMixture, shapes: Sequence[tuple[int, ...]]) -> tuple[Bucket, ...]:
    """Use all texts at each shape of latents (F, C, H, W), equally often."""
    turns = [max(map(math.prod, shapes)) // math.prod(shape) for shape in shapes]
    return tuple(Bucket(shards, number, 1 / number, shape) for number, shape in zip(turns, shapes, strict=True))


def open_training(data: Data) -> ShardMixture:
    """Open the training shards of a run, in the states that its config says.

    Raises:
        UserError: shards cannot be read, or the weights do not fit.
        UserErrors: shards cannot be used together: they differ in their codec or their negative prompt.
    """
    sets = [open_shards(data, location) for location in data.locations]
    raise_all([error for one in sets[1:] for error in _differences(sets[0], one)])
    return ShardMixture(tuple(sets), data.weights)


def _differences(first: ShardSet, other: ShardSet) -> Sequence[UserError]:
    errors = []
    for part in ("vae", "text_encoder", "latents_mean", "latents_std"):
        ours, theirs = (getattr(one.manifest.codec, part) for one in (first, other))
        if ours != theirs:
            problem = f"{other.location} was encoded with {part} {theirs}, but {first.location} with {ours}"
            errors.append(UserError("data.shards", f"{problem}; prepare them with the same codec"))
    if not torch.equal(first.texts.negative.float(), other.texts.negative.float()):
        prompts = f"{other.manifest.negative_prompt!r}, but {first.location} has {first.manifest.negative_prompt!r}"
        advice = "set negative_prompt of `anyflow prepare`, which does not encode clips again"
        errors.append(UserError("data.shards", f"{other.location} has the negative prompt {prompts}; {advice}"))
    return errors
