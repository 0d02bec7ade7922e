"""Second pass of `anyflow prepare`: videos -> latents, and shards of latents and texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from anyflow_train.data.index import Skipped
from anyflow_train.data.loader import map_ahead
from anyflow_train.data.prepare.job import ShardPlan
from anyflow_train.data.prepare.progress import ClipProgress
from anyflow_train.data.prepare.sources import Clip
from anyflow_train.data.prepare.texts import read_cut, read_shard_texts
from anyflow_train.data.prepare.video import ClipError
from anyflow_train.data.prepare.writing import write_shard
from anyflow_train.data.shards import Sample

DECODERS = 2
ReadVideo = Callable[[Path | BinaryIO], Tensor]
"""Video file, or its bytes -> pixels (3, F, H, W) in [-1, 1]. Raises ClipError."""
Encode = Callable[[Tensor], Tensor]
"""(B, 3, F, H, W) in [-1, 1] -> normalised latents (B, F', C, H', W')."""
MakeLatents = Callable[[list[Sample]], Tensor]
"""Samples -> their normalised latents (B, F, C, H, W)."""


def write_prompt_shards(folder: Path, shards: list[ShardPlan], progress: ClipProgress) -> None:
    """Write shards without video."""
    for shard in shards:
        _write(folder, shard, read_shard_texts(folder, shard), progress)


def write_made_shards(
    make: MakeLatents, folder: Path, shards: list[ShardPlan], batch: int, dtype: torch.dtype, progress: ClipProgress
) -> None:
    """Write shards with latents that a network makes from the texts. Arguments as those of `write_video_shards`."""
    for shard in shards:
        _write(folder, shard, _encoded(make, read_shard_texts(folder, shard), batch, dtype), progress)


def write_video_shards(
    read: ReadVideo,
    encode: Encode,
    folder: Path,
    shards: list[ShardPlan],
    batch: int,
    dtype: torch.dtype,
    progress: ClipProgress,
) -> None:
    """Write shards with video. Later clips are decoded while the VAE encodes.

    Args:
        read: reads a video.
        encode: encodes videos.
        folder: folder of the shards.
        shards: shards to write.
        batch: clips per call of `encode`.
        dtype: dtype of the stored latents.
        progress: counts the clips.
    """

    def from_pixels(samples: list[Sample]) -> Tensor:
        return encode(torch.stack([sample.latents for sample in samples if sample.latents is not None]))

    pool = ThreadPoolExecutor(DECODERS, "decode")
    clips = (pair for shard in shards for pair in zip(shard.clips, read_shard_texts(folder, shard), strict=True))
    decoded = map_ahead(pool, partial(_with_pixels, read), clips, batch + DECODERS)
    try:
        for shard in shards:
            _write(folder, shard, _encoded(from_pixels, islice(decoded, len(shard.clips)), batch, dtype), progress)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _write(folder: Path, shard: ShardPlan, outcomes: Iterable[Sample | Skipped], progress: ClipProgress) -> None:
    write_shard(folder, shard.name, _counted(outcomes, progress), read_cut(folder, shard))
    (folder / shard.text_name).unlink()


def _counted(outcomes: Iterable[Sample | Skipped], progress: ClipProgress) -> Iterator[Sample | Skipped]:
    for outcome in outcomes:
        yield outcome
        progress.advance(1, isinstance(outcome, Skipped))


def _with_pixels(read: ReadVideo, pair: tuple[Clip, Sample | Skipped]) -> Sample | Skipped:
    """Add the pixels of a clip to its sample in place of the latents, or state why it is skipped."""
    clip, sample = pair
    if isinstance(sample, Skipped):
        return sample
    try:
        assert clip.video is not None
        return replace(sample, latents=read(clip.video.seekable()))
    except ClipError as error:
        return Skipped(clip.key, str(error))
    except OSError as error:
        return Skipped(clip.key, f"unreadable: {error.strerror}")


def _encoded(
    make: MakeLatents, clips: Iterable[Sample | Skipped], batch: int, dtype: torch.dtype
) -> Iterator[Sample | Skipped]:
    """Make latents in batches. A skipped clip is yielded before the samples of the batch that it interrupts."""
    waiting: list[Sample] = []
    for clip in clips:
        if isinstance(clip, Skipped):
            yield clip
            continue
        waiting.append(clip)
        if len(waiting) == batch:
            yield from _make_batch(make, waiting, dtype)
            waiting = []
    if waiting:
        yield from _make_batch(make, waiting, dtype)


def _make_batch(make: MakeLatents, samples: list[Sample], dtype: torch.dtype) -> Iterator[Sample | Skipped]:
    for sample, latents in zip(samples, make(samples).to("cpu", dtype), strict=True):
        if torch.isfinite(latents).all():
            yield replace(sample, latents=latents.clone())
        else:
            yield Skipped(sample.key, "non-finite latents")
