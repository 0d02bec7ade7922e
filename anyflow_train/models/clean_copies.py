"""Clean copies of chunks: in training, noisy chunks attend to them instead of to generated chunks (FAR)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from anyflow_train.models.backbone import frame_times
from anyflow_train.models.chunk_layout import ChunkLayout


def clean_copies(
    latents: Tensor, clean_times: Tensor | None, layout: ChunkLayout, noisy: Tensor, times: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Select the copies that a layout needs: of all full chunks except the newest, whose copy no chunk would see.

    Args:
        latents: (B, F_noisy, C, H, W) clean latents of all full chunks.
        clean_times: shape (), (B,) or (B, F_noisy), in 0..1000, both source and target time; None means 0.
        layout: layout with copies.
        noisy: (B, F, C, H, W) context and noisy latents.
        times: source and target time of `noisy`, each (B or 1, F or 1).

    Returns:
        Copies (B, F_copies, C, H, W), and `times` with those of the copies at their places, (B or 1, F + F_copies).

    Raises:
        ValueError: `latents` or `clean_times` has a wrong shape.
    """
    batch, frames = len(noisy), sum(layout.full)
    read, older = sum(layout.copies), sum(layout.context)
    wanted = (batch, frames, *noisy.shape[2:])
    if tuple(latents.shape) != wanted:
        raise ValueError(
            f"clean_hidden_states must be {wanted}, clean latents of the {frames} noisy frames, "
            f"but its shape is {tuple(latents.shape)}"
        )
    own = torch.zeros((), device=noisy.device) if clean_times is None else clean_times
    own = frame_times(own, batch, frames).expand(-1, frames)[:, :read]
    rows = max(len(own), len(times[0]))
    spread = [time.expand(rows, layout.frames) for time in times]
    joined = [torch.cat((time[:, :older], own.expand(rows, -1), time[:, older:]), dim=1) for time in spread]
    return latents[:, :read], joined
