"""Token layout and attention pattern of a sequence of chunks (FAR, arXiv 2503.19325).

The mask is block-causal, so all tokens of a chunk see the same keys. Each chunk is therefore one dense attention call.
This is exact, uses the fast kernel of the device, and supports every backward that the kernel has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from anyflow_train.models.attend import attend
from anyflow_train.models.rotary import Stretch

Span = tuple[int, int]
"""Range of tokens: the first, and one after the last."""


@dataclass(frozen=True)
class ChunkLayout:
    """The tokens of a sequence, [context | clean copies | full], chunk by chunk and frame by frame.

    Without copies, each chunk sees itself and all chunks before it. With copies, the full chunks are noisy: each sees
    the context, the clean copies of the chunks before it, and itself. Each copy sees the context and the copies up to
    itself. The newest chunk has no copy, because no chunk would see it.

    Attributes:
        context: frames of each of the oldest chunks, which have large patches.
        full: frames of each newer chunk, which has patches of the usual size.
        copies: frames of each clean copy (all chunks in `full` except the newest), or empty.
        grid: (rows, columns) of tokens of a frame in `full`.
        pool: height and width of a large patch, in small patches.
    """

    context: tuple[int, ...]
    full: tuple[int, ...]
    copies: tuple[int, ...]
    grid: tuple[int, int]
    pool: int

    @classmethod
    def of(cls, partition: Sequence[int], full_chunks: int, grid: tuple[int, int], pool: int) -> ChunkLayout:
        """Lay out chunks without clean copies.

        Args:
            partition: frames of each chunk, oldest first.
            full_chunks: number of the newest chunks that have patches of the usual size.
            grid: (rows, columns) of small patches of a frame.
            pool: height and width of a large patch, in small patches.

        Raises:
            ValueError: no chunk, an empty chunk, or a grid that large patches do not divide.
        """
        partition = tuple(partition)
        if not partition or min(partition) < 1:
            raise ValueError(f"chunk_partition must have chunks of at least 1 frame each, but is {partition}")
        older = max(len(partition) - full_chunks, 0)
        if older and (grid[0] % pool or grid[1] % pool):
            raise ValueError(
                f"frames of {grid[0]} x {grid[1]} patches cannot be divided into large patches (compressed_patch_size) "
                f"of {pool} x {pool} of these, which the {older} oldest chunks need"
            )
        return cls(partition[:older], partition[older:], (), grid, pool)

    def with_copies(self) -> ChunkLayout:
        """Add clean copies of the full chunks."""
        return replace(self, copies=self.full[:-1])

    @property
    def frames(self) -> int:
        """Number of frames of the video, without copies."""
        return sum(self.context) + sum(self.full)

    @property
    def tokens(self) -> int:
        """Number of tokens S of the sequence."""
        return sum(map(sum, self._lengths()))

    @property
    def full_tokens(self) -> int:
        """Number of tokens of `full`. They are the last ones of the sequence."""
        return sum(self._lengths()[2])

    def stretches(self) -> tuple[Stretch, ...]:
        """Positions of the tokens in the video. A copy has the positions of its original."""
        rows, columns = self.grid
        older = sum(self.context)
        every = (
            Stretch((older, rows // self.pool, columns // self.pool), 0, self.pool),
            Stretch((sum(self.copies), rows, columns), older),
            Stretch((sum(self.full), rows, columns), older),
        )
        return tuple(each for each in every if each.grid[0])

    def rows(self, per_frame: Tensor) -> Tensor:
        """Repeat rows of newer frames, so that each row covers the same number of tokens as one of the context.

        per_frame: (B, 1 or frames with copies, ...); one row applies to all frames. Returns (B, rows, ...).
        """
        if per_frame.shape[1] == 1 or not self.context:
            return per_frame
        older = sum(self.context)
        newer = per_frame[:, older:].repeat_interleave(self.pool**2, dim=1)
        return torch.cat((per_frame[:, :older], newer), dim=1)

    def attention(self) -> Segments:
        """Attention pattern of the sequence."""
        context, copies, full = self._lengths()
        spans = list(pairwise((0, *accumulate((*context, *copies, *full)))))
        noisy = len(context) + len(copies) if copies else len(spans)
        segments = [Segment(span, ((0, span[1]),)) for span in spans[:noisy]]
        ends = [0, *(stop for _, stop in spans[:noisy])]
        for index, span in enumerate(spans[noisy:]):
            before = ends[len(context) + index]
            segments.append(Segment(span, ((0, before), span) if before else (span,)))
        return Segments(tuple(segments))

    def _lengths(self) -> tuple[list[int], list[int], list[int]]:
        """Number of tokens of each chunk in the context, the copies and the full chunks."""
        large = self.grid[0] * self.grid[1]
        small = large // self.pool**2
        return [n * small for n in self.context], [n * large for n in self.copies], [n * large for n in self.full]


@dataclass(frozen=True)
class Segment:
    """A range of queries and the ranges of keys that they all see."""

    queries: Span
    keys: tuple[Span, ...]


@dataclass(frozen=True)
class Segments:
    """An attention pattern with one dense call per segment. The queries of the segments are all tokens, in order."""

    segments: tuple[Segment, ...]

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Compute self-attention. query, key, value: (B, S, H, head_dim). Returns (B, S, D)."""
        lengths = [stop - start for start, stop in (each.queries for each in self.segments)]
        parts = [
            attend(part, _taken(key, each.keys), _taken(value, each.keys))
            for part, each in zip(query.split(lengths, dim=1), self.segments, strict=True)
        ]
        return torch.cat(parts, dim=1)


def check_chunks(
    patch_size: tuple[int, ...], compressed: tuple[int, ...], limit: int, partition: tuple[int, ...]
) -> None:
    """Check constructor arguments of a causal network.

    Raises:
        ValueError: invalid patch size, limit or partition.
    """
    if len(compressed) != 3 or compressed[0] != 1 or compressed[1] != compressed[2]:
        raise ValueError(f"compressed_patch_size must be (1, q, q), not {compressed}")
    if compressed[1] < 1 or compressed[1] % patch_size[1]:
        raise ValueError(f"compressed_patch_size must be a multiple of patch_size {patch_size}, but is {compressed}")
    if limit < 1:
        raise ValueError(f"full_chunk_limit must be 1 or more, not {limit}")
    if not partition or min(partition) < 1:
        raise ValueError(f"chunk_partition must have chunks of at least 1 frame each, but is {partition}")


def _taken(x: Tensor, spans: tuple[Span, ...]) -> Tensor:
    """Select tokens; for a single span, the result is a view."""
    parts = [x[:, start:stop] for start, stop in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
