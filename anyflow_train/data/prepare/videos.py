"""Second pass of `anyflow prepare`: videos -> latents, and shards of latents and texts."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
from itertools import chain, groupby, islice
from pathlib import Path
from queue import Full, Queue
from threading import Event
from typing import BinaryIO

import torch
from torch import Tensor

from anyflow_train.data.index import Skipped
from anyflow_train.data.prepare.job import ShardPlan
from anyflow_train.data.prepare.progress import ClipProgress
from anyflow_train.data.prepare.sources import Clip
from anyflow_train.data.prepare.texts import read_cut, read_shard_texts
from anyflow_train.data.prepare.video import ClipError
from anyflow_train.data.prepare.windows import clip_of, window_key
from anyflow_train.data.prepare.writing import write_shard
from anyflow_train.data.shards import Sample

DECODERS = 2
STOP_SECONDS = 0.2
ReadVideo = Callable[[Path | BinaryIO, str], Iterator[tuple[str, Tensor]]]
"""Video file, or its bytes, and key of the clip -> key and pixels (3, F, H, W) in [-1, 1] of each window. Raises
ClipError."""
Encode = Callable[[Tensor], Tensor]
"""(B, 3, F, H, W) in [-1, 1] -> normalised latents (B, F', C, H', W')."""
MakeLatents = Callable[[list[Sample]], Tensor]
"""Samples of one shape -> their normalised latents (B, F, C, H, W)."""
Maker = tuple[Callable[[Sample], Sample], MakeLatents]
"""Puts noise of the sample's shape in place of the latents, and makes latents from that."""
Outcomes = Generator[Iterable[Sample | Skipped]]
"""What becomes of the clips of each shard, in order: samples, and clips that are skipped."""


def write_shards(
    folder: Path,
    shards: list[ShardPlan],
    outcomes: Outcomes,
    progress: ClipProgress,
    shapes: Sequence[tuple[int, ...]],
) -> None:
    """Write shards one after the other.

    Args:
        folder: folder of the shards.
        shards: shards to write.
        outcomes: what becomes of the clips of each shard.
        progress: counts the clips.
        shapes: shapes of latents (F, C, H, W) of the buckets, if there are several.
    """
    with closing(outcomes):
        for shard, clips in zip(shards, outcomes, strict=True):
            write_shard(folder, shard.name, _counted(clips, progress), read_cut(folder, shard), shapes)
            (folder / shard.text_name).unlink()


def from_texts(folder: Path, shards: list[ShardPlan]) -> Generator[list[Sample | Skipped]]:
    """Yield the texts of each shard, as samples without latents."""
    yield from (read_shard_texts(folder, shard) for shard in shards)


def from_network(maker: Maker, folder: Path, shards: list[ShardPlan], batch: int, dtype: torch.dtype) -> Outcomes:
    """Yield samples with latents that a network makes from the texts, `batch` at once; `dtype` is that of latents."""
    start, make = maker
    for texts in from_texts(folder, shards):
        begun = (one if isinstance(one, Skipped) else start(one) for one in texts)
        yield _encoded(make, begun, batch, dtype)


def from_videos(
    read: ReadVideo, encode: Encode, folder: Path, shards: list[ShardPlan], batch: int, dtype: torch.dtype
) -> Outcomes:
    """Yield samples with latents of the videos. Later clips are decoded while the VAE encodes.

    Args:
        read: reads a video.
        encode: encodes videos.
        folder: folder of the shards.
        shards: shards of the clips.
        batch: clips per call of `encode`.
        dtype: dtype of the stored latents.
    """

    pool = ThreadPoolExecutor(DECODERS, "decode")
    clips = (pair for shard in shards for pair in zip(shard.clips, read_shard_texts(folder, shard), strict=True))
    try:
        with closing(_read_ahead(pool, read, clips, batch)) as decoded:
            for shard in shards:
                windows = chain.from_iterable(islice(decoded, len(shard.clips)))
                yield _encoded(lambda samples: encode(stacked(samples)), windows, batch, dtype)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def stacked(samples: Iterable[Sample]) -> Tensor:
    """Join the latents of samples, or what stands in their place, to a batch."""
    return torch.stack([sample.latents for sample in samples if sample.latents is not None])


def _counted(outcomes: Iterable[Sample | Skipped], progress: ClipProgress) -> Iterator[Sample | Skipped]:
    """Count clips when all of their windows are written. A clip is skipped if it has no sample."""
    for _, windows in groupby(outcomes, lambda outcome: clip_of(outcome.key)):
        first = None
        for window in windows:
            first = first or window
            yield window
        progress.advance(1, isinstance(first, Skipped))


def _read_ahead(
    pool: ThreadPoolExecutor, read: ReadVideo, clips: Iterable[tuple[Clip, Sample | Skipped]], batch: int
) -> Generator[Iterator[Sample | Skipped]]:
    """Yield the windows of each clip in order, while the pool reads later clips, enough for one more batch.

    A thread waits when a batch of its clip's windows has not been taken. So a long film does not fill the memory.
    """
    stopped, begun = Event(), deque[tuple[Queue[Sample | Skipped | None], Future[None]]]()

    def fill(queue: Queue[Sample | Skipped | None], clip: Clip, sample: Sample | Skipped) -> None:
        try:
            for window in with_pixels(read, clip, sample):
                put(queue, window)
                if stopped.is_set():
                    return
        finally:
            put(queue, None)

    def put(queue: Queue[Sample | Skipped | None], window: Sample | Skipped | None) -> None:
        while not stopped.is_set():
            with suppress(Full):
                return queue.put(window, timeout=STOP_SECONDS)

    def taken(queue: Queue[Sample | Skipped | None], thread: Future[None]) -> Iterator[Sample | Skipped]:
        while (window := queue.get()) is not None:
            yield window
        thread.result()

    try:
        for clip, sample in clips:
            queue = Queue[Sample | Skipped | None](batch + 1)
            begun.append((queue, pool.submit(fill, queue, clip, sample)))
            if len(begun) > batch + DECODERS:
                yield taken(*begun.popleft())
        while begun:
            yield taken(*begun.popleft())
    finally:
        stopped.set()


def with_pixels(read: ReadVideo, clip: Clip, sample: Sample | Skipped) -> Iterator[Sample | Skipped]:
    """Yield a sample for each window of a clip, with pixels in place of latents; and why the clip, or the rest of it,
    is skipped."""
    if isinstance(sample, Skipped):
        yield sample
        return
    number = 0
    try:
        assert clip.video is not None
        for key, pixels in read(clip.video.seekable(), clip.key):
            yield replace(sample, key=key, latents=pixels)
            number += 1
    except ClipError as error:
        yield Skipped(window_key(clip.key, number) if number else clip.key, str(error))
    except OSError as error:
        yield Skipped(clip.key, f"unreadable: {error.strerror}")


def _encoded(
    make: MakeLatents, clips: Iterable[Sample | Skipped], batch: int, dtype: torch.dtype
) -> Iterator[Sample | Skipped]:
    """Make latents in batches of one shape. All outcomes keep their order, so that those of a clip stay together."""
    waiting: list[Sample | Skipped] = []
    samples: list[Sample] = []

    def made() -> Iterator[Sample | Skipped]:
        results = _make_batch(make, samples, dtype)
        yield from [one if isinstance(one, Skipped) else next(results) for one in waiting]

    for clip in clips:
        if samples and not isinstance(clip, Skipped) and _shape(samples[0]) != _shape(clip):
            yield from made()
            waiting, samples = [], []
        waiting.append(clip)
        samples += [] if isinstance(clip, Skipped) else [clip]
        if len(samples) in (0, batch):
            yield from made() if samples else waiting
            waiting, samples = [], []
    yield from made() if samples else waiting


def _make_batch(make: MakeLatents, samples: list[Sample], dtype: torch.dtype) -> Iterator[Sample | Skipped]:
    for sample, latents in zip(samples, make(samples).to("cpu", dtype), strict=True):
        if torch.isfinite(latents).all():
            yield replace(sample, latents=latents.clone())
        else:
            yield Skipped(sample.key, "non-finite latents")


def _shape(sample: Sample) -> torch.Size | None:
    return None if sample.latents is None else sample.latents.shape
