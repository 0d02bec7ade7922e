"""Which tokens a forward computes on, and which of them see which: plain integers, for counting.

The networks themselves: `models.transformer`, `models.far_transformer`.
"""

from __future__ import annotations

from collections.abc import Sequence as Several
from dataclasses import dataclass
from itertools import accumulate

from anyflow_train.config.chunks import Chunks, Sequence


@dataclass(frozen=True)
class Rectangle:
    """One dense call of self-attention: so many queries that all see the same keys.

    join_workers: whether the keys lie in two places, and are copied to lie together.
    """

    queries: int
    keys: int
    join_workers: bool = False


@dataclass(frozen=True)
class Rows:
    """What one sample's forward computes on.

    Attributes:
        full: tokens with patches of the network's size.
        context: tokens with larger patches.
        velocity: tokens whose velocity is computed; 0 where only keys and values are wanted, for a later chunk.
        times: rows of times.
        seen: self-attention.
        remembered: tokens of which every block's keys and values are kept, made by this forward or read by it.
    """

    full: int
    context: int
    velocity: int
    times: int
    seen: tuple[Rectangle, ...]
    remembered: int = 0

    @classmethod
    def whole(cls, tokens: int) -> Rows:
        """A clip whose tokens all see each other."""
        return cls(tokens, 0, tokens, 1, (Rectangle(tokens, tokens),))

    @property
    def tokens(self) -> int:
        """Of all kinds."""
        return self.full + self.context


@dataclass(frozen=True)
class ChunkRows:
    """The forwards of a causal network.

    Attributes:
        chunks: of a clip.
        full: tokens of a frame.
        context: tokens of a frame that is compressed.
    """

    chunks: Chunks
    full: int
    context: int

    def sequence(self, drawn: Sequence) -> Rows:
        """Noisy chunks after clean ones: the context, and copies of all noisy chunks but the newest."""
        newer = drawn.chunks[-self.chunks.full_limit :]
        context = self._context(drawn.chunks[: -self.chunks.full_limit])
        copies, noisy = self._full(newer[:-1]), self._full(newer)
        ends = list(accumulate((*context, *copies), initial=0))[len(context) :]
        seen = [Rectangle(chunk, before + chunk, before > 0) for chunk, before in zip(noisy, ends, strict=True)]
        alone = len(drawn.chunks) == 1
        return Rows(
            full=sum(copies) + sum(noisy),
            context=sum(context),
            velocity=sum(noisy),
            times=1 if alone else drawn.frames + sum(newer[:-1]),
            seen=(*_block_causal((*context, *copies)), *seen),
        )

    def encoding(self, count: int) -> Rows:
        """The first `count` chunks, clean, to be remembered by the next."""
        older = max(count - (self.chunks.full_limit - 1), 0)
        context = self._context(self.chunks.partition[:older])
        full = self._full(self.chunks.partition[older:count])
        tokens = sum(context) + sum(full)
        return Rows(sum(full), sum(context), 0, 1, _block_causal((*context, *full)), tokens)

    def next_chunk(self, count: int) -> Rows:
        """The chunk after the first `count`."""
        (tokens,) = self._full(self.chunks.partition[count : count + 1])
        before = self.encoding(count).tokens
        return Rows(tokens, 0, tokens, 1, (Rectangle(tokens, before + tokens, before > 0),), before)

    def _full(self, chunks: Several[int]) -> tuple[int, ...]:
        return tuple(frames * self.full for frames in chunks)

    def _context(self, chunks: Several[int]) -> tuple[int, ...]:
        return tuple(frames * self.context for frames in chunks)


def _block_causal(chunks: Several[int]) -> tuple[Rectangle, ...]:
    """Each chunk sees itself and those before it."""
    return tuple(Rectangle(tokens, end) for tokens, end in zip(chunks, accumulate(chunks), strict=True))
