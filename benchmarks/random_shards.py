"""Write shards of random samples with the sizes of a run, to measure loading and starting without a data set."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from anyflow_train.config.derived import latent_shape
from anyflow_train.config.run import RunConfig
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
from anyflow_train.data.prepare.writing import write_shard
from anyflow_train.data.shards import Sample

PROMPTS = ("one", "two", "three", "four")  # validation makes videos of them, so the VAE is loaded before the first step
SHORTEST_TEXT, LONGEST_TEXT = 60, 200  # tokens of usual captions, cut to the run's text length


def write_random_shards(folder: Path, config: RunConfig, samples: int, shards: int) -> int:
    """Fill a folder with shards like those of `anyflow prepare`: float32 latents, bfloat16 texts.

    Args:
        samples: total number of samples.
        shards: number of shards.

    Returns:
        Total bytes of the shards.
    """
    folder.mkdir(parents=True, exist_ok=True)
    infos = []
    for number in range(shards):
        name = f"shard-{number:06d}.tar"
        made = write_shard(folder, name, _samples(config, range(number, samples, shards)))
        infos.append(ShardInfo(name=name, samples=len(made.entries), bytes=(folder / name).stat().st_size))
    negative, *validation = torch.randn(1 + len(PROMPTS), 1, config.student.architecture.text_dim, dtype=torch.bfloat16)
    write_prompt_texts(folder / TEXT, PromptTexts(negative, tuple(validation)))
    write_manifest(folder, _manifest(config, tuple(infos)))
    return sum(info.bytes or 0 for info in infos)


def _samples(config: RunConfig, numbers: range) -> Iterator[Sample]:
    architecture, room = config.student.architecture, min(config.data.text_lengths)
    shortest, longest = min(SHORTEST_TEXT, room), min(LONGEST_TEXT, room)
    for number in numbers:
        torch.manual_seed(number)
        latents = torch.randn(latent_shape(config.data, architecture.in_channels))
        length = shortest + number * 37 % (longest - shortest + 1)  # all lengths occur, in mixed order
        text = torch.randn(length, architecture.text_dim, dtype=torch.bfloat16)
        yield Sample(f"clip-{number:06d}", latents, text, f"caption {number}")


def _manifest(config: RunConfig, shards: tuple[ShardInfo, ...]) -> Manifest:
    data, architecture = config.data, config.student.architecture
    return Manifest(
        format=FORMAT,
        kind="video",
        shards=shards,
        text_dim=architecture.text_dim,
        latent_shape=latent_shape(data, architecture.in_channels),
        latent_dtype="fp32",
        frames=data.frames,
        height=data.height,
        width=data.width,
        longest_text=min(LONGEST_TEXT, min(data.text_lengths)),
        codec=CodecInfo(source="random numbers", text_encoder="random numbers"),
        validation_prompts=PROMPTS,
    )
