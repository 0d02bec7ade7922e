"""Rotary position embedding of a grid of tokens (RoFormer, arXiv 2104.09864; axes split as in Wan2.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anyflow_train.flow.path import at_least_float32

_THETA = 10000.0
_KEPT_GRIDS = 64  # enough for each chunk of a clip and each sequence of chunks


@dataclass(frozen=True)
class Stretch:
    """Consecutive frames with patches of one size.

    Attributes:
        grid: (frames, rows, columns) of tokens.
        first: position of the first frame in the video.
        pool: number of positions that a token covers, in height and in width.
    """

    grid: tuple[int, int, int]
    first: int = 0
    pool: int = 1


class RotaryGrid:
    """Rotation tables of token grids. Each is computed once per grid and device, and cached.

    Args:
        head_dim: channels of an attention head, even. `head_dim // 6` channel pairs encode the row, as many the column,
            and the other pairs the frame.
    """

    def __init__(self, head_dim: int) -> None:
        self.head_dim = head_dim
        self._tables: dict[tuple[tuple[Stretch, ...], torch.device], Tensor] = {}

    def __call__(self, stretches: tuple[Stretch, ...], device: torch.device) -> Tensor:
        """Rotation table (tokens, head_dim / 2, 2) float32 of several grids, one after the other."""
        if torch.compiler.is_compiling():
            # Filling the cache while tracing would add a guard that fails on the next call. The compiled graph computes
            # the few angles per axis instead. Their cost is negligible.
            return _joined(self.head_dim, stretches, device)
        key = (stretches, device)
        if key not in self._tables:
            with torch.inference_mode(False):  # otherwise training could not use the cached table later
                table = _joined(self.head_dim, stretches, device)
            if type(table) is not Tensor:  # a fake tensor of a dry run: do not cache it
                return table
            if len(self._tables) >= _KEPT_GRIDS:
                self._tables.clear()
            self._tables[key] = table
        return self._tables[key]


def _joined(head_dim: int, stretches: tuple[Stretch, ...], device: torch.device) -> Tensor:
    return torch.cat([rotation_table(head_dim, each.grid, device, each.first, each.pool) for each in stretches])


def rotation_table(
    head_dim: int, grid: tuple[int, int, int], device: torch.device, first: int = 0, pool: int = 1
) -> Tensor:
    """Compute cosine and sine per token (frame by frame, row by row) and channel pair.

    Args:
        head_dim: channels of an attention head, even.
        grid: (frames, rows, columns) of the tokens.
        device: device of the table.
        first: see `Stretch`.
        pool: see `Stretch`. A token that covers several positions has the mean of their rotations, as unit complex
            numbers, scaled to length 1 (FAR, arXiv 2503.19325).

    Returns:
        (tokens, head_dim / 2, 2) float32. Angles are computed in float64, because they reach hundreds of turns.
    """
    spatial = head_dim // 6
    pairs = (head_dim // 2 - 2 * spatial, spatial, spatial)
    axes = []
    for axis, (length, count) in enumerate(zip(grid, pairs, strict=True)):
        start, covered = (first, 1) if axis == 0 else (0, pool)
        exponent = torch.arange(count, dtype=torch.float64, device=device) / max(count, 1)
        position = torch.arange(start, start + length * covered, dtype=torch.float64, device=device)
        angles = position[:, None] * _THETA**-exponent
        turn = torch.stack((angles.cos(), angles.sin()), -1)
        if covered > 1:
            turn = turn.unflatten(0, (length, covered)).mean(1)
            turn = turn / torch.linalg.vector_norm(turn, dim=-1, keepdim=True)
        shape = [1, 1, 1, count]
        shape[axis] = length
        axes.append(turn.float().view(*shape, 2).expand(*grid, count, 2))
    return torch.cat(axes, dim=3).flatten(0, 2)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate each pair of adjacent channels by the angle of its token, in float32 or wider.

    x: (B, S, H, head_dim); table: (S, head_dim / 2, 2) float32. Returns the shape and dtype of x.
    """
    pairs = at_least_float32(x).unflatten(-1, (-1, 2))
    table = table.unsqueeze(1)
    if torch.compiler.is_compiling():
        cos, sin = table.unbind(-1)
        even, odd = pairs.unbind(-1)
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1)
    else:
        # In eager mode, the complex product takes one pass instead of seven strided ones.
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(table))
    return turned.flatten(-2).to(x.dtype)
