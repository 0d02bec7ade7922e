"""The values that every room shares: what a network is conditioned on, and what a flow map is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

Rows = slice | Sequence[int]
"""Some of the samples; numbers, unlike a tensor of them, make nobody wait for the device."""


def take(x: Tensor, rows: Rows) -> Tensor:
    """Some rows of a tensor."""
    return x[rows] if isinstance(rows, slice) else torch.stack([x[row] for row in rows])


@dataclass(frozen=True)
class Prefix:
    """The first frames of the clip, clean; what is generated are the others, all together.

    Attributes:
        frames: (B, P, C, H, W).
    """

    frames: Tensor

    def __getitem__(self, rows: Rows) -> Prefix:
        return Prefix(take(self.frames, rows))


@dataclass(frozen=True)
class TeacherForced:
    """The first chunks of the clip, clean; what is generated are the newest of them, each from those before it.

    Attributes:
        chunks: frames of each.
        context: (B, F_c, C, H, W) of the oldest, which are compressed; F_c may be 0.
        clean: (B, F, C, H, W) of those that are generated.
    """

    chunks: tuple[int, ...]
    context: Tensor
    clean: Tensor

    def __getitem__(self, rows: Rows) -> TeacherForced:
        return replace(self, context=take(self.context, rows), clean=take(self.clean, rows))


@dataclass(frozen=True)
class CachedContext:
    """The chunks before the one that is generated, as a causal network keeps them for all of its calls.

    Attributes:
        chunks: frames of each, the new one included.
        kv_cache: what the network's flow map made of them (`CausalFlowMap.encode_context`); None: there are none.
    """

    chunks: tuple[int, ...]
    kv_cache: object | None


Past = Prefix | TeacherForced | CachedContext


@dataclass(frozen=True)
class Condition:
    """What a sample is conditioned on.

    Attributes:
        text: (B, L, D) text embeddings, zero where padded.
        image: (B, I, D_image) image embeddings, or None for text-to-video.
        past: frames of the same clip that are given; None: all are generated, together.
    """

    text: Tensor
    image: Tensor | None = None
    past: Past | None = None

    def __getitem__(self, rows: Rows) -> Condition:
        """The same condition for some of the samples. Raises ValueError for a network's memory, which has no rows."""
        if isinstance(self.past, CachedContext):
            raise ValueError("what a causal network remembers cannot be taken apart by samples")
        past = None if self.past is None else self.past[rows]
        return Condition(take(self.text, rows), None if self.image is None else take(self.image, rows), past)

    def with_text(self, text: Tensor) -> Condition:
        """The same samples with another text, (B, L, D) or one (1, L, D) for all; the rest stays."""
        return replace(self, text=text.expand(self.text.shape[0], -1, -1))

    def after(self, past: Past | None) -> Condition:
        """The same samples with other given frames."""
        return replace(self, past=past)


class FlowMap(Protocol):
    """The average velocity `u(x_t, t, r, c)` from source time `t` back to target time `r`.

    x: (B, F, C, H, W) float32, those frames that are generated; t, r: (B,) or (B, F) float32 in [0, 1], r <= t.
    Returns (B, F, C, H, W) float32. A teacher, which knows only the instantaneous velocity, is called at `r = t`.
    """

    def __call__(self, x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor: ...


class CausalFlowMap(FlowMap, Protocol):
    """A flow map that also generates a clip chunk by chunk."""

    def encode_context(self, x: Tensor, chunks: tuple[int, ...], condition: Condition) -> object:
        """What the network keeps of the clean frames x (B, F, C, H, W) of these chunks; without gradient."""
        ...
