"""How far the central difference is from a float32 one and from the exact derivative, on given weights and data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from anyflow_train.config.positions import BranchCounts
from anyflow_train.data.batch import Batch
from anyflow_train.flow.derivative import Ends, central_difference, exact_derivative
from anyflow_train.flow.draw import Draw
from anyflow_train.flow.times import draw_interval
from anyflow_train.flow.types import FlowMap
from anyflow_train.objectives.guidance import Noised, noised


@dataclass(frozen=True)
class DerivativeError:
    """One row of the report: relative errors in the norm over all samples' elements.

    Attributes:
        network: which flow map took the difference.
        epsilon: half the span of the difference, in [0, 1] time.
        to_difference: against the float32 difference at the same epsilon: the cost of the network's precision.
        to_exact: against the exact derivative of the float32 network: precision and smoothing together.
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
    """Compare differences at times drawn from the free branch, along the data's velocity.

    Args:
        reference: the network in float32 (the exact derivative runs through it: no gradient checkpointing, no
            compilation).
        networks: name -> the same weights as training would call them, such as `fp32` and `bf16`.
        samples: batches with their random numbers; errors are taken over all of them together.
        epsilons, shift, ends: see `flow.derivative` and `flow.times`.

    Returns:
        One row per network and epsilon, in this order.
    """
    if not samples:
        raise ValueError("the derivative is measured on at least one batch")
    sums = {(name, epsilon): _Sums() for name in networks for epsilon in epsilons}
    for batch, draw in samples:
        free = BranchCounts(diffusion=0, consistency=0, free=max(draw.positions) + 1)
        interval = draw_interval(draw, free, shift, "fp32")
        point = noised(batch, draw, interval.t, interval.r, text_dropout=0.0)
        exact = exact_derivative(reference, point.x, point.t, point.r, point.condition, point.velocity)
        for epsilon in epsilons:
            smooth = _difference(reference, point, epsilon, ends)
            for name, network in networks.items():
                sums[name, epsilon].add(_difference(network, point, epsilon, ends), smooth, exact)
    return [DerivativeError(name, epsilon, *total.errors()) for (name, epsilon), total in sums.items()]


def derivative_table(rows: Sequence[DerivativeError]) -> str:
    """The report as aligned text."""
    lines = [f"{'network':<10}{'epsilon':>10}{'to fp32 difference':>20}{'to exact':>12}"]
    lines += [f"{row.network:<10}{row.epsilon:>10g}{row.to_difference:>20.2%}{row.to_exact:>12.2%}" for row in rows]
    return "\n".join(lines)


@dataclass
class _Sums:
    """Sums of squares over batches: two errors and the sizes they are relative to."""

    to_smooth: float = 0.0
    smooth: float = 0.0
    to_exact: float = 0.0
    exact: float = 0.0

    def add(self, difference: Tensor, smooth: Tensor, exact: Tensor) -> None:
        self.to_smooth += _square(difference - smooth)
        self.smooth += _square(smooth)
        self.to_exact += _square(difference - exact)
        self.exact += _square(exact)

    def errors(self) -> tuple[float, float]:
        tiny = 1e-30  # an all-zero derivative has no relative error, and must not end the report
        return (self.to_smooth / max(self.smooth, tiny)) ** 0.5, (self.to_exact / max(self.exact, tiny)) ** 0.5


def _difference(flow_map: FlowMap, point: Noised, epsilon: float, ends: Ends) -> Tensor:
    return central_difference(flow_map, point.x, point.t, point.r, point.condition, point.velocity, epsilon, ends)


def _square(x: Tensor) -> float:
    return x.double().square().sum().item()
