"""Chunks of a clip for chunk-by-chunk generation (FAR, arXiv 2503.19325), as plain integers.

Config, objectives and samplers share them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from anyflow_train.config.network import Architecture


@dataclass(frozen=True)
class Sequence:
    """The first chunks of a clip as one training sequence.

    Attributes:
        chunks: latent frames of each chunk.
        context: latent frames of the oldest chunks, which are clean and compressed. The other chunks are noised.
    """

    chunks: tuple[int, ...]
    context: int

    @property
    def frames(self) -> int:
        """Latent frames of all chunks."""
        return sum(self.chunks)


@dataclass(frozen=True)
class Chunks:
    """The chunks of a clip.

    Attributes:
        partition: latent frames of each chunk.
        full_limit: number of newest chunks of a sequence that have full patches.
    """

    partition: tuple[int, ...]
    full_limit: int

    @classmethod
    def of(cls, network: Architecture) -> Chunks | None:
        """Return the chunks of a causal network; None for any other network."""
        causal = network.causal
        return None if causal is None else cls(causal.chunk_partition, causal.full_chunk_limit)

    def sequence(self, count: int) -> Sequence:
        """Return the sequence of the first `count` chunks."""
        chunks = self.partition[:count]
        return Sequence(chunks, sum(chunks[: -self.full_limit]))

    def drawn(self, long_share: float, kind: float, number: float) -> Sequence:
        """Draw a sequence: with context in a share of the draws, else without. All lengths are equally likely.

        Args:
            long_share: share of draws with context, in [0, 1].
            kind, number: uniform random numbers in [0, 1).
        """
        limit, most = min(self.full_limit, len(self.partition)), len(self.partition)
        if kind < long_share and most > limit:
            return self.sequence(limit + 1 + int(number * (most - limit)))
        return self.sequence(1 + int(number * limit))

    def growing(self) -> Iterator[tuple[int, ...]]:
        """Iterate over the prefixes of the partition, shortest first."""
        return (self.partition[:count] for count in range(1, len(self.partition) + 1))

    def whole(self, frames: int) -> int:
        """Convert a number of latent frames to a number of whole chunks.

        Raises:
            ValueError: the frames end inside a chunk, or they are the whole clip or more.
        """
        ends = [0, *accumulate(self.partition)]
        if frames not in ends[:-1]:
            possible = ", ".join(map(str, ends[1:-1])) or "none"
            raise ValueError(
                f"{frames} latent frames do not end at a chunk of {list(self.partition)}; possible are {possible}"
            )
        return ends.index(frames)
