"""Types that all packages use: the condition of a sample, and the interface of a flow map."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol, cast

import torch
from torch import Tensor

Rows = slice | Sequence[int]
"""Indices of samples. They are Python numbers, because indexing with a tensor would wait for the device."""


def take(x: Tensor, rows: Rows) -> Tensor:
    """Select rows of a tensor; x: (B, ...)."""
    return x[rows] if isinstance(rows, slice) else torch.stack([x[row] for row in rows])


def put(x: Tensor, rows: Sequence[int], values: Tensor) -> Tensor:
    """Copy x (B, ...) with some rows replaced by values (R, ...)."""
    kept = list(x)
    for row, value in zip(rows, values, strict=True):
        kept[row] = value
    return torch.stack(kept)


@dataclass(frozen=True)
class Prefix:
    """Conditioning frames at the start of the clip. The other frames are generated together.

    Attributes:
        frames: (B, P, C, H, W) clean latents.
    """

    frames: Tensor

    def __getitem__(self, rows: Rows) -> Prefix:
        return Prefix(take(self.frames, rows))


@dataclass(frozen=True)
class TeacherForced:
    """Clean chunks for teacher forcing. The newest chunks are generated, each given the clean chunks before it.

    Attributes:
        chunks: latent frames of each chunk; their sum is F_c + F.
        context: (B, F_c, C, H, W) clean latents of the oldest chunks, which are compressed; F_c may be 0.
        clean: (B, F, C, H, W) clean latents of the chunks that are generated.
    """

    chunks: tuple[int, ...]
    context: Tensor
    clean: Tensor

    def __getitem__(self, rows: Rows) -> TeacherForced:
        return replace(self, context=take(self.context, rows), clean=take(self.clean, rows))


@dataclass(frozen=True)
class CachedContext:
    """Cached context of the chunk that is generated. It serves all network calls for this chunk.

    Attributes:
        chunks: latent frames of each chunk, including the new one.
        kv_cache: result of `CausalFlowMap.encode_context` for the chunks before; None for the first chunk.
    """

    chunks: tuple[int, ...]
    kv_cache: object | None


Past = Prefix | TeacherForced | CachedContext


@dataclass(frozen=True)
class Condition:
    """The condition of B samples: `Condition(text)`, or with conditioning frames `Condition(text, Prefix(frames))`.

    Attributes:
        text: (B, L, D) text embeddings, zero where padded.
        past: conditioning frames or chunks of the same clip; None generates all frames together.
    """

    text: Tensor
    past: Past | None = None

    def __getitem__(self, rows: Rows) -> Condition:
        """Select samples. Raises ValueError for a cached context, which cannot be split by sample."""
        if isinstance(self.past, CachedContext):
            raise ValueError("a cached context cannot be split by sample")
        past = None if self.past is None else self.past[rows]
        return Condition(take(self.text, rows), past)

    def with_text(self, text: Tensor) -> Condition:
        """Copy of this condition with another text: (B, L, D), or (1, L, D) for all samples."""
        return replace(self, text=text.expand(self.text.shape[0], -1, -1))

    def after(self, past: Past | None) -> Condition:
        """Copy of this condition with another past."""
        return replace(self, past=past)


class FlowMap(Protocol):
    """Interface of an average velocity `u(x_t, t, r, c)` from source time `t` back to target time `r`.

    Any function with this signature is a flow map. A teacher gives the velocity at `r = t`, and is only called there.

    x: (B, F, C, H, W) float32, the frames that are generated. t, r: (B,) or (B, F) float32 in [0, 1], r <= t.
    Returns (B, F, C, H, W) float32.
    """

    def __call__(self, x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor: ...


class CausalFlowMap(FlowMap, Protocol):
    """Interface of a flow map that can also generate a clip chunk by chunk."""

    def encode_context(self, x: Tensor, chunks: tuple[int, ...], condition: Condition) -> object:
        """Encode clean frames x (B, F, C, H, W) of these chunks as cached context, without gradient."""
        ...


@dataclass(frozen=True)
class FlowMapWithin:
    """A flow map whose calls run in a context, such as one that gives the network other weights.

    Attributes:
        flow_map: the flow map.
        enter: makes the context of a call.
    """

    flow_map: FlowMap
    enter: Callable[[], AbstractContextManager[object]]

    def __call__(self, x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        with self.enter():
            return self.flow_map(x, t, r, condition)

    def encode_context(self, x: Tensor, chunks: tuple[int, ...], condition: Condition) -> object:
        with self.enter():
            return cast(CausalFlowMap, self.flow_map).encode_context(x, chunks, condition)
