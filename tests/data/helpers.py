"""Small shard folders whose samples can be told apart by their numbers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from anyflow_train.data.batch import Batch
from anyflow_train.data.manifest import Manifest, PromptTexts
from anyflow_train.data.mixture import ShardMixture
from anyflow_train.data.shards import Sample, ShardSet
from tests.shards import describe, write_shards

SHAPE = (2, 3, 4, 4)
TEXT_DIM = 6


def make_sample(number: int) -> Sample:
    """Make a sample whose latents and text are filled with `number`; the text has number % 5 + 1 tokens."""
    text = torch.full((number % 5 + 1, TEXT_DIM), float(number))
    return Sample(f"clip-{number:03d}", torch.full(SHAPE, float(number)), text, f"caption {number}")


def make_shards(folder: Path, sizes: Iterable[int]) -> Path:
    """Make a folder with one shard per size. Samples are numbered across shards."""
    numbered = itertools.count()
    parts = ([make_sample(next(numbered)) for _ in range(size)] for size in sizes)
    return write_shards(folder, parts, make_manifest(), PromptTexts(torch.full((1, TEXT_DIM), -1.0), ()))


def make_manifest() -> Manifest:
    """Make the manifest for `make_shards`, without its list of shards."""
    return describe(SHAPE, TEXT_DIM, longest_text=5)


def alone(shards: ShardSet) -> ShardMixture:
    """The shards as the only ones of a run."""
    return ShardMixture((shards,))


def numbers(batches: Iterable[Batch]) -> list[int]:
    """Read the numbers of the samples in some batches from the latents."""
    return [int(sample.flatten()[0]) for batch in batches for sample in batch.latents]


def take(steps: Iterator[list[Batch]], count: int) -> list[list[Batch]]:
    """Return the next `count` steps."""
    return [next(steps) for _ in range(count)]
