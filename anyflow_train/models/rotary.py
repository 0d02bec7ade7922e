"""Rotary position embedding of a grid of tokens (RoFormer, arXiv 2104.09864; axes split as in Wan2.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anyflow_train.flow.path import at_least_float32

_THETA = 10000.0
_KEPT_GRIDS = 64  # one for every chunk of a clip, and one for every sequence of them


@dataclass(frozen=True)
class Stretch:
    """Neighbouring frames whose patches have one size.

    Attributes:
        grid: (frames, rows, columns) of its tokens.
        first: position of its first frame in the video.
        pool: positions, in height and in width, that one token covers.
    """

    grid: tuple[int, int, int]
    first: int = 0
    pool: int = 1


class RotaryGrid:
    """Rotation tables of token grids, each computed once per grid and device and then kept.

    Args:
        head_dim: channels of one attention head, even. A sixth of the channel pairs turns with the row, a sixth with
            the column, the others with the frame.
    """

    def __init__(self, head_dim: int) -> None:
        self.head_dim = head_dim
        self._tables: dict[tuple[tuple[Stretch, ...], torch.device], Tensor] = {}

    def __call__(self, grid: tuple[int, int, int], device: torch.device) -> Tensor:
        """(tokens, head_dim / 2, 2) float32 of a grid (frames, rows, columns): see `rotation_table`."""
        return self.stretches((Stretch(grid),), device)

    def stretches(self, stretches: tuple[Stretch, ...], device: torch.device) -> Tensor:
        """(tokens, head_dim / 2, 2) float32 of several grids, one after the other."""
        if torch.compiler.is_compiling():
            # A cache that is filled while tracing would be a guard that fails on the next call. The compiled graph
            # computes the few angles per axis instead, which costs nothing beside the blocks.
            return _joined(self.head_dim, stretches, device)
        key = (stretches, device)
        if key not in self._tables:
            with torch.inference_mode(False):  # or the kept table could not be used in training later
                table = _joined(self.head_dim, stretches, device)
            if type(table) is not Tensor:  # a fake tensor of some analysis: never to be kept
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
    """Cosine and sine per token (frame by frame, row by row) and channel pair.

    Args:
        grid: (frames, rows, columns) of the tokens.
        first, pool: as in `Stretch`. A token that covers several positions turns by the mean of their unit complex
            numbers, scaled back to length one (FAR, 2503.19325).

    Returns (tokens, head_dim / 2, 2) float32; the angles are float64, since they reach hundreds of turns.
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
    """Turn each pair of neighbouring channels by its token's angle.

    x: (B, S, H, head_dim); table: (S, head_dim / 2, 2) float32. Returns the shape and dtype of x,
    computed in float32 at least.
    """
    pairs = at_least_float32(x).unflatten(-1, (-1, 2))
    table = table.unsqueeze(1)
    if torch.compiler.is_compiling():
        cos, sin = table.unbind(-1)
        even, odd = pairs.unbind(-1)
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1)
    else:
        # The same product; in eager mode the complex view does it in one pass instead of seven strided ones.
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(table))
    return turned.flatten(-2).to(x.dtype)
