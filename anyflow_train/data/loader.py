"""The stream of training batches. It can start at any step."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import count
from types import TracebackType
from typing import TypeVar

import torch
from torch import Tensor

from anyflow_train.data.batch import Batch
from anyflow_train.data.manifest import Manifest
from anyflow_train.data.order import SampleOrder, step_text_length
from anyflow_train.data.shards import BadSampleError, Sample, ShardSet
from anyflow_train.errors import UserError
from anyflow_train.flow.types import Condition

# The share of bad reads is computed over at least this many reads: one bad file at the start must not stop a run.
MIN_READS = 1000
# If this many replacements in a row are bad, the storage is broken and not a single file.
MAX_REPLACEMENTS = 20
REQUESTS_PER_WORKER = 2
MOST_NAMED = 5

log = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Request:
    """One micro-batch to fetch."""

    step: int
    positions: tuple[int, ...]


@dataclass(frozen=True)
class Fetched:
    """A micro-batch, and the bad samples that were replaced."""

    batch: Batch
    bad: tuple[BadSampleError, ...]


class Loader:
    """Endless batches of a run for one rank. Each item is the list of one step's micro-batches.

    Position j of step s is the sample at position `s * global_batch + j` of the stream (`data.order`). Workers are
    threads that only fetch; reading, checksums and decoding release the interpreter's lock. The order does not depend
    on them. Texts are padded with zeros or cut to the step's length, as Wan's pipeline does with its
    `max_sequence_length`.

    Attributes:
        reads, bad_reads: samples read by this process so far, and how many of them were bad.
        bad: names (`shard: key`) of the bad samples, with the reasons.
    """

    def __init__(
        self,
        shards: ShardSet,
        seed: int,
        global_batch: int,
        local_positions: Sequence[tuple[int, ...]],
        text_lengths: Sequence[int],
        workers: int = 2,
        start_step: int = 0,
        max_bad_share: float = 0.01,
        shuffle_shards: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Start the worker threads; the first batch is fetched when the iteration starts.

        Args:
            shards: the training shards.
            seed: seed of the run.
            global_batch: samples per step, over all ranks and micro-steps.
            local_positions: positions of this rank, per micro-step.
            text_lengths: each step pads its texts to one of these lengths, in tokens.
            workers: threads that fetch ahead; with 0, each batch is fetched when it is needed.
            start_step: first step to yield.
            max_bad_share: the iteration raises a UserError if more than this share of the reads is bad.
            shuffle_shards: see `SampleOrder`.
            device: device of the batches; for a GPU they are made in pinned memory.

        Raises:
            ValueError: a position is outside of the global batch.
        """
        if any(position >= global_batch for positions in local_positions for position in positions):
            raise ValueError(f"local_positions {list(local_positions)} go over the global batch of {global_batch}")
        self.bad_reads = 0
        self.reads = 0
        self.bad: dict[str, str] = {}
        self._shards = shards
        self._seed = seed
        self._global_batch = global_batch
        self._local_positions = tuple(local_positions)
        self._text_lengths = tuple(text_lengths)
        self._start_step = start_step
        self._max_bad_share = max_bad_share
        self._order = SampleOrder(seed, shards.shard_sizes, shuffle_shards)
        self._pin = device is not None and device.type == "cuda"
        self._pool = ThreadPoolExecutor(workers, "loader") if workers else None
        self._ahead = workers * REQUESTS_PER_WORKER

    @property
    def manifest(self) -> Manifest:
        """Manifest of the shards."""
        return self._shards.manifest

    def __iter__(self) -> Iterator[list[Batch]]:
        """Yield the micro-batches of each step. Raises UserError if too many samples are bad."""
        requests = (Request(step, positions) for step in count(self._start_step) for positions in self._local_positions)
        fetched = self._fetched(requests)
        while True:
            micro_batches = []
            for _ in self._local_positions:
                result = next(fetched)
                self._account(result)
                micro_batches.append(result.batch)
            yield micro_batches

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop fetching, and cancel remote copies that are in progress."""
        if self._pool is not None:
            self._shards.cancel()
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def fetch(self, request: Request) -> Fetched:
        """Read one micro-batch. Raises UserError if too many replacements in a row are bad."""
        bad: list[BadSampleError] = []
        samples = [self._read(request.step * self._global_batch + position, bad) for position in request.positions]
        length = step_text_length(self._seed, request.step, self._text_lengths)
        text = torch.stack([pad_text(sample.text, length) for sample in samples])
        negative = pad_text(self._shards.texts.negative, length)[None]
        latents = torch.stack([_latents(sample) for sample in samples])
        keys = tuple(sample.key for sample in samples)
        batch = Batch(latents, Condition(text), Condition(negative), keys, request.positions)
        return Fetched(_pinned(batch) if self._pin else batch, tuple(bad))

    def _read(self, position: int, bad: list[BadSampleError]) -> Sample:
        index = self._order.index(position)
        for attempt in range(MAX_REPLACEMENTS):
            try:
                return self._shards.read(index)
            except BadSampleError as error:
                bad.append(error)
                index = self._order.replacement(position, attempt)
        problem = f"{MAX_REPLACEMENTS} samples in a row cannot be read, the last one: {bad[-1]}"
        raise UserError(self._shards.location, problem)

    def _fetched(self, requests: Iterable[Request]) -> Iterator[Fetched]:
        if self._pool is None:
            return map(self.fetch, requests)
        return map_ahead(self._pool, self.fetch, requests, self._ahead)

    def _account(self, fetched: Fetched) -> None:
        """Count reads in the order of the batches, so that a run with bad samples always stops at the same step."""
        self.reads += len(fetched.batch.keys) + len(fetched.bad)
        self.bad_reads += len(fetched.bad)
        for error in fetched.bad:
            name = f"{error.shard}: {error.key}"
            if name not in self.bad:
                log.warning("bad sample, replaced by another one: %s", error)
            self.bad[name] = error.reason
        if self.bad_reads > self._max_bad_share * max(self.reads, MIN_READS):
            raise UserError("data.max_bad_share", self._too_bad())

    def _too_bad(self) -> str:
        named = "; ".join(f"{name} ({reason})" for name, reason in list(self.bad.items())[:MOST_NAMED])
        more = f"; and {len(self.bad) - MOST_NAMED} more" if len(self.bad) > MOST_NAMED else ""
        share = f"{self.bad_reads} of {self.reads} reads from {self._shards.location} were bad"
        return f"{share}, more than the allowed {self._max_bad_share:g}: {named}{more}"


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


def _pinned(batch: Batch) -> Batch:
    return replace(
        batch,
        latents=batch.latents.pin_memory(),
        condition=Condition(batch.condition.text.pin_memory()),
        negative=Condition(batch.negative.text.pin_memory()),
    )
