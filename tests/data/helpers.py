"""Small shard folders whose samples can be told apart by their numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from anyflow_train.data.batch import Batch
from anyflow_train.data.manifest import (
    FORMAT,
    TEXT,
    CodecInfo,
    Manifest,
    PromptTexts,
    ShardInfo,
    write_manifest,
    write_prompt_texts,
)
from anyflow_train.data.shards import Sample
from anyflow_train.data.writing import write_shard

SHAPE = (2, 3, 4, 4)
TEXT_DIM = 6


def make_sample(number: int) -> Sample:
    """Sample `number`: its latents and text are full of that number, its text has number % 5 + 1 tokens."""
    text = torch.full((number % 5 + 1, TEXT_DIM), float(number))
    return Sample(f"clip-{number:03d}", torch.full(SHAPE, float(number)), text, f"caption {number}")


def make_shards(folder: Path, sizes: Iterable[int]) -> Path:
    """A folder with one shard per size, samples numbered through."""
    folder.mkdir(parents=True, exist_ok=True)
    shards, first = [], 0
    for number, size in enumerate(sizes):
        name = f"shard-{number:06d}.tar"
        write_shard(folder, name, [make_sample(first + i) for i in range(size)])
        shards.append(ShardInfo(name=name, samples=size, bytes=(folder / name).stat().st_size))
        first += size
    write_prompt_texts(folder / TEXT, PromptTexts(torch.full((1, TEXT_DIM), -1.0), ()))
    write_manifest(folder, make_manifest(tuple(shards)))
    return folder


def make_manifest(shards: tuple[ShardInfo, ...]) -> Manifest:
    """What `make_shards` writes."""
    return Manifest(
        format=FORMAT,
        kind="video",
        shards=shards,
        text_dim=TEXT_DIM,
        latent_shape=SHAPE,
        latent_dtype="fp32",
        frames=5,
        height=32,
        width=32,
        fps=16.0,
        longest_text=5,
        codec=CodecInfo(source="somewhere", vae="abc", text_encoder="def"),
    )


def numbers(batches: Iterable[Batch]) -> list[int]:
    """The numbers of the samples in some batches, read off the latents."""
    return [int(sample.flatten()[0]) for batch in batches for sample in batch.latents]


def take(steps: Iterator[list[Batch]], count: int) -> list[list[Batch]]:
    """The next `count` steps."""
    return [next(steps) for _ in range(count)]
