"""Assign the positions of a step's global batch to branches and processes, for any number of processes.

A step holds positions 0..G-1. The first positions are diffusion (r = t), the next consistency (r = 0), the rest free.
So the samples that need no time derivative fill the earliest micro-steps, on every process at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum

MOST_ACCUMULATION = 64


class Branch(IntEnum):
    """Which part of the triangle 0 <= r <= t a sample trains."""

    DIFFUSION = 0  # r = t
    CONSISTENCY = 1  # r = 0
    FREE = 2


@dataclass(frozen=True)
class BranchCounts:
    """How many of a global batch's positions each branch holds, in this order."""

    diffusion: int
    consistency: int
    free: int

    @property
    def global_batch(self) -> int:
        """All positions of a step."""
        return self.diffusion + self.consistency + self.free

    def branch(self, position: int) -> Branch:
        """The branch of one position; ValueError where the step has no such position."""
        if not 0 <= position < self.global_batch:
            raise ValueError(f"position {position} is outside of a global batch of {self.global_batch}")
        if position < self.diffusion:
            return Branch.DIFFUSION
        return Branch.CONSISTENCY if position < self.diffusion + self.consistency else Branch.FREE


def branch_counts(global_batch: int, diffusion_share: float, consistency_share: float) -> BranchCounts:
    """Shares of the global batch, rounded half up; free takes what is left.

    Raises ValueError where the shares are impossible, or where the batch is too small to hold every branch: the
    published code then divides by zero or silently drops a branch.
    """
    free_share = 1 - diffusion_share - consistency_share
    if min(diffusion_share, consistency_share) < 0 or free_share < -1e-9:
        raise ValueError(f"shares {diffusion_share} and {consistency_share} are not two parts of a whole")
    diffusion = math.floor(diffusion_share * global_batch + 0.5)
    consistency = min(math.floor(consistency_share * global_batch + 0.5), global_batch - diffusion)
    counts = BranchCounts(diffusion, consistency, global_batch - diffusion - consistency)
    shares = (("diffusion", diffusion_share), ("consistency", consistency_share), ("free", free_share))
    lost = [name for name, share in shares if share > 1e-9 and getattr(counts, name) == 0]
    if lost:
        raise ValueError(
            f"a global batch of {global_batch} gives {diffusion} diffusion, {consistency} consistency and "
            f"{counts.free} free samples: none is left for {' and '.join(lost)}"
        )
    return counts


def local_positions(global_batch: int, micro_batch: int, world: int, rank: int) -> list[tuple[int, ...]]:
    """The positions that one process holds in each of its micro-steps: `m W B + rank + W i`.

    Interleaved, so that within a micro-step all W processes hold equally many of every branch as far as counts allow.
    Raises ValueError unless `micro_batch x world` divides the global batch.
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
    """How many rows of a micro-batch, the last ones, need the term of r < t: the same number on every process.

    The term is whatever an objective computes for r < t alone, such as a time derivative. These are exactly the rows
    with r < t if the micro-step's diffusion positions divide by `world`. Otherwise processes with more diffusion
    positions run some of them too (the term is then multiplied by zero), because under ZeRO-3 a process that runs fewer
    forwards than the others hangs them all.

    Raises ValueError for positions that are not one of `local_positions`' rows.
    """
    width = world * len(positions)
    start = positions[0] // width * width
    if positions != tuple(range(positions[0], start + width, world)):
        raise ValueError(f"positions {positions} are not one process's share of a micro-step of {world} processes")
    diffusion = min(max(counts.diffusion - start, 0), width)
    return len(positions) - diffusion // world


def even_accumulation(micro_batch: int, world: int, diffusion_share: float) -> int | None:
    """The smallest accumulation at which no process takes a needless time derivative; None if there is none to 64."""
    for accumulation in range(1, MOST_ACCUMULATION + 1):
        if math.floor(diffusion_share * accumulation * world * micro_batch + 0.5) % world == 0:
            return accumulation
    return None
