"""Which samples are compared: held-out ones as the reference, and the captions for those to be made."""

from __future__ import annotations

import torch
from torch import Tensor

from anyflow_train.evaluation.intervals import single_stratum


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
