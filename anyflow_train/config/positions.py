"""Assign the positions of a step's global batch to branches and processes, for any number of processes.

A step has positions 0..G-1. The first positions are diffusion (r = t), the next consistency (r = 0), the rest free.
Diffusion samples need no time derivative, so they fill the earliest micro-steps on every process.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import accumulate, pairwise

MOST_ACCUMULATION = 64


class Branch(IntEnum):
    """Part of the triangle 0 <= r <= t that a sample trains."""

    DIFFUSION = 0  # r = t
    CONSISTENCY = 1  # r = 0
    FREE = 2


@dataclass(frozen=True)
class BranchCounts:
    """Number of positions of each branch in a global batch, in this order."""

    diffusion: int
    consistency: int
    free: int

    @property
    def global_batch(self) -> int:
        """Number of positions of all branches."""
        return self.diffusion + self.consistency + self.free

    def branch(self, position: int) -> Branch:
        """Return the branch of one position. Raises ValueError if the step has no such position."""
        if not 0 <= position < self.global_batch:
            raise ValueError(f"position {position} is outside a global batch of {self.global_batch}")
        return Branch(bisect((self.diffusion, self.diffusion + self.consistency), position))


def branch_counts(global_batch: int, diffusion_share: float, consistency_share: float) -> BranchCounts:
    """Split the global batch by shares, rounded half up; the remaining positions are free.

    Raises ValueError if the shares are impossible, or if the batch is too small for every branch. The published code
    then divides by zero or silently drops a branch.
    """
    free_share = 1 - diffusion_share - consistency_share
    if min(diffusion_share, consistency_share) < 0 or free_share < -1e-9:
        raise ValueError(f"shares {diffusion_share} and {consistency_share} must be at least 0, and at most 1 together")
    diffusion = math.floor(diffusion_share * global_batch + 0.5)
    consistency = min(math.floor(consistency_share * global_batch + 0.5), global_batch - diffusion)
    counts = BranchCounts(diffusion, consistency, global_batch - diffusion - consistency)
    shares = (("diffusion", diffusion_share), ("consistency", consistency_share), ("free", free_share))
    lost = [name for name, share in shares if share > 1e-9 and getattr(counts, name) == 0]
    if lost:
        raise ValueError(
            f"a global batch of {global_batch} gives {diffusion} diffusion, {consistency} consistency and "
            f"{counts.free} free samples, but the shares require {' and '.join(lost)} samples"
        )
    return counts


def local_positions(global_batch: int, micro_batch: int, world: int, rank: int) -> list[tuple[int, ...]]:
    """List the positions of one process in each of its micro-steps: `m W B + rank + W i`.

    The positions are interleaved, so that in a micro-step all W processes have nearly the same number of samples of
    each branch. Raises ValueError unless `micro_batch x world` divides the global batch.
    """
    width = micro_batch * world
    if width <= 0 or global_batch % width:
        raise ValueError(
            f"micro-batch {micro_batch} x {world} processes does not divide a global batch of {global_batch}"
        )
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} is not one of {world} processes")
    return [tuple(range(start + rank, start + width, world)) for start in range(0, global_batch, width)]


def rows_with_second_term(counts: BranchCounts, positions: tuple[int, ...], world: int) -> int:
    """Count the last rows of a micro-batch for which the term for r < t is computed; equal on every process.

    The term is what an objective computes only for r < t, such as a time derivative. If `world` divides the number of
    diffusion positions of the micro-step, these are exactly the rows with r < t. Otherwise processes with more
    diffusion positions compute the term for some of them too and multiply it by zero. Under ZeRO-3 a process with fewer
    forward passes would block all others.

    Raises ValueError for positions that are not a row of `local_positions`.
    """
    return len(rows_of(range(counts.diffusion, counts.global_batch), positions, world))


def rows_of(part: range, positions: tuple[int, ...], world: int) -> range:
    """List the rows of a micro-batch in which any process has a position of `part`; equal on every process.

    Raises ValueError for positions that are not a row of `local_positions`.
    """
    width = world * len(positions)
    start = positions[0] // width * width
    if positions != tuple(range(positions[0], start + width, world)):
        raise ValueError(f"positions {positions} are not one process's share of a micro-step of {world} processes")
    first, end = max(part.start - start, 0), min(part.stop - start, width)
    return range(first // world, -(-end // world)) if first < end else range(0)


def split_range(positions: range, shares: Sequence[float]) -> list[range]:
    """Split a range into neighbouring ranges by shares that add up to 1, each border rounded half up."""
    borders = [positions.start + math.floor(share * len(positions) + 0.5 + 1e-9) for share in accumulate(shares)]
    return [range(first, end) for first, end in pairwise([positions.start, *borders])]


def even_accumulation(micro_batch: int, world: int, diffusion_share: float) -> int | None:
    """Find the smallest accumulation, at most 64, without needless time derivatives; None if there is none."""
    for accumulation in range(1, MOST_ACCUMULATION + 1):
        if math.floor(diffusion_share * accumulation * world * micro_batch + 0.5) % world == 0:
            return accumulation
    return None
