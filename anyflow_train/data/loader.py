"""The stream of training batches. It can start at any step."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, count
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from anyflow_train.data.batch import Batch
from anyflow_train.data.mixture import SLOTS, Bucket, ShardMixture
from anyflow_train.data.order import slots_of, step_text_length, take_turns
from anyflow_train.data.shards import BadSampleError, Sample
from anyflow_train.errors import UserError
from anyflow_train.flow.draw import draw_key
from anyflow_train.flow.types import Condition
from anyflow_train.text import MOST_NAMED

# The share of bad reads is computed over at least this many reads: one bad file at the start must not stop a run.
MIN_READS = 1000
# If this many replacements in a row are bad, the storage is broken and not a single file.
MAX_REPLACEMENTS = 20
REQUESTS_PER_WORKER = 2

log = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R")


class Request(NamedTuple):
    """A micro-batch to read.

    Attributes:
        step: training step.
        bucket: number of the bucket.
        start: position of its global batch in the stream of the bucket.
        turn: number of this global batch in the step.
        positions: positions of the samples in it.
    """

    step: int
    bucket: int
    start: int
    turn: int
    positions: tuple[int, ...]


@dataclass
class Loader:
    """Endless batches of a run for one rank. Each item is the list of one step's micro-batches.

    Position j of step s is the sample at position `s * global_batch + j` of the stream (`data.order`). With buckets,
    a step takes one or more global batches of one bucket, which all ranks draw alike, and s counts those of the bucket.
    Workers are threads that only fetch; reading, checksums and decoding release the interpreter's lock. The order does
    not depend on them. Texts are padded with zeros or cut to the step's length, as Wan's pipeline does with its
    `max_sequence_length`.

    Attributes:
        shards: the training shards, of one or of several sets.
        seed: seed of the run.
        global_batch: samples per step, over all ranks and micro-steps.
        local_positions: positions of this rank, per micro-step.
        text_lengths: each step pads its texts to one of these lengths, in tokens.
        workers: threads that fetch ahead; with 0, each batch is fetched when it is needed.
        start_step: first step to yield.
        max_bad_share: the iteration raises a UserError if more than this share of the reads is bad.
        shuffle_shards: see `SampleOrder`.
        device: device of the batches; for a GPU they are made in pinned memory.
        buckets: the samples by size; empty if all have one size.
        reads, bad_reads: samples read by this process so far, and how many of them were bad.
        bad: names (`shard: key`) of the bad samples, with the reasons.

    Raises:
        ValueError: a position is outside of the global batch.
    """

    shards: ShardMixture
    seed: int
    global_batch: int
    local_positions: Sequence[tuple[int, ...]]
    text_lengths: Sequence[int]
    workers: int = 2
    start_step: int = 0
    max_bad_share: float = 0.01
    shuffle_shards: int | None = None
    device: torch.device | None = None
    buckets: tuple[Bucket, ...] = ()
    reads: int = field(default=0, init=False)
    bad_reads: int = field(default=0, init=False)
    bad: dict[str, str] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if any(position >= self.global_batch for positions in self.local_positions for position in positions):
            positions = list(self.local_positions)
            raise ValueError(f"local_positions {positions} go over the global batch of {self.global_batch}")
        self.buckets = self.buckets or (Bucket(self.shards),)
        self._orders = [one.shards.order(self.seed, self.shuffle_shards) for one in self.buckets]
        self._slots = slots_of([one.share for one in self.buckets], SLOTS)
        self._pool = ThreadPoolExecutor(self.workers, "loader") if self.workers else None

    def __iter__(self) -> Iterator[list[Batch]]:
        """Yield the micro-batches of each step. Raises UserError if too many samples are bad."""
        requests = (request for step in count(self.start_step) for request in self._requests(step))
        pool, ahead = self._pool, self.workers * REQUESTS_PER_WORKER
        fetched = map(self._fetch, requests) if pool is None else map_ahead(pool, self._fetch, requests, ahead)
        for step in count(self.start_step):
            yield [self._accounted(*next(fetched)) for _ in self._requests(step)]

    def _requests(self, step: int) -> list[Request]:
        """List the micro-batches of a step. Those of small clips are joined where that divides the global batch."""
        number, place = take_turns(step, self._slots, self.seed, "buckets")
        turns, rows = self.buckets[number].turns, self.local_positions
        width = max(width for width in range(1, turns + 1) if len(rows) % width == 0)
        joined = [tuple(chain(*rows[start : start + width])) for start in range(0, len(rows), width)]
        return [
            Request(step, number, (place * turns + turn) * self.global_batch, turn, positions)
            for turn in range(turns)
            for positions in joined
        ]

    def close(self) -> None:
        """Stop fetching, and cancel remote copies that are in progress."""
        if self._pool is not None:
            self.shards.cancel()
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def _fetch(self, request: Request) -> tuple[Batch, list[BadSampleError]]:
        """Read one micro-batch. Returns it with the bad samples that were replaced.

        Raises:
            UserError: too many replacements in a row are bad.
        """
        bad: list[BadSampleError] = []
        samples = [self._read(request.bucket, request.start + position, bad) for position in request.positions]
        length = step_text_length(self.seed, request.step, self.text_lengths)
        text = torch.stack([pad_text(sample.text, length) for sample in samples])
        negative = pad_text(self.shards.texts.negative, length)[None]
        shape = self.buckets[request.bucket].latent
        latents = [_latents(sample) if shape is None else torch.full(shape, torch.nan) for sample in samples]
        keys = tuple(sample.key for sample in samples)
        batch = Batch(torch.stack(latents), Condition(text), Condition(negative), keys, request.positions, request.turn)
        pinned = self.device is not None and self.device.type == "cuda"
        return batch.map(Tensor.pin_memory) if pinned else batch, bad

    def _read(self, bucket: int, position: int, bad: list[BadSampleError]) -> Sample:
        shards, order = self.buckets[bucket].shards, self._orders[bucket]
        index = order.index(position)
        for attempt in range(MAX_REPLACEMENTS):
            try:
                sample = shards.read(index)
                number = draw_key(self.seed, order.epoch(position), "caption", index) if sample.others else 0
                return sample.with_caption(number)
            except BadSampleError as error:
                bad.append(error)
                index = order.replacement(position, attempt)
        problem = f"{MAX_REPLACEMENTS} samples in a row cannot be read, the last one: {bad[-1]}"
        raise UserError(self.shards.location, problem)

    def _accounted(self, batch: Batch, bad: list[BadSampleError]) -> Batch:
        """Count reads in the order of the batches, so that a run with bad samples always stops at the same step."""
        self.reads += len(batch.keys) + len(bad)
        self.bad_reads += len(bad)
        for error in bad:
            name = f"{error.shard}: {error.key}"
            if name not in self.bad:
                log.warning("bad sample, replaced by another one: %s", error)
            self.bad[name] = error.reason
        if self.bad_reads > self.max_bad_share * max(self.reads, MIN_READS):
            raise UserError("data.max_bad_share", self._too_bad())
        return batch

    def _too_bad(self) -> str:
        named = "; ".join(f"{name} ({reason})" for name, reason in list(self.bad.items())[:MOST_NAMED])
        more = f"; and {len(self.bad) - MOST_NAMED} more" if len(self.bad) > MOST_NAMED else ""
        share = f"{self.bad_reads} of {self.reads} reads from {self.shards.location} were bad"
        return f"{share}, more than the allowed {self.max_bad_share:g}: {named}{more}"


def pad_text(text: Tensor, length: int) -> Tensor:
    """Pad a text (L, D) of any dtype with zeros, or cut it, to (length, D) float32."""
    padded = torch.zeros(length, text.shape[1])
    padded[: len(text)] = text[:length]
    return padded


def map_ahead(pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[R]:
    """Yield `function(item)` for each item in order, while up to `ahead` later items are computed in the pool."""
    queue: deque[Future[R]] = deque()
    for item in items:
        queue.append(pool.submit(function, item))
        if len(queue) > ahead:
            yield queue.popleft().result()
    while queue:
        yield queue.popleft().result()


def _latents(sample: Sample) -> Tensor:
    """Return latents (F, C, H, W) float32; (0,) for prompts without video."""
    return torch.empty(0) if sample.latents is None else sample.latents.float()
