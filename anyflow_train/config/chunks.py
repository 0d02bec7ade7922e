"""How a clip is generated chunk by chunk (FAR, arXiv 2503.19325): plain integers, shared by config, objectives and
samplers.
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
        chunks: latent frames of each.
        context: frames of the oldest chunks, which are given clean and compressed; the others are noised.
    """

    chunks: tuple[int, ...]
    context: int

    @property
    def frames(self) -> int:
        """Of all chunks."""
        return sum(self.chunks)


@dataclass(frozen=True)
class Chunks:
    """The chunks of a clip.

    Attributes:
        partition: latent frames of each.
        full_limit: that many chunks of a sequence have full patches, the newest.
    """

    partition: tuple[int, ...]
    full_limit: int

    @classmethod
    def of(cls, network: Architecture) -> Chunks | None:
        """Those of a causal network; None for any other."""
        causal = network.causal
        return None if causal is None else cls(causal.chunk_partition, causal.full_chunk_limit)

    def sequence(self, count: int) -> Sequence:
        """The first `count` chunks."""
        chunks = self.partition[:count]
        return Sequence(chunks, sum(chunks[: -self.full_limit]))

    def drawn(self, long_share: float, kind: float, number: float) -> Sequence:
        """A sequence with context in a share of the draws, without in the others; every length equally likely.

        Args:
            kind, number: uniform in [0, 1).
        """
        limit, most = min(self.full_limit, len(self.partition)), len(self.partition)
        if kind < long_share and most > limit:
            return self.sequence(limit + 1 + int(number * (most - limit)))
        return self.sequence(1 + int(number * limit))

    def draws(self, long_share: float) -> tuple[tuple[float, Sequence], ...]:
        """Every sequence that `drawn` gives, with its share of the draws."""
        limit, most = min(self.full_limit, len(self.partition)), len(self.partition)
        long = long_share if most > limit else 0.0
        shares = [(1 - long) / limit] * limit + [long / max(most - limit, 1)] * (most - limit)
        return tuple((share, self.sequence(count)) for count, share in enumerate(shares, 1) if share)

    def growing(self) -> Iterator[tuple[int, ...]]:
        """The chunks up to and including each in turn."""
        return (self.partition[:count] for count in range(1, len(self.partition) + 1))

    def whole(self, frames: int) -> int:
        """How many chunks so many frames are.

        Raises:
            ValueError: they end inside of a chunk, or are the whole clip or more.
        """
        ends = [0, *accumulate(self.partition)]
        if frames not in ends[:-1]:
            possible = ", ".join(map(str, ends[1:-1])) or "none"
            raise ValueError(f"{frames} latent frames are no whole chunks of {list(self.partition)}: give {possible}")
        return ends.index(frames)
