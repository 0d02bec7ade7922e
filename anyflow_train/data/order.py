"""Which sample stands at which position: a function of (seed, epoch), never of ranks, workers or micro-batches.

The permutation is a keyed Feistel network with cycle walking (Black and Rogaway, "Ciphers with Arbitrary Finite
Domains", 2002): any single position is computed in microseconds without building the whole order, so neither the size
of the data set nor the step at which a run resumes costs time or memory, and no library's generator decides the order.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from anyflow_train.flow.draw import draw_key

# Small sets have few bits per half: more rounds than the usual four keep their orders as good as random ones.
ROUNDS = 8
WORD = (1 << 64) - 1


def permute(position: int, size: int, keys: Sequence[int]) -> int:
    """The image of `position` under the permutation of range(size) that the round keys choose."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    while True:
        position = _feistel(position, half, keys)
        if position < size:
            return position


def step_text_length(seed: int, step: int, text_lengths: Sequence[int]) -> int:
    """The length to which every text of a step is padded: one of `text_lengths`, drawn anew each step."""
    return text_lengths[draw_key(seed, step, "text_length") % len(text_lengths)]


@dataclass(frozen=True)
class SampleOrder:
    """The endless stream of samples: epoch after epoch, each a new permutation, without dropped tails.

    Attributes:
        seed: of the run.
        shard_sizes: samples per shard; a sample's index counts through the shards.
        shuffle_shards: samples are permuted within groups of this many (permuted) shards, so that a bounded cache of
            remote shards holds a group; None permutes all samples at once.
    """

    seed: int
    shard_sizes: tuple[int, ...]
    shuffle_shards: int | None = None

    def __post_init__(self) -> None:
        if sum(self.shard_sizes) == 0:
            raise ValueError("the order of an empty set of samples was asked for")

    def index(self, position: int) -> int:
        """The index of the sample at a position >= 0."""
        epoch, offset = divmod(position, sum(self.shard_sizes))
        groups = _groups(self, epoch)
        number = bisect_right(groups.starts, offset) - 1
        group = groups.members[number]
        place = permute(offset - groups.starts[number], group.size, _round_keys(self.seed, epoch, f"group {number}"))
        which = bisect_right(group.starts, place) - 1
        return group.firsts[which] + place - group.starts[which]

    def replacement(self, position: int, attempt: int) -> int:
        """The index to read in place of a bad sample at `position`: the attempt-th of a sequence of its own.

        Independent draws, because the neighbours of a bad sample are often bad too (a truncated shard).
        """
        return draw_key(self.seed, position, "replacement", attempt) % sum(self.shard_sizes)


@dataclass(frozen=True)
class _Group:
    """Shards whose samples are permuted together: where each starts in the group, and its first sample's index."""

    size: int
    starts: tuple[int, ...]
    firsts: tuple[int, ...]


@dataclass(frozen=True)
class _Groups:
    starts: tuple[int, ...]
    members: tuple[_Group, ...]


# Two epochs are alive while a step straddles them; readers ahead of the step may add one more.
@lru_cache(maxsize=4)
def _groups(order: SampleOrder, epoch: int) -> _Groups:
    sizes = order.shard_sizes
    firsts = _starts(sizes)
    keys = _round_keys(order.seed, epoch, "shards")
    shards = [permute(i, len(sizes), keys) for i in range(len(sizes))]
    shards = [shard for shard in shards if sizes[shard] > 0]
    width = order.shuffle_shards or len(shards)
    chunks = [shards[i : i + width] for i in range(0, len(shards), width)]
    members = tuple(
        _Group(sum(sizes[s] for s in chunk), _starts([sizes[s] for s in chunk]), tuple(firsts[s] for s in chunk))
        for chunk in chunks
    )
    return _Groups(_starts([group.size for group in members]), members)


@lru_cache(maxsize=64)
def _round_keys(seed: int, epoch: int, purpose: str) -> tuple[int, ...]:
    return tuple(draw_key(seed, epoch, "order", purpose, number) for number in range(ROUNDS))


def _starts(sizes: Sequence[int]) -> tuple[int, ...]:
    return (0, *accumulate(sizes))[:-1]


def _feistel(value: int, half: int, keys: Sequence[int]) -> int:
    mask = (1 << half) - 1
    left, right = value >> half, value & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return left << half | right


def _mix(value: int) -> int:
    """The finaliser of splitmix64: every output bit depends on every input bit."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & WORD
    return value ^ (value >> 31)
