"""Rotary position embedding of a grid of tokens (RoFormer, arXiv 2104.09864; axes split as in Wan2.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from anyflow_train.models.fused import wide

_THETA = 10000.0
_KEPT_GRIDS = 16


class RotaryGrid:
    """Rotation tables of token grids, each computed once per grid and device and then kept.

    Args:
        head_dim: channels of one attention head, even. A sixth of the channel pairs turns with the row, a sixth with
            the column, the others with the frame.
    """

    def __init__(self, head_dim: int) -> None:
        self.head_dim = head_dim
        self._tables: dict[tuple[tuple[int, int, int], torch.device], Tensor] = {}

    def __call__(self, grid: tuple[int, int, int], device: torch.device) -> Tensor:
        """(tokens, head_dim / 2, 2) float32 of a grid (frames, rows, columns): see `rotation_table`."""
        if torch.compiler.is_compiling():
            # A cache that is filled while tracing would be a guard that fails on the next call. The compiled graph
            # computes the few angles per axis instead, which costs nothing beside the blocks.
            return rotation_table(self.head_dim, grid, device)
        key = (grid, device)
        if key not in self._tables:
            with torch.inference_mode(False):  # or the kept table could not be used in training later
                table = rotation_table(self.head_dim, grid, device)
            if type(table) is not Tensor:  # a fake tensor of some analysis: never to be kept
                return table
            if len(self._tables) >= _KEPT_GRIDS:
                self._tables.clear()
            self._tables[key] = table
        return self._tables[key]


def rotation_table(head_dim: int, grid: tuple[int, int, int], device: torch.device) -> Tensor:
    """Cosine and sine per token (frame by frame, row by row) and channel pair.

    Returns (tokens, head_dim / 2, 2) float32; the angles are float64, since they reach hundreds of turns.
    """
    spatial = head_dim // 6
    pairs = (head_dim // 2 - 2 * spatial, spatial, spatial)
    axes = []
    for axis, (length, count) in enumerate(zip(grid, pairs, strict=True)):
        exponent = torch.arange(count, dtype=torch.float64, device=device) / max(count, 1)
        position = torch.arange(length, dtype=torch.float64, device=device)
        angles = position[:, None] * _THETA**-exponent
        shape = [1, 1, 1, count]
        shape[axis] = length
        axes.append(torch.stack((angles.cos(), angles.sin()), -1).float().view(*shape, 2).expand(*grid, count, 2))
    return torch.cat(axes, dim=3).flatten(0, 2)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn each pair of neighbouring channels by its token's angle.

    x: (B, S, H, head_dim); table: (S, head_dim / 2, 2) float32. Returns the shape and dtype of x,
    computed in float32 at least.
    """
    pairs = wide(x).unflatten(-1, (-1, 2))
    table = table.unsqueeze(1)
    if torch.compiler.is_compiling():
        cos, sin = table.unbind(-1)
        even, odd = pairs.unbind(-1)
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1)
    else:
        # The same product; in eager mode the complex view does it in one pass instead of seven strided ones.
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(table))
    return turned.flatten(-2).to(x.dtype)
