"""Bootstrap intervals that take pairs, strata and common noise into account.

A replicate is a row of weights over the samples, so a statistic of R resamples is a few matrix products. Row 0 is the
original sample: the same code computes value and replicates.

Two sources of bias are removed. A resample contains copies of the same sample; their distance of 0 would lower an
energy distance by `E|X - X'| / n`, so pairs of copies are left out of the sums and of the number of pairs. From a
stratum with n samples, n - 1 are drawn (Rao and Wu 1988). With n, the variance would be (n - 1) / n of the true one,
which matters for strata of a few samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anyflow_train.evaluation.metrics import (
    directions,
    pairwise_distances,
    project,
    self_distances,
)

LEVELS = 512
"""Equal probabilities at whose middles quantile functions are compared."""


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """Format as `0.512 [0.431, 0.604]`."""
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def as_distance(self) -> str:
        """Format a distance. Unbiased estimates of a small distance can be negative; they are shown `at the floor`."""
        if self.value <= 0:
            return f"at the floor (< {self.high:.3f})"
        return str(Estimate(self.value, max(self.low, 0.0), self.high))


@dataclass(frozen=True)
class Resampling:
    """Bootstrap weights of one set of samples. Statistics with the same resampling are paired.

    Attributes:
        strata: (n,) int64, class of each sample, 0..K-1; the distribution is the equal mixture of the classes.
        counts: (R + 1, n) float64, how often each sample is drawn; row 0 is all ones.
        weights: (R + 1, n) float64, with sum 1 over all samples and sum 1 / K over each stratum.
    """

    strata: Tensor
    counts: Tensor
    weights: Tensor


def resample(strata: Tensor, replicates: int, seed: int, draws: Tensor | None = None) -> Resampling:
    """Draw the weights within each stratum. For independent samples, pass one stratum (`single_stratum`).

    Args:
        strata: (n,) int64, class of each sample, 0..K-1.
        replicates: number of resamples R.
        seed: seed of the draws.
        draws: (K,) int64, how many samples are drawn from each stratum; None is one fewer than it has.

    Raises:
        ValueError: a stratum has fewer than two samples.
    """
    sizes = torch.bincount(strata)
    if int(sizes.min()) < 2:
        raise ValueError("every stratum needs at least two samples")
    draws = sizes - 1 if draws is None else draws
    generator = torch.Generator().manual_seed(seed)
    counts = torch.ones(replicates + 1, len(strata), dtype=torch.float64)
    for k, size in enumerate(sizes.tolist()):
        drawn = torch.randint(size, (replicates, int(draws[k])), generator=generator)
        drawn_counts = torch.zeros(replicates, size, dtype=torch.float64)
        drawn_counts.scatter_add_(1, drawn, torch.ones(drawn.shape, dtype=torch.float64))
        counts[1:, strata == k] = drawn_counts
    totals = sizes[strata].double().expand(replicates + 1, -1).clone()
    totals[1:] = draws[strata].double()
    return Resampling(strata, counts, counts / (len(sizes) * totals))


def single_stratum(samples: int) -> Tensor:
    """Return the strata of independent samples: all zeros."""
    return torch.zeros(samples, dtype=torch.int64)


def mean_of_pairs(distances: Tensor, left: Resampling, right: Resampling) -> Tensor:
    """Compute `E|X - X'|` of the class mixture for each replicate: (n, n) -> (R + 1,) float64.

    Args:
        distances: distances within one set, zero on the diagonal.
        left, right: resamplings of that set for X and for X', with equal strata. Pairs of copies are left out.
    """
    total = _quadratic(left.weights, distances, right.weights)
    for k in range(int(left.strata.max()) + 1):
        rows = (left.strata == k).nonzero()[:, 0]
        within = _quadratic(left.weights[:, rows], distances[rows][:, rows], right.weights[:, rows])
        ordered = left.counts[:, rows].sum(1) * right.counts[:, rows].sum(1)
        distinct = ordered - (left.counts[:, rows] * right.counts[:, rows]).sum(1)
        pairs = within * ordered / distinct
        # A resample of a single sample has no spread. Use the spread of the original samples instead.
        total = total - within + torch.where(distinct > 0, pairs, pairs[0])
    return total


class EnergyReference:
    """Reference samples of the energy distance `2 E|X - Y| - E|X - X'| - E|Y - Y'|` (Szekely and Rizzo 2013).

    The part that depends on the reference alone is computed once.

    Args:
        samples: (m, ...) float32.
        resampling: resampling of these samples.
    """

    def __init__(self, samples: Tensor, resampling: Resampling) -> None:
        self._samples = samples
        self._resampling = resampling
        self._distances = self_distances(samples)
        self._within = mean_of_pairs(self._distances, resampling, resampling)

    def replicates(self, x: Tensor, resampling: Resampling) -> Tensor:
        """Compute energy distances of (n, ...) samples, (R + 1,) float64, with both sides resampled.

        They are unbiased, so they can be negative.
        """
        cross = _quadratic(resampling.weights, pairwise_distances(x, self._samples), self._resampling.weights)
        return 2 * cross - mean_of_pairs(self_distances(x), resampling, resampling) - self._within

    def floor(self, sizes: Tensor, seed: int) -> float:
        """Compute what equal distributions score: 95 % of sets drawn from the reference have a smaller distance to it.

        Both sides are drawn independently from the reference samples.

        Args:
            sizes: (K,) int64, samples of each stratum in such a set.
            seed: seed of the draws.
        """
        own = self._resampling
        drawn = resample(own.strata, len(own.weights) - 1, seed, sizes)
        cross, within = (mean_of_pairs(self._distances, drawn, other) for other in (own, drawn))
        return float(torch.quantile((2 * cross - within - self._within)[1:], 0.95))


class SlicedReference:
    """Reference samples of a squared sliced 2-Wasserstein distance: the mean over projections on fixed directions.

    In one dimension, the distance is the one between quantile functions, so sizes may differ. Quantiles are read at the
    middles of 512 equal probabilities (exact if both sizes divide 512).

    Args:
        samples: (m, ...) float32.
        resampling: resampling of these samples.
        count: number of fixed directions.
        replicates: number of replicates to use; fewer than for the energy distance save time.
    """

    def __init__(self, samples: Tensor, resampling: Resampling, count: int = 64, replicates: int = 200) -> None:
        self._axes = directions(samples.flatten(1).shape[1], count)
        self._replicates = replicates
        self._quantiles = list(self._read(samples, resampling))

    def replicates(self, x: Tensor, resampling: Resampling) -> Tensor:
        """Compute squared distances of (n, ...) samples, (R + 1,) float64; biased upwards (see `reflected`)."""
        gaps = [(a - b).square().mean(1) for a, b in zip(self._read(x, resampling), self._quantiles, strict=True)]
        return torch.stack(gaps).mean(0)

    def _read(self, x: Tensor, resampling: Resampling):
        """Yield the weighted quantiles of each direction: (R + 1, levels) float64."""
        levels = (torch.arange(LEVELS, dtype=torch.float64) + 0.5) / LEVELS
        for values in project(x, self._axes).cpu():
            yield weighted_quantiles(values, resampling.weights[: self._replicates + 1], levels)


def weighted_means(values: Tensor, resampling: Resampling) -> Tensor:
    """Compute means of (n,) values over the class mixture, for each replicate: (R + 1,) float64."""
    return resampling.weights @ values.double()


def weighted_quantiles(values: Tensor, weights: Tensor, levels: Tensor) -> Tensor:
    """Compute quantiles of (n,) values under each row of (R + 1, n) weights, at (K,) float64 levels: (R + 1, K)."""
    ordered, order = values.sort()
    cumulative = weights[:, order].cumsum(1)
    index = torch.searchsorted(cumulative, levels.expand(len(weights), -1).contiguous())
    return ordered[index.clamp_max_(len(ordered) - 1)]


def percentile(replicates: Tensor) -> Estimate:
    """Make value and 95 % percentile interval from replicates of an unbiased statistic, (R + 1,), value first."""
    low, high = _ends(replicates[1:])
    return Estimate(float(replicates[0]), low, high)


def reflected(squares: Tensor) -> Estimate:
    """Take the root of a squared distance, after subtracting the bootstrap's estimate of its upward bias.

    Replicates exceed the value by as much as the value exceeds the truth. So value and interval are reflected (basic
    bootstrap), and negative squares become 0.
    """
    value = 2 * squares[0] - squares[1:].mean()
    low, high = _ends(2 * squares[0] - squares[1:])
    roots = torch.tensor([float(value), low, high]).clamp_min(0).sqrt().tolist()
    return Estimate(roots[0], min(roots[0], roots[1]), max(roots[0], roots[2]))


def ratio(numerator: Tensor, denominator: Tensor) -> Estimate | None:
    """Make the interval of a ratio of replicates, (R + 1,) each; None if the denominator's sign is not certain.

    Both must come from the same resamplings, so that their common noise cancels.
    """
    if percentile(denominator).low <= 0:
        return None
    return percentile(numerator / denominator)


def _quadratic(left: Tensor, matrix: Tensor, right: Tensor) -> Tensor:
    """Compute `l M r` row by row: (R, n), (n, m), (R, m) -> (R,)."""
    return ((left @ matrix.to(left)) * right).sum(1)


def _ends(replicates: Tensor) -> tuple[float, float]:
    low, high = torch.quantile(replicates, torch.tensor([0.025, 0.975], dtype=replicates.dtype))
    return float(low), float(high)
