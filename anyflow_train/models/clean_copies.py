"""Clean copies of chunks: in training, noisy chunks attend to them instead of to generated chunks (FAR)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anyflow_train.models.backbone import frame_times
from anyflow_train.models.chunk_layout import ChunkLayout


@dataclass(frozen=True)
class CleanCopies:
    """Clean copies of all full chunks except the newest, whose copy no chunk would see.

    Attributes:
        latents: (B, F_copies, C, H, W).
        times: (B or 1, F_copies) in 0..1000, both source and target time.
    """

    latents: Tensor
    times: Tensor

    @classmethod
    def of(cls, latents: Tensor, times: Tensor | None, layout: ChunkLayout, noisy: Tensor) -> CleanCopies:
        """Select the copies that a layout needs.

        Args:
            latents: (B, F_noisy, C, H, W) clean latents of all full chunks.
            times: shape (), (B,) or (B, F_noisy), in 0..1000; None means 0.
            layout: layout with copies.
            noisy: (B, F, C, H, W) context and noisy latents.

        Raises:
            ValueError: `latents` or `times` has a wrong shape.
        """
        batch, _, channels, height, width = noisy.shape
        frames, read = sum(layout.full), sum(layout.copies)
        wanted = (batch, frames, channels, height, width)
        if tuple(latents.shape) != wanted:
            raise ValueError(
                f"clean_hidden_states must be {wanted}, clean latents of the {frames} noisy frames, "
                f"but its shape is {tuple(latents.shape)}"
            )
        times = torch.zeros((), device=noisy.device) if times is None else times
        return cls(latents[:, :read], frame_times(times, batch, frames).expand(-1, frames)[:, :read])

    def among(self, times: Tensor, layout: ChunkLayout) -> Tensor:
        """Insert the times of the copies at their tokens' places: (B or 1, 1 or F) -> (B or 1, F + F_copies)."""
        rows = max(len(times), len(self.times))
        times = times.expand(rows, layout.frames)
        older = sum(layout.context)
        return torch.cat((times[:, :older], self.times.expand(rows, -1), times[:, older:]), dim=1)
