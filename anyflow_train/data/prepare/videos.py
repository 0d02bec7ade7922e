"""Second pass of `anyflow prepare`: videos -> latents, and everything into shards."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from anyflow_train.data.index import Skipped
from anyflow_train.data.prepare.job import ShardPlan
from anyflow_train.data.prepare.progress import ClipProgress
from anyflow_train.data.prepare.sources import Clip
from anyflow_train.data.prepare.texts import ShardTexts, read_shard_texts
from anyflow_train.data.prepare.video import ClipError, read_clip
from anyflow_train.data.prepare.writing import write_shard
from anyflow_train.data.shards import Sample

DECODERS = 2


@dataclass(frozen=True)
class VideoShape:
    """What every clip is made into: 4n+1 frames at a rate (frames per second), in pixels."""

    frames: int
    height: int
    width: int
    fps: float


@dataclass(frozen=True)
class Captioned:
    """A clip with its caption and the caption's embedding (L, D); an empty caption has none."""

    clip: Clip
    caption: str
    text: Tensor | None


def write_prompt_shards(folder: Path, shards: list[ShardPlan], progress: ClipProgress) -> None:
    """Write shards without video."""
    for shard in shards:
        items = _captioned(shard, read_shard_texts(folder / shard.text_name))
        _write(folder, shard, (_without_video(item) for item in items), progress)


def write_video_shards(
    encode: Callable[[Tensor], Tensor],
    folder: Path,
    shards: list[ShardPlan],
    shape: VideoShape,
    batch: int,
    dtype: torch.dtype,
    progress: ClipProgress,
) -> None:
    """Write shards; clips of the next ones are decoded while the VAE works.

    Args:
        encode: (B, 3, F, H, W) in [-1, 1] -> normalised latents (B, F', C, H', W').
        shape: of the clips.
        batch: clips that are encoded at a time.
        dtype: of the stored latents.
    """
    pool = ThreadPoolExecutor(DECODERS, "decode")
    decoded = _decoded_ahead(pool, folder, shards, shape, batch + DECODERS)
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


def _captioned(shard: ShardPlan, texts: ShardTexts) -> list[Captioned]:
    pairs = zip(shard.clips, texts.captions, strict=True)
    return [Captioned(clip, caption, texts.embeddings.get(caption)) for clip, caption in pairs]


def _without_video(item: Captioned) -> Sample | Skipped:
    if item.text is None:
        return Skipped(item.clip.key, "empty caption")
    return Sample(item.clip.key, None, item.text, item.caption)


def _decoded_ahead(
    pool: ThreadPoolExecutor, folder: Path, shards: list[ShardPlan], shape: VideoShape, ahead: int
) -> Iterator[tuple[Captioned, Tensor | Skipped]]:
    """Every clip of the shards, in order, with its pixels or the reason why it has none; `ahead` are under way."""
    queue: deque[tuple[Captioned, Future[Tensor | Skipped]]] = deque()
    for shard in shards:
        for item in _captioned(shard, read_shard_texts(folder / shard.text_name)):
            queue.append((item, pool.submit(_decode, item, shape)))
            if len(queue) > ahead:
                first, future = queue.popleft()
                yield first, future.result()
    while queue:
        first, future = queue.popleft()
        yield first, future.result()


def _decode(item: Captioned, shape: VideoShape) -> Tensor | Skipped:
    if item.text is None:
        return Skipped(item.clip.key, "empty caption")
    try:
        assert item.clip.video is not None
        video = item.clip.video.seekable()
        return read_clip(video, shape.frames, shape.height, shape.width, shape.fps)
    except (ClipError, OSError) as error:
        reason = str(error) if isinstance(error, ClipError) else f"unreadable: {error}"
        return Skipped(item.clip.key, reason)


def _encoded(
    encode: Callable[[Tensor], Tensor],
    clips: Iterable[tuple[Captioned, Tensor | Skipped]],
    batch: int,
    dtype: torch.dtype,
) -> Iterator[Sample | Skipped]:
    """Samples in batches of one call of the VAE; what was skipped comes first, it needs none."""
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
            yield Skipped(item.clip.key, "the VAE gave non-finite latents")
        else:
            yield Sample(item.clip.key, sample.clone(), item.text, item.caption)
