"""Order of the samples: a function of (seed, epoch), independent of ranks, workers and micro-batches.

The permutation is a keyed Feistel network with cycle walking (Black and Rogaway, "Ciphers with Arbitrary Finite
Domains", 2002). A single position is computed in microseconds, without building the whole order. So large data sets and
late resume steps cost neither time nor memory. The order does not depend on the version of a library.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from anyflow_train.flow.draw import draw_key

# Small sets have few bits per half. They need more than the usual four rounds to be as good as random permutations.
ROUNDS = 8
WORD = (1 << 64) - 1


def permute(position: int, size: int, keys: Sequence[int]) -> int:
    """Return the image of `position` under a permutation of range(size), which the round keys select."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    while True:
        position = _feistel(position, half, keys)
        if position < size:
            return position


def step_text_length(seed: int, step: int, text_lengths: Sequence[int]) -> int:
    """Draw the text length of a step, in tokens, from `text_lengths`."""
    return text_lengths[draw_key(seed, step, "text_length") % len(text_lengths)]


@dataclass(frozen=True)
class SampleOrder:
    """Endless stream of samples. Each epoch is a new permutation of all samples; none is dropped at its end.

    Attributes:
        seed: seed of the run.
        shard_sizes: samples per shard; the index of a sample counts through all shards.
        shuffle_shards: samples are permuted within groups of this many (permuted) shards, so that a group fits into a
            bounded cache of remote shards; None permutes all samples together.
        number: number of this set of shards among several, so that their permutations differ.
    """

    seed: int
    shard_sizes: tuple[int, ...]
    shuffle_shards: int | None = None
    number: int = 0

    def __post_init__(self) -> None:
        if sum(self.shard_sizes) == 0:
            raise ValueError("an empty set of samples has no order")

    def index(self, position: int) -> int:
        """Return the index of the sample at a position >= 0."""
        epoch, offset = divmod(position, sum(self.shard_sizes))
        firsts, starts = _shard_order(self, epoch)
        width = self.shuffle_shards or len(firsts)
        group = (bisect_right(starts, offset) - 1) // width
        begin, end = starts[group * width], starts[min((group + 1) * width, len(firsts))]
        offset = begin + permute(offset - begin, end - begin, _round_keys(self._seed, epoch, f"group {group}"))
        shard = bisect_right(starts, offset) - 1
        return firsts[shard] + offset - starts[shard]

    def epoch(self, position: int) -> int:
        """Return how often all samples have been used before a position."""
        return position // sum(self.shard_sizes)

    @property
    def _seed(self) -> int:
        return draw_key(self.seed, self.number, "set of shards") if self.number else self.seed

    def replacement(self, position: int, attempt: int) -> int:
        """Draw the index of a sample that replaces a bad one at `position`.

        Attempts are independent draws, because the neighbours of a bad sample are often bad too (a truncated shard).
        """
        return draw_key(self._seed, position, "replacement", attempt) % sum(self.shard_sizes)


@dataclass(frozen=True)
class MixedOrder:
    """Endless stream of samples from several sets, each in its own order.

    A cycle of the stream has a fixed number of slots for each set, in a new permutation each time. So the shares of the
    sets are exact after every cycle, and the position within a set follows from that in the stream.

    Attributes:
        seed: seed of the run.
        orders: order of each set; the index of a sample counts through all sets.
        slots: slots of each set in a cycle.
    """

    seed: int
    orders: tuple[SampleOrder, ...]
    slots: tuple[int, ...]

    def index(self, position: int) -> int:
        """Return the index of the sample at a position >= 0."""
        number, place = self._place(position)
        return self._first(number) + self.orders[number].index(place)

    def replacement(self, position: int, attempt: int) -> int:
        """Draw the index of a sample of the same set that replaces a bad one at `position`."""
        number, place = self._place(position)
        return self._first(number) + self.orders[number].replacement(place, attempt)

    def epoch(self, position: int) -> int:
        """Return how often all samples of the position's set have been used before it."""
        number, place = self._place(position)
        return self.orders[number].epoch(place)

    def _place(self, position: int) -> tuple[int, int]:
        """Return the set of a position, and the position in the set's own stream."""
        return take_turns(position, self.slots, self.seed, "sets")

    def _first(self, number: int) -> int:
        return sum(sum(order.shard_sizes) for order in self.orders[:number])


def take_turns(position: int, slots: Sequence[int], seed: int, purpose: str) -> tuple[int, int]:
    """Choose one of several streams for a position, in cycles in which each has its slots, in random order.

    Args:
        position: position in the whole, from 0.
        slots: positions of each stream in a cycle.
        seed: seed of the run.
        purpose: what is chosen.

    Returns:
        Number of the stream, and position in it: each stream is used from its beginning, without gaps.
    """
    if len(slots) == 1:
        return 0, position
    cycle, offset = divmod(position, sum(slots))
    slot = permute(offset, sum(slots), _round_keys(seed, cycle, purpose))
    starts = (0, *accumulate(slots))
    number = bisect_right(starts, slot) - 1
    return number, cycle * slots[number] + slot - starts[number]


def slots_of(shares: Sequence[float], cycle: int) -> tuple[int, ...]:
    """Split a cycle by shares of any sum; each one gets at least one slot."""
    return tuple(max(1, round(cycle * share / sum(shares))) for share in shares)


# A step can span two epochs, and threads that read ahead may already be in a third one.
@lru_cache(maxsize=4)
def _shard_order(order: SampleOrder, epoch: int) -> tuple[list[int], list[int]]:
    """Permute the shards that have samples. Returns the index of each one's first sample, and its start in the epoch.

    The starts have one more entry, the end of the epoch.
    """
    sizes, keys = order.shard_sizes, _round_keys(order._seed, epoch, "shards")
    firsts = (0, *accumulate(sizes))
    permuted = [permute(i, len(sizes), keys) for i in range(len(sizes))]
    shards = [shard for shard in permuted if sizes[shard] > 0]
    return [firsts[shard] for shard in shards], [0, *accumulate(sizes[shard] for shard in shards)]


@lru_cache(maxsize=64)
def _round_keys(seed: int, epoch: int, purpose: str) -> tuple[int, ...]:
    return tuple(draw_key(seed, epoch, "order", purpose, number) for number in range(ROUNDS))


def _feistel(value: int, half: int, keys: Sequence[int]) -> int:
    mask = (1 << half) - 1
    left, right = value >> half, value & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return left << half | right


def _mix(value: int) -> int:
    """Apply the finaliser of splitmix64: every output bit depends on every input bit."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & WORD
    return value ^ (value >> 31)
