"""Error of the central difference, against float32 and against the exact derivative, on given weights and data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anyflow_train.config.positions import BranchCounts
from anyflow_train.data.batch import Batch
from anyflow_train.flow.derivative import Ends, central_difference, exact_derivative
from anyflow_train.flow.draw import Draw
from anyflow_train.flow.times import draw_interval
from anyflow_train.flow.types import FlowMap
from anyflow_train.objectives.guidance import Noised, noised

TINY = 1e-30  # avoids a division by zero for an all-zero derivative


@dataclass(frozen=True)
class DerivativeError:
    """One row of the report. Errors are relative, in the norm over all elements of all samples.

    Attributes:
        network: name of the flow map.
        epsilon: half the span of the difference, in [0, 1] time.
        to_difference: error against the float32 difference at the same epsilon. It comes from the network's precision.
        to_exact: error against the exact derivative of the float32 network. It comes from precision and smoothing.
    """

    network: str
    epsilon: float
    to_difference: float
    to_exact: float


def derivative_errors(
    reference: FlowMap,
    networks: Mapping[str, FlowMap],
    samples: Sequence[tuple[Batch, Draw]],
    epsilons: Sequence[float],
    shift: float,
    ends: Ends = "clamped",
) -> list[DerivativeError]:
    """Compare central differences at times of the free branch, along the velocity of the data.

    Args:
        reference: the network in float32, without gradient checkpointing or compilation, which the exact derivative
            does not support.
        networks: name -> the same weights in the precisions of training, such as `fp32` and `bf16`.
        samples: batches with their random numbers. The errors cover all of them together.
        epsilons: half spans of the differences.
        shift: time shift.
        ends: see `flow.derivative.central_difference`.

    Returns:
        One row per network and epsilon, in this order.

    Raises:
        ValueError: no samples.
    """
    if not samples:
        raise ValueError("the derivative error needs at least one batch")
    # Sums of squares over batches: both errors, and the numbers that they are relative to.
    sums = {(name, epsilon): torch.zeros(2, 2, dtype=torch.float64) for name in networks for epsilon in epsilons}
    for batch, draw in samples:
        free = BranchCounts(diffusion=0, consistency=0, free=max(draw.positions) + 1)
        interval = draw_interval(draw, free, shift, "fp32")
        point = noised(batch, draw, interval.t, interval.r, text_dropout=0.0)
        exact = exact_derivative(reference, point.x, point.t, point.r, point.condition, point.velocity)
        for epsilon in epsilons:
            smooth = _difference(reference, point, epsilon, ends)
            for name, network in networks.items():
                found = _difference(network, point, epsilon, ends)
                squares = [[_square(found - smooth), _square(found - exact)], [_square(smooth), _square(exact)]]
                sums[name, epsilon] += torch.tensor(squares, dtype=torch.float64)
    errors = {row: (total[0] / total[1].clamp_min(TINY)).sqrt().tolist() for row, total in sums.items()}
    return [DerivativeError(*row, *both) for row, both in errors.items()]


def derivative_table(rows: Sequence[DerivativeError]) -> str:
    """Format the report as aligned text."""
    lines = [f"{'network':<10}{'epsilon':>10}{'to fp32 difference':>20}{'to exact':>12}"]
    lines += [f"{row.network:<10}{row.epsilon:>10g}{row.to_difference:>20.2%}{row.to_exact:>12.2%}" for row in rows]
    return "\n".join(lines)


def _difference(flow_map: FlowMap, point: Noised, epsilon: float, ends: Ends) -> Tensor:
    return central_difference(flow_map, point.x, point.t, point.r, point.condition, point.velocity, epsilon, ends)


def _square(x: Tensor) -> float:
    return x.double().square().sum().item()
