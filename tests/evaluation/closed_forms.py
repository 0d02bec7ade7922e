"""Energy distances that are known exactly."""

import math


def mean_absolute(mean: float, std: float) -> float:
    """Compute `E|Z|` for Z ~ N(mean, std^2)."""
    bell = std * math.sqrt(2 / math.pi) * math.exp(-(mean**2) / (2 * std**2))
    return bell + mean * math.erf(mean / (std * math.sqrt(2)))


def gaussian_energy(shift: float, std_x: float, std_y: float) -> float:
    """Compute the energy distance of N(shift, std_x^2) and N(0, std_y^2)."""
    within = mean_absolute(0, std_x * math.sqrt(2)) + mean_absolute(0, std_y * math.sqrt(2))
    return 2 * mean_absolute(shift, math.hypot(std_x, std_y)) - within


def mixture_energy(shift: float, spacing: float, classes: int) -> float:
    """Compute the energy distance of a mixture of unit Gaussians at 0, spacing, ... and its copy moved by `shift`."""

    def mean_of_pairs(offset: float) -> float:
        gaps = [spacing * (a - b) + offset for a in range(classes) for b in range(classes)]
        return sum(mean_absolute(gap, math.sqrt(2)) for gap in gaps) / len(gaps)

    return 2 * mean_of_pairs(shift) - 2 * mean_of_pairs(0)
