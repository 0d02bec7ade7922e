"""Validation on a GPU that is almost full: smaller batches and decoding in tiles, so that the run does not end."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

from anyflow_train.models.codec import Codec


def warn(problem: str) -> None:
    """Print a warning that names validation."""
    print(f"warning: validation: {problem}", file=sys.stderr)


def free_cache() -> None:
    """Return the memory of freed tensors to the GPU. An out-of-memory error may be caused by fragmentation only."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def sample_in_parts(solve: Callable[[Tensor, Tensor], Tensor], text: Tensor, noise: Tensor) -> Tensor | None:
    """Sample a batch. If it does not fit into memory, sample its halves.

    Args:
        solve: samples a batch from texts (n, L, D) and noise (n, F, C, H, W).
        text: (n, L, D).
        noise: (n, F, C, H, W).

    Returns:
        Samples (n, F, C, H, W); None if not even one sample fits.
    """
    with suppress(torch.OutOfMemoryError):
        return solve(text, noise)
    free_cache()  # outside of the block, which kept the failed batch alive
    if len(text) == 1:
        return None
    warn(f"{len(text)} samples do not fit into memory, trying half of them; use a smaller evaluation.batch")
    parts = []
    for half in zip(text.chunk(2), noise.chunk(2), strict=True):
        part = sample_in_parts(solve, *half)
        if part is None:
            return None
        parts.append(part)
    return torch.cat(parts)


def decode_in_parts(codec: Codec, latents: Tensor) -> Tensor:
    """Decode latents (B, F, C, h, w) to videos. If they do not fit into memory, decode one by one in tiles.

    Raises:
        OutOfMemoryError: the tiles of one video do not fit either.
    """
    with suppress(torch.OutOfMemoryError):
        return codec.decode_video(latents)
    free_cache()
    warn("decoding does not fit into memory; decoding in tiles, whose borders may be visible")
    with codec.tiled():
        return torch.cat([codec.decode_video(one[None]) for one in latents])
