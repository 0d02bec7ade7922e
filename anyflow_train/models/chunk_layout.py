"""Which tokens a sequence of chunks has, and which of them see which (FAR, arXiv 2503.19325).

The mask is block-causal, and so a handful of dense rectangles: the tokens of a chunk all see the same keys. Each chunk
is therefore one dense attention call: exact, as fast as the device's kernel, with a backward wherever there is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from anyflow_train.models.attend import attend
from anyflow_train.models.rotary import Stretch

Span = tuple[int, int]
"""Neighbouring tokens: the first, and the one after the last."""


@dataclass(frozen=True)
class ChunkLayout:
    """The tokens of a sequence: [context | clean copies | full], chunk by chunk, frame by frame.

    Without copies it is block-causal: a chunk sees itself and all before it. With copies the full chunks are noisy: one
    sees the context, the clean copies of the chunks before it, and itself; a copy sees the context and the copies up to
    itself. No chunk sees the copy of the newest one, so there is none.

    Attributes:
        context: frames of each of the oldest chunks, whose patches are large.
        full: frames of each chunk after them, whose patches are the network's.
        copies: frames of each clean copy: of all in `full` but the newest, or nothing.
        grid: (rows, columns) of tokens of a frame in `full`.
        pool: small patches, in height and in width, that a large one covers.
    """

    context: tuple[int, ...]
    full: tuple[int, ...]
    copies: tuple[int, ...]
    grid: tuple[int, int]
    pool: int

    @classmethod
    def of(cls, partition: Sequence[int], full_chunks: int, grid: tuple[int, int], pool: int) -> ChunkLayout:
        """Of chunks without clean copies, the newest `full_chunks` of them at full patch size.

        Raises:
            ValueError: no chunk, an empty chunk, or large patches that do not cover the frames of the context.
        """
        partition = tuple(partition)
        if not partition or min(partition) < 1:
            raise ValueError(f"chunk_partition must name one frame or more for every chunk, but is {partition}")
        older = max(len(partition) - full_chunks, 0)
        if older and (grid[0] % pool or grid[1] % pool):
            raise ValueError(
                f"frames of {grid[0]} x {grid[1]} patches cannot be cut into the context's patches "
                f"(compressed_patch_size) of {pool} x {pool} of these; {older} chunks are context"
            )
        return cls(partition[:older], partition[older:], (), grid, pool)

    def with_copies(self) -> ChunkLayout:
        """The same with clean copies of the full chunks."""
        return replace(self, copies=self.full[:-1])

    @property
    def frames(self) -> int:
        """Frames of the video, its copies not counted."""
        return sum(self.context) + sum(self.full)

    @property
    def tokens(self) -> int:
        context, copies, full = self._lengths()
        return sum(context) + sum(copies) + sum(full)

    @property
    def full_tokens(self) -> int:
        """How many tokens, the last ones, are those of `full`."""
        return sum(self._lengths()[2])

    def stretches(self) -> tuple[Stretch, ...]:
        """Where the tokens lie in the video; a copy lies where its original does."""
        rows, columns = self.grid
        older = sum(self.context)
        every = (
            Stretch((older, rows // self.pool, columns // self.pool), 0, self.pool),
            Stretch((sum(self.copies), rows, columns), older),
            Stretch((sum(self.full), rows, columns), older),
        )
        return tuple(each for each in every if each.grid[0])

    def rows(self, per_frame: Tensor) -> Tensor:
        """One row per frame to rows for equally many tokens each, since a frame of the context has fewer tokens.

        per_frame: (B, 1 or frames with copies, ...), one row standing for all. Returns (B, rows, ...).
        """
        if per_frame.shape[1] == 1 or not self.context:
            return per_frame
        older = sum(self.context)
        newer = per_frame[:, older:].repeat_interleave(self.pool**2, dim=1)
        return torch.cat((per_frame[:, :older], newer), dim=1)

    def attention(self) -> Segments:
        """What each chunk sees."""
        context, copies, full = self._lengths()
        spans = _spans((*context, *copies, *full))
        if not copies:
            return Segments(tuple(Segment(span, ((0, span[1]),)) for span in spans))
        noisy = len(context) + len(copies)
        segments = [Segment(span, ((0, span[1]),)) for span in spans[:noisy]]
        ends = [0, *(stop for _, stop in spans[:noisy])]
        for index, span in enumerate(spans[noisy:]):
            before = ends[len(context) + index]
            segments.append(Segment(span, ((0, before), span) if before else (span,)))
        return Segments(tuple(segments))

    def _lengths(self) -> tuple[list[int], list[int], list[int]]:
        """Tokens of each chunk of the context, of the copies, and of the full chunks."""
        large = self.grid[0] * self.grid[1]
        small = large // self.pool**2
        return [n * small for n in self.context], [n * large for n in self.copies], [n * large for n in self.full]


@dataclass(frozen=True)
class Segment:
    """Queries that see the same keys."""

    queries: Span
    keys: tuple[Span, ...]


@dataclass(frozen=True)
class Segments:
    """Attention as one dense call per segment; together their queries are all tokens, in order."""

    segments: tuple[Segment, ...]

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Three times (B, S, H, head_dim) -> (B, S, D)."""
        lengths = [stop - start for start, stop in (each.queries for each in self.segments)]
        parts = [
            attend(part, _taken(key, each.keys), _taken(value, each.keys))
            for part, each in zip(query.split(lengths, dim=1), self.segments, strict=True)
        ]
        return torch.cat(parts, dim=1)


def check_chunks(
    patch_size: tuple[int, ...], compressed: tuple[int, ...], limit: int, partition: tuple[int, ...]
) -> None:
    """Raises ValueError: constructor arguments that a causal network cannot have."""
    if len(compressed) != 3 or compressed[0] != 1 or compressed[1] != compressed[2]:
        raise ValueError(f"compressed_patch_size must be (1, q, q), not {compressed}")
    if compressed[1] < 1 or compressed[1] % patch_size[1]:
        raise ValueError(f"compressed_patch_size must be a multiple of patch_size {patch_size}, but is {compressed}")
    if limit < 1:
        raise ValueError(f"full_chunk_limit must be 1 or more, not {limit}")
    if not partition or min(partition) < 1:
        raise ValueError(f"chunk_partition must name one frame or more for every chunk, but is {partition}")


def _taken(x: Tensor, spans: tuple[Span, ...]) -> Tensor:
    """Tokens of a few spans, a view where it is one."""
    parts = [x[:, start:stop] for start, stop in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _spans(lengths: Sequence[int]) -> list[Span]:
    """Where parts of given lengths lie, one after the other."""
    spans, start = [], 0
    for length in lengths:
        spans.append((start, start + length))
        start += length
    return spans
