"""The values that every room shares: what a network is conditioned on, and what a flow map is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """What a sample is conditioned on.

    Attributes:
        text: (B, L, D) text embeddings, zero where padded.
        image: (B, I, D_image) image embeddings, or None for text-to-video.
    """

    text: Tensor
    image: Tensor | None = None

    def __getitem__(self, rows: Tensor | slice) -> Condition:
        """The same condition for some of the samples."""
        return Condition(self.text[rows], None if self.image is None else self.image[rows])

    def with_text(self, text: Tensor) -> Condition:
        """The same samples with another text, (B, L, D) or one (1, L, D) for all; the image stays."""
        return Condition(text.expand(self.text.shape[0], -1, -1), self.image)


class FlowMap(Protocol):
    """The average velocity `u(x_t, t, r, c)` from source time `t` back to target time `r`.

    x: (B, F, C, H, W) float32; t, r: (B,) or (B, F) float32 in [0, 1], r <= t. Returns (B, F, C, H, W) float32.
    A teacher, which knows only the instantaneous velocity, is called at `r = t`.
    """

    def __call__(self, x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor: ...
