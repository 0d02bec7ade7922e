"""Second pass of `anyflow prepare`: videos -> latents, and shards of latents and texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from anyflow_train.data.index import Skipped
from anyflow_train.data.loader import map_ahead
from anyflow_train.data.prepare.job import ShardPlan
from anyflow_train.data.prepare.progress import ClipProgress
from anyflow_train.data.prepare.texts import Captioned, read_shard_texts
from anyflow_train.data.prepare.video import ClipError, read_clip
from anyflow_train.data.prepare.writing import write_shard
from anyflow_train.data.shards import Sample

DECODERS = 2


@dataclass(frozen=True)
class VideoShape:
    """Target size of all clips: 4n + 1 frames, height and width in pixels, rate in frames per second."""

    frames: int
    height: int
    width: int
    fps: float


def write_prompt_shards(folder: Path, shards: list[ShardPlan], progress: ClipProgress) -> None:
    """Write shards without video."""
    for shard in shards:
        _write(folder, shard, map(_without_video, read_shard_texts(folder, shard)), progress)


def write_video_shards(
    encode: Callable[[Tensor], Tensor],
    folder: Path,
    shards: list[ShardPlan],
    shape: VideoShape,
    batch: int,
    dtype: torch.dtype,
    progress: ClipProgress,
) -> None:
    """Write shards with video. Later clips are decoded while the VAE encodes.

    Args:
        encode: function from (B, 3, F, H, W) in [-1, 1] to normalised latents (B, F', C, H', W').
        folder: folder of the shards.
        shards: shards to write.
        shape: target size of the clips.
        batch: clips per call of `encode`.
        dtype: dtype of the stored latents.
        progress: counts the clips.
    """
    pool = ThreadPoolExecutor(DECODERS, "decode")
    items = (item for shard in shards for item in read_shard_texts(folder, shard))
    decoded = map_ahead(pool, partial(_decode, shape), items, batch + DECODERS)
    try:
        for shard in shards:
            clips = islice(decoded, len(shard.clips))
            _write(folder, shard, _encoded(encode, clips, batch, dtype), progress)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _write(folder: Path, shard: ShardPlan, outcomes: Iterable[Sample | Skipped], progress: ClipProgress) -> None:
    write_shard(folder, shard.name, _counted(outcomes, progress))
    (folder / shard.text_name).unlink()


def _counted(outcomes: Iterable[Sample | Skipped], progress: ClipProgress) -> Iterator[Sample | Skipped]:
    for outcome in outcomes:
        yield outcome
        progress.advance(1)


def _without_video(item: Captioned) -> Sample | Skipped:
    if item.text is None:
        return Skipped(item.clip.key, "empty caption")
    return Sample(item.clip.key, None, item.text, item.caption)


def _decode(shape: VideoShape, item: Captioned) -> tuple[Captioned, Tensor | Skipped]:
    """Read the pixels (3, F, H, W) of a clip, or state why it is skipped."""
    if item.text is None:
        return item, Skipped(item.clip.key, "empty caption")
    try:
        assert item.clip.video is not None
        video = item.clip.video.seekable()
        return item, read_clip(video, shape.frames, shape.height, shape.width, shape.fps)
    except ClipError as error:
        return item, Skipped(item.clip.key, str(error))
    except OSError as error:
        return item, Skipped(item.clip.key, f"unreadable: {error}")


def _encoded(
    encode: Callable[[Tensor], Tensor],
    clips: Iterable[tuple[Captioned, Tensor | Skipped]],
    batch: int,
    dtype: torch.dtype,
) -> Iterator[Sample | Skipped]:
    """Encode clips in batches. A skipped clip is yielded before the samples of the batch that it interrupts."""
    waiting: list[tuple[Captioned, Tensor]] = []
    for item, video in clips:
        if isinstance(video, Skipped):
            yield video
            continue
        waiting.append((item, video))
        if len(waiting) == batch:
            yield from _encode_batch(encode, waiting, dtype)
            waiting = []
    if waiting:
        yield from _encode_batch(encode, waiting, dtype)


def _encode_batch(
    encode: Callable[[Tensor], Tensor], waiting: list[tuple[Captioned, Tensor]], dtype: torch.dtype
) -> Iterator[Sample | Skipped]:
    latents = encode(torch.stack([video for _, video in waiting])).to("cpu", dtype)
    for (item, _), sample in zip(waiting, latents, strict=True):
        if item.text is None or not torch.isfinite(sample).all():
            yield Skipped(item.clip.key, "the VAE returned non-finite latents")
        else:
            yield Sample(item.clip.key, sample.clone(), item.text, item.caption)
