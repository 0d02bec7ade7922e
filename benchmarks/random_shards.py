"""Write shards of random samples with the sizes of a run, to measure loading and starting without a data set."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch

from anyflow_train.config.derived import latent_shape
from anyflow_train.config.run import RunConfig
from anyflow_train.data.manifest import CodecInfo, PromptTexts
from anyflow_train.data.prepare.own import write_folder
from anyflow_train.data.shards import Sample

PROMPTS = ("one", "two", "three", "four")  # validation makes videos of them, so the VAE is loaded before the first step
SHORTEST_TEXT, LONGEST_TEXT = 60, 200  # tokens of usual captions, cut to the run's text length


def write_random_shards(folder: Path, config: RunConfig, samples: int, shards: int) -> int:
    """Fill a folder with shards like those of `anyflow prepare`: float32 latents, bfloat16 texts.

    Args:
        samples: total number of samples.
        shards: largest number of shards.

    Returns:
        Total bytes of the shards.
    """
    negative, *validation = torch.randn(1 + len(PROMPTS), 1, config.student.architecture.text_dim, dtype=torch.bfloat16)
    written = write_folder(
        folder,
        _samples(config, samples),
        CodecInfo(source="random numbers", text_encoder="random numbers"),
        PromptTexts(negative, tuple(validation)),
        validation_prompts=PROMPTS,
        samples_per_shard=math.ceil(samples / shards),
    )
    return sum(info.bytes or 0 for info in written.shards)


def _samples(config: RunConfig, count: int) -> Iterator[Sample]:
    architecture, room = config.student.architecture, min(config.data.text_lengths)
    shortest, longest = min(SHORTEST_TEXT, room), min(LONGEST_TEXT, room)
    for number in range(count):
        torch.manual_seed(number)
        latents = torch.randn(latent_shape(config.data, architecture.in_channels))
        length = shortest + number * 37 % (longest - shortest + 1)  # all lengths occur, in mixed order
        text = torch.randn(length, architecture.text_dim, dtype=torch.bfloat16)
        yield Sample(f"clip-{number:06d}", latents, text, f"caption {number}")
