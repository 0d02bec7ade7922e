"""Choice of an evaluation's clips: the reference, and the captions and first frames of samples."""

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
    """Order indices so that every prefix contains all captions about equally often: one of each, then again."""
    seen: dict[str, int] = {}
    rounds = []
    for index, caption in enumerate(captions):
        rounds.append((seen.get(caption, 0), index))
        seen[caption] = seen.get(caption, 0) + 1
    return [index for _, index in sorted(rounds)]


def cycle(items: list[int], count: int) -> list[int]:
    """Return `count` items, repeating the list if it is shorter."""
    return [items[number % len(items)] for number in range(count)]


def varied(captions: list[str], count: int) -> list[int]:
    """Choose captions to show: the first, then always the one that shares the fewest words with those before."""
    words, chosen = [set(caption.split()) for caption in captions], []
    for _ in range(min(count, len(captions))):
        others = [row for row in range(len(captions)) if row not in chosen]
        chosen.append(min(others, key=lambda row: sum(len(words[row] & words[other]) for other in chosen)))
    return chosen


def strata(captions: list[str], reference_captions: list[str]) -> tuple[Tensor, Tensor]:
    """Assign strata to both sets by caption, (n,) and (m,) int64.

    If both sets contain the same captions, each at least twice, a caption is a class, and the equal mixture of classes
    is compared. The usual estimate would be biased: a set with equally many samples of each class has fewer pairs of
    one class than independent draws have. Otherwise all samples count as independent.
    """
    classes = sorted(set(captions))
    counted = [sum(caption == name for caption in side) for side in (captions, reference_captions) for name in classes]
    if sorted(set(reference_captions)) != classes or min(counted) < 2:
        return single_stratum(len(captions)), single_stratum(len(reference_captions))
    number = {name: k for k, name in enumerate(classes)}
    left, right = ([number[caption] for caption in side] for side in (captions, reference_captions))
    return torch.tensor(left), torch.tensor(right)


def reference_and_inputs(config: EvaluateConfig, shards: ShardSet) -> tuple[HeldOut, HeldOut]:
    """Load the clips that samples are compared with, and the clips that provide captions and first frames.

    With conditioning frames they are different clips: a sample must not start from a clip that it is compared with.
    """
    count = config.held_out_samples
    if config.conditioning_frames == 0:
        held_out = load_samples(shards, count)
        return held_out, held_out
    loaded = load_samples(shards, count + config.samples)
    return loaded.part(slice(0, count)), loaded.part(slice(count, None))


def check_frames(config: EvaluateConfig, shards: ShardSet, models: list[LoadedNetwork]) -> None:
    """Compare the held-out clips with the models' chunks and with `conditioning_frames`.

    Raises:
        UserError: chunks do not add up to the clips, conditioning frames end inside of a chunk or fill the clip, or
            there are too few clips.
    """
    shape, count = shards.manifest.latent_shape, config.conditioning_frames
    if shape is None:
        return
    for model in models:
        _check_chunks(model, tuple(shape))
    partitions = {model.chunks.partition for model in models if model.chunks is not None}
    if len(partitions) > 1:
        problem = f"have different chunks {sorted(map(list, partitions))}; evaluate models with equal chunks together"
        raise UserError("models", problem)
    if count == 0:
        return
    if count >= shape[0]:
        problem = f"{count} of the clips' {shape[0]} latent frames leave none to generate; use fewer"
        raise UserError("conditioning_frames", problem)
    for model in models:
        try:
            if model.chunks is not None:
                model.chunks.whole(count)
        except ValueError as error:
            raise UserError("conditioning_frames", f"{model.name}: {error}") from None
    needed = config.held_out_samples + config.samples
    if len(shards) < needed:
        problem = f"{count} needs {config.samples} clips in addition to held_out_samples={config.held_out_samples}"
        raise UserError("conditioning_frames", f"{problem}, together {needed}; {config.held_out} holds {len(shards)}")


def _check_chunks(model: LoadedNetwork, shape: tuple[int, ...]) -> None:
    if model.chunks is None:
        return
    frames, _, height, width = shape
    patch = model.network.config["compressed_patch_size"][1]
    chunks = list(model.chunks.partition)
    if sum(chunks) != frames:
        problem = f"{model.name} makes clips of the chunks {chunks}, but the clips of held_out have {frames} latent"
        raise UserError("models", f"{problem} frames; name shards with clips of {sum(chunks)} latent frames")
    if height % patch or width % patch:
        problem = f"{model.name} needs latents whose height and width are multiples of {patch} for its context"
        raise UserError("models", f"{problem}; those of held_out are {height} x {width}")
