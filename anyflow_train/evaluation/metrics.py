"""Parts of the distances between sets of samples (`evaluation.intervals`), computed in float64."""

from __future__ import annotations

import torch
from torch import Tensor

FEATURES_PER_CHUNK = 1 << 16


def pairwise_distances(x: Tensor, y: Tensor) -> Tensor:
    """Compute Euclidean distances between all rows: (n, ...) and (m, ...) -> (n, m) float64.

    The Gram form is summed over chunks of features, so that only one chunk at a time is in float64. The mean of `y` is
    subtracted first, to reduce cancellation: the squares then have an error of about 1e-16 of the squared spread, so
    two equal rows are about 1e-8 of the spread apart. For exact zeros on the diagonal use `self_distances`.

    Raises:
        ValueError: the rows have different sizes.
    """
    x, y = _rows(x), _rows(y)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"samples of {x.shape[1]} and of {y.shape[1]} numbers cannot be compared")
    squared = torch.zeros(len(x), len(y), dtype=torch.float64, device=x.device)
    for start in range(0, x.shape[1], FEATURES_PER_CHUNK):
        columns = slice(start, start + FEATURES_PER_CHUNK)
        b = y[:, columns].double()
        center = b.mean(0)
        a, b = x[:, columns].double() - center, b - center
        squared += a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T
    return squared.clamp_min_(0).sqrt_()


def self_distances(x: Tensor) -> Tensor:
    """Compute Euclidean distances within one set: (n, ...) -> (n, n) float64, exactly zero on the diagonal."""
    return pairwise_distances(x, x).fill_diagonal_(0)


def directions(features: int, count: int, seed: int = 0) -> Tensor:
    """Draw fixed random unit vectors, (features, count) float32."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(features, count, generator=generator)
    return normal / normal.norm(dim=0)


def project(x: Tensor, axes: Tensor) -> Tensor:
    """Compute coordinates of (n, ...) samples along (features, count) unit vectors: (count, n) float64.

    The products are in float32: their error of about 1e-6 of the sample's norm is far below the sampling noise.
    """
    return (_rows(x).float() @ axes.to(x.device)).T.double()


def squared_errors(x: Tensor, target: Tensor) -> Tensor:
    """Compute the mean square difference of each sample: two (n, ...) -> (n,) float64."""
    return (_rows(x).double() - _rows(target).double()).square().mean(1)


def _rows(x: Tensor) -> Tensor:
    return x.flatten(1) if x.ndim > 1 else x[:, None]
