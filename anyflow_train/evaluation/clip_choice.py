"""Which clips an evaluation compares: held-out ones as the reference, and the captions and first frames of samples."""

from __future__ import annotations

import torch
from torch import Tensor

from anyflow_train.config.commands import EvaluateConfig
from anyflow_train.data.held_out import HeldOut, load_samples
from anyflow_train.data.shards import ShardSet
from anyflow_train.errors import UserError
from anyflow_train.evaluation.intervals import single_stratum
from anyflow_train.evaluation.load import LoadedNetwork


def balanced_order(captions: list[str]) -> list[int]:
    """Indices such that any first part holds every caption about equally often: one of each, then the next round."""
    seen: dict[str, int] = {}
    rounds = []
    for index, caption in enumerate(captions):
        rounds.append((seen.get(caption, 0), index))
        seen[caption] = seen.get(caption, 0) + 1
    return [index for _, index in sorted(rounds)]


def cycle(items: list[int], count: int) -> list[int]:
    """The first `count` of items, again from the start where they end."""
    return [items[number % len(items)] for number in range(count)]


def strata(captions: list[str], reference_captions: list[str]) -> tuple[Tensor, Tensor]:
    """Strata of both sets by caption, (n,) and (m,) int64.

    Where both hold the same captions, and each at least twice, a caption is a class and the law that is compared is the
    equal mixture of the classes: the usual estimate would be biased, because a set with as many samples of every class
    holds fewer pairs of one class than independent draws do. Otherwise all samples count as independent.
    """
    classes = sorted(set(captions))
    counted = [sum(caption == name for caption in side) for side in (captions, reference_captions) for name in classes]
    if sorted(set(reference_captions)) != classes or min(counted) < 2:
        return single_stratum(len(captions)), single_stratum(len(reference_captions))
    number = {name: k for k, name in enumerate(classes)}
    left, right = ([number[caption] for caption in side] for side in (captions, reference_captions))
    return torch.tensor(left), torch.tensor(right)


def held_out_and_begun(config: EvaluateConfig, shards: ShardSet) -> tuple[HeldOut, HeldOut]:
    """The clips that samples are compared with, and those that give captions, and first frames where some are given.

    These are others then: a sample that begins as one of the clips which it is compared with would be too near to them.
    """
    count = config.held_out_samples
    if config.conditioning_frames == 0:
        held_out = load_samples(shards, count)
        return held_out, held_out
    loaded = load_samples(shards, count + config.samples)
    return loaded.part(slice(0, count)), loaded.part(slice(count, None))


def check_frames(config: EvaluateConfig, shards: ShardSet, models: list[LoadedNetwork]) -> None:
    """Compare the held-out clips with the models' chunks, and with what is given of them.

    Raises:
        UserError: the chunks do not make up the clips, given frames end inside of one or leave none to generate, or
            there are too few clips.
    """
    shape, count = shards.manifest.latent_shape, config.conditioning_frames
    if shape is None:
        return
    for model in models:
        _check_chunks(model, tuple(shape))
    partitions = {model.chunks.partition for model in models if model.chunks is not None}
    if len(partitions) > 1:
        raise UserError("models", f"have chunks {sorted(map(list, partitions))}; evaluate those of one kind at a time")
    if count == 0:
        return
    if count >= shape[0]:
        raise UserError("conditioning_frames", f"{count} of the clips' {shape[0]} latent frames leave none")
    for model in models:
        try:
            if model.chunks is not None:
                model.chunks.whole(count)
        except ValueError as error:
            raise UserError("conditioning_frames", f"{model.name}: {error}") from None
    needed = config.held_out_samples + config.samples
    if len(shards) < needed:
        problem = f"{count} of {config.samples} clips, others than the {config.held_out_samples} that are compared with"
        raise UserError("conditioning_frames", f"{problem}, need {needed}; {config.held_out} holds {len(shards)}")


def _check_chunks(model: LoadedNetwork, shape: tuple[int, ...]) -> None:
    if model.chunks is None:
        return
    frames, _, height, width = shape
    patch = model.network.config["compressed_patch_size"][1]
    chunks = list(model.chunks.partition)
    if sum(chunks) != frames:
        problem = f"{model.name} makes clips of the chunks {chunks}, but those of held_out have {frames} latent frames"
        raise UserError("models", problem)
    if height % patch or width % patch:
        problem = f"{model.name} has patches of {patch} for its context, which do not divide {height} x {width} latents"
        raise UserError("models", problem)
